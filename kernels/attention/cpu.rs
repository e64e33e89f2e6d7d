//! Attention on the CPU: one task per sequence and head, query rows in tiles, scores in cache.
//! A tile has scores for the keys that some of its rows may see; what one row may not, is zeroed.

use std::ops::Range;

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::{Attention, Saved, Span};
use crate::{
    common::{
        Dropout, Real,
        host::{Scatter, read, tensor, unwritten},
        real::{softmax, sum_by},
        simd,
    },
    linear::{View, gemm},
};

/// Query rows of one tile: with 512 keys, two tiles of f32 scores take 256 KiB, inside L2.
const TILE: usize = 64;

/// One head of one sequence.
struct Task {
    sample: u32,
    head: usize,
    /// First row in the batch, and number of rows.
    start: usize,
    len: usize,
    /// Where row 0 of this head is in a `[T, h·d]` buffer.
    offset: usize,
    dropout: Option<Dropout>,
}

/// All heads of all sequences, longest first, so that the last tasks to start are short ones.
fn tasks(attention: Attention<'_>, d: usize) -> Vec<Task> {
    let Attention { ragged, heads, .. } = attention;
    let mut tasks: Vec<Task> = (0..ragged.sequences())
        .flat_map(|i| {
            let range = ragged.range(i);
            (0..heads).map(move |head| Task {
                sample: ragged.sample(i),
                head,
                start: range.start,
                len: range.len(),
                offset: range.start * heads * d + head * d,
                dropout: attention.dropout.map(|dropout| dropout.head(head)),
            })
        })
        .collect();
    tasks.sort_by_key(|task| std::cmp::Reverse(task.len));
    tasks
}

/// Query rows `row..row + rows`, and the keys that some of them may see.
struct Tile {
    row: usize,
    rows: usize,
    keys: Range<usize>,
}

impl Tile {
    /// Columns of the tile that query `row + i` sees.
    #[inline(always)]
    fn seen(&self, span: Span, len: usize, i: usize) -> Range<usize> {
        let keys = span.keys(self.row + i, len);
        keys.start - self.keys.start..keys.end - self.keys.start
    }
}

/// The tiles of a sequence. Neither end of their keys ever moves back, and the first is a multiple
/// of what dropout draws at once.
fn tiles(span: Span, len: usize) -> impl Iterator<Item = Tile> {
    (0..len).step_by(TILE).map(move |row| {
        let rows = TILE.min(len - row);
        let start = span.keys(row, len).start / Dropout::COLUMNS * Dropout::COLUMNS;
        Tile { row, rows, keys: start..span.keys(row + rows - 1, len).end }
    })
}

/// The most keys that a tile has.
fn widest(span: Span, len: usize) -> usize {
    tiles(span, len).map(|tile| tile.keys.len()).max().unwrap_or(0)
}

/// Zeroes the columns outside `seen` and returns those inside.
#[inline(always)]
fn mask<T: Real>(row: &mut [T], seen: Range<usize>) -> &mut [T] {
    row[..seen.start].fill(T::ZERO);
    row[seen.end..].fill(T::ZERO);
    &mut row[seen]
}

pub(super) fn forward<T: Real>(
    attention: Attention<'_>,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
) -> Result<(Tensor, Tensor)> {
    let (t, width) = q.dims2()?;
    let (heads, d) = (attention.heads, width / attention.heads);
    let (q, k, v) = (read::<T>(q)?, read::<T>(k)?, read::<T>(v)?);
    let (mut o, mut lse) = (unwritten::<T>(t * width), unwritten::<T>(heads * t));
    let (o_out, lse_out) = (Scatter::new(&mut o), Scatter::new(&mut lse));
    let (span, scale) = (attention.span, T::of(attention.scale));
    tasks(attention, d).into_par_iter().with_max_len(1).for_each(|task| {
        let widest = widest(span, task.len);
        let mut scores = unwritten::<T>(TILE.min(task.len) * widest);
        let mut factors = vec![T::ZERO; if task.dropout.is_some() { widest } else { 0 }];
        // SAFETY: lse rows start..start+len of this head belong to this task alone.
        let lse = unsafe { lse_out.slice(task.head * t + task.start, task.len) };
        for tile in tiles(span, task.len) {
            let (row, rows, columns) = (tile.row, tile.rows, tile.keys.len());
            let (at, keys_at) = (task.offset + row * width, task.offset + tile.keys.start * width);
            // SAFETY: the q and k views stay inside this sequence's rows of [T, h·d] buffers;
            // `scores` holds rows x columns elements and is this task's own.
            unsafe {
                gemm(
                    (rows, columns, d),
                    View::rows(scores.as_mut_ptr(), columns),
                    false,
                    scale,
                    View::rows(q[at..].as_ptr(), width),
                    View::rows(k[keys_at..].as_ptr(), width).transposed(),
                    1,
                );
            }
            simd(
                #[inline(always)]
                || {
                    for (i, scores) in scores.chunks_exact_mut(columns).take(rows).enumerate() {
                        let seen = tile.seen(span, task.len, i);
                        let scores = mask(scores, seen.clone());
                        lse[row + i] = softmax(scores);
                        if let Some(dropout) = &task.dropout {
                            let factors = &mut factors[..columns];
                            let first = tile.keys.start;
                            dropout.factors_from(task.sample, (row + i) as u32, first, factors);
                            for (p, factor) in scores.iter_mut().zip(&factors[seen]) {
                                *p *= *factor;
                            }
                        }
                    }
                },
            );
            // SAFETY: as above; o's rows of this head and sequence belong to this task alone.
            unsafe {
                gemm(
                    (rows, d, columns),
                    View::rows(o_out.pointer(at), width),
                    false,
                    T::ONE,
                    View::rows(scores.as_ptr(), columns),
                    View::rows(v[keys_at..].as_ptr(), width),
                    1,
                );
            }
        }
    });
    Ok((tensor(o, (t, width))?, tensor(lse, (heads, t))?))
}

