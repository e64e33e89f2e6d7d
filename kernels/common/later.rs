//! Numbers of a device that the host reads later, without waiting for what is queued behind them.

#[cfg(any(feature = "cuda", test))]
use candle_core::Device;
use candle_core::{DType, Result, Tensor};

/// A few numbers on their way to the host.
#[derive(Debug)]
pub struct Later(State);

#[derive(Debug)]
enum State {
    Here(Vec<f64>),
    #[cfg(feature = "cuda")]
    Coming(super::device::cuda::Coming),
}

impl Later {
    /// Starts copying the numbers of a small tensor. What is done to it afterwards does not matter.
    ///
    /// # Errors
    /// If the device fails.
    pub fn of(numbers: &Tensor) -> Result<Self> {
        let numbers = numbers.to_dtype(DType::F64)?.flatten_all()?;
        Ok(Self(match numbers.device() {
            #[cfg(feature = "cuda")]
            Device::Cuda(device) => {
                State::Coming(super::device::cuda::Coming::of(device, &numbers)?)
            }
            _ => State::Here(numbers.to_vec1()?),
        }))
    }

    /// The numbers, once they are there.
    ///
    /// # Errors
    /// What the device failed with until then.
    pub fn wait(self) -> Result<Vec<f64>> {
        match self.0 {
            State::Here(numbers) => Ok(numbers),
            #[cfg(feature = "cuda")]
            State::Coming(coming) => coming.wait(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn later_changes_are_not_seen() -> Result<()> {
        let numbers = Tensor::new(&[1f32, 2.5], &Device::Cpu)?;
        let later = Later::of(&numbers)?;
        numbers.zero_set()?;
        assert_eq!(later.wait()?, [1.0, 2.5]);
        Ok(())
    }
}
