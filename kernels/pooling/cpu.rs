//! Pooling on the CPU: one task per sequence, its tokens in order.

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::Pool;
use crate::{
    common::{
        Ragged, Real,
        host::{Scatter, read, tensor, unwritten},
        simd,
    },
    linear::add,
};

pub(super) fn forward<T: Real>(
    x: &Tensor,
    ragged: &Ragged,
    pool: Pool,
    skip: usize,
) -> Result<Tensor> {
    let (b, h) = (ragged.sequences(), x.dim(1)?);
    let x = read::<T>(x)?;
    let mut y = unwritten::<T>(b * h);
    y.par_chunks_mut(h).enumerate().for_each(|(i, y)| {
        let all = ragged.range(i);
        let rows = all.start + skip..all.end;
        match pool {
            Pool::First => y.copy_from_slice(&x[rows.start * h..][..h]),
            Pool::Last => y.copy_from_slice(&x[(rows.end - 1) * h..][..h]),
            Pool::Mean => simd(
                #[inline(always)]
                || mean(y, &x[rows.start * h..rows.end * h]),
            ),
        }
    });
    tensor(y, (b, h))
}

#[inline(always)]
fn mean<T: Real>(y: &mut [T], x: &[T]) {
    let h = y.len();
    y.fill(T::ZERO);
    for row in x.chunks_exact(h) {
        add(y, row);
    }
    let tokens = T::of((x.len() / h) as f64);
    for y in y {
        *y /= tokens;
    }
}

pub(super) fn backward<T: Real>(
    dy: &Tensor,
    ragged: &Ragged,
    pool: Pool,
    skip: usize,
) -> Result<Tensor> {
    let (t, h) = (ragged.tokens(), dy.dim(1)?);
    let dy = read::<T>(dy)?;
    let mut dx = unwritten::<T>(t * h);
    let out = Scatter::new(&mut dx);
    dy.par_chunks(h).enumerate().for_each(|(i, dy)| {
        let rows = ragged.range(i);
        // SAFETY: the rows of a sequence belong to its task alone.
        let dx = unsafe { out.slice(rows.start * h, rows.len() * h) };
        let (others, dx) = dx.split_at_mut(skip * h);
        others.fill(T::ZERO);
        match pool {
            Pool::First => {
                dx[..h].copy_from_slice(dy);
                dx[h..].fill(T::ZERO);
            }
            Pool::Last => {
                let last = dx.len() - h;
                dx[..last].fill(T::ZERO);
                dx[last..].copy_from_slice(dy);
            }
            Pool::Mean => {
                let tokens = T::of((rows.len() - skip) as f64);
                let share: Vec<T> = dy.iter().map(|dy| *dy / tokens).collect();
                dx.chunks_exact_mut(h).for_each(|dx| dx.copy_from_slice(&share));
            }
        }
    });
    tensor(dx, (t, h))
}
