//! Dropout on its own: `y = x · keep / (1 - p)`, where [`Dropout`] decides what is kept.
//!
//! It is linear, so backward is the same function applied to the gradient.

mod cpu;
#[cfg(test)]
mod test;

use candle_core::{Device, Result, Tensor, bail};

use crate::common::{Dropout, RowIds, by_dtype};

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
    match x.device() {
        Device::Cpu => by_dtype!("dropout", x, (cpu::apply)(x, dropout, rows)),
        other => bail!("dropout: no implementation for {other:?}"),
    }
}
