//! Linear on the CPU: the `gemm` crate, spread over the rayon pool.

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use crate::common::{
    ROWS_PER_TASK, Real,
    host::{read, tensor, unwritten, write},
    simd,
};

/// A matrix inside a larger buffer: where it starts and the distance between rows and columns.
#[derive(Clone, Copy)]
pub(crate) struct View<P> {
    pub(crate) start: P,
    pub(crate) row_stride: usize,
    pub(crate) column_stride: usize,
}

impl<P> View<P> {
    /// Rows of `stride` elements, one after another.
    pub(crate) fn rows(start: P, stride: usize) -> Self {
        Self { start, row_stride: stride, column_stride: 1 }
    }

    /// The same memory, read as its transpose.
    pub(crate) fn transposed(self) -> Self {
        Self { start: self.start, row_stride: self.column_stride, column_stride: self.row_stride }
    }
}

/// `dst = scale·a·b`, or `dst += scale·a·b`, for `a [m, k]`, `b [k, n]`.
///
/// # Safety
/// Every element that the views name must lie in memory that is valid for reads (for writes, for
/// `dst`); no other thread may touch `dst`'s meanwhile. `dst` is read only when accumulating.
pub(crate) unsafe fn gemm<T: Real>(
    shape: (usize, usize, usize),
    dst: View<*mut T>,
    accumulate: bool,
    scale: T,
    a: View<*const T>,
    b: View<*const T>,
    threads: usize,
) {
    let (m, n, k) = shape;
    let parallelism =
        if threads > 1 { gemm::Parallelism::Rayon(threads) } else { gemm::Parallelism::None };
    // SAFETY: passed on from the caller; strides fit isize because they index real memory.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            dst.start,
            dst.column_stride as isize,
            dst.row_stride as isize,
            accumulate,
            a.start,
            a.column_stride as isize,
            a.row_stride as isize,
            b.start,
            b.column_stride as isize,
            b.row_stride as isize,
            T::ONE,
            scale,
            false,
            false,
            false,
            parallelism,
        );
    }
}

pub(super) fn forward<T: Real>(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
) -> Result<Tensor> {
    let ((t, k), n) = (x.dims2()?, weight.dim(0)?);
    let (x, w) = (read::<T>(x)?, read::<T>(weight)?);
    let mut y = unwritten::<T>(t * n);
    if let Some(bias) = bias {
        let bias = read::<T>(bias)?;
        y.par_chunks_mut(ROWS_PER_TASK * n).for_each(|rows| {
            for row in rows.chunks_exact_mut(n) {
                row.copy_from_slice(&bias);
            }
        });
    }
    add_product(&x, &w, &mut y, (t, n, k), bias.is_some());
    tensor(y, (t, n))
}

pub(super) fn forward_into<T: Real>(x: &Tensor, weight: &Tensor, y: &Tensor) -> Result<()> {
    let ((t, k), n) = (x.dims2()?, weight.dim(0)?);
    let (x, w) = (read::<T>(x)?, read::<T>(weight)?);
    write::<T, _>(y, |y| {
        add_product(&x, &w, y, (t, n, k), true);
        Ok(())
    })
}

/// `y = x·wᵀ`, or `y += x·wᵀ`, for `x [t, k]`, `w [n, k]`, `y [t, n]`.
fn add_product<T: Real>(
    x: &[T],
    w: &[T],
    y: &mut [T],
    (t, n, k): (usize, usize, usize),
    accumulate: bool,
) {
    assert_eq!((x.len(), w.len(), y.len()), (t * k, n * k, t * n));
    // SAFETY: y is [t, n], x [t, k] and w [n, k], all contiguous (asserted); y is ours alone.
    unsafe {
        gemm(
            (t, n, k),
            View::rows(y.as_mut_ptr(), n),
            accumulate,
            T::ONE,
            View::rows(x.as_ptr(), k),
            View::rows(w.as_ptr(), k).transposed(),
            rayon::current_num_threads(),
        );
    }
}

pub(super) fn backward_input<T: Real>(dy: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let ((t, _), k) = (dy.dims2()?, weight.dim(1)?);
    let mut dx = unwritten::<T>(t * k);
    input_gradient(dy, weight, &mut dx, false)?;
    tensor(dx, (t, k))
}

pub(super) fn backward_input_into<T: Real>(
    dy: &Tensor,
    weight: &Tensor,
    dx: &Tensor,
) -> Result<()> {
    write::<T, _>(dx, |dx| input_gradient(dy, weight, dx, true))
}

fn input_gradient<T: Real>(
    dy: &Tensor,
    weight: &Tensor,
    dx: &mut [T],
    accumulate: bool,
) -> Result<()> {
    let ((t, n), k) = (dy.dims2()?, weight.dim(1)?);
    let (dy, w) = (read::<T>(dy)?, read::<T>(weight)?);
    assert_eq!(dx.len(), t * k);
    // SAFETY: dx is [t, k] (asserted) and ours alone; dy [t, n] and w [n, k] are contiguous tensors.
    unsafe {
        gemm(
            (t, k, n),
            View::rows(dx.as_mut_ptr(), k),
            accumulate,
            T::ONE,
            View::rows(dy.as_ptr(), n),
            View::rows(w.as_ptr(), k),
            rayon::current_num_threads(),
        );
    }
    Ok(())
}

pub(super) fn backward_weight<T: Real>(
    dy: &Tensor,
    x: &Tensor,
    weight_grad: &Tensor,
) -> Result<()> {
    let ((t, n), k) = (dy.dims2()?, x.dim(1)?);
    let (dy, x) = (read::<T>(dy)?, read::<T>(x)?);
    write::<T, _>(weight_grad, |dw| {
        assert_eq!(dw.len(), n * k);
        // SAFETY: dw is [n, k] (asserted) and exclusively borrowed; dy [t, n] and x [t, k] are
        // contiguous tensors.
        unsafe {
            gemm(
                (n, k, t),
                View::rows(dw.as_mut_ptr(), k),
                true,
                T::ONE,
                View::rows(dy.as_ptr(), n).transposed(),
                View::rows(x.as_ptr(), k),
                rayon::current_num_threads(),
            );
        }
        Ok(())
    })
}

pub(super) fn backward_bias<T: Real>(dy: &Tensor, bias_grad: &Tensor) -> Result<()> {
    let n = dy.dim(1)?;
    let dy = read::<T>(dy)?;
    let partials: Vec<Vec<T>> = dy
        .par_chunks(ROWS_PER_TASK * n)
        .map(|rows| {
            let mut sum = vec![T::ZERO; n];
            simd(
                #[inline(always)]
                || {
                    for row in rows.chunks_exact(n) {
                        add(&mut sum, row);
                    }
                },
            );
            sum
        })
        .collect();
    add_partials(bias_grad, &partials)
}

/// `sum += row`.
#[inline(always)]
pub(crate) fn add<T: Real>(sum: &mut [T], row: &[T]) {
    for (sum, value) in sum.iter_mut().zip(row) {
        *sum += *value;
    }
}

/// Adds column sums that tasks made of their own rows into a gradient, in task order.
pub(crate) fn add_partials<T: Real>(gradient: &Tensor, partials: &[Vec<T>]) -> Result<()> {
    write::<T, _>(gradient, |gradient| {
        simd(
            #[inline(always)]
            || {
                for partial in partials {
                    add(gradient, partial);
                }
            },
        );
        Ok(())
    })
}
