//! Pooling: one row per sequence, from its tokens.
//!
//! ```text
//! x, dx [T, H]   y, dy [B, H]     sequence s, whose own n rows are a..a+n
//! first  y_s = x_a                dx_a = dy_s
//! last   y_s = x_(a+n-1)          dx_(a+n-1) = dy_s
//! mean   y_s = Σ_t x_t / n        dx_t = dy_s / n
//! ```
//!
//! `skip` rows at the head of each sequence are not its own (virtual tokens). Nothing is saved, and a row that
//! was not read gets a gradient of zero.

pub(crate) mod check;
mod cpu;
#[cfg(device)]
mod device;
#[cfg(test)]
mod test;

use candle_core::{Result, Tensor, bail};

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

/// `[B, H]` from `x [T, H]`, whose sequences each start with `skip` rows that are not their own.
///
/// # Errors
/// If `x` is not of the batch, a sequence has no row of its own, or on a device without an implementation.
pub fn forward(x: &Tensor, ragged: &Ragged, pool: Pool, skip: usize) -> Result<Tensor> {
    expect_shape("pooling", "x", x, &[ragged.tokens(), x.dims2()?.1])?;
    check_skip(ragged, skip)?;
    run!("pooling", x, forward(x, ragged, pool, skip))
}

/// `dx [T, H]` from `dy [B, H]`.
///
/// # Errors
/// As [`forward`].
pub fn backward(dy: &Tensor, ragged: &Ragged, pool: Pool, skip: usize) -> Result<Tensor> {
    expect_shape("pooling", "dy", dy, &[ragged.sequences(), dy.dims2()?.1])?;
    check_skip(ragged, skip)?;
    run!("pooling", dy, backward(dy, ragged, pool, skip))
}

fn check_skip(ragged: &Ragged, skip: usize) -> Result<()> {
    let length = |i: &usize| ragged.range(*i).len();
    match (0..ragged.sequences()).find(|i| length(i) <= skip) {
        Some(i) => bail!(
            "pooling: sequence {i} has {} rows, none behind the {skip} that are not its own",
            length(&i)
        ),
        None => Ok(()),
    }
}
