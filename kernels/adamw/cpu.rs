//! AdamW on the CPU: bound by memory, so everything happens in one pass.

use candle_core::{DType, Device, Result, Tensor};
use rayon::prelude::*;

use super::{AdamW, Bucket, Constants, Norm, State, Update, clip_coefficient};
use crate::{
    common::{
        host::{read, write},
        real::sum_by,
        simd,
    },
    embedding::SparseRows,
};

/// Elements of one task.
const CHUNK: usize = 1 << 14;

impl Constants {
    /// Those of parameters that do not decay.
    fn without_decay(self) -> Self {
        Self { keep: 1.0, ..self }
    }

    #[inline(always)]
    fn update(&self, p: &mut f32, m: &mut f32, v: &mut f32, g: f32) {
        *m = self.beta1 * *m + self.one_minus_beta1 * g;
        *v = self.beta2 * *v + self.one_minus_beta2 * g * g;
        let denominator = v.sqrt() * self.inverse_bias2 + self.epsilon;
        *p = *p * self.keep - self.step_size * *m / denominator;
    }
}

pub(super) fn norm(
    update: &Update<'_>,
    samples: usize,
    max_norm: f64,
    before: Option<&Norm>,
) -> Result<Norm> {
    let mut squares = match update.table {
        Some(table) => sum_of_squares(&read::<f32>(&table.rows.values)?),
        None => 0.0,
    };
    for bucket in &update.buckets {
        squares += sum_of_squares(&read::<f32>(bucket.gradients)?);
    }
    let norm = squares.sqrt() / samples as f64;
    let clip = if max_norm > 0.0 { clip_coefficient(norm, max_norm) } else { 1.0 };
    let mut finite = norm.is_finite();
    if let Some(before) = before {
        finite &= before.read()?.wait()?.1;
    }
    let finite = f64::from(u8::from(finite));
    Ok(Norm(Tensor::new(&[norm, clip / samples as f64, finite], &Device::Cpu)?))
}

pub(super) fn step(update: &Update<'_>, adamw: &AdamW, norm: &Norm) -> Result<()> {
    let numbers = norm.0.to_vec1::<f64>()?;
    if numbers[2] == 0.0 {
        return Ok(());
    }
    let (constants, scale) = (Constants::new(adamw), numbers[1] as f32);
    for Bucket { state, gradients, decayed } in &update.buckets {
        step_bucket(constants, scale, state, gradients, *decayed)?;
        round(state)?;
    }
    if let Some(table) = &update.table {
        step_rows(constants, scale, table.state, table.rows)?;
        round(table.state)?;
    }
    Ok(())
}

/// Writes the copy, where there is one.
fn round(state: &State) -> Result<()> {
    match &state.copy {
        Some(copy) => copy.slice_set(&state.values.to_dtype(DType::BF16)?, 0, 0),
        None => Ok(()),
    }
}

/// Opens the three state vectors for writing.
fn with_state(
    state: &State,
    body: impl FnOnce(&mut [f32], &mut [f32], &mut [f32]) -> Result<()>,
) -> Result<()> {
    write::<f32, _>(&state.values, |p| {
        write::<f32, _>(&state.exp_avg, |m| write::<f32, _>(&state.exp_avg_sq, |v| body(p, m, v)))
    })
}

fn step_bucket(
    constants: Constants,
    scale: f32,
    state: &State,
    gradients: &Tensor,
    decayed: usize,
) -> Result<()> {
    let constants = [constants, constants.without_decay()];
    with_state(state, |p, m, v| {
        write::<f32, _>(gradients, |g| {
            let (p, m, v, g) = (
                p.par_chunks_mut(CHUNK),
                m.par_chunks_mut(CHUNK),
                v.par_chunks_mut(CHUNK),
                g.par_chunks_mut(CHUNK),
            );
            p.zip(m).zip(v).zip(g).enumerate().for_each(|(task, (((p, m), v), g))| {
                let border = decayed.saturating_sub(task * CHUNK).min(p.len());
                simd(
                    #[inline(always)]
                    || {
                        for (constants, range) in constants.iter().zip([0..border, border..p.len()])
                        {
                            let states = p[range.clone()].iter_mut().zip(&mut m[range.clone()]);
                            let states = states.zip(&mut v[range.clone()]);
                            for (((p, m), v), g) in states.zip(&mut g[range]) {
                                constants.update(p, m, v, *g * scale);
                                *g = 0.0;
                            }
                        }
                    },
                );
            });
            Ok(())
        })
    })
}

fn step_rows(constants: Constants, scale: f32, state: &State, rows: &SparseRows) -> Result<()> {
    let (width, values) = (rows.width, read::<f32>(&rows.values)?);
    let values = &*values;
    let chunk = (CHUNK / width).max(1) * width;
    with_state(state, |p, m, v| {
        let (p, m, v) = (p.par_chunks_mut(chunk), m.par_chunks_mut(chunk), v.par_chunks_mut(chunk));
        p.zip(m).zip(v).enumerate().for_each(|(task, ((p, m), v))| {
            let first = (task * chunk / width) as u32;
            let mut next = rows.ids.partition_point(|id| *id < first);
            let zeros = vec![0.0; width];
            simd(
                #[inline(always)]
                || {
                    let states = p.chunks_exact_mut(width).zip(m.chunks_exact_mut(width));
                    for (i, ((p, m), v)) in states.zip(v.chunks_exact_mut(width)).enumerate() {
                        let mut gradient = &zeros[..];
                        if rows.ids.get(next) == Some(&(first + i as u32)) {
                            gradient = &values[next * width..][..width];
                            next += 1;
                        }
                        for (((p, m), v), g) in p.iter_mut().zip(m).zip(v).zip(gradient) {
                            constants.update(p, m, v, *g * scale);
                        }
                    }
                },
            );
        });
        Ok(())
    })
}

fn sum_of_squares(values: &[f32]) -> f64 {
    let partials: Vec<f64> = values
        .par_chunks(CHUNK)
        .map(|chunk| {
            // f32 inside runs of 512 (32 terms a lane: 2e-6 relative at worst), f64 across them.
            chunk
                .chunks(1 << 9)
                .map(|run| {
                    f64::from(simd(
                        #[inline(always)]
                        || sum_by(run.len(), |i| run[i] * run[i]),
                    ))
                })
                .sum()
        })
        .collect();
    partials.iter().sum()
}
