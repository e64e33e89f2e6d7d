//! A tensor of a device parked in the host's memory until it is wanted again.

#[cfg(any(feature = "cuda", test))]
use candle_core::Device;
use candle_core::{Result, Tensor};

/// A tensor on the host; of the host's own tensors, the tensor.
#[derive(Debug)]
pub struct Parked(State);

#[derive(Debug)]
enum State {
    Here(Tensor),
    #[cfg(feature = "cuda")]
    Away(super::device::cuda::Away),
}

impl Parked {
    /// Queues a copy into pinned memory behind what computes the tensor; its own memory is free behind that copy,
    /// once it is dropped.
    ///
    /// # Errors
    /// If the device fails, or the host has no memory to pin.
    pub fn of(tensor: &Tensor) -> Result<Self> {
        Ok(Self(match tensor.device() {
            #[cfg(feature = "cuda")]
            Device::Cuda(device) => State::Away(super::device::cuda::Away::of(device, tensor)?),
            _ => State::Here(tensor.clone()),
        }))
    }

    /// The tensor, on its device again; the copy is queued, and the host does not wait.
    ///
    /// # Errors
    /// If the device fails or its memory runs out.
    pub fn back(self) -> Result<Tensor> {
        match self.0 {
            State::Here(tensor) => Ok(tensor),
            #[cfg(feature = "cuda")]
            State::Away(away) => away.back(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tensor_of_the_host_stays_where_it_is() -> Result<()> {
        let tensor = Tensor::new(&[1f32, 2.5], &Device::Cpu)?;
        assert_eq!(Parked::of(&tensor)?.back()?.to_vec1::<f32>()?, [1.0, 2.5]);
        Ok(())
    }
}
