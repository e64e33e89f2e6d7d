//! Attention against the CPU implementation in f64. Kernels may be twice as wrong as a naive bf16
//! implementation.

use candle_core::{DType, Device, Result};

use super::{
    naive::{Head, Rows},
    *,
};
use crate::common::check::{Checker, HEADS, LENGTHS, Sizes, batch, dropout, numbers, random, wide};

/// Heads that the naive implementation runs, in f64 one pair at a time: they set what all heads may be off by.
pub(crate) const NAIVE_HEADS: usize = 2;
/// What f32 attention on the CPU may be off by, relative to the largest (at least 1): scores reach 40, and
/// that rounds them and their log-sum-exp by 2e-6 each, and so what they are exponents of. Measured 1.4e-6.
const IN_F32: f64 = 4e-6;

/// Holds a result of attention to at most twice the error of a `naive` version where there is one, in bf16.
pub(crate) fn hold(
    c: &mut Checker,
    what: &str,
    got: &Tensor,
    exact: &Tensor,
    naive: Option<&Tensor>,
) -> Result<()> {
    match naive {
        Some(naive) => c.check_against(what, got, exact, naive, 1e-6),
        None => c.check(what, got, exact, IN_F32),
    }
}

/// Sequences that end inside a tile and between two, with every kind of span.
pub(crate) fn check(c: &mut Checker, sizes: Sizes) -> Result<()> {
    const ALL: Span = Span { causal: false, window: None };
    let windowed = |causal, window| Span { causal, window: Some(window) };
    let causal = Span { causal: true, window: None };
    let cases: &[(&[usize], Span, bool)] = match sizes {
        Sizes::Odd => &[
            (&[1, 17, 130, 64, 2], ALL, false),
            (&[97, 3, 65], ALL, true),
            (&[97, 3, 130], causal, true),
            (&[200, 5], windowed(false, 3), false),
            (&[130, 64], windowed(true, 64), true),
            (&[70], windowed(false, 0), false),
        ],
        Sizes::Real => &[(&LENGTHS, ALL, true), (&LENGTHS, windowed(false, 64), false)],
    };
    let heads = if sizes == Sizes::Odd { NAIVE_HEADS } else { HEADS };
    for (lengths, span, dropped) in cases {
        compare(c, lengths, heads, *span, dropout().filter(|_| *dropped).as_ref())?;
    }
    Ok(())
}

/// Columns of one head, rows `range`, of `[T, width]` values.
pub(crate) fn part(
    values: &[f64],
    width: usize,
    range: std::ops::Range<usize>,
    head: usize,
) -> Rows {
    let row = |row: usize| {
        let columns = &values[row * width + head * HEAD..][..HEAD];
        std::array::from_fn(|i| columns[i])
    };
    range.map(row).collect()
}

/// Puts the rows of one head back.
pub(crate) fn put(values: &mut [f64], width: usize, first: usize, head: usize, rows: &Rows) {
    for (i, row) in rows.iter().enumerate() {
        values[(first + i) * width + head * HEAD..][..HEAD].copy_from_slice(row);
    }
}

/// Dropout's factors on the probabilities of one sequence and head, `[i][j]`.
pub(crate) fn factors(
    dropout: Option<&Dropout>,
    sample: u32,
    head: usize,
    len: usize,
) -> Vec<Vec<f64>> {
    let row = |i: usize| {
        let mut factors = vec![1.0; len];
        if let Some(dropout) = dropout {
            dropout.head(head).factors(sample, i as u32, &mut factors);
        }
        factors
    };
    (0..len).map(row).collect()
}

/// `[o, dq, dk, dv]` of the naive implementation in its heads, and of `exact` in all others, from what
/// forward left; all in f64.
fn naive(
    attention: Attention<'_>,
    saved: &Saved,
    d_o: &Tensor,
    exact: [&Tensor; 4],
) -> Result<[Tensor; 4]> {
    let Attention { ragged, heads, scale, dropout, span } = attention;
    let (t, width) = (ragged.tokens(), heads * HEAD);
    let [q, k, v, o, d_o, lse] =
        [&saved.q, &saved.k, &saved.v, &saved.o, d_o, &saved.lse].map(numbers);
    let (q, k, v, o, d_o, lse) = (q?, k?, v?, o?, d_o?, lse?);
    let [y, dq, dk, dv] = exact.map(numbers);
    let mut all = [y?, dq?, dk?, dv?];
    for (sequence, head) in heads_of(ragged, heads) {
        let range = ragged.range(sequence);
        let factors = factors(dropout, ragged.sample(sequence), head, range.len());
        let rows = |x: &[f64]| part(x, width, range.clone(), head);
        let one = Head {
            q: rows(&q),
            k: rows(&k),
            v: rows(&v),
            o: rows(&o),
            d_o: rows(&d_o),
            lse: lse[head * t + range.start..][..range.len()].to_vec(),
            scale,
            relative: None,
            sees: &|i, j| span.keys(i, range.len()).contains(&j),
            factor: &|i, j| factors[i][j],
        };
        let gradients = one.backward();
        let of_head = [&one.forward(), &gradients.q, &gradients.k, &gradients.v];
        for (all, rows) in all.iter_mut().zip(of_head) {
            put(all, width, range.start, head, rows);
        }
    }
    let [o, dq, dk, dv] = all.map(|x| Tensor::from_vec(x, (t, width), &Device::Cpu));
    Ok([o?, dq?, dk?, dv?])
}

