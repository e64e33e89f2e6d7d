use candle_core::{DType, Device, Result};
use rayon::ThreadPoolBuilder;

use super::*;
use crate::testing::{assert_close, check_gradient, narrow, ragged, random, weighted, zeros};

fn random_operands(t: usize, h: usize, width: usize) -> Result<[Tensor; 3]> {
    Ok([random(&[t, h], 1)?, random(&[t, width], 2)?, (random(&[width], 3)? * 2.0)?])
}

fn of([x, u, v]: &[Tensor; 3]) -> Operands<'_> {
    Operands { x, u, v }
}

#[test]
fn values_are_candles() -> Result<()> {
    let ragged = Ragged::new(&[1, 97, 2, 257], &[4, 3, 2, 1])?;
    let all = random_operands(357, 19, 23)?;
    let (y, a) = forward(of(&all), &ragged)?;
    let [x, u, v] = &all;
    let (mut want_y, mut want_a) = (vec![], vec![]);
    for i in 0..4 {
        let rows = ragged.range(i);
        let own = |t: &Tensor| t.narrow(0, rows.start, rows.len());
        let scores = own(u)?.matmul(&v.unsqueeze(1)?)?;
        let exps = scores.broadcast_sub(&scores.max_keepdim(0)?)?.exp()?;
        let a = exps.broadcast_div(&exps.sum_keepdim(0)?)?;
        want_y.push(own(x)?.broadcast_mul(&a)?.sum_keepdim(0)?);
        want_a.push(a.squeeze(1)?);
    }
    let (want_y, want_a) = (Tensor::cat(&want_y, 0)?, Tensor::cat(&want_a, 0)?);
    // Sums of up to 257 f64.
    assert_close("a", &a, &want_a, 1e-14)?;
    assert_close("y", &y, &want_y, 1e-14)?;
    assert_close("a alone", &weights(u, v, &ragged)?, &a, 0.0)?;
    let small = narrow(&[x, u, v])?;
    let (y, a) = forward(Operands { x: &small[0], u: &small[1], v: &small[2] }, &ragged)?;
    // Scores of up to 15 are off by 1e-6, and so are the weights.
    assert_close("a f32", &a, &want_a, 2e-6)?;
    assert_close("y f32", &y, &want_y, 2e-6)
}

#[test]
fn gradients_match_finite_differences() -> Result<()> {
    let ragged = ragged()?;
    for (h, width) in [(1, 1), (7, 19), (19, 3)] {
        let all = random_operands(15, h, width)?;
        let [x, u, v] = &all;
        let dy = random(&[3, h], 4)?;
        let (_, a) = forward(of(&all), &ragged)?;
        let dv = zeros(v)?;
        let d = backward(of(&all), &a, &dy, &ragged, Some(&dv))?;
        let loss = |operands: Operands<'_>| weighted(&forward(operands, &ragged)?.0, &dy);
        check_gradient("x", x, &d.x, |x| loss(Operands { x, u, v }))?;
        check_gradient("u", u, &d.u, |u| loss(Operands { x, u, v }))?;
        check_gradient("v", v, &dv, |v| loss(Operands { x, u, v }))?;
    }
    Ok(())
}

#[test]
fn the_gradient_of_the_context_accumulates_and_need_not_be_given() -> Result<()> {
    let (ragged, all, dy) = (ragged()?, random_operands(15, 7, 5)?, random(&[3, 7], 4)?);
    let (_, a) = forward(of(&all), &ragged)?;
    let (once, twice) = (zeros(&all[2])?, zeros(&all[2])?);
    let with = backward(of(&all), &a, &dy, &ragged, Some(&once))?;
    for _ in 0..2 {
        backward(of(&all), &a, &dy, &ragged, Some(&twice))?;
    }
    assert_close("2 dv", &twice, &(once * 2.0)?, 1e-15)?;
    let without = backward(of(&all), &a, &dy, &ragged, None)?;
    assert_close("dx", &without.x, &with.x, 0.0)?;
    assert_close("du", &without.u, &with.u, 0.0)
}

