//! The products on the CPU: a thread dequantises a tile of W that fits its cache and multiplies by it.
//!
//! The result is cut into tasks by shapes alone, and a task adds up all it needs in order: no sum depends on
//! the number of threads.

use std::ops::Range;

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::Quantized;
use crate::{
    common::{
        ROWS_PER_TASK, Real,
        host::{Scatter, read, tensor, unwritten, write},
    },
    linear::{View, gemm},
};

/// Columns of the result that a task computes, and how many terms of their sums it dequantises at once. Both
/// whole blocks of 4-bit codes, because either may run along W's rows; the tile, 384 KiB of f32, stays in
/// a core's second cache.
const WIDTH: usize = 192;
const DEPTH: usize = 512;
/// Most rows of the result that a task computes. As often as there are so many, W is dequantised again.
const HEIGHT: usize = 1024;
/// Elements of a tile: all the memory that a thread needs.
pub(super) const TILE: usize = WIDTH * DEPTH;

pub(super) fn dequantize(weight: &Quantized) -> Result<Tensor> {
    let (n, k) = weight.dims();
    let weight = weight.borrow()?;
    let mut values = unwritten::<f32>(n * k);
    values.par_chunks_mut(ROWS_PER_TASK * k).enumerate().for_each(|(i, rows)| {
        let first = i * ROWS_PER_TASK;
        weight.tile(first..first + rows.len() / k, 0..k, rows);
    });
    tensor(values, (n, k))
}

pub(super) fn forward<T: Real>(
    x: &Tensor,
    weight: &Quantized,
    bias: Option<&Tensor>,
) -> Result<Tensor> {
    let ((t, k), (n, _)) = (x.dims2()?, weight.dims());
    let (x, weight) = (read::<T>(x)?, weight.borrow()?);
    let mut y = unwritten::<T>(t * n);
    if let Some(bias) = bias {
        let bias = read::<T>(bias)?;
        y.par_chunks_mut(ROWS_PER_TASK * n).for_each(|rows| {
            rows.chunks_exact_mut(n).for_each(|row| row.copy_from_slice(&bias));
        });
    }
    product(&x, (t, n, k), &mut y, bias.is_some(), |depth, columns, tile| {
        weight.tile(columns, depth.clone(), tile);
        View::rows(tile.as_ptr(), depth.len()).transposed()
    });
    tensor(y, (t, n))
}

pub(super) fn backward_input<T: Real>(dy: &Tensor, weight: &Quantized) -> Result<Tensor> {
    let shape = (dy.dim(0)?, weight.dims().1);
    let mut dx = unwritten::<T>(shape.0 * shape.1);
    input_gradient(dy, weight, &mut dx, false)?;
    tensor(dx, shape)
}

pub(super) fn backward_input_into<T: Real>(
    dy: &Tensor,
    weight: &Quantized,
    dx: &Tensor,
) -> Result<()> {
    write::<T, _>(dx, |dx| input_gradient(dy, weight, dx, true))
}

fn input_gradient<T: Real>(
    dy: &Tensor,
    weight: &Quantized,
    dx: &mut [T],
    accumulate: bool,
) -> Result<()> {
    let ((t, n), (_, k)) = (dy.dims2()?, weight.dims());
    let (dy, weight) = (read::<T>(dy)?, weight.borrow()?);
    product(&dy, (t, k, n), dx, accumulate, |depth, columns, tile| {
        weight.tile(depth, columns.clone(), tile);
        View::rows(tile.as_ptr(), columns.len())
    });
    Ok(())
}

/// `out = left·right`, or `out += left·right`, for `left [rows, inner]` and `right [inner, width]`, `shape` being
/// (rows, width, inner). `right(depth, columns, tile)` writes those rows and columns of itself into the tile, of as
/// many elements, and returns them as a view of it.
pub(super) fn product<T: Real>(
    left: &[T],
    shape: (usize, usize, usize),
    out: &mut [T],
    accumulate: bool,
    right: impl Fn(Range<usize>, Range<usize>, &mut [T]) -> View<*const T> + Sync,
) {
    let (rows, width, inner) = shape;
    assert_eq!((left.len(), out.len()), (rows * inner, rows * width));
    let result = Scatter::new(out);
    // Evenly high: a last task of few rows would dequantise for little.
    let height = rows.div_ceil(rows.div_ceil(HEIGHT).max(1)).max(1);
    let high = rows.div_ceil(height);
    let task = |scratch: &mut Vec<T>, task: usize| {
        let lines = part(task % high, height, rows);
        let columns = part(task / high, WIDTH, width);
        let corner = lines.start * width + columns.start;
        for i in 0..inner.div_ceil(DEPTH) {
            let depth = part(i, DEPTH, inner);
            let tile = &mut scratch[..depth.len() * columns.len()];
            let right = right(depth.clone(), columns.clone(), tile);
            // SAFETY: the result is [rows, width] and left [rows, inner] (asserted), lines and columns are this
            // task's alone, written before they are added to; right views the whole tile, of depth by columns.
            unsafe {
                gemm(
                    (lines.len(), columns.len(), depth.len()),
                    View::rows(result.pointer(corner), width),
                    accumulate || i > 0,
                    T::ONE,
                    View::rows(left[lines.start * inner + depth.start..].as_ptr(), inner),
                    right,
                    1,
                );
            }
        }
    };
    let tasks = (0..high * width.div_ceil(WIDTH)).into_par_iter();
    tasks.for_each_init(|| unwritten::<T>(TILE), task);
}

/// Part `i` of `0..whole` in parts of `size`.
fn part(i: usize, size: usize, whole: usize) -> Range<usize> {
    i * size..whole.min((i + 1) * size)
}
