use candle_core::{D, Device, Result, Var};

use super::*;
use crate::testing::{assert_close, check_gradient, dropout, narrow, ragged, random, weighted};

const HEADS: usize = 3;
const WIDTH: usize = 12;
const SCALE: f64 = 0.5;

const fn span(causal: bool, window: Option<usize>) -> Span {
    Span { causal, window }
}

/// Everything, and spans whose edges fall inside tiles, on their borders and beyond the sequence.
const SPANS: [Span; 7] = [
    span(false, None),
    span(true, None),
    span(false, Some(0)),
    span(false, Some(3)),
    span(true, Some(3)),
    span(false, Some(64)),
    span(true, Some(usize::MAX)),
];

fn attention<'a>(ragged: &'a Ragged, dropout: Option<&'a Dropout>, span: Span) -> Attention<'a> {
    Attention { ragged, heads: HEADS, scale: SCALE, dropout, span }
}

fn inputs(t: usize) -> Result<[Tensor; 4]> {
    Ok([
        random(&[t, WIDTH], 1)?,
        random(&[t, WIDTH], 2)?,
        random(&[t, WIDTH], 3)?,
        random(&[t, WIDTH], 4)?,
    ])
}

/// `[o, dq, dk, dv]`.
fn run(attention: Attention<'_>, [q, k, v, d_o]: [&Tensor; 4]) -> Result<[Tensor; 4]> {
    let (o, lse) = forward(attention, q, k, v)?;
    let saved = Saved { q: q.clone(), k: k.clone(), v: v.clone(), o: o.clone(), lse };
    let (dq, dk, dv) = backward(attention, &saved, d_o)?;
    Ok([o, dq, dk, dv])
}

#[test]
fn gradients_match_finite_differences() -> Result<()> {
    let (ragged, dropout) = (ragged()?, dropout());
    let [q, k, v, d_o] = inputs(15)?;
    for (dropout, span) in SPANS.iter().flat_map(|s| [(None, *s), (Some(&dropout), *s)]) {
        let attention = attention(&ragged, dropout, span);
        let [_, dq, dk, dv] = run(attention, [&q, &k, &v, &d_o])?;
        let loss =
            |q: &Tensor, k: &Tensor, v: &Tensor| weighted(&forward(attention, q, k, v)?.0, &d_o);
        check_gradient("q", &q, &dq, |q| loss(q, &k, &v))?;
        check_gradient("k", &k, &dk, |k| loss(&q, k, &v))?;
        check_gradient("v", &v, &dv, |v| loss(&q, &k, v))?;
    }
    Ok(())
}

/// `[h, len, len]` of `value(head, i, j)`.
fn scores(len: usize, value: impl Fn(usize, usize, usize) -> f64) -> Result<Tensor> {
    let all = (0..HEADS * len * len).map(|at| value(at / len / len, at / len % len, at % len));
    Tensor::from_vec(all.collect::<Vec<f64>>(), (HEADS, len, len), &Device::Cpu)
}

/// Attention within one sequence by candle, and its gradients by candle's autograd: `[o, dq, dk, dv]`.
fn candles(
    span: Span,
    dropout: Option<(&Dropout, u32)>,
    [q, k, v, d_o]: [&Tensor; 4],
) -> Result<[Tensor; 4]> {
    let len = q.dim(0)?;
    let [q, k, v] = [Var::from_tensor(q)?, Var::from_tensor(k)?, Var::from_tensor(v)?];
    let split = |x: &Tensor| x.reshape((len, HEADS, WIDTH / HEADS))?.transpose(0, 1)?.contiguous();
    let hidden = scores(len, |_, i, j| {
        let seen =
            (!span.causal || j <= i) && span.window.is_none_or(|window| i.abs_diff(j) <= window);
        if seen { 0.0 } else { -1e30 }
    })?;
    let s = ((split(&q)?.matmul(&split(&k)?.t()?)? * SCALE)? + hidden)?;
    let exps = s.broadcast_sub(&s.max_keepdim(D::Minus1)?)?.exp()?;
    let mut p = exps.broadcast_div(&exps.sum_keepdim(D::Minus1)?)?;
    if let Some((dropout, sample)) = dropout {
        let factors = |head: usize, i: usize| {
            let mut factors = vec![f64::NAN; len];
            dropout.head(head).factors(sample, i as u32, &mut factors);
            factors
        };
        let rows: Vec<Vec<f64>> = (0..HEADS * len).map(|at| factors(at / len, at % len)).collect();
        p = (p * scores(len, |head, i, j| rows[head * len + i][j])?)?;
    }
    let o = p.matmul(&split(&v)?)?.transpose(0, 1)?.reshape((len, WIDTH))?;
    let autograd = (&o * d_o)?.sum_all()?.backward()?;
    let gradient = |x: &Var| autograd.get(x).expect("every input has a gradient").clone();
    Ok([o, gradient(&q), gradient(&k), gradient(&v)])
}

