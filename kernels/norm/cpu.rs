//! The junction on the CPU: each row is read once, normalised in cache, written once.

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::{Gradients, Junction, LayerNorm, Saved};
use crate::{
    common::{
        Dropout, ROWS_PER_TASK, Real, RowIds,
        host::{Host, read, tensor, unwritten},
        real::sum_by,
        simd,
    },
    linear::{add as add_row, add_partials},
};

/// The operands of `drop(x + b) + r`, borrowed.
struct Operands<'a, T> {
    x: Host<'a, T>,
    bias: Option<Host<'a, T>>,
    residual: Option<Host<'a, T>>,
    dropout: Option<(&'a Dropout, &'a RowIds)>,
}

impl<'a, T: Real> Operands<'a, T> {
    fn read(x: &'a Tensor, junction: Junction<'a>) -> Result<Self> {
        Ok(Self {
            x: read(x)?,
            bias: junction.bias.map(read).transpose()?,
            residual: junction.residual.map(read).transpose()?,
            dropout: junction.dropout,
        })
    }

    /// Writes one row of z; `factors` is scratch, as wide as the row where there is dropout.
    #[inline(always)]
    fn join(&self, row: usize, z: &mut [T], factors: &mut [T]) {
        let h = z.len();
        z.copy_from_slice(&self.x[row * h..][..h]);
        if let Some(bias) = &self.bias {
            add_row(z, bias);
        }
        if let Some((dropout, ids)) = self.dropout {
            dropout.factors(ids.sample[row], ids.position[row], factors);
            for (z, factor) in z.iter_mut().zip(factors) {
                *z *= *factor;
            }
        }
        if let Some(residual) = &self.residual {
            add_row(z, &residual[row * h..][..h]);
        }
    }
}

/// Scratch for one row of dropout factors: empty without dropout.
fn factors<T: Real>(junction: Junction<'_>, h: usize) -> Vec<T> {
    vec![T::ZERO; if junction.dropout.is_some() { h } else { 0 }]
}

pub(super) fn add<T: Real>(x: &Tensor, junction: Junction<'_>) -> Result<Tensor> {
    let (t, h) = x.dims2()?;
    let operands = Operands::<T>::read(x, junction)?;
    let mut z = unwritten::<T>(t * h);
    z.par_chunks_mut(ROWS_PER_TASK * h).enumerate().for_each(|(task, z)| {
        let mut factors = factors(junction, h);
        simd(
            #[inline(always)]
            || {
                for (i, z) in z.chunks_exact_mut(h).enumerate() {
                    operands.join(task * ROWS_PER_TASK + i, z, &mut factors);
                }
            },
        );
    });
    tensor(z, (t, h))
}

pub(super) fn forward<T: Real>(
    x: &Tensor,
    junction: Junction<'_>,
    norm: LayerNorm<'_>,
) -> Result<(Tensor, Saved)> {
    let (t, h) = x.dims2()?;
    let operands = Operands::<T>::read(x, junction)?;
    let gamma = read::<T>(norm.gamma)?;
    let beta = norm.beta.map(read::<T>).transpose()?;
    // Plain slices: going through the guard at every element kept the loop from vectorising.
    let (gamma, beta) = (&gamma[..h], beta.as_deref());
    let (mut y, mut z) = (unwritten::<T>(t * h), unwritten::<T>(t * h));
    let mut moments = unwritten::<T>(t * 2);
    let eps = T::of(norm.eps);
    y.par_chunks_mut(ROWS_PER_TASK * h)
        .zip(z.par_chunks_mut(ROWS_PER_TASK * h))
        .zip(moments.par_chunks_mut(ROWS_PER_TASK * 2))
        .enumerate()
        .for_each(|(task, ((y, z), moments))| {
            let mut factors = factors(junction, h);
            simd(
                #[inline(always)]
                || {
                    let rows = y.chunks_exact_mut(h).zip(z.chunks_exact_mut(h));
                    for (i, ((y, z), moments)) in rows.zip(moments.chunks_exact_mut(2)).enumerate()
                    {
                        operands.join(task * ROWS_PER_TASK + i, z, &mut factors);
                        (moments[0], moments[1]) = normalise(y, z, gamma, beta, eps);
                    }
                },
            );
        });
    Ok((tensor(y, (t, h))?, Saved { z: tensor(z, (t, h))?, moments: tensor(moments, (t, 2))? }))
}

/// Writes one row of y; returns mean and rstd.
#[inline(always)]
fn normalise<T: Real>(y: &mut [T], z: &[T], gamma: &[T], beta: Option<&[T]>, eps: T) -> (T, T) {
    let h = z.len();
    let (y, gamma) = (&mut y[..h], &gamma[..h]);
    let inverse = T::of(1.0 / h as f64);
    let mean = sum_by(h, |j| z[j]) * inverse;
    let variance = sum_by(h, |j| (z[j] - mean) * (z[j] - mean)) * inverse;
    let rstd = T::ONE / (variance + eps).sqrt();
    match beta {
        Some(beta) => {
            let beta = &beta[..h];
            for j in 0..h {
                y[j] = ((z[j] - mean) * rstd).fma(gamma[j], beta[j]);
            }
        }
        None => {
            for j in 0..h {
                y[j] = (z[j] - mean) * rstd * gamma[j];
            }
        }
    }
    (mean, rstd)
}