/// Every sequence with each head that the naive implementation runs.
pub(crate) fn heads_of(ragged: &Ragged, heads: usize) -> impl Iterator<Item = (usize, usize)> {
    let heads = heads.min(NAIVE_HEADS);
    (0..ragged.sequences()).flat_map(move |s| (0..heads).map(move |head| (s, head)))
}

fn compare(
    c: &mut Checker,
    lengths: &[usize],
    heads: usize,
    span: Span,
    dropout: Option<&Dropout>,
) -> Result<()> {
    let (ragged, dtype) = (batch(lengths)?, c.attention_dtype());
    let dropped = dropout.is_some();
    c.case(format!("{lengths:?}, {heads} heads, {span:?}, dropout {dropped}, {dtype:?}"));
    let shape = [ragged.tokens(), heads * HEAD];
    let matrix = |seed| c.rounded(&(random(&shape, seed)? * 2.0)?, dtype);
    let (q, k, v, d_o) = (matrix(1)?, matrix(2)?, matrix(3)?, matrix(4)?);
    let attention = Attention { ragged: &ragged, heads, scale: 0.125, dropout, span };
    let (o, lse) = forward(attention, &q, &k, &v)?;
    let saved = Saved { q, k, v, o, lse };
    let (dq, dk, dv) = backward(attention, &saved, &d_o)?;

    // Backward starts from what forward left.
    let exact = Saved {
        q: wide(&saved.q)?,
        k: wide(&saved.k)?,
        v: wide(&saved.v)?,
        o: wide(&saved.o)?,
        lse: wide(&saved.lse)?,
    };
    let d_o = wide(&d_o)?;
    let (exact_o, exact_lse) = forward(attention, &exact.q, &exact.k, &exact.v)?;
    let (exact_dq, exact_dk, exact_dv) = backward(attention, &exact, &d_o)?;
    // Scores reach 40; their log-sum-exp in f32 is good to a few units in the last place.
    c.check_against("lse", &saved.lse, &exact_lse, &exact_lse, 1e-6)?;
    let (got, want) = ([&saved.o, &dq, &dk, &dv], [&exact_o, &exact_dq, &exact_dk, &exact_dv]);
    let naive = match dtype {
        DType::BF16 => Some(naive(attention, &exact, &d_o, want)?),
        _ => None,
    };
    for (i, what) in ["o", "dq", "dk", "dv"].into_iter().enumerate() {
        hold(c, what, got[i], want[i], naive.as_ref().map(|naive| &naive[i]))?;
    }
    Ok(())
}

#[cfg(all(test, feature = "host-kernels"))]
mod host {
    use super::*;
    use crate::testing::{assert_close, on_host};

    #[test]
    fn host_flash_attention_matches_the_cpu() -> Result<()> {
        on_host(|c| check(c, Sizes::Odd))
    }

    /// Heads of 16 and 32, as the CPU has them: widened only for the kernels.
    #[test]
    fn host_narrow_heads_match_the_cpu() -> Result<()> {
        let ragged = batch(&[5, 70])?;
        for heads in [2, 4] {
            let matrix = |seed| random(&[75, 64], seed)?.to_dtype(DType::BF16);
            let (q, k, v, d_o) = (matrix(1)?, matrix(2)?, matrix(3)?, matrix(4)?);
            let (scale, span, dropout) = (0.2, Span::default(), dropout());
            let dropout = dropout.as_ref();
            let attention = Attention { ragged: &ragged, heads, scale, dropout, span };
            let (o, lse) = forward(attention, &q, &k, &v)?;
            let exact = forward(attention, &wide(&q)?, &wide(&k)?, &wide(&v)?)?;
            let saved = Saved { q, k, v, o, lse };
            let [q, k, v, o, lse] = [&saved.q, &saved.k, &saved.v, &saved.o, &saved.lse].map(wide);
            let from = Saved { q: q?, k: k?, v: v?, o: o?, lse: lse? };
            let (dq, dk, dv) = backward(attention, &saved, &d_o)?;
            let (exact_dq, exact_dk, exact_dv) = backward(attention, &from, &wide(&d_o)?)?;
            // A few roundings to bf16, each of 1 in 512; measured: less than 5e-3 of the largest.
            assert_close("o", &saved.o, &exact.0, 1e-2)?;
            assert_close("dq", &dq, &exact_dq, 1e-2)?;
            assert_close("dk", &dk, &exact_dk, 1e-2)?;
            assert_close("dv", &dv, &exact_dv, 1e-2)?;
        }
        Ok(())
    }

    #[test]
    fn host_other_heads_and_dtypes_are_refused() -> Result<()> {
        let ragged = batch(&[3])?;
        let of = |heads, dtype| {
            let x = random(&[3, 2 * HEAD], 1)?.to_dtype(dtype)?;
            let (scale, span) = (0.1, Span::default());
            let attention = Attention { ragged: &ragged, heads, scale, dropout: None, span };
            device::forward(attention, &x, &x, &x)
        };
        let error = of(1, DType::BF16).unwrap_err().to_string();
        assert!(error.contains("heads of 128; the CUDA kernels take heads of up to 64"), "{error}");
        let error = of(2, DType::F32).unwrap_err().to_string();
        assert!(error.contains("q of F32; the CUDA kernels take BF16"), "{error}");
        Ok(())
    }
}
