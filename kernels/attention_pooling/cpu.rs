//! Attention pooling on the CPU: one task per sequence, its tokens in order.

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::{Gradients, Operands};
use crate::{
    common::{
        Ragged, Real,
        host::{Scatter, read, tensor, unwritten},
        real::{softmax, sum_by},
        simd,
    },
    linear::add_partials,
};

#[inline(always)]
fn dot<T: Real>(a: &[T], b: &[T]) -> T {
    let a = &a[..b.len()];
    sum_by(b.len(), |j| a[j] * b[j])
}

/// `sum += scale·row`.
#[inline(always)]
fn add_scaled<T: Real>(sum: &mut [T], scale: T, row: &[T]) {
    for (sum, value) in sum.iter_mut().zip(row) {
        *sum = scale.fma(*value, *sum);
    }
}

/// `row = scale·of`.
#[inline(always)]
fn set_scaled<T: Real>(row: &mut [T], scale: T, of: &[T]) {
    for (row, value) in row.iter_mut().zip(of) {
        *row = scale * *value;
    }
}

pub(super) fn weights<T: Real>(u: &Tensor, v: &Tensor, ragged: &Ragged) -> Result<Tensor> {
    let (t, width) = u.dims2()?;
    let (u, v) = (read::<T>(u)?, read::<T>(v)?);
    let v = &v[..width];
    let mut a = unwritten::<T>(t);
    let out = Scatter::new(&mut a);
    (0..ragged.sequences()).into_par_iter().for_each(|i| {
        let rows = ragged.range(i);
        // SAFETY: the rows of a sequence belong to its task alone.
        let a = unsafe { out.slice(rows.start, rows.len()) };
        simd(
            #[inline(always)]
            || {
                for (row, a) in rows.zip(&mut *a) {
                    *a = dot(&u[row * width..], v);
                }
                softmax(a);
            },
        );
    });
    tensor(a, t)
}

pub(super) fn pool<T: Real>(x: &Tensor, a: &Tensor, ragged: &Ragged) -> Result<Tensor> {
    let (b, h) = (ragged.sequences(), x.dim(1)?);
    let (x, a) = (read::<T>(x)?, read::<T>(a)?);
    let mut y = unwritten::<T>(b * h);
    y.par_chunks_mut(h).enumerate().for_each(|(i, y)| {
        y.fill(T::ZERO);
        simd(
            #[inline(always)]
            || {
                for row in ragged.range(i) {
                    add_scaled(y, a[row], &x[row * h..][..h]);
                }
            },
        );
    });
    tensor(y, (b, h))
}

pub(super) fn backward<T: Real>(
    operands: Operands<'_>,
    a: &Tensor,
    dy: &Tensor,
    ragged: &Ragged,
    v_grad: Option<&Tensor>,
) -> Result<Gradients> {
    let ((t, h), width) = (operands.x.dims2()?, operands.u.dim(1)?);
    let (x, u) = (read::<T>(operands.x)?, read::<T>(operands.u)?);
    let (v, a) = (read::<T>(operands.v)?, read::<T>(a)?);
    let (mut dx, mut du) = (unwritten::<T>(t * h), unwritten::<T>(t * width));
    let (to_dx, to_du) = (Scatter::new(&mut dx), Scatter::new(&mut du));
    let dy = read::<T>(dy)?;
    let of_sequence = |(i, dy): (usize, &[T])| {
        let rows = ragged.range(i);
        // SAFETY: the rows of a sequence belong to its task alone.
        let (dx, du) = unsafe {
            (
                to_dx.slice(rows.start * h, rows.len() * h),
                to_du.slice(rows.start * width, rows.len() * width),
            )
        };
        let (x, u) = (&x[rows.start * h..][..dx.len()], &u[rows.start * width..][..du.len()]);
        let a = &a[rows];
        let (mut scores, mut dv) = (vec![T::ZERO; a.len()], vec![T::ZERO; width]);
        simd(
            #[inline(always)]
            || {
                for (t, (score, a)) in scores.iter_mut().zip(a).enumerate() {
                    *score = dot(&x[t * h..], dy);
                    set_scaled(&mut dx[t * h..][..h], *a, dy);
                }
                let mean = dot(&scores, a);
                for (t, (score, a)) in scores.iter().zip(a).enumerate() {
                    let score = *a * (*score - mean);
                    set_scaled(&mut du[t * width..][..width], score, &v);
                    add_scaled(&mut dv, score, &u[t * width..][..width]);
                }
            },
        );
        dv
    };
    let dv: Vec<Vec<T>> = dy.par_chunks(h).enumerate().map(of_sequence).collect();
    if let Some(v_grad) = v_grad {
        add_partials(v_grad, &dv)?;
    }
    Ok(Gradients { x: tensor(dx, (t, h))?, u: tensor(du, (t, width))? })
}
