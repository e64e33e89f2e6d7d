//! AdamW over flat buckets in one pass, and the norm that clipping needs.
//!
//! ```text
//! p *= 1 - lr·wd          m = β1·m + (1-β1)·g       v = β2·v + (1-β2)·g²
//! p -= lr/(1-β1^t) · m / (√v/√(1-β2^t) + eps)       g = min(1, max_norm / norm) · gradient / samples
//! ```
//!
//! Loshchilov & Hutter 2019, in PyTorch's order of operations. The division by the number of samples
//! and the clipping coefficient are folded into the same pass, which also zeroes the gradient for the
//! next step. A large embedding table takes its gradient as rows; the rows that have none still decay
//! and follow their momentum, exactly as with a dense gradient of zeros.
//!
//! On a device the norm never leaves it between [`Update::norm`] and [`Update::step`]: the host reads it
//! when it likes. A step whose norm is not finite does nothing, and neither does any after it, since what
//! it left in the gradients would be added to.

pub(crate) mod check;
mod cpu;
#[cfg(device)]
mod device;
#[cfg(test)]
mod test;

use candle_core::{DType, Device, Result, Tensor, bail};

#[cfg(device)]
use crate::common::{Mirror, device::takes};
use crate::{
    common::{Later, expect_shape},
    embedding::{SparseRows, check_rows},
};

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
    /// The parameters rounded to bf16, where the model computes with those; written with `values`.
    pub copy: Option<Tensor>,
}

/// A bucket whose gradients are dense.
#[derive(Clone, Copy)]
pub struct Bucket<'a> {
    /// Parameters and optimizer state.
    pub state: &'a State,
    /// Sums over the samples, f32, as long as the state. A step zeroes them.
    pub gradients: &'a Tensor,
    /// Number of leading elements that take weight decay.
    pub decayed: usize,
}

/// A table whose gradient is sparse; all of it decays.
#[derive(Clone, Copy)]
pub struct Table<'a> {
    /// Parameters and optimizer state of `[V · width]` elements.
    pub state: &'a State,
    /// Sums over the samples, of the rows that have a gradient.
    pub rows: &'a SparseRows,
}

/// Everything that one step updates, all on one device.
pub struct Update<'a> {
    buckets: Vec<Bucket<'a>>,
    table: Option<Table<'a>>,
    /// What blocks take of the buckets.
    #[cfg(device)]
    pieces: std::sync::OnceLock<Mirror<[i32; 2]>>,
}

/// What a step needs to know of all gradients together, left where they are: `Norm` of op.cu, three f64.
#[derive(Clone)]
pub struct Norm(Tensor);

/// A norm on its way to the host.
pub struct Reading(Later);

impl<'a> Update<'a> {
    /// Over these buckets and the table, if there is one.
    ///
    /// # Errors
    /// If lengths differ, or there is nothing to update.
    pub fn new(buckets: Vec<Bucket<'a>>, table: Option<Table<'a>>) -> Result<Self> {
        if buckets.is_empty() && table.is_none() {
            bail!("adamw: nothing to update");
        }
        for Bucket { state, gradients, decayed } in &buckets {
            let n = check(state)?;
            expect_shape("adamw", "gradients", gradients, &[n])?;
            if *decayed > n {
                bail!("adamw: {decayed} elements decay in a bucket of {n}");
            }
        }
        if let Some(Table { state, rows }) = table {
            let n = check(state)?;
            check_rows(rows)?;
            let fits = rows.width > 0 && n % rows.width == 0;
            if !fits || rows.ids.iter().any(|id| *id as usize >= n / rows.width) {
                bail!("adamw: rows of {} elements do not fit a table of {n}", rows.width);
            }
        }
        Ok(Self {
            buckets,
            table,
            #[cfg(device)]
            pieces: std::sync::OnceLock::new(),
        })
    }

    /// A tensor on the device of all.
    fn any(&self) -> &Tensor {
        match (self.buckets.first(), self.table) {
            (Some(bucket), _) => bucket.gradients,
            (None, Some(table)) => &table.state.values,
            (None, None) => unreachable!("new() refuses it"),
        }
    }

