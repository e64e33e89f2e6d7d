use candle_core::Result;

use super::*;
use crate::testing::{assert_close, check_gradient, narrow, random, weighted, zeros};

const ALL: [Activation; 4] =
    [Activation::Gelu, Activation::GeluTanh, Activation::Relu, Activation::Tanh];

#[test]
fn gradients_match_finite_differences() -> Result<()> {
    for activation in ALL {
        let h = (random(&[35, 9], 1)? * 3.0)?;
        let (b, dy) = (random(&[9], 2)?, random(&[35, 9], 3)?);
        let db = zeros(&b)?;
        let dh = backward(&dy, &h, &b, activation, Some(&db))?;
        let loss = |h: &Tensor, b: &Tensor| weighted(&forward(h, b, activation)?, &dy);
        check_gradient("h", &h, &dh, |h| loss(h, &b))?;
        check_gradient("b", &b, &db, |b| loss(&h, b))?;
    }
    Ok(())
}

#[test]
fn values_are_candles() -> Result<()> {
    let (h, b) = ((random(&[3, 40], 1)? * 4.0)?, random(&[40], 2)?);
    let u = h.broadcast_add(&b)?;
    let wanted = [u.gelu_erf()?, u.gelu()?, u.relu()?, u.tanh()?];
    for (activation, wanted) in ALL.into_iter().zip(wanted) {
        assert_close("f64", &forward(&h, &b, activation)?, &wanted, 1e-12)?;
        let small = narrow(&[&h, &b])?;
        assert_close("f32", &forward(&small[0], &small[1], activation)?, &wanted, 1e-6)?;
    }
    Ok(())
}
