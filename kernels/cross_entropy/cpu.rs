//! Cross-entropy on the CPU, in f64: `[B, C]` is tiny.

use candle_core::{Result, Tensor};

use super::argmax;
use crate::common::{
    Real,
    host::{read, tensor, write},
};

pub(super) fn cross_entropy<T: Real>(
    logits: &Tensor,
    labels: &[u32],
    smoothing: f64,
    sums: &Tensor,
) -> Result<Tensor> {
    let (b, c) = logits.dims2()?;
    let logits: Vec<f64> = read::<T>(logits)?.iter().map(|x| x.wide()).collect();
    let (mut loss, mut correct) = (0.0, 0);
    let mut gradient = Vec::with_capacity(b * c);
    for (row, label) in logits.chunks_exact(c).zip(labels) {
        let label = *label as usize;
        let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let lse = max + row.iter().map(|x| (x - max).exp()).sum::<f64>().ln();
        let uniform = smoothing / c as f64;
        let mean_nll = lse - row.iter().sum::<f64>() / c as f64;
        loss += (1.0 - smoothing) * (lse - row[label]) + smoothing * mean_nll;
        correct += usize::from(argmax(row) == label);
        gradient.extend(row.iter().enumerate().map(|(i, x)| {
            let target = uniform + if i == label { 1.0 - smoothing } else { 0.0 };
            T::of((x - lse).exp() - target)
        }));
    }
    write::<f64, _>(sums, |sums| {
        sums[0] += loss;
        sums[1] += correct as f64;
        Ok(())
    })?;
    tensor(gradient, (b, c))
}