#[test]
fn any_number_of_threads_and_any_batch_gives_the_same_bits() -> Result<()> {
    let lengths: Vec<usize> = (0..29).map(|i| 1 + i * 17 % 23).collect();
    let ragged = Ragged::new(&lengths, &[3; 29])?;
    let all = random_operands(ragged.tokens(), 37, 21)?;
    let small = narrow(&[&all[0], &all[1], &all[2], &random(&[29, 37], 4)?])?;
    let run = |threads| {
        let pool = ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
        pool.install(|| {
            let operands = Operands { x: &small[0], u: &small[1], v: &small[2] };
            let (y, a) = forward(operands, &ragged)?;
            let dv = zeros(operands.v)?;
            let d = backward(operands, &a, &small[3], &ragged, Some(&dv))?;
            let bits = |t: &Tensor| {
                let values = t.flatten_all()?.to_vec1::<f32>()?;
                Ok::<_, candle_core::Error>(values.into_iter().map(f32::to_bits).collect())
            };
            [y, a, d.x, d.u, dv].iter().map(bits).collect::<Result<Vec<Vec<u32>>>>()
        })
    };
    let one = run(1)?;
    assert!(run(2)? == one && run(5)? == one);
    for i in [0, 7, 28] {
        let rows = ragged.range(i);
        let own = |t: &Tensor| t.narrow(0, rows.start, rows.len())?.copy();
        let alone = Operands { x: &own(&small[0])?, u: &own(&small[1])?, v: &small[2] };
        let (y, _) = forward(alone, &Ragged::new(&[rows.len()], &[3])?)?;
        let y: Vec<u32> =
            y.flatten_all()?.to_vec1::<f32>()?.into_iter().map(f32::to_bits).collect();
        assert_eq!(y, one[0][i * 37..][..37], "sequence {i}");
    }
    Ok(())
}

/// Weights of large scores are finite, and a NaN reaches no other sequence.
#[test]
fn large_scores_are_finite_and_nan_is_not_hidden() -> Result<()> {
    let ragged = ragged()?;
    let all = random_operands(15, 7, 5)?;
    for dtype in [DType::F64, DType::F32] {
        let [u, v] = [((&all[1] * 1e4)?).to_dtype(dtype)?, all[2].to_dtype(dtype)?];
        let a = weights(&u, &v, &ragged)?.to_dtype(DType::F64)?.to_vec1::<f64>()?;
        for i in 0..3 {
            let sum: f64 = a[ragged.range(i)].iter().sum();
            assert!((sum - 1.0).abs() <= 1e-6, "{sum}");
        }
        let mut values = all[1].to_vec2::<f64>()?;
        values[7][3] = f64::NAN;
        let u = Tensor::new(values, &Device::Cpu)?.to_dtype(dtype)?;
        let a = weights(&u, &v, &ragged)?.to_dtype(DType::F64)?.to_vec1::<f64>()?;
        assert!(a[..6].iter().all(|a| a.is_finite()) && a[6..].iter().all(|a| a.is_nan()), "{a:?}");
    }
    Ok(())
}

#[test]
fn an_empty_batch_pools_to_nothing_and_shapes_that_do_not_fit_are_named() -> Result<()> {
    let empty = Ragged::new(&[], &[])?;
    let all = random_operands(0, 7, 5)?;
    let (y, a) = forward(of(&all), &empty)?;
    assert_eq!((y.dims(), a.dims()), (&[0, 7][..], &[0][..]));
    let dv = zeros(&all[2])?;
    let d = backward(of(&all), &a, &y, &empty, Some(&dv))?;
    assert_eq!((d.x.dims(), d.u.dims()), (&[0, 7][..], &[0, 5][..]));
    assert_close("dv", &dv, &zeros(&all[2])?, 0.0)?;
    let ragged = ragged()?;
    let [x, u, v] = random_operands(15, 7, 5)?;
    let says = |operands, said: &str| {
        let error = forward(operands, &ragged).unwrap_err().to_string();
        assert!(error.contains(said), "{error}");
    };
    let short = u.narrow(0, 0, 14)?;
    says(
        Operands { x: &x, u: &short, v: &v },
        "attention_pooling: u has shape [14, 5], expected [15, 5]",
    );
    says(Operands { x: &x, u: &u, v: &x }, "attention_pooling: v has shape [15, 7], expected [5]");
    Ok(())
}
