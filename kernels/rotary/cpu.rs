//! Rotary positions on the CPU: one pass over the rows.

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::Table;
use crate::common::{
    ROWS_PER_TASK, Ragged, Real,
    host::{read, tensor, unwritten},
    simd,
};

pub(super) fn forward<T: Real>(x: &Tensor, table: &Table, ragged: &Ragged) -> Result<Tensor> {
    rotate::<T>(x, table, ragged, 1.0)
}

pub(super) fn backward<T: Real>(dy: &Tensor, table: &Table, ragged: &Ragged) -> Result<Tensor> {
    rotate::<T>(dy, table, ragged, -1.0)
}

/// Rotates by the table's angles times `direction`, 1 or -1.
fn rotate<T: Real>(x: &Tensor, table: &Table, ragged: &Ragged, direction: f64) -> Result<Tensor> {
    let (t, width) = x.dims2()?;
    let half = table.half;
    let x = read::<T>(x)?;
    let positions = &ragged.token_rows().position;
    let mut y = unwritten::<T>(t * width);
    y.par_chunks_mut(ROWS_PER_TASK * width)
        .zip(x.par_chunks(ROWS_PER_TASK * width))
        .zip(positions.par_chunks(ROWS_PER_TASK))
        .for_each(|((y, x), positions)| {
            let [mut cos, mut sin] = [vec![T::ZERO; half], vec![T::ZERO; half]];
            simd(
                #[inline(always)]
                || {
                    let rows = y.chunks_exact_mut(width).zip(x.chunks_exact(width));
                    for ((y, x), position) in rows.zip(positions) {
                        let at = *position as usize * half;
                        let angles = table.cos[at..][..half].iter().zip(&table.sin[at..][..half]);
                        // Once per row: every head turns by the same angles.
                        for ((cos, sin), (c, s)) in cos.iter_mut().zip(&mut sin).zip(angles) {
                            (*cos, *sin) = (T::of(*c), T::of(*s * direction));
                        }
                        for (y, x) in y.chunks_exact_mut(2 * half).zip(x.chunks_exact(2 * half)) {
                            rotate_head(y, x, &cos, &sin);
                        }
                    }
                },
            );
        });
    tensor(y, (t, width))
}

#[inline(always)]
fn rotate_head<T: Real>(y: &mut [T], x: &[T], cos: &[T], sin: &[T]) {
    let half = cos.len();
    let (y1, y2) = y.split_at_mut(half);
    let (x1, x2) = x.split_at(half);
    let (y2, x2, sin) = (&mut y2[..half], &x2[..half], &sin[..half]);
    for i in 0..half {
        y1[i] = x1[i] * cos[i] - x2[i] * sin[i];
        y2[i] = x2[i] * cos[i] + x1[i] * sin[i];
    }
}
