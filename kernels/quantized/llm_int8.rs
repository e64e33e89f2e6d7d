//! LLM.int8() on the CPU: x in 8 bits as well, but for its columns with outliers (the maths is in `mod.rs`).
//!
//! Codes are multiplied as floats, by the tiles and with the speed of the other products. A tile's sums of 512
//! products of two codes stay below 2²⁴, so they are whole numbers in f32, and only where tiles are added up can a
//! sum be rounded: of more than 1,040 products at the earliest.

use std::ops::Range;

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::{
    cpu::product,
    int8::{Borrowed, Int8, MAX, quantize_rows},
};
use crate::{
    common::{
        ROWS_PER_TASK, Real,
        host::{read, tensor, unwritten},
        simd,
    },
    linear::View,
};

pub(super) fn forward<T: Real>(
    x: &Tensor,
    weight: &Int8,
    threshold: Option<f32>,
    bias: Option<&Tensor>,
) -> Result<Tensor> {
    let ((t, k), (n, _)) = (x.dims2()?, weight.dims());
    let (x, weight) = (read::<T>(x)?, weight.borrow()?);
    let bias = bias.map(read::<T>).transpose()?;
    let outliers = threshold.map_or_else(Vec::new, |threshold| columns_above(&x, k, threshold));
    let (codes, absmax) = quantize::<T>(&x, k, threshold, &outliers);

    let mut y = unwritten::<T>(t * n);
    product(&codes, (t, n, k), &mut y, false, |depth, columns, tile| {
        write_codes(&weight, columns, depth.clone(), tile);
        View::rows(tile.as_ptr(), depth.len()).transposed()
    });
    scale(&mut y, n, &absmax, &weight, bias.as_deref());
    if !outliers.is_empty() {
        let rows = x.chunks_exact(k);
        let left: Vec<T> = rows.flat_map(|row| outliers.iter().map(|k| row[*k])).collect();
        product(&left, (t, n, outliers.len()), &mut y, true, |depth, rows, tile| {
            gather(&weight, rows, &outliers[depth.clone()], tile);
            View::rows(tile.as_ptr(), depth.len()).transposed()
        });
    }
    tensor(y, (t, n))
}

/// Columns of `x` with an element of at least `threshold`, ascending.
pub(super) fn columns_above<T: Real>(x: &[T], columns: usize, threshold: f32) -> Vec<usize> {
    let threshold = T::of(f64::from(threshold));
    let above = |rows: &[T]| {
        let mut above = vec![false; columns];
        for row in rows.chunks_exact(columns) {
            for (above, x) in above.iter_mut().zip(row) {
                *above |= *x >= threshold || -*x >= threshold;
            }
        }
        above
    };
    let tasks = x.par_chunks(ROWS_PER_TASK * columns).map(above);
    let either = |a: Vec<bool>, b: Vec<bool>| a.iter().zip(&b).map(|(a, b)| *a || *b).collect();
    let above = tasks.reduce(|| vec![false; columns], either);
    (0..columns).filter(|column| above[*column]).collect()
}

/// The codes of `x`, as floats, and the largest magnitude of each row. Elements of at least `threshold` count for
/// neither, other elements of their columns for the magnitude.
pub(super) fn quantize<T: Real>(
    x: &[T],
    columns: usize,
    threshold: Option<f32>,
    outliers: &[usize],
) -> (Vec<T>, Vec<f32>) {
    let (mut codes, mut absmax) = (vec![0; x.len()], vec![0.0; x.len() / columns]);
    // As f32 whatever T is: f64 is to see the same codes.
    let mut small: Vec<f32> = x.par_iter().map(|x| x.wide() as f32).collect();
    if let Some(threshold) = threshold.filter(|_| !outliers.is_empty()) {
        let clear = |x: &mut f32| *x = if x.abs() >= threshold { 0.0 } else { *x };
        small.par_iter_mut().for_each(clear);
    }
    quantize_rows(&small, columns, &mut codes, &mut absmax);
    for row in codes.chunks_exact_mut(columns) {
        outliers.iter().for_each(|column| row[*column] = 0);
    }
    let wide = codes.par_iter().map(|code| T::of(f64::from(code.cast_signed())));
    (wide.collect(), absmax)
}

/// Writes codes of the weight, as floats.
fn write_codes<T: Real>(
    weight: &Borrowed<'_>,
    rows: Range<usize>,
    columns: Range<usize>,
    tile: &mut [T],
) {
    simd(
        #[inline(always)]
        || {
            for (row, out) in rows.zip(tile.chunks_exact_mut(columns.len())) {
                for (out, code) in out.iter_mut().zip(weight.codes(row, columns.clone())) {
                    *out = T::of(f64::from(code.cast_signed()));
                }
            }
        },
    );
}

/// Sums of products of codes as what they stand for, and the bias.
fn scale<T: Real>(
    y: &mut [T],
    n: usize,
    absmax: &[f32],
    weight: &Borrowed<'_>,
    bias: Option<&[T]>,
) {
    let step = |absmax: f32| T::of(f64::from(absmax)) / T::of(f64::from(MAX));
    let steps: Vec<T> = (0..n).map(|row| step(weight.absmax(row))).collect();
    y.par_chunks_mut(n).zip(absmax).for_each(|(row, absmax)| {
        let own = step(*absmax);
        for (i, (y, step)) in row.iter_mut().zip(&steps).enumerate() {
            *y = *y * (own * *step) + bias.map_or(T::ZERO, |bias| bias[i]);
        }
    });
}

/// Writes those `columns` of Ŵ that are named, row by row.
fn gather<T: Real>(weight: &Borrowed<'_>, rows: Range<usize>, columns: &[usize], tile: &mut [T]) {
    for (row, out) in rows.zip(tile.chunks_exact_mut(columns.len())) {
        for (out, column) in out.iter_mut().zip(columns) {
            weight.values(row, *column..column + 1, std::slice::from_mut(out), |out, value| {
                *out = value;
            });
        }
    }
}
