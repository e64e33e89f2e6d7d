//! Embedding on the CPU: gather by rows; gradients by sorting tokens into segments.

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::{Lookup, SparseRows, segments::Segments, sparse::Sources};
use crate::{
    common::{
        ROWS_PER_TASK, Real,
        host::{read, tensor, unwritten, write},
        simd,
    },
    linear::add,
};

/// Tokens of one segment summed by one task; longer segments (token type 0) are cut.
const SEGMENT: usize = 256;

pub(super) fn forward<T: Real>(lookups: &[Lookup<'_>]) -> Result<Tensor> {
    let (t, h) = (lookups[0].ids.len(), lookups[0].table.dim(1)?);
    let tables = lookups.iter().map(|l| read::<T>(l.table)).collect::<Result<Vec<_>>>()?;
    let mut y = unwritten::<T>(t * h);
    y.par_chunks_mut(ROWS_PER_TASK * h).enumerate().for_each(|(task, rows)| {
        simd(
            #[inline(always)]
            || {
                for (i, row) in rows.chunks_exact_mut(h).enumerate() {
                    let token = task * ROWS_PER_TASK + i;
                    let source = |k: usize| &tables[k][lookups[k].ids[token] as usize * h..][..h];
                    row.copy_from_slice(source(0));
                    for k in 1..tables.len() {
                        add(row, source(k));
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
