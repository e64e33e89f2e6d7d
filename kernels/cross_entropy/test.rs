use candle_core::Result;

use super::*;
use crate::testing::{check_gradient, random};

/// `(loss, hits)` and the gradient of one batch.
fn run(logits: &Tensor, labels: &[u32], smoothing: f64) -> Result<((f64, usize), Tensor)> {
    let totals = Totals::default();
    let d_logits = cross_entropy(logits, &labels.to_vec().into(), smoothing, &totals)?;
    Ok((totals.read()?, d_logits))
}

#[test]
fn gradient_matches_finite_differences() -> Result<()> {
    let logits = (random(&[9, 3], 1)? * 4.0)?;
    let labels = [0, 1, 2, 2, 1, 0, 0, 2, 1];
    for smoothing in [0.0, 0.1] {
        let (_, d_logits) = run(&logits, &labels, smoothing)?;
        check_gradient("logits", &logits, &d_logits, |x| Ok(run(x, &labels, smoothing)?.0.0))?;
    }
    Ok(())
}

#[test]
fn hits_are_counted_and_wrong_labels_refused() -> Result<()> {
    let logits = Tensor::new(&[[1f32, 2.0], [3.0, -1.0], [0.0, 0.5]], &Device::Cpu)?;
    assert_eq!(run(&logits, &[1, 0, 0], 0.0)?.0.1, 2);
    assert!(run(&logits, &[1, 0, 2], 0.0).is_err());
    assert!(run(&logits, &[1, 0], 0.0).is_err());
    Ok(())
}

#[test]
fn batches_add_up() -> Result<()> {
    let totals = Totals::default();
    assert_eq!(totals.read()?, (0.0, 0));
    let (mut loss, mut correct) = (0.0, 0);
    for (seed, rows) in [(1, 5), (2, 1), (3, 97)] {
        let logits = random(&[rows, 3], seed)?;
        let labels: Vec<u32> = (0..rows as u32).map(|i| i % 3).collect();
        let ((one, hits), _) = run(&logits, &labels, 0.1)?;
        (loss, correct) = (loss + one, correct + hits);
        cross_entropy(&logits, &labels.into(), 0.1, &totals)?;
    }
    assert_eq!(totals.read()?, (loss, correct));
    Ok(())
}

#[test]
fn nan_is_never_a_hit_nor_a_finite_loss() -> Result<()> {
    let logits = Tensor::new(&[[f32::NAN, 0.0]], &Device::Cpu)?;
    let ((loss, correct), _) = run(&logits, &[1], 0.0)?;
    assert!(loss.is_nan());
    assert_eq!(correct, 0);
    Ok(())
}
