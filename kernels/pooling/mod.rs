//! Pooling: one row per sequence, from its tokens.
//!
//! ```text
//! x, dx [T, H]   y, dy [B, H]     sequence s, whose own n rows are a..a+n
//! first  y_s = x_a                dx_a = dy_s
//! last   y_s = x_(a+n-1)          dx_(a+n-1) = dy_s
//! mean   y_s = Σ_t x_t / n        dx_t = dy_s / n
//! max    y_sj = max_t x_tj        dx_tj = dy_sj, t being the first row that has the maximum of column j
//! ends   the last row's columns 0..H/2, the first row's H/2..H, and back to there
//! ```
//!
//! Ends are where both directions of a bidirectional recurrence have seen all of a sequence. The maximum of a
//! column with a NaN is NaN, of the first row that has one.
//!
//! `skip` rows at the head of each sequence are not its own (virtual tokens). Saved is, of a maximum, which rows
//! have it. A row that was not read gets a gradient of zero.

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
    /// In each column the one with the largest value, of several the first.
    Max,
    /// In the first half of the columns the last one, in the second half the first one.
    Ends,
}

/// What backward needs.
#[derive(Clone, Debug)]
pub struct Saved {
    pool: Pool,
    skip: usize,
    /// u32 `[B, H]`: the row of x that each element is of. Of a maximum only.
    rows: Option<Tensor>,
}

/// `y [B, H]` from `x [T, H]`, whose sequences each start with `skip` rows that are not their own.
///
/// # Errors
/// If `x` is not of the batch, a sequence has no row of its own, its columns have no halves where each half
/// is another row's, or on a device without an implementation.
pub fn forward(x: &Tensor, ragged: &Ragged, pool: Pool, skip: usize) -> Result<(Tensor, Saved)> {
    let columns = x.dims2()?.1;
    expect_shape("pooling", "x", x, &[ragged.tokens(), columns])?;
    check_skip(ragged, skip)?;
    if pool == Pool::Ends && !columns.is_multiple_of(2) {
        bail!("pooling: x {:?} has no two halves of columns", x.dims());
    }
    let (y, rows) = run!("pooling", x, forward(x, ragged, pool, skip))?;
    Ok((y, Saved { pool, skip, rows }))
}

/// `dx [T, H]` from `dy [B, H]`.
///
/// # Errors
/// As [`forward`].
pub fn backward(dy: &Tensor, ragged: &Ragged, saved: &Saved) -> Result<Tensor> {
    expect_shape("pooling", "dy", dy, &[ragged.sequences(), dy.dims2()?.1])?;
    check_skip(ragged, saved.skip)?;
    if let Some(rows) = &saved.rows {
        expect_shape("pooling", "the saved rows", rows, dy.dims())?;
    }
    run!("pooling", dy, backward(dy, ragged, saved))
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
