use candle_core::{DType, Device, Result};

use super::*;
use crate::testing::{
    assert_close, check_gradient, dropout, narrow, ragged, random, weighted, zeros,
};

/// Both results are used, as a pre-LN block uses them: the loss weighs y by `dy` and z by `dz`.
#[test]
fn gradients_match_finite_differences() -> Result<()> {
    let [x, residual] = [random(&[15, 19], 1)?, random(&[15, 19], 2)?];
    let [dy, dz] = [random(&[15, 19], 3)?, random(&[15, 19], 7)?];
    let [bias, gamma, beta] = [random(&[19], 4)?, random(&[19], 5)?, random(&[19], 6)?];
    let (ragged, dropout) = (ragged()?, dropout());
    let dropouts = [None, Some((&dropout, ragged.token_rows()))];
    for (dropout, dz) in dropouts.into_iter().flat_map(|d| [(d, None), (d, Some(&dz))]) {
        let run = |x: &Tensor, bias: &Tensor, residual: &Tensor, gamma: &Tensor, beta: &Tensor| {
            let junction = Junction { bias: Some(bias), dropout, residual: Some(residual) };
            forward(x, junction, LayerNorm { gamma, beta: Some(beta), eps: 1e-5 })
        };
        let loss = |x: &Tensor, bias: &Tensor, residual: &Tensor, gamma: &Tensor, beta: &Tensor| {
            let (y, saved) = run(x, bias, residual, gamma, beta)?;
            Ok(weighted(&y, &dy)? + dz.map_or(Ok(0.0), |dz| weighted(saved.z(), dz))?)
        };
        let (_, saved) = run(&x, &bias, &residual, &gamma, &beta)?;
        let [dgamma, dbeta, dbias] = [zeros(&gamma)?, zeros(&beta)?, zeros(&bias)?];
        let gradients = Gradients { gamma: &dgamma, beta: Some(&dbeta), bias: Some(&dbias) };
        let junction = Junction { bias: Some(&bias), dropout, residual: Some(&residual) };
        let norm = LayerNorm { gamma: &gamma, beta: Some(&beta), eps: 1e-5 };
        let (dx, dresidual) = backward(&dy, &saved, dz, junction, norm, Some(gradients))?;
        check_gradient("x", &x, &dx, |x| loss(x, &bias, &residual, &gamma, &beta))?;
        check_gradient("residual", &residual, &dresidual, |r| loss(&x, &bias, r, &gamma, &beta))?;
        check_gradient("bias", &bias, &dbias, |b| loss(&x, b, &residual, &gamma, &beta))?;
        check_gradient("gamma", &gamma, &dgamma, |g| loss(&x, &bias, &residual, g, &beta))?;
        check_gradient("beta", &beta, &dbeta, |b| loss(&x, &bias, &residual, &gamma, b))?;
    }
    Ok(())
}

#[test]
fn without_a_shift_it_is_the_norm_with_a_shift_of_zero() -> Result<()> {
    let [x, dy, dz] = [random(&[97, 33], 1)?, random(&[97, 33], 2)?, random(&[97, 33], 3)?];
    let gamma = random(&[33], 4)?;
    let zero = Tensor::zeros(33, DType::F64, &Device::Cpu)?;
    for dtype in [DType::F64, DType::F32] {
        let [x, dy, dz] = [x.to_dtype(dtype)?, dy.to_dtype(dtype)?, dz.to_dtype(dtype)?];
        let (gamma, zero) = (gamma.to_dtype(dtype)?, zero.to_dtype(dtype)?);
        let run = |beta: Option<&Tensor>| {
            let norm = LayerNorm { gamma: &gamma, beta, eps: 1e-5 };
            let (y, saved) = forward(&x, Junction::default(), norm)?;
            let dgamma = zeros(&gamma)?;
            let gradients = Gradients { gamma: &dgamma, beta: None, bias: None };
            let junction = Junction::default();
            let (dx, _) = backward(&dy, &saved, Some(&dz), junction, norm, Some(gradients))?;
            Ok::<_, candle_core::Error>([y, dx, dgamma])
        };
        for (got, want) in run(None)?.iter().zip(run(Some(&zero))?) {
            assert_close("shift", got, &want, 0.0)?;
        }
    }
    Ok(())
}

#[test]
fn adding_without_a_norm_is_the_stream_of_the_norm() -> Result<()> {
    let [x, residual, dz] = [random(&[15, 19], 1)?, random(&[15, 19], 2)?, random(&[15, 19], 3)?];
    let bias = random(&[19], 4)?;
    let gamma = random(&[19], 5)?;
    let (ragged, dropout) = (ragged()?, dropout());
    for dropout in [None, Some((&dropout, ragged.token_rows()))] {
        let run = |x: &Tensor, bias: &Tensor| {
            add(x, Junction { bias: Some(bias), dropout, residual: Some(&residual) })
        };
        let junction = Junction { bias: Some(&bias), dropout, residual: Some(&residual) };
        let (_, saved) = forward(&x, junction, LayerNorm { gamma: &gamma, beta: None, eps: 1e-5 })?;
        assert_close("z", &run(&x, &bias)?, saved.z(), 0.0)?;
        let dbias = zeros(&bias)?;
        let dx = add_backward(&dz, junction, Some(&dbias))?;
        check_gradient("x", &x, &dx, |x| weighted(&run(x, &bias)?, &dz))?;
        check_gradient("bias", &bias, &dbias, |b| weighted(&run(&x, b)?, &dz))?;
    }
    let plain = add(&x, Junction { residual: Some(&residual), ..Junction::default() })?;
    assert_close("x + r", &plain, &(&x + &residual)?, 0.0)?;
    assert_close("x", &add(&x, Junction::default())?, &x, 0.0)?;
    let small = narrow(&[&x, &residual])?;
    let plain = add(&small[0], Junction { residual: Some(&small[1]), ..Junction::default() })?;
    assert_close("x + r f32", &plain, &(&small[0] + &small[1])?, 0.0)
}

#[test]
fn a_large_mean_does_not_cancel() -> Result<()> {
    // mean² is 1e8 times the variance: E[z²] - mean² in f32 would be pure rounding.
    let x = (random(&[4, 100], 1)? + 10_000.0)?;
    let (gamma, beta) = (random(&[100], 2)?, random(&[100], 3)?);
    let norm = LayerNorm { gamma: &gamma, beta: Some(&beta), eps: 1e-12 };
    let small = narrow(&[&x, &gamma, &beta])?;
    let exact = forward(&small[0].to_dtype(DType::F64)?, Junction::default(), norm)?;
    let norm = LayerNorm { gamma: &small[1], beta: Some(&small[2]), eps: 1e-12 };
    let (y, _) = forward(&small[0], Junction::default(), norm)?;
    assert_close("y", &y, &exact.0, 2e-3)
}
