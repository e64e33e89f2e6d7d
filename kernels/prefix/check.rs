//! A prefix against the CPU implementation in f64. Kernels may be twice as wrong as a naive bf16
//! implementation.

use candle_core::{DType, Device, Result};

use super::*;
use crate::{
    attention::{
        self, Attention, HEAD, Span,
        check::{NAIVE_HEADS, hold, part, put},
        naive::{Rows, add, dot, round, rounded},
    },
    common::check::{Checker, HEADS, LENGTHS, Sizes, batch, dropout, numbers, random, wide},
};

/// Prefixes that end inside a tile of keys, at its end and behind it; sequences likewise.
pub(crate) fn check(c: &mut Checker, sizes: Sizes) -> Result<()> {
    let cases: &[(&[usize], usize, bool)] = match sizes {
        Sizes::Odd => &[
            (&[1, 17, 130, 64, 2], 1, false),
            (&[97, 3, 65], 20, true),
            (&[70, 1], 64, true),
            (&[200, 5], 65, false),
            (&[33, 97], 256, true),
        ],
        Sizes::Real => &[(&LENGTHS, 20, true)],
    };
    let heads = if sizes == Sizes::Odd { NAIVE_HEADS } else { HEADS };
    for (lengths, n, dropped) in cases {
        compare(c, lengths, heads, *n, dropout().filter(|_| *dropped).as_ref())?;
    }
    Ok(())
}

/// What forward and backward are given, and forward's results, in the order of [`Saved`].
struct Operands {
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    /// Attention's, before the prefix and after it: o and lse.
    own: [Tensor; 2],
    all: [Tensor; 2],
    d_o: Tensor,
    /// The gradient of the queries before it is added to.
    dq: Tensor,
}

impl Operands {
    fn saved(&self) -> Saved<'_> {
        let Self { q, keys, values, all: [o, lse], .. } = self;
        Saved { q, keys, values, o, lse }
    }

    fn wide(&self) -> Result<Self> {
        let pair = |[o, lse]: &[Tensor; 2]| -> Result<[Tensor; 2]> { Ok([wide(o)?, wide(lse)?]) };
        Ok(Self {
            q: wide(&self.q)?,
            keys: wide(&self.keys)?,
            values: wide(&self.values)?,
            own: pair(&self.own)?,
            all: pair(&self.all)?,
            d_o: wide(&self.d_o)?,
            dq: wide(&self.dq)?,
        })
    }
}

/// One head as a naive bf16 implementation has it: products in f64 of operands rounded to bf16.
struct Naive<'a> {
    q: Rows,
    keys: Rows,
    values: Rows,
    own_o: Rows,
    own_lse: &'a [f64],
    o: Rows,
    lse: &'a [f64],
    d_o: Rows,
    dq: Rows,
    scale: f64,
    /// Dropout's factors, `[i][j]`.
    factors: Vec<Vec<f64>>,
}

impl Naive<'_> {
    fn scores(&self, i: usize) -> Vec<f64> {
        self.keys.iter().map(|key| self.scale * dot(&self.q[i], key)).collect()
    }

    /// o'.
    fn forward(&self) -> Rows {
        let of_row = |i: usize| {
            let (scores, own) = (self.scores(i), self.own_lse[i]);
            let max = scores.iter().copied().fold(own, f64::max);
            let sum = (own - max).exp() + scores.iter().map(|s| (s - max).exp()).sum::<f64>();
            let mut o = [0.0; HEAD];
            add(&mut o, (own - max).exp() / sum, &self.own_o[i]);
            for (j, score) in scores.iter().enumerate() {
                let p = (score - max).exp() / sum;
                add(&mut o, round(p * self.factors[i][j]), &self.values[j]);
            }
            o
        };
        rounded((0..self.q.len()).map(of_row).collect())
    }

    /// dq, and dPK and dPV, which are not rounded.
    fn backward(&self) -> [Rows; 3] {
        let mut dq = self.dq.clone();
        let [mut d_keys, mut d_values] = [(); 2].map(|()| vec![[0.0; HEAD]; self.keys.len()]);
        for i in 0..self.q.len() {
            let delta = dot(&self.o[i], &self.d_o[i]);
            for (j, score) in self.scores(i).into_iter().enumerate() {
                let (p, factor) = ((score - self.lse[i]).exp(), self.factors[i][j]);
                let g = p * (dot(&self.d_o[i], &self.values[j]) * factor - delta) * self.scale;
                let g = round(g);
                add(&mut dq[i], g, &self.keys[j]);
                add(&mut d_keys[j], g, &self.q[i]);
                add(&mut d_values[j], round(p * factor), &self.d_o[i]);
            }
        }
        [rounded(dq), d_keys, d_values]
    }
}

