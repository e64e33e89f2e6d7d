//! The optimizer's two passes over a flat f32 bucket: the update, and the norm that clipping needs.

use allreel_kernels::adamw::{AdamW, Bucket, State, Update};
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

fn state(setup: &Setup) -> Result<State> {
    let zeros = || setup.zeros(setup.sizes.parameters);
    Ok(State { values: (zeros()? + 1.0)?, exp_avg: zeros()?, exp_avg_sq: zeros()?, copy: None })
}

fn step(setup: &Setup) -> Result<Body> {
    let n = setup.sizes.parameters;
    let (state, gradients) = (state(setup)?, (setup.zeros(n)? + 1.0)?);
    let adamw = AdamW {
        learning_rate: 1e-5,
        beta1: 0.9,
        beta2: 0.999,
        epsilon: 1e-8,
        weight_decay: 0.01,
        step: 1,
    };
    let bucket = Bucket { state: &state, gradients: &gradients, decayed: n };
    let norm = Update::new(vec![bucket], None)?.norm(1, 0.0, None)?;
    Ok(Box::new(move || {
        let bucket = Bucket { state: &state, gradients: &gradients, decayed: n };
        Update::new(vec![bucket], None)?.step(&adamw, &norm)
    }))
}

fn norm(setup: &Setup) -> Result<Body> {
    let (state, gradients) = (state(setup)?, (setup.zeros(setup.sizes.parameters)? + 1.0)?);
    Ok(Box::new(move || {
        let bucket = Bucket { state: &state, gradients: &gradients, decayed: 0 };
        Update::new(vec![bucket], None)?.norm(1, 0.0, None).map(drop)
    }))
}
