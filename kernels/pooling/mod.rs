//! Pooling: one row per sequence, from its tokens.
//!
//! ```text
//! x, dx [T, H]   y, dy [B, H]     sequence s of n tokens, rows a..a+n
//! first  y_s = x_a                dx_a = dy_s
//! last   y_s = x_(a+n-1)          dx_(a+n-1) = dy_s
//! mean   y_s = Σ_t x_t / n        dx_t = dy_s / n
//! ```
//!
//! Nothing is saved, and a row that was not read gets a gradient of zero.

mod cpu;
#[cfg(test)]
mod test;

use candle_core::{Device, Result, Tensor, bail};

use crate::common::{Ragged, by_dtype, expect_shape};

/// Which tokens speak for a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pool {
    /// The first one.
    First,
    /// The last one.
    Last,
    /// All, equally.
    Mean,
}

/// `[B, H]` from `x [T, H]`.
///
/// # Errors
/// If `x` is not of the batch, or on a device without an implementation.
pub fn forward(x: &Tensor, ragged: &Ragged, pool: Pool) -> Result<Tensor> {
    expect_shape("pooling", "x", x, &[ragged.tokens(), x.dims2()?.1])?;
    match x.device() {
        Device::Cpu => by_dtype!("pooling", x, (cpu::forward)(x, ragged, pool)),
        other => bail!("pooling: no implementation for {other:?}"),
    }
}

/// `dx [T, H]` from `dy [B, H]`.
///
/// # Errors
/// As [`forward`].
pub fn backward(dy: &Tensor, ragged: &Ragged, pool: Pool) -> Result<Tensor> {
    expect_shape("pooling", "dy", dy, &[ragged.sequences(), dy.dims2()?.1])?;
    match dy.device() {
        Device::Cpu => by_dtype!("pooling", dy, (cpu::backward)(dy, ragged, pool)),
        other => bail!("pooling: no implementation for {other:?}"),
    }
}