#[test]
fn values_and_gradients_are_candles_at_lengths_that_cross_tiles() -> Result<()> {
    let dropout = dropout();
    for (len, span) in [1usize, 2, 63, 64, 65, 130].into_iter().flat_map(|l| SPANS.map(|s| (l, s)))
    {
        let ragged = Ragged::new(&[len], &[5])?;
        let [q, k, v, d_o] = inputs(len)?;
        let inputs = [&q, &k, &v, &d_o];
        for dropout in [None, Some(&dropout)] {
            let want = candles(span, dropout.map(|dropout| (dropout, 5)), inputs)?;
            let got = run(attention(&ragged, dropout, span), inputs)?;
            let small = narrow(&inputs)?;
            let small = [&small[0], &small[1], &small[2], &small[3]];
            let single = run(attention(&ragged, dropout, span), small)?;
            for (i, what) in ["o", "dq", "dk", "dv"].into_iter().enumerate() {
                let what = format!("{what} of {len} in {span:?}");
                // Measured: 6e-16, and 3e-7 in f32.
                assert_close(&what, &got[i], &want[i], 1e-14)?;
                assert_close(&format!("{what}, f32"), &single[i], &want[i], 1e-6)?;
            }
        }
    }
    Ok(())
}

#[test]
fn packed_sequences_equal_the_same_alone() -> Result<()> {
    let lengths = [1usize, 2, 97, 257, 13];
    let samples = [8, 3, 77, 1000, 2];
    let total = lengths.iter().sum();
    let together = Ragged::new(&lengths, &samples)?;
    let dropout = dropout();
    let [q, k, v, d_o] = inputs(total)?;
    for span in SPANS {
        let packed = run(attention(&together, Some(&dropout), span), [&q, &k, &v, &d_o])?;
        let mut start = 0;
        for (len, sample) in lengths.into_iter().zip(samples) {
            let part = |x: &Tensor| x.narrow(0, start, len)?.contiguous();
            let one = Ragged::new(&[len], &[sample])?;
            let [q, k, v, d_o] = [part(&q)?, part(&k)?, part(&v)?, part(&d_o)?];
            let alone = run(attention(&one, Some(&dropout), span), [&q, &k, &v, &d_o])?;
            for (packed, alone) in packed.iter().zip(&alone) {
                assert_close("packed", &part(packed)?, alone, 1e-13)?;
            }
            start += len;
        }
    }
    Ok(())
}

/// A NaN would show wherever it is multiplied, be it by zero.
#[test]
fn keys_that_no_query_of_a_tile_sees_are_not_read() -> Result<()> {
    let ragged = Ragged::new(&[257], &[5])?;
    let [q, k, v, d_o] = inputs(257)?;
    let nan = Tensor::full(f64::NAN, (100, WIDTH), &Device::Cpu)?;
    let spoilt = |x: &Tensor| Tensor::cat(&[&x.narrow(0, 0, 157)?, &nan], 0)?.contiguous();
    for span in [span(true, None), span(false, Some(3)), span(true, Some(64))] {
        let attention = attention(&ragged, None, span);
        let want = run(attention, [&q, &k, &v, &d_o])?;
        let got = run(attention, [&q, &spoilt(&k)?, &spoilt(&v)?, &d_o])?;
        // Queries 0..128 are the first two tiles.
        for (got, want) in got.iter().zip(&want).take(2) {
            let first = |x: &Tensor| x.narrow(0, 0, 128);
            assert_close("first tiles", &first(got)?, &first(want)?, 0.0)?;
        }
    }
    Ok(())
}