/// One task's column sums, each empty where nobody asks for it.
struct Sums<T> {
    gamma: Vec<T>,
    beta: Vec<T>,
    bias: Vec<T>,
}

impl<T: Real> Sums<T> {
    fn zeros(gradients: Option<Gradients<'_>>, h: usize) -> Self {
        let zeros = |wanted: bool| vec![T::ZERO; if wanted { h } else { 0 }];
        Self {
            gamma: zeros(gradients.is_some()),
            beta: zeros(gradients.is_some_and(|g| g.beta.is_some())),
            bias: zeros(gradients.is_some_and(|g| g.bias.is_some())),
        }
    }

    /// Adds the sums of all tasks to the gradients, in task order.
    fn add_to(tasks: Vec<Self>, gradients: Gradients<'_>) -> Result<()> {
        let [mut gamma, mut beta, mut bias] = [Vec::new(), Vec::new(), Vec::new()];
        for task in tasks {
            gamma.push(task.gamma);
            beta.push(task.beta);
            bias.push(task.bias);
        }
        add_partials(gradients.gamma, &gamma)?;
        for (gradient, partials) in [(gradients.beta, beta), (gradients.bias, bias)] {
            if let Some(gradient) = gradient {
                add_partials(gradient, &partials)?;
            }
        }
        Ok(())
    }
}

pub(super) fn backward<T: Real>(
    dy: &Tensor,
    saved: &Saved,
    dz: Option<&Tensor>,
    junction: Junction<'_>,
    norm: LayerNorm<'_>,
    gradients: Option<Gradients<'_>>,
) -> Result<(Tensor, Tensor)> {
    let (t, h) = dy.dims2()?;
    let (dy, z, moments) = (read::<T>(dy)?, read::<T>(&saved.z)?, read::<T>(&saved.moments)?);
    let past = dz.map(read::<T>).transpose()?;
    let gamma = read::<T>(norm.gamma)?;
    let gamma = &gamma[..h];
    let mut dz = unwritten::<T>(t * h);
    // Without dropout dx is dz, and the second buffer stays empty.
    let mut dx = unwritten::<T>(if junction.dropout.is_some() { t * h } else { 0 });
    let mut dx_chunks: Vec<&mut [T]> = dx.chunks_mut(ROWS_PER_TASK * h).collect();
    dx_chunks.resize_with(t.div_ceil(ROWS_PER_TASK), Default::default);
    let sums: Vec<Sums<T>> = dz
        .par_chunks_mut(ROWS_PER_TASK * h)
        .zip(dx_chunks)
        .enumerate()
        .map(|(task, (dz, dx))| {
            let mut sums = Sums::zeros(gradients, h);
            let mut factors = factors(junction, h);
            simd(
                #[inline(always)]
                || {
                    for (i, dz) in dz.chunks_exact_mut(h).enumerate() {
                        let row = task * ROWS_PER_TASK + i;
                        let (at, moments) = (row * h, (moments[row * 2], moments[row * 2 + 1]));
                        let (dy, z) = (&dy[at..][..h], &z[at..][..h]);
                        through_norm(dz, dy, z, gamma, moments, &mut sums);
                        if let Some(past) = &past {
                            add_row(dz, &past[at..][..h]);
                        }
                        let dx: &[T] = match junction.dropout {
                            None => dz,
                            Some((dropout, ids)) => {
                                dropout.factors(ids.sample[row], ids.position[row], &mut factors);
                                let dx = &mut dx[i * h..][..h];
                                for ((dx, dz), factor) in dx.iter_mut().zip(dz).zip(&factors) {
                                    *dx = *dz * *factor;
                                }
                                dx
                            }
                        };
                        add_row(&mut sums.bias, dx);
                    }
                },
            );
            sums
        })
        .collect();
    if let Some(gradients) = gradients {
        Sums::add_to(sums, gradients)?;
    }
    let dz = tensor(dz, (t, h))?;
    let dx = if junction.dropout.is_some() { tensor(dx, (t, h))? } else { dz.clone() };
    Ok((dx, dz))
}

/// Writes one row of the gradient through the norm, and adds to the sums of γ and β.
#[inline(always)]
fn through_norm<T: Real>(
    dz: &mut [T],
    dy: &[T],
    z: &[T],
    gamma: &[T],
    (mean, rstd): (T, T),
    sums: &mut Sums<T>,
) {
    let h = z.len();
    let (dz, dy, gamma) = (&mut dz[..h], &dy[..h], &gamma[..h]);
    let inverse = T::of(1.0 / h as f64);
    let mean_g = sum_by(h, |j| dy[j] * gamma[j]) * inverse;
    let mean_gz = sum_by(h, |j| dy[j] * gamma[j] * (z[j] - mean)) * rstd * inverse;
    for j in 0..h {
        let normed = (z[j] - mean) * rstd;
        dz[j] = rstd * (dy[j] * gamma[j] - mean_g - normed * mean_gz);
    }
    for ((sum, dy), z) in sums.gamma.iter_mut().zip(dy).zip(z) {
        *sum += *dy * (*z - mean) * rstd;
    }
    add_row(&mut sums.beta, dy);
}
