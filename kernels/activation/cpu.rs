//! Bias + activation on the CPU: one pass over the rows, vectorised.

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::Activation;
use crate::{
    common::{
        ROWS_PER_TASK, Real,
        host::{read, tensor, unwritten},
        simd,
    },
    linear::{add, add_partials},
};

/// √(2/π) and the cubic coefficient of the tanh form.
const TANH_SCALE: f64 = 0.797_884_560_802_865_4;
const TANH_CUBIC: f64 = 0.044_715;

#[inline(always)]
fn gelu<T: Real>(u: T) -> T {
    let half = T::of(0.5);
    half * u * (T::ONE + (u * T::of(std::f64::consts::FRAC_1_SQRT_2)).erf())
}

#[inline(always)]
fn gelu_slope<T: Real>(u: T) -> T {
    let cdf = T::of(0.5) * (T::ONE + (u * T::of(std::f64::consts::FRAC_1_SQRT_2)).erf());
    // φ(u) = e^(-u²/2) / √(2π)
    let pdf = (T::of(-0.5) * u * u).exp() * T::of(0.398_942_280_401_432_7);
    u.fma(pdf, cdf)
}

#[inline(always)]
fn gelu_tanh<T: Real>(u: T) -> T {
    let inner = T::of(TANH_SCALE) * u * (T::ONE + T::of(TANH_CUBIC) * u * u);
    T::of(0.5) * u * (T::ONE + inner.tanh())
}

#[inline(always)]
fn gelu_tanh_slope<T: Real>(u: T) -> T {
    let cubic = T::of(TANH_CUBIC) * u * u;
    let tanh = (T::of(TANH_SCALE) * u * (T::ONE + cubic)).tanh();
    let inner_slope = T::of(TANH_SCALE) * (T::ONE + T::of(3.0) * cubic);
    T::of(0.5) * (T::ONE + tanh + u * (T::ONE - tanh * tanh) * inner_slope)
}

pub(super) fn forward<T: Real>(
    h: &Tensor,
    bias: &Tensor,
    activation: Activation,
) -> Result<Tensor> {
    let (t, n) = h.dims2()?;
    let (h, bias) = (read::<T>(h)?, read::<T>(bias)?);
    let mut y = unwritten::<T>(t * n);
    y.par_chunks_mut(ROWS_PER_TASK * n).zip(h.par_chunks(ROWS_PER_TASK * n)).for_each(|(y, h)| {
        simd(
            #[inline(always)]
            || {
                for (y, h) in y.chunks_exact_mut(n).zip(h.chunks_exact(n)) {
                    match activation {
                        Activation::Gelu => map(y, h, &bias, gelu),
                        Activation::GeluTanh => map(y, h, &bias, gelu_tanh),
                        // In this order NaN stays NaN.
                        Activation::Relu => map(y, h, &bias, |u: T| T::ZERO.larger(u)),
                        Activation::Tanh => map(y, h, &bias, |u: T| u.tanh()),
                    }
                }
            },
        );
    });
    tensor(y, (t, n))
}

#[inline(always)]
fn map<T: Real>(y: &mut [T], h: &[T], bias: &[T], f: impl Fn(T) -> T) {
    for ((y, h), bias) in y.iter_mut().zip(h).zip(bias) {
        *y = f(*h + *bias);
    }
}

pub(super) fn backward<T: Real>(
    dy: &Tensor,
    h: &Tensor,
    bias: &Tensor,
    activation: Activation,
    bias_grad: Option<&Tensor>,
) -> Result<Tensor> {
    let (t, n) = h.dims2()?;
    let (dy, h, bias) = (read::<T>(dy)?, read::<T>(h)?, read::<T>(bias)?);
    let mut dh = unwritten::<T>(t * n);
    let rows = ROWS_PER_TASK * n;
    let partials: Vec<Vec<T>> =
        dh.par_chunks_mut(rows)
            .zip(dy.par_chunks(rows).zip(h.par_chunks(rows)))
            .map(|(dh, (dy, h))| {
                let mut sum = vec![T::ZERO; if bias_grad.is_some() { n } else { 0 }];
                simd(
                    #[inline(always)]
                    || {
                        let rows =
                            dh.chunks_exact_mut(n).zip(dy.chunks_exact(n)).zip(h.chunks_exact(n));
                        for ((dh, dy), h) in rows {
                            match activation {
                                Activation::Gelu => slope(dh, dy, h, &bias, gelu_slope),
                                Activation::GeluTanh => slope(dh, dy, h, &bias, gelu_tanh_slope),
                                Activation::Relu => slope(dh, dy, h, &bias, |u: T| {
                                    if u <= T::ZERO { T::ZERO } else { T::ONE }
                                }),
                                Activation::Tanh => slope(dh, dy, h, &bias, |u: T| {
                                    let tanh = u.tanh();
                                    T::ONE - tanh * tanh
                                }),
                            }
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

#[inline(always)]
fn slope<T: Real>(dh: &mut [T], dy: &[T], h: &[T], bias: &[T], f: impl Fn(T) -> T) {
    for (((dh, dy), h), bias) in dh.iter_mut().zip(dy).zip(h).zip(bias) {
        *dh = *dy * f(*h + *bias);
    }
}
