//! What every room shares: tensor access, the element trait, SIMD dispatch, counted randomness and
//! the shape of a ragged batch.

pub mod check;
#[cfg(device)]
pub mod device;
#[cfg(feature = "fatbin")]
pub mod fatbin;
pub mod host;
#[cfg(feature = "host-kernels")]
pub(crate) mod host_run;
pub mod later;
pub mod mirror;
pub mod parked;
pub mod philox;
pub mod ragged;
pub mod real;
pub(crate) mod strip;
pub mod threads;

pub use later::Later;
pub use mirror::Mirror;
pub use parked::Parked;
pub use philox::{Dropout, DropoutKey};
pub use ragged::{Ragged, RowIds};
pub use real::Real;

/// Rows that one parallel task works on. Fixed, so that partial sums are cut in the same places
/// whatever the number of threads: results are then bitwise equal on any of them.
pub(crate) const ROWS_PER_TASK: usize = 32;

/// Runs `body` compiled for the widest vector unit of this machine (AVX-512, AVX2 + FMA, NEON, or
/// plain). `body` and everything it calls must be `#[inline(always)]` to be compiled that way too:
/// without it an op ran eight times slower, `mul_add` being a call into libm.
#[inline(always)]
pub(crate) fn simd<R>(body: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(body)
}

/// Runs an op of a room on the device and in the dtype of `$tensor` (a [`Stored`], where no tensor has
/// both): its kernels, or the CPU implementation in f32 or f64 (the latter is what finite differences
/// run on).
macro_rules! run {
    ($op:literal, $tensor:expr, $function:ident($($argument:expr),* $(,)?)) => {
        match ($tensor.device(), $tensor.dtype()) {
            #[cfg(device)]
            _ if $crate::common::device::takes($tensor.device(), $tensor.dtype()) => device::$function($($argument),*),
            (candle_core::Device::Cpu, candle_core::DType::F32) => cpu::$function::<f32>($($argument),*),
            (candle_core::Device::Cpu, candle_core::DType::F64) => cpu::$function::<f64>($($argument),*),
            (device, dtype) => candle_core::bail!("{}: no implementation for {dtype:?} on {device:?}", $op),
        }
    };
}
pub(crate) use run;

/// Where an op runs and what it stores, for [`run!`].
pub(crate) struct Stored<'a> {
    pub(crate) device: &'a candle_core::Device,
    pub(crate) dtype: candle_core::DType,
}

impl Stored<'_> {
    pub(crate) fn device(&self) -> &candle_core::Device {
        self.device
    }

    pub(crate) fn dtype(&self) -> candle_core::DType {
        self.dtype
    }
}

/// Whether an error is that a device has no memory left: the driver's and cuBLAS's names for it, which are
/// in every error that they cause.
pub fn is_out_of_memory(error: &candle_core::Error) -> bool {
    let text = error.to_string();
    text.contains("OUT_OF_MEMORY") || text.contains("ALLOC_FAILED")
}

/// Fails unless `tensor` has exactly `shape`.
pub(crate) fn expect_shape(
    op: &str,
    what: &str,
    tensor: &candle_core::Tensor,
    shape: &[usize],
) -> candle_core::Result<()> {
    if tensor.dims() != shape {
        candle_core::bail!("{op}: {what} has shape {:?}, expected {shape:?}", tensor.dims());
    }
    Ok(())
}
