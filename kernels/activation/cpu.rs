//! Bias + activation on the CPU, plain and gated: one pass over the rows, vectorised.

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::{
    Activation,
    functions::{Function, Gelu, GeluTanh, Relu, Silu, Tanh, by_activation},
};
use crate::{
    common::{
        ROWS_PER_TASK, Real,
        host::{read, tensor, unwritten},
        simd,
    },
    linear::{add, add_partials},
};

/// The bias, or zeros: one row in cache costs less than a second copy of every loop.
fn bias_row<T: Real>(bias: Option<&Tensor>, n: usize) -> Result<Vec<T>> {
    bias.map_or_else(|| Ok(vec![T::ZERO; n]), |bias| Ok(read::<T>(bias)?.to_vec()))
}

pub(super) fn forward<T: Real>(
    h: &Tensor,
    bias: Option<&Tensor>,
    activation: Activation,
) -> Result<Tensor> {
    let (t, n) = h.dims2()?;
    let (h, bias) = (read::<T>(h)?, bias_row::<T>(bias, n)?);
    let mut y = unwritten::<T>(t * n);
    y.par_chunks_mut(ROWS_PER_TASK * n).zip(h.par_chunks(ROWS_PER_TASK * n)).for_each(|(y, h)| {
        simd(
            #[inline(always)]
            || {
                for (y, h) in y.chunks_exact_mut(n).zip(h.chunks_exact(n)) {
                    by_activation!(activation, value::<T>(y, h, &bias));
                }
            },
        );
    });
    tensor(y, (t, n))
}

#[inline(always)]
fn value<T: Real, F: Function>(y: &mut [T], h: &[T], bias: &[T]) {
    for ((y, h), bias) in y.iter_mut().zip(h).zip(bias) {
        *y = F::value(*h + *bias);
    }
}

pub(super) fn gated_forward<T: Real>(
    h: &Tensor,
    bias: Option<&Tensor>,
    activation: Activation,
) -> Result<Tensor> {
    let (t, both) = h.dims2()?;
    let n = both / 2;
    let (h, bias) = (read::<T>(h)?, bias_row::<T>(bias, both)?);
    let mut y = unwritten::<T>(t * n);
    y.par_chunks_mut(ROWS_PER_TASK * n).zip(h.par_chunks(ROWS_PER_TASK * both)).for_each(
        |(y, h)| {
            simd(
                #[inline(always)]
                || {
                    for (y, h) in y.chunks_exact_mut(n).zip(h.chunks_exact(both)) {
                        by_activation!(activation, gated_value::<T>(y, h, &bias));
                    }
                },
            );
        },
    );
    tensor(y, (t, n))
}

#[inline(always)]
fn gated_value<T: Real, F: Function>(y: &mut [T], h: &[T], bias: &[T]) {
    let n = y.len();
    let ((input, gate), (input_bias, gate_bias)) = (h.split_at(n), bias.split_at(n));
    let rows = input.iter().zip(input_bias).zip(gate.iter().zip(gate_bias));
    for (y, ((input, input_bias), (gate, gate_bias))) in y.iter_mut().zip(rows) {
        *y = F::value(*input + *input_bias) * (*gate + *gate_bias);
    }
}

pub(super) fn backward<T: Real>(
    dy: &Tensor,
    h: &Tensor,
    bias: Option<&Tensor>,
    activation: Activation,
    bias_grad: Option<&Tensor>,
) -> Result<Tensor> {
    rows_backward(
        dy,
        h,
        bias,
        bias_grad,
        #[inline(always)]
        |dh: &mut [T], dy: &[T], h: &[T], bias: &[T]| {
            by_activation!(activation, slope::<T>(dh, dy, h, bias));
        },
    )
}

#[inline(always)]
fn slope<T: Real, F: Function>(dh: &mut [T], dy: &[T], h: &[T], bias: &[T]) {
    for (((dh, dy), h), bias) in dh.iter_mut().zip(dy).zip(h).zip(bias) {
        *dh = *dy * F::slope(*h + *bias);
    }
}

pub(super) fn gated_backward<T: Real>(
    dy: &Tensor,
    h: &Tensor,
    bias: Option<&Tensor>,
    activation: Activation,
    bias_grad: Option<&Tensor>,
) -> Result<Tensor> {
    rows_backward(
        dy,
        h,
        bias,
        bias_grad,
        #[inline(always)]
        |dh: &mut [T], dy: &[T], h: &[T], bias: &[T]| {
            by_activation!(activation, gated_slope::<T>(dh, dy, h, bias));
        },
    )
}

#[inline(always)]
fn gated_slope<T: Real, F: Function>(dh: &mut [T], dy: &[T], h: &[T], bias: &[T]) {
    let n = dy.len();
    let ((input, gate), (input_bias, gate_bias)) = (h.split_at(n), bias.split_at(n));
    let (d_input, d_gate) = dh.split_at_mut(n);
    let (gate, gate_bias, d_gate) = (&gate[..n], &gate_bias[..n], &mut d_gate[..n]);
    for j in 0..n {
        let u = input[j] + input_bias[j];
        d_input[j] = dy[j] * (gate[j] + gate_bias[j]) * F::slope(u);
        d_gate[j] = dy[j] * F::value(u);
    }
}

/// `dh` row by row through `row(dh, dy, h, bias)`, and its column sums into `bias_grad`.
fn rows_backward<T: Real>(
    dy: &Tensor,
    h: &Tensor,
    bias: Option<&Tensor>,
    bias_grad: Option<&Tensor>,
    row: impl Fn(&mut [T], &[T], &[T], &[T]) + Sync,
) -> Result<Tensor> {
    let ((t, n), outputs) = (h.dims2()?, dy.dim(1)?);
    let (dy, h, bias) = (read::<T>(dy)?, read::<T>(h)?, bias_row::<T>(bias, n)?);
    let mut dh = unwritten::<T>(t * n);
    let inputs = dy.par_chunks(ROWS_PER_TASK * outputs).zip(h.par_chunks(ROWS_PER_TASK * n));
    let partials: Vec<Vec<T>> = dh
        .par_chunks_mut(ROWS_PER_TASK * n)
        .zip(inputs)
        .map(|(dh, (dy, h))| {
            let mut sum = vec![T::ZERO; if bias_grad.is_some() { n } else { 0 }];
            simd(
                #[inline(always)]
                || {
                    let inputs = dy.chunks_exact(outputs).zip(h.chunks_exact(n));
                    for (dh, (dy, h)) in dh.chunks_exact_mut(n).zip(inputs) {
                        row(dh, dy, h, &bias);
                        add(&mut sum, dh);
                    }
                },
            );
            sum
        })
        .collect();
    if let Some(bias_grad) = bias_grad {
        add_partials(bias_grad, &partials)?;
    }
    tensor(dh, (t, n))
}
