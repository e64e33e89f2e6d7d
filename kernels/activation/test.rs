use candle_core::{Device, Result};

use super::*;
use crate::testing::{assert_close, check_gradient, narrow, random, weighted, zeros};

const ALL: [Activation; 5] =
    [Activation::Gelu, Activation::GeluTanh, Activation::Relu, Activation::Silu, Activation::Tanh];

/// Candle's own functions, in the order of `ALL`.
fn candles(u: &Tensor) -> Result<[Tensor; 5]> {
    Ok([u.gelu_erf()?, u.gelu()?, u.relu()?, u.silu()?, u.tanh()?])
}

#[test]
fn gradients_match_finite_differences() -> Result<()> {
    for activation in ALL {
        let h = (random(&[35, 9], 1)? * 3.0)?;
        let (b, dy) = (random(&[9], 2)?, random(&[35, 9], 3)?);
        let db = zeros(&b)?;
        let dh = backward(&dy, &h, Some(&b), activation, Some(&db))?;
        let loss = |h: &Tensor, b: &Tensor| weighted(&forward(h, Some(b), activation)?, &dy);
        check_gradient("h", &h, &dh, |h| loss(h, &b))?;
        check_gradient("b", &b, &db, |b| loss(&h, b))?;
    }
    Ok(())
}

#[test]
fn gated_gradients_match_finite_differences() -> Result<()> {
    for activation in ALL {
        let h = (random(&[35, 14], 1)? * 3.0)?;
        let (b, dy) = (random(&[14], 2)?, random(&[35, 7], 3)?);
        let db = zeros(&b)?;
        let dh = gated_backward(&dy, &h, Some(&b), activation, Some(&db))?;
        let loss = |h: &Tensor, b: &Tensor| weighted(&gated_forward(h, Some(b), activation)?, &dy);
        check_gradient("h", &h, &dh, |h| loss(h, &b))?;
        check_gradient("b", &b, &db, |b| loss(&h, b))?;
    }
    Ok(())
}

#[test]
fn values_are_candles() -> Result<()> {
    let (h, b) = ((random(&[3, 40], 1)? * 4.0)?, random(&[40], 2)?);
    let u = h.broadcast_add(&b)?;
    let gate = u.narrow(1, 20, 20)?.contiguous()?;
    let input = u.narrow(1, 0, 20)?.contiguous()?;
    let small = narrow(&[&h, &b])?;
    let (small_h, small_b) = (&small[0], Some(&small[1]));
    for (i, activation) in ALL.into_iter().enumerate() {
        let wanted = &candles(&u)?[i];
        assert_close("f64", &forward(&h, Some(&b), activation)?, wanted, 1e-12)?;
        assert_close("f32", &forward(small_h, small_b, activation)?, wanted, 1e-6)?;
        let wanted = (&candles(&input)?[i] * &gate)?;
        assert_close("gated", &gated_forward(&h, Some(&b), activation)?, &wanted, 1e-12)?;
        assert_close("gated f32", &gated_forward(small_h, small_b, activation)?, &wanted, 1e-6)?;
    }
    Ok(())
}

#[test]
fn no_bias_is_a_bias_of_zero() -> Result<()> {
    let (h, dy) = ((random(&[97, 34], 1)? * 4.0)?, random(&[97, 34], 2)?);
    let half = dy.narrow(1, 0, 17)?.contiguous()?;
    let small = narrow(&[&h, &dy, &half])?;
    for (h, dy, half) in [(&h, &dy, &half), (&small[0], &small[1], &small[2])] {
        let zero = h.narrow(0, 0, 1)?.zeros_like()?.squeeze(0)?;
        for activation in ALL {
            let run = |bias| {
                Ok::<_, candle_core::Error>([
                    forward(h, bias, activation)?,
                    gated_forward(h, bias, activation)?,
                    backward(dy, h, bias, activation, None)?,
                    gated_backward(half, h, bias, activation, None)?,
                ])
            };
            for (got, want) in run(None)?.iter().zip(run(Some(&zero))?) {
                assert_close("without bias", got, &want, 0.0)?;
            }
        }
    }
    Ok(())
}

#[test]
fn silu_saturates_and_keeps_nan() -> Result<()> {
    let h = Tensor::new(&[[-1e4f32, -100.0, 0.0, 100.0, f32::NAN]], &Device::Cpu)?;
    let y = forward(&h, None, Activation::Silu)?.flatten_all()?.to_vec1::<f32>()?;
    assert!(y[0].abs() < 1e-30 && y[1].abs() < 1e-30, "{y:?}");
    assert_eq!(y[2..4], [0.0, 100.0]);
    assert!(y[4].is_nan());
    Ok(())
}

#[test]
fn an_odd_width_has_no_gate() -> Result<()> {
    let error = gated_forward(&random(&[2, 5], 1)?, None, Activation::Gelu).unwrap_err();
    assert!(error.to_string().contains("[2, 5] is not an input beside a gate"), "{error}");
    Ok(())
}
