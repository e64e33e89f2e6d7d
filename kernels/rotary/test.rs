use candle_core::{DType, Device, Result};

use super::*;
use crate::testing::{assert_close, check_gradient, narrow, ragged, random, weighted};

const HEADS: usize = 3;

/// `x·cos + rotate_half(x)·sin` in candle, for one sequence and heads of `d` columns.
fn hugging_face(x: &Tensor, theta: f64, d: usize) -> Result<Tensor> {
    let len = x.dim(0)?;
    let frequencies: Vec<f64> =
        (0..d / 2).map(|i| 1.0 / theta.powf((2 * i) as f64 / d as f64)).collect();
    let positions = Tensor::arange(0f64, len as f64, &Device::Cpu)?.reshape((len, 1, 1))?;
    let half = positions.broadcast_mul(&Tensor::new(frequencies.as_slice(), &Device::Cpu)?)?;
    let angles = Tensor::cat(&[&half, &half], 2)?;
    let x = x.reshape((len, HEADS, d))?;
    let (x1, x2) = (x.narrow(2, 0, d / 2)?, x.narrow(2, d / 2, d / 2)?);
    let turned = Tensor::cat(&[&x2.neg()?, &x1], 2)?;
    let y = (x.broadcast_mul(&angles.cos()?)? + turned.broadcast_mul(&angles.sin()?)?)?;
    y.reshape((len, HEADS * d))
}

#[test]
fn values_are_hugging_faces() -> Result<()> {
    for (len, d, theta) in [(1, 2, 10_000.0), (97, 6, 10_000.0), (257, 64, 160_000.0)] {
        let x = random(&[len, HEADS * d], 1)?;
        let ragged = Ragged::new(&[len], &[5])?;
        let table = Table::new(theta, d, len)?;
        let want = hugging_face(&x, theta, d)?;
        assert_close("y", &forward(&x, &table, &ragged, HEADS)?, &want, 1e-13)?;
        let small = x.to_dtype(DType::F32)?;
        // Two products and a sum of f32, of values below 1.
        assert_close("y f32", &forward(&small, &table, &ragged, HEADS)?, &want, 2e-7)?;
    }
    Ok(())
}

#[test]
fn gradients_match_finite_differences_and_undo_the_rotation() -> Result<()> {
    let ragged = ragged()?;
    let (x, dy) = (random(&[15, HEADS * 6], 1)?, random(&[15, HEADS * 6], 2)?);
    let table = Table::new(100.0, 6, 9)?;
    let dx = backward(&dy, &table, &ragged, HEADS)?;
    check_gradient("x", &x, &dx, |x| weighted(&forward(x, &table, &ragged, HEADS)?, &dy))?;
    for x in [&x, &narrow(&[&x])?[0]] {
        let back = backward(&forward(x, &table, &ragged, HEADS)?, &table, &ragged, HEADS)?;
        assert_close(
            "there and back",
            &back,
            x,
            if x.dtype() == DType::F32 { 4e-7 } else { 1e-15 },
        )?;
    }
    Ok(())
}

#[test]
fn positions_begin_at_zero_in_every_sequence() -> Result<()> {
    let lengths = [1usize, 97, 2, 40];
    let together = Ragged::new(&lengths, &[4, 3, 2, 1])?;
    let x = random(&[140, HEADS * 6], 1)?;
    let table = Table::new(100.0, 6, 97)?;
    let packed = forward(&x, &table, &together, HEADS)?;
    for (i, len) in lengths.into_iter().enumerate() {
        let part = |x: &Tensor| x.narrow(0, together.range(i).start, len)?.contiguous();
        let alone = forward(&part(&x)?, &table, &Ragged::new(&[len], &[9])?, HEADS)?;
        assert_close("alone", &part(&packed)?, &alone, 0.0)?;
    }
    Ok(())
}

#[test]
fn what_does_not_fit_is_named() -> Result<()> {
    let error = Table::new(100.0, 5, 9).unwrap_err();
    assert!(error.to_string().contains("a head of 5 columns"), "{error}");
    let error = Table::new(f64::NAN, 4, 9).unwrap_err();
    assert!(error.to_string().contains("theta is NaN"), "{error}");
    let table = Table::new(100.0, 4, 8)?;
    let error = forward(&random(&[15, 12], 1)?, &table, &ragged()?, HEADS).unwrap_err();
    assert!(error.to_string().contains("a sequence of 9 tokens, but a table of 8"), "{error}");
    Ok(())
}