pub(super) fn backward<T: Real>(
    attention: Attention<'_>,
    saved: &Saved,
    d_o: &Tensor,
) -> Result<(Tensor, Tensor, Tensor)> {
    let (t, width) = d_o.dims2()?;
    let d = width / attention.heads;
    let (q, k, v) = (read::<T>(&saved.q)?, read::<T>(&saved.k)?, read::<T>(&saved.v)?);
    let (o, lse, d_o) = (read::<T>(&saved.o)?, read::<T>(&saved.lse)?, read::<T>(d_o)?);
    let [mut dq, mut dk, mut dv] = std::array::from_fn(|_| unwritten::<T>(t * width));
    let [dq_out, dk_out, dv_out] =
        [Scatter::new(&mut dq), Scatter::new(&mut dk), Scatter::new(&mut dv)];
    let (span, scale) = (attention.span, T::of(attention.scale));
    tasks(attention, d).into_par_iter().with_max_len(1).for_each(|task| {
        let len = task.len;
        let widest = widest(span, len);
        let [mut p, mut ds] = std::array::from_fn(|_| unwritten::<T>(TILE.min(len) * widest));
        let mut factors = vec![T::ONE; widest];
        let lse = &lse[task.head * t + task.start..][..len];
        let head = |x: &[T], row: usize| View::rows(x[task.offset + row * width..].as_ptr(), width);
        let into = |x: &Scatter<'_, T>, row: usize| {
            View::rows(x.pointer(task.offset + row * width), width)
        };
        // Keys below this have a gradient from the tiles before.
        let mut written = 0;
        for tile in tiles(span, len) {
            let (row, rows, keys, columns) = (tile.row, tile.rows, &tile.keys, tile.keys.len());
            // SAFETY: all views of [T, h·d] buffers stay inside this sequence's rows and this
            // head's columns, which no other task writes; p and ds hold rows x columns elements and
            // are this task's own. The same holds for the products after the loop over rows.
            unsafe {
                let scores = View::rows(p.as_mut_ptr(), columns);
                let (q, k) = (head(&q, row), head(&k, keys.start).transposed());
                gemm((rows, columns, d), scores, false, scale, q, k, 1);
                let d_p = View::rows(ds.as_mut_ptr(), columns);
                let (d_o, v) = (head(&d_o, row), head(&v, keys.start).transposed());
                gemm((rows, columns, d), d_p, false, T::ONE, d_o, v, 1);
            }
            simd(
                #[inline(always)]
                || {
                    let pairs = p.chunks_exact_mut(columns).zip(ds.chunks_exact_mut(columns));
                    for (i, (p, ds)) in pairs.take(rows).enumerate() {
                        let at = task.offset + (row + i) * width;
                        let (o, d_o) = (&o[at..][..d], &d_o[at..][..d]);
                        let delta = sum_by(d, |j| o[j] * d_o[j]);
                        let factors = &mut factors[..columns];
                        if let Some(dropout) = &task.dropout {
                            let sample = task.sample;
                            dropout.factors_from(sample, (row + i) as u32, keys.start, factors);
                        }
                        let seen = tile.seen(span, len, i);
                        let (p, ds) = (mask(p, seen.clone()), mask(ds, seen.clone()));
                        let lse = lse[row + i];
                        for ((p, ds), factor) in p.iter_mut().zip(ds).zip(&factors[seen]) {
                            let probability = (*p - lse).exp();
                            *ds = probability * (*ds * *factor - delta);
                            *p = probability * *factor;
                        }
                    }
                },
            );
            // SAFETY: see above.
            unsafe {
                let (ds, k) = (View::rows(ds.as_ptr(), columns), head(&k, keys.start));
                gemm((rows, d, columns), into(&dq_out, row), false, scale, ds, k, 1);
            }
            for (keys, accumulate) in [(keys.start..written, true), (written..keys.end, false)] {
                if keys.is_empty() {
                    continue;
                }
                let column = keys.start - tile.keys.start;
                let (dk, dv) = (into(&dk_out, keys.start), into(&dv_out, keys.start));
                let shape = (keys.len(), d, rows);
                // SAFETY: see above.
                unsafe {
                    let ds = View::rows(ds[column..].as_ptr(), columns).transposed();
                    gemm(shape, dk, accumulate, scale, ds, head(&q, row), 1);
                    let p = View::rows(p[column..].as_ptr(), columns).transposed();
                    gemm(shape, dv, accumulate, T::ONE, p, head(&d_o, row), 1);
                }
            }
            written = tile.keys.end;
        }
    });
    let shape = (t, width);
    Ok((tensor(dq, shape)?, tensor(dk, shape)?, tensor(dv, shape)?))
}