/// `[o', dq, dPK, dPV]` of the naive implementation in its heads, and of `exact` in all others.
fn naive(prefix: Prefix<'_>, x: &Operands, exact: [&Tensor; 4]) -> Result<[Tensor; 4]> {
    let (t, n, width) = (prefix.ragged.tokens(), x.keys.dim(0)?, prefix.heads * HEAD);
    let [q, keys, values, d_o, dq] = [&x.q, &x.keys, &x.values, &x.d_o, &x.dq].map(numbers);
    let (q, keys, values, d_o, dq) = (q?, keys?, values?, d_o?, dq?);
    let [own_o, own_lse, o, lse] = [&x.own[0], &x.own[1], &x.all[0], &x.all[1]].map(numbers);
    let (own_o, own_lse, o, lse) = (own_o?, own_lse?, o?, lse?);
    let mut all = exact.into_iter().map(numbers).collect::<Result<Vec<_>>>()?;
    for head in 0..prefix.heads.min(NAIVE_HEADS) {
        let rows = |x: &[f64], rows: usize| part(x, width, 0..rows, head);
        let one = Naive {
            q: rows(&q, t),
            keys: rows(&keys, n),
            values: rows(&values, n),
            own_o: rows(&own_o, t),
            own_lse: &own_lse[head * t..][..t],
            o: rows(&o, t),
            lse: &lse[head * t..][..t],
            d_o: rows(&d_o, t),
            dq: rows(&dq, t),
            scale: prefix.scale,
            factors: factors(prefix, head, n),
        };
        let [dq, d_keys, d_values] = one.backward();
        for (all, rows) in all.iter_mut().zip([&one.forward(), &dq, &d_keys, &d_values]) {
            put(all, width, 0, head, rows);
        }
    }
    let tensor = |i: usize, rows| Tensor::from_slice(&all[i], (rows, width), &Device::Cpu);
    Ok([tensor(0, t)?, tensor(1, t)?, tensor(2, n)?, tensor(3, n)?])
}

/// Dropout's factors on the probabilities of every row, `[T][n]`.
fn factors(prefix: Prefix<'_>, head: usize, n: usize) -> Vec<Vec<f64>> {
    let ids = prefix.ragged.token_rows();
    let row = |row: usize| {
        let mut factors = vec![1.0; n];
        if let Some(dropout) = prefix.dropout {
            dropout.head(head).factors(ids.sample[row], ids.position[row], &mut factors);
        }
        factors
    };
    (0..ids.len()).map(row).collect()
}

fn compare(
    c: &mut Checker,
    lengths: &[usize],
    heads: usize,
    n: usize,
    dropout: Option<&Dropout>,
) -> Result<()> {
    let (ragged, dtype, scale) = (batch(lengths)?, c.attention_dtype(), 0.125);
    let dropped = dropout.is_some();
    c.case(format!("{n} keys, {lengths:?}, {heads} heads, dropout {dropped}, {dtype:?}"));
    let matrix = |rows, seed| c.rounded(&(random(&[rows, heads * HEAD], seed)? * 2.0)?, dtype);
    let (t, prefix) = (ragged.tokens(), Prefix { ragged: &ragged, heads, scale, dropout });
    let (q, keys, values) = (matrix(t, 1)?, matrix(n, 2)?, matrix(n, 3)?);
    let span = Span::default();
    let attention = Attention { ragged: &ragged, heads, scale, dropout: None, span };
    let [k, v] = [wide(&matrix(t, 4)?)?, wide(&matrix(t, 5)?)?];
    let (own_o, own_lse) = attention::forward(attention, &wide(&q)?, &k, &v)?;
    let (own_o, own_lse) = (c.rounded(&own_o, dtype)?, c.rounded(&own_lse, DType::F32)?);
    let (o, lse) = forward(prefix, &q, [&keys, &values], [&own_o, &own_lse])?;
    let (own, all) = ([own_o, own_lse], [o, lse]);
    let x = Operands { q, keys, values, own, all, d_o: matrix(t, 6)?, dq: matrix(t, 7)? };
    // Backward starts from what forward left.
    let exact = x.wide()?;
    let (d_keys, d_values) = backward(prefix, x.saved(), &x.d_o, Some(&x.dq))?;

    let [own_o, own_lse] = &exact.own;
    let tables = [&exact.keys, &exact.values];
    let (exact_o, exact_lse) = forward(prefix, &exact.q, tables, [own_o, own_lse])?;
    let exact_dq = exact.dq.copy()?;
    let (exact_keys, exact_values) = backward(prefix, exact.saved(), &exact.d_o, Some(&exact_dq))?;
    // Scores in f32, as attention's.
    c.check_against("lse", &x.all[1], &exact_lse, &exact_lse, 1e-6)?;
    let got = [&x.all[0], &x.dq, &d_keys, &d_values];
    let want = [&exact_o, &exact_dq, &exact_keys, &exact_values];
    let naive = match dtype {
        DType::BF16 => Some(naive(prefix, &exact, want)?),
        _ => None,
    };
    for (i, what) in ["o", "dq", "dPK", "dPV"].into_iter().enumerate() {
        hold(c, what, got[i], want[i], naive.as_ref().map(|naive| &naive[i]))?;
    }
    Ok(())
}

