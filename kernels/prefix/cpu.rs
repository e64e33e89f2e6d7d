//! A prefix on the CPU: one task per head and part of the rows, which are those of any sequence; query rows
//! in tiles, scores in cache.

use std::ops::Range;

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::{Prefix, Saved};
use crate::{
    common::{
        Dropout, Real,
        host::{Host, Scatter, read, tensor, unwritten, write},
        real::{largest, sum_by},
        simd,
    },
    linear::{View, add, gemm},
};

/// Query rows of one tile: with 256 keys, two tiles of f32 scores take 128 KiB, inside L2.
const TILE: usize = 64;
/// Rows of one task, which sums over them what the keys and values get. Fixed, so that sums are cut in the
/// same places on any number of threads.
const PART: usize = 512;

/// A part of the rows at one head.
struct Task {
    head: usize,
    rows: Range<usize>,
    dropout: Option<Dropout>,
}

impl Task {
    /// Its tiles: first row and number of rows.
    fn tiles(&self) -> impl Iterator<Item = (usize, usize)> {
        let end = self.rows.end;
        self.rows.clone().step_by(TILE).map(move |row| (row, TILE.min(end - row)))
    }
}

/// All heads of the first part, then of the next.
fn tasks(prefix: Prefix<'_>) -> Vec<Task> {
    let t = prefix.ragged.tokens();
    let of_part = |first: usize| {
        (0..prefix.heads).map(move |head| Task {
            head,
            rows: first..(first + PART).min(t),
            dropout: prefix.dropout.map(|dropout| dropout.head(head)),
        })
    };
    (0..t).step_by(PART).flat_map(of_part).collect()
}

/// The operands of both directions: `q, o [t, heads·d]`, `keys, values [n, heads·d]`, `lse [heads, t]`.
struct Operands<'a, T> {
    q: Host<'a, T>,
    keys: Host<'a, T>,
    values: Host<'a, T>,
    o: Host<'a, T>,
    lse: Host<'a, T>,
    t: usize,
    n: usize,
    d: usize,
    width: usize,
    scale: T,
    prefix: Prefix<'a>,
}

impl<'a, T: Real> Operands<'a, T> {
    fn new(prefix: Prefix<'a>, saved: Saved<'a>) -> Result<Self> {
        let (t, width) = saved.q.dims2()?;
        Ok(Self {
            q: read(saved.q)?,
            keys: read(saved.keys)?,
            values: read(saved.values)?,
            o: read(saved.o)?,
            lse: read(saved.lse)?,
            t,
            n: saved.keys.dim(0)?,
            d: width / prefix.heads,
            width,
            scale: T::of(prefix.scale),
            prefix,
        })
    }

    /// Where row `row` of a head is in a `[_, heads·d]` buffer.
    fn at(&self, row: usize, head: usize) -> usize {
        row * self.width + head * self.d
    }

    /// One head of a `[_, heads·d]` buffer, from row `row` on.
    fn head(&self, x: &[T], row: usize, head: usize) -> View<*const T> {
        View::rows(x[self.at(row, head)..].as_ptr(), self.width)
    }

    /// Dropout's factors on the probabilities of row `row`.
    #[inline(always)]
    fn factors(&self, dropout: &Dropout, row: usize, factors: &mut [T]) {
        let ids = self.prefix.ragged.token_rows();
        dropout.factors(ids.sample[row], ids.position[row], factors);
    }
}

/// Adds keys to a softmax over others, whose log-sum-exp is `lse`: their scores become probabilities.
/// Returns what is left to the others and the log-sum-exp of all.
#[inline(always)]
fn join<T: Real>(scores: &mut [T], lse: T) -> (T, T) {
    let max = largest(scores, lse);
    for score in scores.iter_mut() {
        *score = (*score - max).exp();
    }
    let others = (lse - max).exp();
    let sum = others + sum_by(scores.len(), |j| scores[j]);
    let inverse = T::ONE / sum;
    for score in scores.iter_mut() {
        *score *= inverse;
    }
    (others * inverse, max + T::of(sum.wide().ln()))
}

pub(super) fn forward<T: Real>(prefix: Prefix<'_>, saved: Saved<'_>) -> Result<(Tensor, Tensor)> {
    let x = Operands::<T>::new(prefix, saved)?;
    let (t, n, d, heads) = (x.t, x.n, x.d, prefix.heads);
    let (mut o, mut lse) = (unwritten::<T>(t * x.width), unwritten::<T>(heads * t));
    let (o_out, lse_out) = (Scatter::new(&mut o), Scatter::new(&mut lse));
    tasks(prefix).into_par_iter().with_max_len(1).for_each(|task| {
        let mut scores = unwritten::<T>(TILE * n);
        let mut factors = vec![T::ONE; n];
        for (row, rows) in task.tiles() {
            let (first, head) = (row, task.head);
            // SAFETY: the views stay inside this head's columns of q's rows and of the keys, whose
            // shapes were checked; `scores` holds TILE x n elements and is this task's own.
            unsafe {
                let keys = x.head(&x.keys, 0, head).transposed();
                let to = View::rows(scores.as_mut_ptr(), n);
                gemm((rows, n, d), to, false, x.scale, x.head(&x.q, row, head), keys, 1);
            }
            simd(
                #[inline(always)]
                || {
                    for (row, scores) in (first..first + rows).zip(scores.chunks_exact_mut(n)) {
                        let (at, of_lse) = (x.at(row, head), head * t + row);
                        // SAFETY: this row of this head, in o and in lse, is this task's alone.
                        let (o, lse) = unsafe { (o_out.slice(at, d), lse_out.slice(of_lse, 1)) };
                        let others;
                        (others, lse[0]) = join(scores, x.lse[of_lse]);
                        for (o, own) in o.iter_mut().zip(&x.o[at..]) {
                            *o = others * *own;
                        }
                        if let Some(dropout) = &task.dropout {
                            x.factors(dropout, row, &mut factors);
                            for (p, factor) in scores.iter_mut().zip(&factors) {
                                *p *= *factor;
                            }
                        }
                    }
                },
            );
            // SAFETY: as above; o's rows of this head are this task's alone, and written by now.
            unsafe {
                let to = View::rows(o_out.pointer(x.at(row, head)), x.width);
                let (p, values) = (View::rows(scores.as_ptr(), n), x.head(&x.values, 0, head));
                gemm((rows, d, n), to, true, T::ONE, p, values, 1);
            }
        }
    });
    Ok((tensor(o, (t, x.width))?, tensor(lse, (heads, t))?))
}