    /// Norm of the gradients over the number of `samples`, clipped to `max_norm` (0: not at all) in the
    /// step that takes it. `before` is the norm of the step before, if the host has not read that yet:
    /// where that was not finite, neither is this.
    ///
    /// # Errors
    /// If the tensors are of several devices, or on one without an implementation.
    pub fn norm(&self, samples: usize, max_norm: f64, before: Option<&Norm>) -> Result<Norm> {
        match self.any().device() {
            #[cfg(device)]
            _ if takes(self.any().device(), self.any().dtype()) => {
                device::norm(self, samples, max_norm, before)
            }
            Device::Cpu => cpu::norm(self, samples, max_norm, before),
            other => bail!("adamw: no implementation for {other:?}"),
        }
    }

    /// One step, and zeroes the gradients; nothing at all if `norm` is not finite.
    ///
    /// # Errors
    /// As [`norm`](Self::norm).
    pub fn step(&self, adamw: &AdamW, norm: &Norm) -> Result<()> {
        match norm.0.device() {
            #[cfg(device)]
            _ if takes(self.any().device(), self.any().dtype()) => device::step(self, adamw, norm),
            Device::Cpu => cpu::step(self, adamw, norm),
            other => bail!("adamw: no implementation for {other:?}"),
        }
    }
}

impl Norm {
    /// Numbers of a norm.
    #[cfg(device)]
    const NUMBERS: usize = 3;

    /// Starts bringing it to the host.
    ///
    /// # Errors
    /// If the device fails.
    pub fn read(&self) -> Result<Reading> {
        Ok(Reading(Later::of(&self.0)?))
    }

    /// Whether it is the host's, so that reading it waits for nothing.
    pub fn is_here(&self) -> bool {
        self.0.device().is_cpu()
    }
}

impl Reading {
    /// The norm, and whether it and all before it were finite.
    ///
    /// # Errors
    /// What the device failed with until then.
    pub fn wait(self) -> Result<(f64, bool)> {
        let numbers = self.0.wait()?;
        Ok((numbers[0], numbers[2] != 0.0))
    }
}

/// Clipping's factor on gradients of global norm `norm`: `min(1, max_norm / (norm + 1e-6))`.
pub fn clip_coefficient(norm: f64, max_norm: f64) -> f64 {
    (max_norm / (norm + 1e-6)).min(1.0)
}

/// The constants of the update, once per step in f64 as PyTorch does; as op.cu has them.
#[derive(Clone, Copy)]
#[repr(C)]
struct Constants {
    beta1: f32,
    one_minus_beta1: f32,
    beta2: f32,
    one_minus_beta2: f32,
    step_size: f32,
    inverse_bias2: f32,
    epsilon: f32,
    /// Factor on parameters that decay.
    keep: f32,
}

impl Constants {
    fn new(adamw: &AdamW) -> Self {
        let power = |beta: f64| 1.0 - beta.powf(adamw.step as f64);
        Self {
            beta1: adamw.beta1 as f32,
            one_minus_beta1: (1.0 - adamw.beta1) as f32,
            beta2: adamw.beta2 as f32,
            one_minus_beta2: (1.0 - adamw.beta2) as f32,
            step_size: (adamw.learning_rate / power(adamw.beta1)) as f32,
            inverse_bias2: (1.0 / power(adamw.beta2).sqrt()) as f32,
            epsilon: adamw.epsilon as f32,
            keep: (1.0 - adamw.learning_rate * adamw.weight_decay) as f32,
        }
    }
}

fn check(state: &State) -> Result<usize> {
    let n = state.values.dims1()?;
    expect_shape("adamw", "exp_avg", &state.exp_avg, &[n])?;
    expect_shape("adamw", "exp_avg_sq", &state.exp_avg_sq, &[n])?;
    if let Some(copy) = &state.copy {
        expect_shape("adamw", "copy", copy, &[n])?;
        if copy.dtype() != DType::BF16 {
            bail!("adamw: a copy of {:?}, expected BF16", copy.dtype());
        }
    }
    Ok(n)
}
