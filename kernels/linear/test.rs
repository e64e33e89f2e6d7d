use candle_core::Result;

use super::*;
use crate::testing::{assert_close, check_gradient, narrow, random, weighted, zeros};

#[test]
fn gradients_match_finite_differences() -> Result<()> {
    let (x, w, b) = (random(&[37, 11], 1)?, random(&[7, 11], 2)?, random(&[7], 3)?);
    let dy = random(&[37, 7], 4)?;
    let loss = |x: &Tensor, w: &Tensor, b: &Tensor| weighted(&forward(x, w, Some(b))?, &dy);
    let (dw, db) = (zeros(&w)?, zeros(&b)?);
    backward_weight(&dy, &x, &dw)?;
    backward_bias(&dy, &db)?;
    check_gradient("x", &x, &backward_input(&dy, &w)?, |x| loss(x, &w, &b))?;
    check_gradient("w", &w, &dw, |w| loss(&x, w, &b))?;
    check_gradient("b", &b, &db, |b| loss(&x, &w, b))
}

#[test]
fn gradients_accumulate() -> Result<()> {
    let (x, w, dy) = (random(&[5, 3], 1)?, random(&[4, 3], 2)?, random(&[5, 4], 3)?);
    let (dw, db, dx) = (zeros(&w)?, random(&[4], 5)?, random(&[5, 3], 6)?);
    let (db_before, dx_before) = (db.copy()?, dx.copy()?);
    backward_weight(&dy, &x, &dw)?;
    let once = dw.copy()?;
    backward_weight(&dy, &x, &dw)?;
    assert_close("dw", &dw, &(once * 2.0)?, 1e-12)?;
    backward_bias(&dy, &db)?;
    assert_close("db", &db, &(dy.sum(0)? + db_before)?, 1e-12)?;
    backward_input_into(&dy, &w, &dx)?;
    assert_close("dx", &dx, &(dy.matmul(&w)? + dx_before)?, 1e-12)?;
    let y = random(&[5, 4], 7)?;
    let y_before = y.copy()?;
    forward_into(&x, &w, &y)?;
    assert_close("y", &y, &(x.matmul(&w.t()?)? + y_before)?, 1e-12)
}

#[test]
fn f32_matches_f64_at_odd_sizes() -> Result<()> {
    for (t, k, n) in [(1, 1, 1), (3, 130, 65), (97, 64, 33), (257, 31, 129)] {
        let (x, w, b) = (random(&[t, k], 1)?, random(&[n, k], 2)?, random(&[n], 3)?);
        let small = narrow(&[&x, &w, &b])?;
        let y = forward(&small[0], &small[1], Some(&small[2]))?;
        assert_close("y", &y, &forward(&x, &w, Some(&b))?, 1e-5)?;
        assert_close("y", &forward(&x, &w, None)?, &x.matmul(&w.t()?)?, 1e-12)?;
    }
    Ok(())
}

#[test]
fn shapes_that_do_not_fit_are_named() -> Result<()> {
    let error = forward(&random(&[2, 3], 1)?, &random(&[4, 5], 2)?, None).unwrap_err();
    assert!(error.to_string().contains("linear: x [2, 3] does not fit weight [4, 5]"), "{error}");
    Ok(())
}
