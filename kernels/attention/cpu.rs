//! Attention on the CPU: one task per sequence and head, query rows in tiles, scores in cache.

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::{Attention, Saved};
use crate::{
    common::{
        Dropout, Real,
        host::{Scatter, read, tensor, unwritten},
        real::{largest, sum_by},
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

/// The tiles of a task: first query row and number of rows.
fn tiles(len: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..len).step_by(TILE).map(move |row| (row, TILE.min(len - row)))
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
    let scale = T::of(attention.scale);
    tasks(attention, d).into_par_iter().with_max_len(1).for_each(|task| {
        let mut scores = unwritten::<T>(TILE.min(task.len) * task.len);
        let mut factors = vec![T::ZERO; if task.dropout.is_some() { task.len } else { 0 }];
        // SAFETY: lse rows start..start+len of this head belong to this task alone.
        let lse = unsafe { lse_out.slice(task.head * t + task.start, task.len) };
        for (row, rows) in tiles(task.len) {
            let at = task.offset + row * width;
            // SAFETY: the q and k views stay inside this sequence's rows of [T, h·d] buffers;
            // `scores` holds rows x len elements and is this task's own.
            unsafe {
                gemm(
                    (rows, task.len, d),
                    View::rows(scores.as_mut_ptr(), task.len),
                    false,
                    scale,
                    View::rows(q[at..].as_ptr(), width),
                    View::rows(k[task.offset..].as_ptr(), width).transposed(),
                    1,
                );
            }
            simd(
                #[inline(always)]
                || {
                    for (i, scores) in scores.chunks_exact_mut(task.len).take(rows).enumerate() {
                        lse[row + i] = softmax(scores);
                        if let Some(dropout) = &task.dropout {
                            dropout.factors(task.sample, (row + i) as u32, &mut factors);
                            for (p, factor) in scores.iter_mut().zip(&factors) {
                                *p *= *factor;
                            }
                        }
                    }
                },
            );
            // SAFETY: as above; o's rows of this head and sequence belong to this task alone.
            unsafe {
                gemm(
                    (rows, d, task.len),
                    View::rows(o_out.pointer(at), width),
                    false,
                    T::ONE,
                    View::rows(scores.as_ptr(), task.len),
                    View::rows(v[task.offset..].as_ptr(), width),
                    1,
                );
            }
        }
    });
    Ok((tensor(o, (t, width))?, tensor(lse, (heads, t))?))
}

/// Softmax of one row in place; returns its log-sum-exp.
#[inline(always)]
fn softmax<T: Real>(scores: &mut [T]) -> T {
    let max = largest(scores, scores[0]);
    for score in scores.iter_mut() {
        *score = (*score - max).exp();
    }
    let sum = sum_by(scores.len(), |j| scores[j]);
    let inverse = T::ONE / sum;
    for score in scores.iter_mut() {
        *score *= inverse;
    }
    max + T::of(sum.wide().ln())
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
    let scale = T::of(attention.scale);
    tasks(attention, d).into_par_iter().with_max_len(1).for_each(|task| {
        let len = task.len;
        let [mut p, mut ds] = std::array::from_fn(|_| unwritten::<T>(TILE.min(len) * len));
        let mut factors = vec![T::ONE; len];
        let lse = &lse[task.head * t + task.start..][..len];
        let head = |x: &[T], row: usize| View::rows(x[task.offset + row * width..].as_ptr(), width);
        let into = |x: &Scatter<'_, T>, row: usize| {
            View::rows(x.pointer(task.offset + row * width), width)
        };
        for (row, rows) in tiles(len) {
            // SAFETY: all views of [T, h·d] buffers stay inside this sequence's rows and this
            // head's columns, which no other task writes; p and ds hold rows x len elements and are
            // this task's own. The same holds for the three products after the loop over rows.
            unsafe {
                let scores = View::rows(p.as_mut_ptr(), len);
                gemm(
                    (rows, len, d),
                    scores,
                    false,
                    scale,
                    head(&q, row),
                    head(&k, 0).transposed(),
                    1,
                );
                let d_p = View::rows(ds.as_mut_ptr(), len);
                gemm(
                    (rows, len, d),
                    d_p,
                    false,
                    T::ONE,
                    head(&d_o, row),
                    head(&v, 0).transposed(),
                    1,
                );
            }
            simd(
                #[inline(always)]
                || {
                    let tile = p.chunks_exact_mut(len).zip(ds.chunks_exact_mut(len));
                    for (i, (p, ds)) in tile.take(rows).enumerate() {
                        let at = task.offset + (row + i) * width;
                        let (o, d_o) = (&o[at..][..d], &d_o[at..][..d]);
                        let delta = sum_by(d, |j| o[j] * d_o[j]);
                        if let Some(dropout) = &task.dropout {
                            dropout.factors(task.sample, (row + i) as u32, &mut factors);
                        }
                        let lse = lse[row + i];
                        for ((p, ds), factor) in p.iter_mut().zip(ds).zip(&factors) {
                            let probability = (*p - lse).exp();
                            *ds = probability * (*ds * *factor - delta);
                            *p = probability * *factor;
                        }
                    }
                },
            );
            let first = row == 0;
            // SAFETY: see above.
            unsafe {
                let (p, ds) = (View::rows(p.as_ptr(), len), View::rows(ds.as_ptr(), len));
                gemm((rows, d, len), into(&dq_out, row), false, scale, ds, head(&k, 0), 1);
                gemm(
                    (len, d, rows),
                    into(&dk_out, 0),
                    !first,
                    scale,
                    ds.transposed(),
                    head(&q, row),
                    1,
                );
                gemm(
                    (len, d, rows),
                    into(&dv_out, 0),
                    !first,
                    T::ONE,
                    p.transposed(),
                    head(&d_o, row),
                    1,
                );
            }
        }
    });
    let shape = (t, width);
    Ok((tensor(dq, shape)?, tensor(dk, shape)?, tensor(dv, shape)?))
}
