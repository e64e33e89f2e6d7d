//! Embedding on the CPU: gather by rows; gradients by sorting tokens into segments.

use candle_core::{DType, Result, Tensor};
use rayon::prelude::*;

use super::{Lookup, NOTHING, SparseRows, Table, segments::Segments, sparse::Sources};
use crate::{
    common::{
        ROWS_PER_TASK, Real,
        host::{Host, read, tensor, unwritten, write},
        simd,
    },
    linear::add,
    quantized::int8,
};

/// Tokens of one segment summed by one task; longer segments (token type 0) are cut.
const SEGMENT: usize = 256;

/// A table's rows, borrowed.
enum Rows<'a, T> {
    Dense(Host<'a, T>),
    Int8(int8::Borrowed<'a>),
}

impl<'a, T: Real> Rows<'a, T> {
    fn of(table: Table<'a>) -> Result<Self> {
        match table {
            Table::Dense(table) => read(table).map(Self::Dense),
            Table::Int8(table) => table.borrow().map(Self::Int8),
        }
    }

    /// Writes row `id` to `to`, or adds it.
    #[inline(always)]
    fn put(&self, id: usize, to: &mut [T], add_it: bool) {
        let h = to.len();
        match self {
            Self::Dense(table) if add_it => add(to, &table[id * h..][..h]),
            Self::Dense(table) => to.copy_from_slice(&table[id * h..][..h]),
            Self::Int8(table) if add_it => table.values(id, 0..h, to, |to, value: T| *to += value),
            Self::Int8(table) => table.values(id, 0..h, to, |to, value| *to = value),
        }
    }
}

pub(super) fn forward<T: Real>(lookups: &[Lookup<'_>], _: DType) -> Result<Tensor> {
    let (t, h) = (lookups[0].ids.len(), lookups[0].table.dims()?.1);
    let tables = lookups.iter().map(|l| Rows::<T>::of(l.table)).collect::<Result<Vec<_>>>()?;
    let mut y = unwritten::<T>(t * h);
    y.par_chunks_mut(ROWS_PER_TASK * h).enumerate().for_each(|(task, rows)| {
        simd(
            #[inline(always)]
            || {
                for (i, row) in rows.chunks_exact_mut(h).enumerate() {
                    let token = task * ROWS_PER_TASK + i;
                    let mut written = false;
                    for (table, lookup) in tables.iter().zip(lookups) {
                        let id = lookup.ids[token];
                        if id != NOTHING {
                            table.put(id as usize, row, written);
                            written = true;
                        }
                    }
                    if !written {
                        row.fill(T::ZERO);
                    }
                }
            },
        );
    });
    tensor(y, (t, h))
}

/// Sum of each piece's rows of `dy`, `[pieces, h]`.
fn piece_sums<T: Real>(dy: &[T], h: usize, Segments { tokens, pieces }: &Segments) -> Vec<T> {
    let mut sums = vec![T::ZERO; pieces.len() * h];
    sums.par_chunks_mut(h).zip(pieces).with_min_len(ROWS_PER_TASK).for_each(|(sum, (_, range))| {
        simd(
            #[inline(always)]
            || {
                for token in &tokens[range.clone()] {
                    add(sum, &dy[*token as usize * h..][..h]);
                }
            },
        );
    });
    sums
}

pub(super) fn backward_dense<T: Real>(
    dy: &Tensor,
    ids: &[u32],
    padding: Option<u32>,
    gradient: &Tensor,
) -> Result<()> {
    let h = dy.dim(1)?;
    let dy = read::<T>(dy)?;
    let segments = Segments::new(ids, padding, SEGMENT);
    let sums = piece_sums(&dy, h, &segments);
    write::<T, _>(gradient, |gradient| {
        simd(
            #[inline(always)]
            || {
                for ((id, _), sum) in segments.pieces.iter().zip(sums.chunks_exact(h)) {
                    add(&mut gradient[*id as usize * h..][..h], sum);
                }
            },
        );
        Ok(())
    })
}

pub(super) fn backward_sparse<T: Real>(
    dy: &Tensor,
    ids: &[u32],
    padding: Option<u32>,
) -> Result<SparseRows> {
    let width = dy.dim(1)?;
    let dy = read::<T>(dy)?;
    let segments = Segments::new(ids, padding, SEGMENT);
    let (ids, sums) = (segments.ids(), piece_sums(&dy, width, &segments));
    if ids.len() == segments.pieces.len() {
        let values = tensor(sums, ids.len() * width)?;
        return Ok(SparseRows { ids, values, width });
    }
    let mut values = vec![T::ZERO; ids.len() * width];
    let mut at = 0;
    for ((id, _), sum) in segments.pieces.iter().zip(sums.chunks_exact(width)) {
        if ids[at] != *id {
            at += 1;
        }
        add(&mut values[at * width..][..width], sum);
    }
    let values = tensor(values, ids.len() * width)?;
    Ok(SparseRows { ids, values, width })
}

pub(super) fn join<T: Real>(
    [a, b]: [&Tensor; 2],
    from: &[Sources],
    width: usize,
) -> Result<Tensor> {
    let (a, b) = (read::<T>(a)?, read::<T>(b)?);
    let mut out = vec![T::ZERO; from.len() * width];
    let rows = out.par_chunks_mut(ROWS_PER_TASK * width).zip(from.par_chunks(ROWS_PER_TASK));
    rows.for_each(|(rows, from)| {
        simd(
            #[inline(always)]
            || {
                for (row, [a_row, b_row]) in rows.chunks_exact_mut(width).zip(from) {
                    if let Ok(at) = usize::try_from(*a_row) {
                        row.copy_from_slice(&a[at * width..][..width]);
                    }
                    if let Ok(at) = usize::try_from(*b_row) {
                        add(row, &b[at * width..][..width]);
                    }
                }
            },
        );
    });
    tensor(out, from.len() * width)
}
