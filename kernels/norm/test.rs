use candle_core::Result;

use super::*;
use crate::testing::{
    assert_close, check_gradient, dropout, narrow, ragged, random, weighted, zeros,
};

#[test]
fn gradients_match_finite_differences() -> Result<()> {
    let [x, residual, dy] = [random(&[15, 19], 1)?, random(&[15, 19], 2)?, random(&[15, 19], 3)?];
    let [bias, gamma, beta] = [random(&[19], 4)?, random(&[19], 5)?, random(&[19], 6)?];
    let (ragged, dropout) = (ragged()?, dropout());
    for dropout in [None, Some((&dropout, ragged.token_rows()))] {
        let run = |x: &Tensor, bias: &Tensor, residual: &Tensor, gamma: &Tensor, beta: &Tensor| {
            let junction = Junction { bias: Some(bias), dropout, residual: Some(residual) };
            forward(x, junction, LayerNorm { gamma, beta, eps: 1e-5 })
        };
        let loss = |x: &Tensor, bias: &Tensor, residual: &Tensor, gamma: &Tensor, beta: &Tensor| {
            weighted(&run(x, bias, residual, gamma, beta)?.0, &dy)
        };
        let (_, saved) = run(&x, &bias, &residual, &gamma, &beta)?;
        let [dgamma, dbeta, dbias] = [zeros(&gamma)?, zeros(&beta)?, zeros(&bias)?];
        let gradients = Gradients { gamma: &dgamma, beta: &dbeta, bias: Some(&dbias) };
        let junction = Junction { bias: Some(&bias), dropout, residual: Some(&residual) };
        let norm = LayerNorm { gamma: &gamma, beta: &beta, eps: 1e-5 };
        let (dx, dresidual) = backward(&dy, &saved, junction, norm, Some(gradients))?;
        check_gradient("x", &x, &dx, |x| loss(x, &bias, &residual, &gamma, &beta))?;
        check_gradient("residual", &residual, &dresidual, |r| loss(&x, &bias, r, &gamma, &beta))?;
        check_gradient("bias", &bias, &dbias, |b| loss(&x, b, &residual, &gamma, &beta))?;
        check_gradient("gamma", &gamma, &dgamma, |g| loss(&x, &bias, &residual, g, &beta))?;
        check_gradient("beta", &beta, &dbeta, |b| loss(&x, &bias, &residual, &gamma, b))?;
    }
    Ok(())
}

#[test]
fn a_large_mean_does_not_cancel() -> Result<()> {
    // mean² is 1e8 times the variance: E[z²] - mean² in f32 would be pure rounding.
    let x = (random(&[4, 100], 1)? + 10_000.0)?;
    let (gamma, beta) = (random(&[100], 2)?, random(&[100], 3)?);
    let norm = LayerNorm { gamma: &gamma, beta: &beta, eps: 1e-12 };
    let small = narrow(&[&x, &gamma, &beta])?;
    let exact = forward(&small[0].to_dtype(candle_core::DType::F64)?, Junction::default(), norm)?;
    let norm = LayerNorm { gamma: &small[1], beta: &small[2], eps: 1e-12 };
    let (y, _) = forward(&small[0], Junction::default(), norm)?;
    assert_close("y", &y, &exact.0, 2e-3)
}
