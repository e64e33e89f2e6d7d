//! AdamW over flat buckets in one pass, and the norm that clipping needs.
//!
//! ```text
//! p *= 1 - lr·wd          m = β1·m + (1-β1)·g       v = β2·v + (1-β2)·g²
//! p -= lr/(1-β1^t) · m / (√v/√(1-β2^t) + eps)        g = scale · gradient
//! ```
//!
//! Loshchilov & Hutter 2019, in PyTorch's order of operations. `scale` folds the division by the
//! number of samples and the clipping coefficient into the same pass, which also zeroes the
//! gradient for the next step. A large embedding table takes its gradient as rows; the rows that
//! have none still decay and follow their momentum, exactly as with a dense gradient of zeros.

mod cpu;
#[cfg(test)]
mod test;

use candle_core::{Device, Result, Tensor, bail};

use crate::{common::expect_shape, embedding::SparseRows};

/// The settings of one step.
#[derive(Clone, Copy, Debug)]
pub struct AdamW {
    /// Learning rate of this step.
    pub learning_rate: f64,
    /// Decay of the mean.
    pub beta1: f64,
    /// Decay of the mean square.
    pub beta2: f64,
    /// Added to the denominator.
    pub epsilon: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Number of this step, from 1.
    pub step: u64,
    /// Factor on the gradients.
    pub scale: f64,
}

/// Parameters and optimizer state of one bucket, flat f32 tensors of one length.
#[derive(Clone)]
pub struct State {
    /// Parameters, updated in place.
    pub values: Tensor,
    /// Running mean.
    pub exp_avg: Tensor,
    /// Running mean square.
    pub exp_avg_sq: Tensor,
}

/// One step over a bucket whose first `decayed` elements take weight decay. Zeroes `gradients`.
///
/// # Errors
/// If lengths differ, or on a device without an implementation.
pub fn step(adamw: &AdamW, state: &State, gradients: &Tensor, decayed: usize) -> Result<()> {
    let n = check(state)?;
    expect_shape("adamw", "gradients", gradients, &[n])?;
    match gradients.device() {
        Device::Cpu => cpu::step(adamw, state, gradients, decayed),
        other => bail!("adamw: no implementation for {other:?}"),
    }
}

/// One step over a whole table (all of it decayed) whose gradient is `rows`.
///
/// # Errors
/// As [`step`].
pub fn step_rows(adamw: &AdamW, state: &State, rows: &SparseRows) -> Result<()> {
    let n = check(state)?;
    if rows.width == 0 || n % rows.width != 0 {
        bail!("adamw: rows of {} elements do not fit a table of {n}", rows.width);
    }
    match state.values.device() {
        Device::Cpu => cpu::step_rows(adamw, state, rows),
        other => bail!("adamw: no implementation for {other:?}"),
    }
}

/// Sum of the squares of a bucket; not finite if an element is not.
///
/// # Errors
/// On a device without an implementation.
pub fn sum_of_squares(gradients: &Tensor) -> Result<f64> {
    match gradients.device() {
        Device::Cpu => Ok(cpu::sum_of_squares(&crate::common::host::read::<f32>(gradients)?)),
        other => bail!("adamw: no implementation for {other:?}"),
    }
}

/// [`sum_of_squares`] of sparse rows.
pub fn sum_of_squares_rows(rows: &SparseRows) -> f64 {
    cpu::sum_of_squares(&rows.values)
}

/// Clipping's factor on gradients of global norm `norm`: `min(1, max_norm / (norm + 1e-6))`.
pub fn clip_coefficient(norm: f64, max_norm: f64) -> f64 {
    (max_norm / (norm + 1e-6)).min(1.0)
}

fn check(state: &State) -> Result<usize> {
    let n = state.values.dims1()?;
    expect_shape("adamw", "exp_avg", &state.exp_avg, &[n])?;
    expect_shape("adamw", "exp_avg_sq", &state.exp_avg_sq, &[n])?;
    Ok(n)
}
