//! The optimizer's two passes over a flat f32 bucket: the update, and the norm that clipping needs.

use allreel_kernels::adamw::{self, AdamW, State};
use candle_core::Result;

use super::{Case, Setup, Work};
use crate::command::bench::measure::Body;

/// The update and the norm.
pub fn cases(setup: &Setup) -> Vec<Case> {
    let n = setup.sizes.parameters;
    let sizes = format!("{n} parameters");
    vec![
        Case::new("adamw step".into(), sizes.clone(), step_work(n), step),
        Case::new("adamw norm".into(), sizes, norm_work(n), norm),
    ]
}

/// p, m, v and g are read and written: g is zeroed.
pub fn step_work(n: usize) -> Work {
    Work { bytes: 32.0 * n as f64, flops: 0.0 }
}

/// g is read.
pub fn norm_work(n: usize) -> Work {
    Work { bytes: 4.0 * n as f64, flops: 0.0 }
}

fn step(setup: &Setup) -> Result<Body> {
    let n = setup.sizes.parameters;
    let zeros = || setup.zeros(n);
    let state = State { values: (zeros()? + 1.0)?, exp_avg: zeros()?, exp_avg_sq: zeros()? };
    let gradients = (zeros()? + 1.0)?;
    let adamw = AdamW {
        learning_rate: 1e-5,
        beta1: 0.9,
        beta2: 0.999,
        epsilon: 1e-8,
        weight_decay: 0.01,
        step: 1,
        scale: 1.0,
    };
    Ok(Box::new(move || adamw::step(&adamw, &state, &gradients, n)))
}

fn norm(setup: &Setup) -> Result<Body> {
    let gradients = (setup.zeros(setup.sizes.parameters)? + 1.0)?;
    Ok(Box::new(move || adamw::sum_of_squares(&gradients).map(drop)))
}