pub(super) fn backward<T: Real>(
    prefix: Prefix<'_>,
    saved: Saved<'_>,
    d_o: &Tensor,
    dq: Option<&Tensor>,
) -> Result<(Tensor, Tensor)> {
    let (x, d_o) = (Operands::<T>::new(prefix, saved)?, read::<T>(d_o)?);
    let sums = |dq: Option<Scatter<'_, T>>| -> Vec<(usize, [Vec<T>; 2])> {
        let tasks = tasks(prefix).into_par_iter().with_max_len(1);
        tasks.map(|task| (task.head, backward_part(&x, &d_o, dq, &task))).collect()
    };
    let parts = match dq {
        Some(dq) => write::<T, _>(dq, |dq| Ok(sums(Some(Scatter::new(dq)))))?,
        None => sums(None),
    };
    let [mut d_keys, mut d_values] = [(); 2].map(|()| vec![T::ZERO; x.n * x.width]);
    for (head, [of_keys, of_values]) in &parts {
        for (sum, part) in [(&mut d_keys, of_keys), (&mut d_values, of_values)] {
            for (j, row) in part.chunks_exact(x.d).enumerate() {
                add(&mut sum[x.at(j, *head)..][..x.d], row);
            }
        }
    }
    Ok((tensor(d_keys, (x.n, x.width))?, tensor(d_values, (x.n, x.width))?))
}

/// What a part of the rows gives the keys and the values of its head, `[n, d]` each, and adds to its own
/// rows of dq.
fn backward_part<T: Real>(
    x: &Operands<'_, T>,
    d_o: &[T],
    dq: Option<Scatter<'_, T>>,
    task: &Task,
) -> [Vec<T>; 2] {
    let (n, d, head) = (x.n, x.d, task.head);
    let [mut p, mut ds] = [(); 2].map(|()| unwritten::<T>(TILE * n));
    let [mut d_keys, mut d_values] = [(); 2].map(|()| vec![T::ZERO; n * d]);
    for (row, rows) in task.tiles() {
        let (q, d_o_tile) = (x.head(&x.q, row, head), x.head(d_o, row, head));
        let (keys, values) = (x.head(&x.keys, 0, head), x.head(&x.values, 0, head));
        // SAFETY: the views stay inside this head's columns of `rows` rows of q and of d_o and of the n
        // keys and values, whose shapes were checked; p and ds hold TILE x n elements and are this task's.
        unsafe {
            let (scores, d_p) = (View::rows(p.as_mut_ptr(), n), View::rows(ds.as_mut_ptr(), n));
            gemm((rows, n, d), scores, false, x.scale, q, keys.transposed(), 1);
            gemm((rows, n, d), d_p, false, T::ONE, d_o_tile, values.transposed(), 1);
        }
        gradients_of_scores(x, d_o, task, row..row + rows, [&mut p, &mut ds]);
        // SAFETY: as above; dq's rows of this head are this task's alone; d_keys and d_values hold n x d
        // elements and are this task's.
        unsafe {
            let (p, ds) = (View::rows(p.as_ptr(), n), View::rows(ds.as_ptr(), n));
            if let Some(dq) = dq {
                let to = View::rows(dq.pointer(x.at(row, head)), x.width);
                gemm((rows, d, n), to, true, x.scale, ds, keys, 1);
            }
            let (to_keys, to_values) =
                (View::rows(d_keys.as_mut_ptr(), d), View::rows(d_values.as_mut_ptr(), d));
            gemm((n, d, rows), to_keys, true, x.scale, ds.transposed(), q, 1);
            gemm((n, d, rows), to_values, true, T::ONE, p.transposed(), d_o_tile, 1);
        }
    }
    [d_keys, d_values]
}

/// Of each row: scores become dropped probabilities, and gradients of those gradients of the scores.
fn gradients_of_scores<T: Real>(
    x: &Operands<'_, T>,
    d_o: &[T],
    task: &Task,
    rows: Range<usize>,
    [p, ds]: [&mut [T]; 2],
) {
    let mut factors = vec![T::ONE; x.n];
    simd(
        #[inline(always)]
        || {
            let pairs = p.chunks_exact_mut(x.n).zip(ds.chunks_exact_mut(x.n));
            for (row, (p, ds)) in rows.zip(pairs) {
                let at = x.at(row, task.head);
                let (o, d_o) = (&x.o[at..][..x.d], &d_o[at..][..x.d]);
                let delta = sum_by(x.d, |c| o[c] * d_o[c]);
                if let Some(dropout) = &task.dropout {
                    x.factors(dropout, row, &mut factors);
                }
                let lse = x.lse[task.head * x.t + row];
                for ((p, ds), factor) in p.iter_mut().zip(ds).zip(&factors) {
                    let probability = (*p - lse).exp();
                    *ds = probability * (*ds * *factor - delta);
                    *p = probability * *factor;
                }
            }
        },
    );
}
