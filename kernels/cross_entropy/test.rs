use candle_core::Result;

use super::*;
use crate::testing::{check_gradient, random};

#[test]
fn gradient_matches_finite_differences() -> Result<()> {
    let logits = (random(&[9, 3], 1)? * 4.0)?;
    let labels = [0, 1, 2, 2, 1, 0, 0, 2, 1];
    for smoothing in [0.0, 0.1] {
        let result = cross_entropy(&logits, &labels, smoothing)?;
        check_gradient("logits", &logits, &result.d_logits, |x| {
            Ok(cross_entropy(x, &labels, smoothing)?.loss)
        })?;
    }
    Ok(())
}

#[test]
fn hits_are_counted_and_wrong_labels_refused() -> Result<()> {
    let logits = Tensor::new(&[[1f32, 2.0], [3.0, -1.0], [0.0, 0.5]], &candle_core::Device::Cpu)?;
    assert_eq!(cross_entropy(&logits, &[1, 0, 0], 0.0)?.correct, 2);
    assert!(cross_entropy(&logits, &[1, 0, 2], 0.0).is_err());
    assert!(cross_entropy(&logits, &[1, 0], 0.0).is_err());
    Ok(())
}

#[test]
fn nan_is_never_a_hit_nor_a_finite_loss() -> Result<()> {
    let logits = Tensor::new(&[[f32::NAN, 0.0]], &candle_core::Device::Cpu)?;
    assert!(cross_entropy(&logits, &[1], 0.0)?.loss.is_nan());
    Ok(())
}
