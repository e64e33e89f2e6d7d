//! The junction on the CPU: each row is read once, normalised in cache, written once.

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::{Gradients, Junction, LayerNorm, Saved};
use crate::{
    common::{
        ROWS_PER_TASK, Real,
        host::{read, tensor, unwritten},
        real::sum_by,
        simd,
    },
    linear::{add, add_partials},
};

pub(super) fn forward<T: Real>(
    x: &Tensor,
    junction: Junction<'_>,
    norm: LayerNorm<'_>,
) -> Result<(Tensor, Saved)> {
    let (t, h) = x.dims2()?;
    let x = read::<T>(x)?;
    let bias = junction.bias.map(read::<T>).transpose()?;
    let residual = junction.residual.map(read::<T>).transpose()?;
    let (gamma, beta) = (read::<T>(norm.gamma)?, read::<T>(norm.beta)?);
    // Plain slices: going through the guard at every element kept the loop from vectorising.
    let (gamma, beta) = (&gamma[..h], &beta[..h]);
    let (mut y, mut z) = (unwritten::<T>(t * h), unwritten::<T>(t * h));
    let mut moments = unwritten::<T>(t * 2);
    let eps = T::of(norm.eps);
    let inverse = T::of(1.0 / h as f64);
    y.par_chunks_mut(ROWS_PER_TASK * h)
        .zip(z.par_chunks_mut(ROWS_PER_TASK * h))
        .zip(moments.par_chunks_mut(ROWS_PER_TASK * 2))
        .enumerate()
        .for_each(|(task, ((y, z), moments))| {
            let mut factors = vec![T::ZERO; if junction.dropout.is_some() { h } else { 0 }];
            simd(
                #[inline(always)]
                || {
                    let rows = y.chunks_exact_mut(h).zip(z.chunks_exact_mut(h));
                    for (i, ((y, z), moments)) in rows.zip(moments.chunks_exact_mut(2)).enumerate()
                    {
                        let row = task * ROWS_PER_TASK + i;
                        z.copy_from_slice(&x[row * h..][..h]);
                        if let Some(bias) = &bias {
                            add(z, bias);
                        }
                        if let Some((dropout, ids)) = junction.dropout {
                            dropout.factors(ids.sample[row], ids.position[row], &mut factors);
                            for (z, factor) in z.iter_mut().zip(&factors) {
                                *z *= *factor;
                            }
                        }
                        if let Some(residual) = &residual {
                            add(z, &residual[row * h..][..h]);
                        }
                        let mean = sum_by(h, |j| z[j]) * inverse;
                        let variance = sum_by(h, |j| (z[j] - mean) * (z[j] - mean)) * inverse;
                        let rstd = T::ONE / (variance + eps).sqrt();
                        for j in 0..h {
                            y[j] = ((z[j] - mean) * rstd).fma(gamma[j], beta[j]);
                        }
                        (moments[0], moments[1]) = (mean, rstd);
                    }
                },
            );
        });
    Ok((tensor(y, (t, h))?, Saved { z: tensor(z, (t, h))?, moments: tensor(moments, (t, 2))? }))
}

pub(super) fn backward<T: Real>(
    dy: &Tensor,
    saved: &Saved,
    junction: Junction<'_>,
    norm: LayerNorm<'_>,
    gradients: Option<Gradients<'_>>,
) -> Result<(Tensor, Tensor)> {
    let (t, h) = dy.dims2()?;
    let (dy, z, moments) = (read::<T>(dy)?, read::<T>(&saved.z)?, read::<T>(&saved.moments)?);
    let gamma = read::<T>(norm.gamma)?;
    let with_bias = gradients.is_some_and(|g| g.bias.is_some());
    let inverse = T::of(1.0 / h as f64);
    let mut dz = unwritten::<T>(t * h);
    // Without dropout dx is dz, and the second buffer stays empty.
    let mut dx = unwritten::<T>(if junction.dropout.is_some() { t * h } else { 0 });
    let mut dx_chunks: Vec<&mut [T]> = dx.chunks_mut(ROWS_PER_TASK * h).collect();
    dx_chunks.resize_with(t.div_ceil(ROWS_PER_TASK), Default::default);
    let partials: Vec<[Vec<T>; 3]> = dz
        .par_chunks_mut(ROWS_PER_TASK * h)
        .zip(dx_chunks)
        .enumerate()
        .map(|(task, (dz, dx))| {
            let width = if gradients.is_some() { h } else { 0 };
            let [mut dgamma, mut dbeta] = [vec![T::ZERO; width], vec![T::ZERO; width]];
            let mut dbias = vec![T::ZERO; if with_bias { h } else { 0 }];
            let mut factors = vec![T::ZERO; if junction.dropout.is_some() { h } else { 0 }];
            simd(
                #[inline(always)]
                || {
                    for (i, dz) in dz.chunks_exact_mut(h).enumerate() {
                        let row = task * ROWS_PER_TASK + i;
                        let (dy, z) = (&dy[row * h..][..h], &z[row * h..][..h]);
                        let (mean, rstd) = (moments[row * 2], moments[row * 2 + 1]);
                        let gamma = &gamma[..h];
                        let mean_g = sum_by(h, |j| dy[j] * gamma[j]) * inverse;
                        let mean_gz =
                            sum_by(h, |j| dy[j] * gamma[j] * (z[j] - mean)) * rstd * inverse;
                        for j in 0..h {
                            let normed = (z[j] - mean) * rstd;
                            dz[j] = rstd * (dy[j] * gamma[j] - mean_g - normed * mean_gz);
                        }
                        if gradients.is_some() {
                            let (dgamma, dbeta) = (&mut dgamma[..h], &mut dbeta[..h]);
                            for j in 0..h {
                                dgamma[j] += dy[j] * (z[j] - mean) * rstd;
                                dbeta[j] += dy[j];
                            }
                        }
                        let dx: &[T] = match junction.dropout {
                            None => dz,
                            Some((dropout, ids)) => {
                                dropout.factors(ids.sample[row], ids.position[row], &mut factors);
                                let dx = &mut dx[i * h..][..h];
                                for j in 0..h {
                                    dx[j] = dz[j] * factors[j];
                                }
                                dx
                            }
                        };
                        add(&mut dbias, dx);
                    }
                },
            );
            [dgamma, dbeta, dbias]
        })
        .collect();
    if let Some(gradients) = gradients {
        let targets = [Some(gradients.gamma), Some(gradients.beta), gradients.bias];
        let mut columns: [Vec<Vec<T>>; 3] = Default::default();
        for task in partials {
            for (column, partial) in columns.iter_mut().zip(task) {
                column.push(partial);
            }
        }
        for (target, column) in targets.iter().zip(&columns) {
            if let Some(target) = target {
                add_partials(target, column)?;
            }
        }
    }
    let dz = tensor(dz, (t, h))?;
    let dx = if junction.dropout.is_some() { tensor(dx, (t, h))? } else { dz.clone() };
    Ok((dx, dz))
}
