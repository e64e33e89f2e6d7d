//! Softmax cross-entropy with label smoothing, summed over samples.
//!
//! ```text
//! logits [B, C]   labels [B]   e = label smoothing
//! loss = Σ_b (1 - e)·nll(y_b) + e/C · Σ_c nll(c)        nll(c) = lse - logit_c
//! dlogits = softmax - ((1 - e)·onehot + e/C)
//! ```
//!
//! The sum is divided by the global number of samples once, after the all-reduce. `[B, C]` is tiny:
//! it is computed in f64 on the host, whichever device the logits are on.

#[cfg(test)]
mod test;

use candle_core::{DType, Result, Tensor, bail};

/// What a batch's logits say.
#[derive(Clone, Debug)]
pub struct CrossEntropy {
    /// Sum of the samples' losses.
    pub loss: f64,
    /// How many largest logits are the label's.
    pub correct: usize,
    /// Gradient of `loss`, `[B, C]`, of the logits' dtype and device.
    pub d_logits: Tensor,
}

/// Loss, hits and gradient.
///
/// # Errors
/// If a label is not below C or the numbers of labels and rows differ.
pub fn cross_entropy(logits: &Tensor, labels: &[u32], smoothing: f64) -> Result<CrossEntropy> {
    let (b, c) = logits.dims2()?;
    if labels.len() != b || labels.iter().any(|label| *label as usize >= c) {
        bail!("cross_entropy: labels {labels:?} for logits {:?}", logits.dims());
    }
    let rows = logits.to_dtype(DType::F64)?.to_vec2::<f64>()?;
    let (mut loss, mut correct) = (0.0, 0);
    let mut gradient = Vec::with_capacity(b * c);
    for (row, label) in rows.iter().zip(labels) {
        let label = *label as usize;
        let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let lse = max + row.iter().map(|x| (x - max).exp()).sum::<f64>().ln();
        let uniform = smoothing / c as f64;
        let mean_nll = lse - row.iter().sum::<f64>() / c as f64;
        loss += (1.0 - smoothing) * (lse - row[label]) + smoothing * mean_nll;
        correct += usize::from(argmax(row) == label);
        gradient.extend(row.iter().enumerate().map(|(i, x)| {
            let target = uniform + if i == label { 1.0 - smoothing } else { 0.0 };
            (x - lse).exp() - target
        }));
    }
    let d_logits = Tensor::from_vec(gradient, (b, c), logits.device())?.to_dtype(logits.dtype())?;
    Ok(CrossEntropy { loss, correct, d_logits })
}

/// Index of the first largest element.
pub fn argmax(row: &[f64]) -> usize {
    (1..row.len()).fold(0, |best, i| if row[i] > row[best] { i } else { best })
}
