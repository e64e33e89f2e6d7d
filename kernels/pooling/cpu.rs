//! Pooling on the CPU: one task per sequence, its tokens in order.

use candle_core::{Device, Result, Tensor};
use rayon::prelude::*;

use super::{Pool, Saved};
use crate::{
    common::{
        Ragged, Real,
        host::{Scatter, read, tensor, unwritten},
        simd,
    },
    linear::add,
};

/// y, and the rows of maxima.
pub(super) fn forward<T: Real>(
    x: &Tensor,
    ragged: &Ragged,
    pool: Pool,
    skip: usize,
) -> Result<(Tensor, Option<Tensor>)> {
    let (b, h) = (ragged.sequences(), x.dim(1)?);
    let x = read::<T>(x)?;
    let mut y = unwritten::<T>(b * h);
    let mut rows = vec![0; if pool == Pool::Max { b * h } else { 0 }];
    let mut rows_of: Vec<&mut [u32]> = rows.chunks_mut(h).collect();
    rows_of.resize_with(b, Default::default);
    y.par_chunks_mut(h).zip(rows_of).enumerate().for_each(|(i, (y, rows_of))| {
        let all = ragged.range(i);
        let rows = all.start + skip..all.end;
        let (first, last) = (&x[rows.start * h..][..h], &x[(rows.end - 1) * h..][..h]);
        match pool {
            Pool::First => y.copy_from_slice(first),
            Pool::Last => y.copy_from_slice(last),
            Pool::Mean => simd(
                #[inline(always)]
                || mean(y, &x[rows.start * h..rows.end * h]),
            ),
            Pool::Max => simd(
                #[inline(always)]
                || max(y, rows_of, &x[rows.start * h..rows.end * h], rows.start as u32),
            ),
            Pool::Ends => {
                y[..h / 2].copy_from_slice(&last[..h / 2]);
                y[h / 2..].copy_from_slice(&first[h / 2..]);
            }
        }
    });
    let rows = (pool == Pool::Max).then(|| Tensor::from_vec(rows, (b, h), &Device::Cpu));
    Ok((tensor(y, (b, h))?, rows.transpose()?))
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

/// The largest of each column and the first row that has it, rows being counted from `start`.
#[inline(always)]
fn max<T: Real>(y: &mut [T], rows: &mut [u32], x: &[T], start: u32) {
    let h = y.len();
    let rows = &mut rows[..h];
    y.copy_from_slice(&x[..h]);
    rows.fill(start);
    for (row, x) in (start..).zip(x.chunks_exact(h)) {
        for j in 0..h {
            // No branch: the loop is to vectorise. Nothing is larger than a NaN that was found.
            let (own, found) = (x[j].wide().is_nan(), y[j].wide().is_nan());
            let larger = (x[j] > y[j]) | (own & !found);
            y[j] = if larger { x[j] } else { y[j] };
            rows[j] = if larger { row } else { rows[j] };
        }
    }
}

pub(super) fn backward<T: Real>(dy: &Tensor, ragged: &Ragged, saved: &Saved) -> Result<Tensor> {
    let (t, h, skip) = (ragged.tokens(), dy.dim(1)?, saved.skip);
    let dy = read::<T>(dy)?;
    let maxima = saved.rows.as_ref().map(read::<u32>).transpose()?;
    let maxima = maxima.as_deref().unwrap_or_default();
    let mut dx = unwritten::<T>(t * h);
    let out = Scatter::new(&mut dx);
    dy.par_chunks(h).enumerate().for_each(|(i, dy)| {
        let rows = ragged.range(i);
        // SAFETY: the rows of a sequence belong to its task alone.
        let dx = unsafe { out.slice(rows.start * h, rows.len() * h) };
        let (others, dx) = dx.split_at_mut(skip * h);
        others.fill(T::ZERO);
        if saved.pool != Pool::Mean {
            dx.fill(T::ZERO);
        }
        let last = dx.len() - h;
        match saved.pool {
            Pool::First => dx[..h].copy_from_slice(dy),
            Pool::Last => dx[last..].copy_from_slice(dy),
            Pool::Mean => {
                let tokens = T::of((rows.len() - skip) as f64);
                let share: Vec<T> = dy.iter().map(|dy| *dy / tokens).collect();
                dx.chunks_exact_mut(h).for_each(|dx| dx.copy_from_slice(&share));
            }
            Pool::Max => {
                for (j, (row, dy)) in maxima[i * h..][..h].iter().zip(dy).enumerate() {
                    dx[(*row as usize - rows.start - skip) * h + j] = *dy;
                }
            }
            Pool::Ends => {
                dx[last..][..h / 2].copy_from_slice(&dy[..h / 2]);
                dx[h / 2..h].copy_from_slice(&dy[h / 2..]);
            }
        }
    });
    tensor(dx, (t, h))
}
