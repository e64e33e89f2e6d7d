use candle_core::{D, Result};

use super::*;
use crate::testing::{assert_close, check_gradient, dropout, narrow, ragged, random, weighted};

const HEADS: usize = 3;
const WIDTH: usize = 12;

fn attention<'a>(ragged: &'a Ragged, dropout: Option<&'a Dropout>) -> Attention<'a> {
    Attention { ragged, heads: HEADS, scale: 0.5, dropout }
}

fn inputs(t: usize) -> Result<[Tensor; 4]> {
    Ok([
        random(&[t, WIDTH], 1)?,
        random(&[t, WIDTH], 2)?,
        random(&[t, WIDTH], 3)?,
        random(&[t, WIDTH], 4)?,
    ])
}

fn gradients(
    attention: Attention<'_>,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    d_o: &Tensor,
) -> Result<(Tensor, Tensor, Tensor)> {
    let (o, lse) = forward(attention, q, k, v)?;
    let saved = Saved { q: q.clone(), k: k.clone(), v: v.clone(), o, lse };
    backward(attention, &saved, d_o)
}

#[test]
fn gradients_match_finite_differences() -> Result<()> {
    let (ragged, dropout) = (ragged()?, dropout());
    let [q, k, v, d_o] = inputs(15)?;
    for dropout in [None, Some(&dropout)] {
        let attention = attention(&ragged, dropout);
        let (dq, dk, dv) = gradients(attention, &q, &k, &v, &d_o)?;
        let loss =
            |q: &Tensor, k: &Tensor, v: &Tensor| weighted(&forward(attention, q, k, v)?.0, &d_o);
        check_gradient("q", &q, &dq, |q| loss(q, &k, &v))?;
        check_gradient("k", &k, &dk, |k| loss(&q, k, &v))?;
        check_gradient("v", &v, &dv, |v| loss(&q, &k, v))?;
    }
    Ok(())
}

/// Softmax attention of one sequence by candle, and its gradients by candle's autograd.
#[test]
fn values_and_gradients_are_candles_at_lengths_that_cross_tiles() -> Result<()> {
    for len in [1usize, 2, 63, 64, 65, 130] {
        let ragged = Ragged::new(&[len], &[5])?;
        let [q, k, v, d_o] = inputs(len)?;
        let attention = attention(&ragged, None);
        let vars = [&q, &k, &v].map(candle_core::Var::from_tensor);
        let [q_var, k_var, v_var] = vars;
        let (q_var, k_var, v_var) = (q_var?, k_var?, v_var?);
        let split =
            |x: &Tensor| x.reshape((len, HEADS, WIDTH / HEADS))?.transpose(0, 1)?.contiguous();
        let scores = (split(&q_var)?.matmul(&split(&k_var)?.t()?)? * 0.5)?;
        let exps = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?)?.exp()?;
        let p = exps.broadcast_div(&exps.sum_keepdim(D::Minus1)?)?;
        let want = p.matmul(&split(&v_var)?)?.transpose(0, 1)?.reshape((len, WIDTH))?;
        let autograd = (&want * &d_o)?.sum_all()?.backward()?;
        let (o, _) = forward(attention, &q, &k, &v)?;
        assert_close("o", &o, &want, 1e-12)?;
        let (dq, dk, dv) = gradients(attention, &q, &k, &v, &d_o)?;
        for (name, got, var) in [("q", dq, &q_var), ("k", dk, &k_var), ("v", dv, &v_var)] {
            assert_close(name, &got, autograd.get(var).expect("gradient"), 1e-11)?;
        }
        let small = narrow(&[&q, &k, &v, &d_o])?;
        assert_close(
            "o f32",
            &forward(attention, &small[0], &small[1], &small[2])?.0,
            &want,
            2e-6,
        )?;
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
    let packed = attention(&together, Some(&dropout));
    let (o, _) = forward(packed, &q, &k, &v)?;
    let (dq, dk, dv) = gradients(packed, &q, &k, &v, &d_o)?;
    let mut start = 0;
    for (len, sample) in lengths.into_iter().zip(samples) {
        let part = |x: &Tensor| x.narrow(0, start, len)?.contiguous();
        let one = Ragged::new(&[len], &[sample])?;
        let alone = attention(&one, Some(&dropout));
        let [q, k, v, d_o] = [part(&q)?, part(&k)?, part(&v)?, part(&d_o)?];
        assert_close("o", &part(&o)?, &forward(alone, &q, &k, &v)?.0, 1e-13)?;
        let one = gradients(alone, &q, &k, &v, &d_o)?;
        assert_close("dq", &part(&dq)?, &one.0, 1e-13)?;
        assert_close("dk", &part(&dk)?, &one.1, 1e-13)?;
        assert_close("dv", &part(&dv)?, &one.2, 1e-13)?;
        start += len;
    }
    Ok(())
}
