//! Where a rank computes: on the CPU in f32, or on a CUDA device in bf16 with f32 masters.

use candle_core::{DType, Device, Tensor};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// What the user asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Choice {
    /// A CUDA device where there is one, and else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// A CUDA device; without one, an error.
    Cuda,
}

/// A device, and what matrices and activations are stored as there.
#[derive(Clone, Debug)]
pub struct Placement {
    /// The device of all tensors.
    pub device: Device,
    /// Of matrices and activations; vectors of parameters, gradients and optimizer state are f32.
    pub dtype: DType,
}

impl Placement {
    /// The CPU, in f32.
    pub const CPU: Self = Self { device: Device::Cpu, dtype: DType::F32 };

    /// The device for the rank `local_rank` of its node: CUDA device `local_rank`, and where there are
    /// fewer devices than ranks they share. A binary that could use one says so where it finds none.
    ///
    /// # Errors
    /// `User` if a CUDA device was asked for and there is none, or this binary cannot use any; `Device` if
    /// one is there and fails.
    pub fn open(choice: Choice, local_rank: usize) -> Result<Self> {
        match choice {
            Choice::Cpu => Ok(Self::CPU),
            Choice::Cuda => cuda(local_rank)?.ok_or_else(|| Error::User(NO_CUDA.into())),
            Choice::Auto => {
                let cuda = cuda(local_rank)?;
                if cfg!(feature = "cuda") && cuda.is_none() && local_rank == 0 {
                    eprintln!("no CUDA device here: computing on the CPU");
                }
                Ok(cuda.unwrap_or(Self::CPU))
            }
        }
    }

    /// Whether this is a CUDA device.
    pub fn is_cuda(&self) -> bool {
        self.device.is_cuda()
    }

    /// What it is, for people: `CPU`, or the GPU's name and number.
    pub fn name(&self) -> String {
        match &self.device {
            #[cfg(feature = "cuda")]
            Device::Cuda(device) => allreel_kernels::common::device::cuda::name(device),
            _ => "CPU".into(),
        }
    }

    /// How many kernels and products have been queued so far; 0 on a CPU. What little candle launches itself
    /// is not counted.
    pub fn launches(&self) -> u64 {
        match &self.device {
            #[cfg(feature = "cuda")]
            Device::Cuda(device) => allreel_kernels::common::device::cuda::launches(device),
            _ => 0,
        }
    }

    /// The most bytes of the device that were in use at once; `None` for a CPU.
    pub fn peak_memory(&self) -> Option<u64> {
        match &self.device {
            #[cfg(feature = "cuda")]
            Device::Cuda(device) => {
                allreel_kernels::common::device::cuda::used(device).ok().map(|u| u.1)
            }
            _ => None,
        }
    }
}

/// `tensor` in the host's memory. Of a view candle would bring all that it is a view of: a whole bucket for
/// each of its parameters.
///
/// # Errors
/// If the device fails, or memory runs out.
pub fn to_host(tensor: &Tensor) -> Result<Tensor> {
    match tensor.device() {
        Device::Cpu => Ok(tensor.clone()),
        _ => Ok(tensor.force_contiguous()?.to_device(&Device::Cpu)?),
    }
}

#[cfg(feature = "cuda")]
const NO_CUDA: &str = "--device cuda (or run.device): there is no CUDA device here (no driver, or none visible: see nvidia-smi and \
    CUDA_VISIBLE_DEVICES); use --device cpu";
#[cfg(not(feature = "cuda"))]
const NO_CUDA: &str = "--device cuda (or run.device): this allreel was built without CUDA; build it with \
    --features mpi,nccl, or use --device cpu";

/// The CUDA device of a rank, if there is one.
#[cfg(feature = "cuda")]
fn cuda(local_rank: usize) -> Result<Option<Placement>> {
    use allreel_kernels::common::device::cuda;
    let failed = |error: candle_core::Error| Error::Device(format!("CUDA: {error}"));
    let count = cuda::count().map_err(failed)?;
    if count == 0 {
        return Ok(None);
    }
    let device = cuda::open(local_rank % count).map_err(failed)?;
    Ok(Some(Placement { device, dtype: DType::BF16 }))
}

/// The CUDA device of a rank, if there is one.
#[cfg(not(feature = "cuda"))]
fn cuda(_: usize) -> Result<Option<Placement>> {
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_is_always_there_and_cuda_never_falls_back() -> Result<()> {
        assert_eq!(Placement::open(Choice::Cpu, 3)?.dtype, DType::F32);
        let auto = Placement::open(Choice::Auto, 0)?;
        match Placement::open(Choice::Cuda, 0) {
            Ok(placement) => assert!(placement.is_cuda() && auto.is_cuda()),
            Err(error) => {
                assert_eq!(error.exit_code(), 2);
                assert!(error.to_string().contains("--device cpu"), "{error}");
                assert_eq!(auto.name(), "CPU");
            }
        }
        Ok(())
    }
}