#[cfg(all(test, feature = "host-kernels"))]
mod host {
    use super::*;
    use crate::testing::{assert_close, on_host};

    #[test]
    fn host_prefix_matches_the_cpu() -> Result<()> {
        on_host(|c| check(c, Sizes::Odd))
    }

    /// The gradients of the whole chain, attention's backward given o' and lse'.
    fn chain(
        prefix: Prefix<'_>,
        [q, k, v, keys, values, d_o]: [&Tensor; 6],
    ) -> Result<[Tensor; 6]> {
        let Prefix { ragged, heads, scale, .. } = prefix;
        let span = Span { causal: true, window: Some(40) };
        let attention = Attention { ragged, heads, scale, dropout: None, span };
        let (o, lse) = attention::forward(attention, q, k, v)?;
        let (o, lse) = forward(prefix, q, [keys, values], [&o, &lse])?;
        let saved = Saved { q, keys, values, o: &o, lse: &lse };
        let (q, k, v) = (q.clone(), k.clone(), v.clone());
        let of_own = attention::Saved { q, k, v, o: o.clone(), lse: lse.clone() };
        let (dq, dk, dv) = attention::backward(attention, &of_own, d_o)?;
        let (d_keys, d_values) = backward(prefix, saved, d_o, Some(&dq))?;
        Ok([o, dq, dk, dv, d_keys, d_values])
    }

    /// Heads of 64, and of 16, as the CPU has them: widened only for the kernels.
    #[test]
    fn host_prefix_after_attention_matches_the_cpu() -> Result<()> {
        let (ragged, dropout) = (batch(&[5, 70])?, dropout());
        for heads in [1, 4] {
            let prefix = Prefix { ragged: &ragged, heads, scale: 0.2, dropout: dropout.as_ref() };
            let matrix = |rows, seed| random(&[rows, 64], seed)?.to_dtype(DType::BF16);
            let tokens = |seed| matrix(75, seed);
            let (q, k, v, d_o) = (tokens(1)?, tokens(2)?, tokens(3)?, tokens(4)?);
            let (keys, values) = (matrix(21, 5)?, matrix(21, 6)?);
            let x = [&q, &k, &v, &keys, &values, &d_o];
            let [q, k, v, keys, values, d_o] = x.map(wide);
            let exact = chain(prefix, [&q?, &k?, &v?, &keys?, &values?, &d_o?])?;
            for (i, got) in chain(prefix, x)?.iter().enumerate() {
                // A few roundings to bf16, each of 1 in 512, of what is below 1. Measured: o 1.6e-3,
                // gradients 9.1e-4.
                let tolerance = if i == 0 { 3.2e-3 } else { 1.8e-3 };
                let what = ["o", "dq", "dk", "dv", "dPK", "dPV"][i];
                assert_close(what, got, &exact[i], tolerance)?;
            }
        }
        Ok(())
    }

    /// Frozen queries change no other gradient, and an empty batch gives none.
    #[test]
    fn host_without_dq_or_tokens() -> Result<()> {
        let matrix = |rows, seed| random(&[rows, 128], seed)?.to_dtype(DType::BF16);
        let (keys, values) = (matrix(9, 5)?, matrix(9, 6)?);
        for lengths in [&[70, 3][..], &[]] {
            let ragged = batch(lengths)?;
            let prefix = Prefix { ragged: &ragged, heads: 2, scale: 0.2, dropout: None };
            let (t, tables) = (ragged.tokens(), [&keys, &values]);
            let (q, o, d_o, dq) = (matrix(t, 1)?, matrix(t, 2)?, matrix(t, 3)?, matrix(t, 4)?);
            let lse = random(&[2, t], 7)?.to_dtype(DType::F32)?;
            let (o, lse) = forward(prefix, &q, tables, [&o, &lse])?;
            let saved = Saved { q: &q, keys: &keys, values: &values, o: &o, lse: &lse };
            let with = backward(prefix, saved, &d_o, Some(&dq))?;
            let without = backward(prefix, saved, &d_o, None)?;
            assert_eq!(numbers(&with.0)?, numbers(&without.0)?);
            assert_eq!(numbers(&with.1)?, numbers(&without.1)?);
            let none = numbers(&with.0)?.iter().all(|x| *x == 0.0);
            assert_eq!(none, lengths.is_empty());
        }
        Ok(())
    }
}
