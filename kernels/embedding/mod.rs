//! Embedding: a sum of table rows per token, and its gradient by segments.
//!
//! ```text
//! tables [V_k, H]   ids_k [T]    y_t = Σ_k table_k[ids_k[t]]
//! dtable_k[r] = Σ_{t: ids_k[t] = r} dy_t
//! ```
//!
//! The word table's gradient is [`SparseRows`]: only the rows that a batch names. That is what is
//! exchanged between ranks, never the table. Small tables (positions, token types) accumulate into
//! dense gradient memory.

pub(crate) mod check;
mod cpu;
#[cfg(device)]
mod device;
mod segments;
mod sparse;
#[cfg(test)]
mod test;

pub use sparse::SparseRows;

use candle_core::{Result, Tensor, bail};

use crate::common::{Mirror, expect_shape, run};

/// A table and the row that each token takes from it.
#[derive(Clone, Copy)]
pub struct Lookup<'a> {
    /// `[V, H]`.
    pub table: &'a Tensor,
    /// `T` row numbers.
    pub ids: &'a Mirror<u32>,
}

/// Sum of the rows named by each lookup, `[T, H]`; of at most three on a device.
///
/// # Errors
/// If a row number is outside its table, widths or lengths differ, or on a device without an
/// implementation.
pub fn forward(lookups: &[Lookup<'_>]) -> Result<Tensor> {
    let Some(first) = lookups.first() else { bail!("embedding: no table") };
    let width = first.table.dims2()?.1;
    for lookup in lookups {
        let (rows, columns) = lookup.table.dims2()?;
        if columns != width || lookup.ids.len() != first.ids.len() {
            bail!(
                "embedding: {} ids into {:?} beside {} ids into {:?}",
                lookup.ids.len(),
                lookup.table.dims(),
                first.ids.len(),
                first.table.dims()
            );
        }
        if let Some(id) = lookup.ids.iter().find(|id| **id as usize >= rows) {
            bail!("embedding: id {id} is outside a table of {rows} rows");
        }
    }
    run!("embedding", first.table, forward(lookups))
}

/// Adds the gradient of one lookup to a dense `[V, H]` gradient; rows named `padding` get none.
///
/// # Errors
/// As [`forward`].
pub fn backward_dense(
    dy: &Tensor,
    ids: &[u32],
    padding: Option<u32>,
    gradient: &Tensor,
) -> Result<()> {
    let width = check_ids(dy, ids)?;
    let (rows, columns) = gradient.dims2()?;
    if columns != width || ids.iter().any(|id| *id as usize >= rows) {
        bail!("embedding: gradient {:?} does not fit dy {:?}", gradient.dims(), dy.dims());
    }
    run!("embedding", dy, backward_dense(dy, ids, padding, gradient))
}

/// The gradient of one lookup as the rows that occur; `padding` is left out.
///
/// # Errors
/// As [`forward`].
pub fn backward_sparse(dy: &Tensor, ids: &[u32], padding: Option<u32>) -> Result<SparseRows> {
    check_ids(dy, ids)?;
    run!("embedding", dy, backward_sparse(dy, ids, padding))
}

fn check_ids(dy: &Tensor, ids: &[u32]) -> Result<usize> {
    let (t, width) = dy.dims2()?;
    if t != ids.len() {
        bail!("embedding: dy {:?} for {} ids", dy.dims(), ids.len());
    }
    Ok(width)
}

/// Fails unless there is a row of values for each id.
pub(crate) fn check_rows(rows: &SparseRows) -> Result<()> {
    expect_shape("embedding", "rows", &rows.values, &[rows.ids.len() * rows.width])
}
