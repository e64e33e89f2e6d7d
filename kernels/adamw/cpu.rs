//! AdamW on the CPU: bound by memory, so everything happens in one pass.

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::{AdamW, State};
use crate::{
    common::{host::write, real::sum_by, simd},
    embedding::SparseRows,
};

/// Elements of one task.
const CHUNK: usize = 1 << 14;

/// The constants of the update, once per step in f64 as PyTorch does.
#[derive(Clone, Copy)]
struct Constants {
    scale: f32,
    beta1: f32,
    one_minus_beta1: f32,
    beta2: f32,
    one_minus_beta2: f32,
    step_size: f32,
    inverse_bias2: f32,
    epsilon: f32,
    keep: f32,
}

impl Constants {
    fn new(adamw: &AdamW, decay: bool) -> Self {
        let power = |beta: f64| 1.0 - beta.powf(adamw.step as f64);
        let keep = 1.0 - adamw.learning_rate * adamw.weight_decay;
        Self {
            scale: adamw.scale as f32,
            beta1: adamw.beta1 as f32,
            one_minus_beta1: (1.0 - adamw.beta1) as f32,
            beta2: adamw.beta2 as f32,
            one_minus_beta2: (1.0 - adamw.beta2) as f32,
            step_size: (adamw.learning_rate / power(adamw.beta1)) as f32,
            inverse_bias2: (1.0 / power(adamw.beta2).sqrt()) as f32,
            epsilon: adamw.epsilon as f32,
            keep: if decay { keep as f32 } else { 1.0 },
        }
    }

    #[inline(always)]
    fn update(&self, p: &mut f32, m: &mut f32, v: &mut f32, gradient: f32) {
        let g = gradient * self.scale;
        *m = self.beta1 * *m + self.one_minus_beta1 * g;
        *v = self.beta2 * *v + self.one_minus_beta2 * g * g;
        let denominator = v.sqrt() * self.inverse_bias2 + self.epsilon;
        *p = *p * self.keep - self.step_size * *m / denominator;
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

pub(super) fn step(adamw: &AdamW, state: &State, gradients: &Tensor, decayed: usize) -> Result<()> {
    let constants = [Constants::new(adamw, true), Constants::new(adamw, false)];
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
                                constants.update(p, m, v, *g);
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

pub(super) fn step_rows(adamw: &AdamW, state: &State, rows: &SparseRows) -> Result<()> {
    let constants = Constants::new(adamw, true);
    let width = rows.width;
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
                            gradient = &rows.values[next * width..][..width];
                            next += 1;
                        }
                        for (((p, m), v), g) in p.iter_mut().zip(m).zip(v).zip(gradient) {
                            constants.update(p, m, v, *g);
                        }
                    }
                },
            );
        });
        Ok(())
    })
}

pub(super) fn sum_of_squares(values: &[f32]) -> f64 {
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
