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

pub(crate) mod check;
mod cpu;
#[cfg(device)]
mod device;
#[cfg(test)]
mod test;

use candle_core::{Result, Tensor};

use crate::common::{Ragged, expect_shape, run};

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
    run!("pooling", x, forward(x, ragged, pool))
}

/// `dx [T, H]` from `dy [B, H]`.
///
/// # Errors
/// As [`forward`].
pub fn backward(dy: &Tensor, ragged: &Ragged, pool: Pool) -> Result<Tensor> {
    expect_shape("pooling", "dy", dy, &[ragged.sequences(), dy.dims2()?.1])?;
    run!("pooling", dy, backward(dy, ragged, pool))
}
