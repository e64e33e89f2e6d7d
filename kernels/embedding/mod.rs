//! Embedding: a sum of table rows per token, and its gradient by segments.
//!
//! ```text
//! tables [V_k, H]   ids_k [T]    y_t = Σ_k table_k[ids_k[t]]
//! dtable_k[r] = Σ_{t: ids_k[t] = r} dy_t
//! ```
//!
//! The id [`NOTHING`] takes no row: it adds zero. So rows of a batch may come from one table or another. A table
//! may be [`Int8`], a scale for each row; it is frozen, and what it adds is dequantised row by row.
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

use candle_core::{DType, Device, Result, Tensor, bail};

use crate::{
    common::{Mirror, Stored, expect_shape, run},
    quantized::Int8,
};

/// The id of a token that takes no row of a table.
pub const NOTHING: u32 = u32::MAX;

/// Rows `[V, H]` to take.
#[derive(Clone, Copy, Debug)]
pub enum Table<'a> {
    /// As they are.
    Dense(&'a Tensor),
    /// In 8 bits; frozen.
    Int8(&'a Int8),
}

/// A table and the row that each token takes from it.
#[derive(Clone, Copy)]
pub struct Lookup<'a> {
    /// `[V, H]`.
    pub table: Table<'a>,
    /// `T` row numbers, or [`NOTHING`].
    pub ids: &'a Mirror<u32>,
}

impl<'a> Lookup<'a> {
    /// Of the rows of `table` that `ids` name.
    pub fn new(table: impl Into<Table<'a>>, ids: &'a Mirror<u32>) -> Self {
        Self { table: table.into(), ids }
    }
}

impl<'a> From<&'a Tensor> for Table<'a> {
    fn from(table: &'a Tensor) -> Self {
        Self::Dense(table)
    }
}

impl<'a> From<&'a Int8> for Table<'a> {
    fn from(table: &'a Int8) -> Self {
        Self::Int8(table)
    }
}

impl<'a> Table<'a> {
    /// `(V, H)`.
    fn dims(self) -> Result<(usize, usize)> {
        match self {
            Self::Dense(table) => table.dims2(),
            Self::Int8(table) => Ok(table.dims()),
        }
    }

    fn device(self) -> &'a Device {
        match self {
            Self::Dense(table) => table.device(),
            Self::Int8(table) => table.device(),
        }
    }
}

/// Sum of the rows named by each lookup, `[T, H]`; of at most four on a device. Stored as the dense tables are,
/// or, without any, as the device's activations: f32 on the CPU, bf16 else.
///
/// # Errors
/// If a row number is outside its table, widths or lengths differ, or on a device without an
/// implementation.
pub fn forward(lookups: &[Lookup<'_>]) -> Result<Tensor> {
    let Some(first) = lookups.first() else { bail!("embedding: no table") };
    let (first_rows, width) = first.table.dims()?;
    for lookup in lookups {
        let (rows, columns) = lookup.table.dims()?;
        if columns != width || lookup.ids.len() != first.ids.len() {
            bail!(
                "embedding: {} ids into {:?} beside {} ids into {:?}",
                lookup.ids.len(),
                [rows, columns],
                first.ids.len(),
                [first_rows, width]
            );
        }
        if let Some(id) = lookup.ids.iter().find(|id| is_outside(**id, rows)) {
            bail!("embedding: id {id} is outside a table of {rows} rows");
        }
    }
    let stored = stored(lookups, first);
    run!("embedding", stored, forward(lookups, stored.dtype))
}

fn is_outside(id: u32, rows: usize) -> bool {
    id as usize >= rows && id != NOTHING
}

fn stored<'a>(lookups: &[Lookup<'a>], first: &Lookup<'a>) -> Stored<'a> {
    let device = first.table.device();
    let alone = if device.is_cpu() { DType::F32 } else { DType::BF16 };
    let dense = lookups.iter().find_map(|lookup| match lookup.table {
        Table::Dense(table) => Some(table.dtype()),
        Table::Int8(_) => None,
    });
    Stored { device, dtype: dense.unwrap_or(alone) }
}

/// Adds the gradient of one lookup to a dense `[V, H]` gradient; the row named `padding` gets none.
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
    if columns != width || ids.iter().any(|id| is_outside(*id, rows)) {
        bail!("embedding: gradient {:?} does not fit dy {:?}", gradient.dims(), dy.dims());
    }
    run!("embedding", dy, backward_dense(dy, ids, padding, gradient))
}

/// The gradient of one lookup as the rows that occur; `padding` is left out, and [`NOTHING`].
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
