//! Softmax cross-entropy with label smoothing, summed over samples.
//!
//! ```text
//! logits [B, C]   labels [B]   e = label smoothing
//! loss = Σ_b (1 - e)·nll(y_b) + e/C · Σ_c nll(c)        nll(c) = lse - logit_c
//! dlogits = softmax - ((1 - e)·onehot + e/C)
//! ```
//!
//! The sum is divided by the global number of samples once, after the all-reduce. The CPU computes all
//! of it in f64; kernels compute a row in f32 and sum the rows in f64.

pub(crate) mod check;
mod cpu;
#[cfg(device)]
mod device;
#[cfg(test)]
mod test;

use std::sync::OnceLock;

use candle_core::{DType, Device, Result, Tensor, bail};

use crate::common::{Later, Mirror, run};

/// Loss and hits of all the batches since it was made, nothing at first. They stay on the device of the
/// logits, which is waited for only when they are read: once a step.
#[derive(Debug, Default)]
pub struct Totals {
    /// f64 `[2]`: sum of the samples' losses, number of hits. Made with the first batch.
    sums: OnceLock<Tensor>,
}

impl Totals {
    /// `(sum of the samples' losses, how many largest logits are the label's)`; waits for the device.
    ///
    /// # Errors
    /// What any of the queued work failed with.
    pub fn read(&self) -> Result<(f64, usize)> {
        let Some(sums) = self.sums.get() else { return Ok((0.0, 0)) };
        let sums = sums.to_vec1::<f64>()?;
        Ok((sums[0], sums[1] as usize))
    }

    /// [`read`](Self::read) without waiting: `[sum of losses, hits]`, once they are there.
    ///
    /// # Errors
    /// If the device fails.
    pub fn later(&self) -> Result<Later> {
        match self.sums.get() {
            Some(sums) => Later::of(sums),
            None => Later::of(&Tensor::zeros(2, DType::F64, &Device::Cpu)?),
        }
    }

    fn on(&self, device: &Device) -> Result<&Tensor> {
        match self.sums.get() {
            Some(sums) => Ok(sums),
            None => {
                let zeros = Tensor::zeros(2, DType::F64, device)?;
                Ok(self.sums.get_or_init(|| zeros))
            }
        }
    }
}

/// Gradient of the sum of losses, `[B, C]`, of the logits' dtype and device; adds losses and hits to
/// `totals`.
///
/// # Errors
/// If a label is not below C, the numbers of labels and rows differ, or on a device without an
/// implementation.
pub fn cross_entropy(
    logits: &Tensor,
    labels: &Mirror<u32>,
    smoothing: f64,
    totals: &Totals,
) -> Result<Tensor> {
    let (b, c) = logits.dims2()?;
    if labels.len() != b || labels.iter().any(|label| *label as usize >= c) {
        bail!("cross_entropy: labels {:?} for logits {:?}", &labels[..], logits.dims());
    }
    let sums = totals.on(logits.device())?;
    run!("cross_entropy", logits, cross_entropy(logits, labels, smoothing, sums))
}

/// Index of the first largest element.
pub fn argmax(row: &[f64]) -> usize {
    (1..row.len()).fold(0, |best, i| if row[i] > row[best] { i } else { best })
}
