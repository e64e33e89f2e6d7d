//! Dropout on its own: `y = x · keep / (1 - p)`, where [`Dropout`] decides what is kept.
//!
//! It is linear, so backward is the same function applied to the gradient.

pub(crate) mod check;
mod cpu;
#[cfg(device)]
mod device;
#[cfg(test)]
mod test;

use candle_core::{Result, Tensor, bail};

use crate::common::{Dropout, RowIds, run};

/// Drops elements of `x [rows, N]`, or of its gradient; without `dropout` returns `x` itself.
///
/// # Errors
/// If `rows` does not describe `x`, or on a device without an implementation.
pub fn apply(x: &Tensor, dropout: Option<&Dropout>, rows: &RowIds) -> Result<Tensor> {
    let Some(dropout) = dropout else {
        return Ok(x.clone());
    };
    if x.dims2()?.0 != rows.len() {
        bail!("dropout: x {:?} for {} row ids", x.dims(), rows.len());
    }
    run!("dropout", x, apply(x, dropout, rows))
}
