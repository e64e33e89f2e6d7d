//! Embedding on the CPU: gather by rows; gradients by sorting tokens into segments.

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::{Lookup, SparseRows};
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

/// Tokens sorted by id, and the pieces (id, range of the sorted tokens) of at most [`SEGMENT`].
fn segments(ids: &[u32], padding: Option<u32>) -> (Vec<u32>, Vec<(u32, std::ops::Range<usize>)>) {
    let mut tokens: Vec<u32> =
        (0..ids.len() as u32).filter(|t| Some(ids[*t as usize]) != padding).collect();
    tokens.sort_by_key(|t| ids[*t as usize]);
    let mut pieces: Vec<(u32, std::ops::Range<usize>)> = Vec::new();
    for (at, token) in tokens.iter().enumerate() {
        let id = ids[*token as usize];
        match pieces.last_mut() {
            Some((last, range)) if *last == id && range.len() < SEGMENT => range.end = at + 1,
            _ => pieces.push((id, at..at + 1)),
        }
    }
    (tokens, pieces)
}

/// Sum of each piece's rows of `dy`, `[pieces, h]`.
fn piece_sums<T: Real>(
    dy: &[T],
    h: usize,
    tokens: &[u32],
    pieces: &[(u32, std::ops::Range<usize>)],
) -> Vec<T> {
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
    let (tokens, pieces) = segments(ids, padding);
    let sums = piece_sums(&dy, h, &tokens, &pieces);
    write::<T, _>(gradient, |gradient| {
        simd(
            #[inline(always)]
            || {
                for ((id, _), sum) in pieces.iter().zip(sums.chunks_exact(h)) {
                    add(&mut gradient[*id as usize * h..][..h], sum);
                }
            },
        );
        Ok(())
    })
}

pub(super) fn backward_sparse(
    dy: &Tensor,
    ids: &[u32],
    padding: Option<u32>,
) -> Result<SparseRows> {
    let h = dy.dim(1)?;
    let dy = read::<f32>(dy)?;
    let (tokens, pieces) = segments(ids, padding);
    let sums = piece_sums(&dy, h, &tokens, &pieces);
    let mut unique: Vec<u32> = pieces.iter().map(|(id, _)| *id).collect();
    unique.dedup();
    if unique.len() == pieces.len() {
        return Ok(SparseRows { ids: unique, values: sums, width: h });
    }
    let mut values = vec![0.0; unique.len() * h];
    let mut at = 0;
    for ((id, _), sum) in pieces.iter().zip(sums.chunks_exact(h)) {
        if unique[at] != *id {
            at += 1;
        }
        add(&mut values[at * h..][..h], sum);
    }
    Ok(SparseRows { ids: unique, values, width: h })
}
