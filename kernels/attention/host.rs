//! The kernels of op.cu, run on the host, against the CPU implementation in f64; they may be twice as
//! wrong as a naive bf16 implementation.

use candle_core::{DType, Device, Result};

use super::{
    naive::{HEAD, Head, Rows},
    *,
};
use crate::{
    DropoutKey,
    common::host_run::in_every_order,
    testing::{check_against, random, rounded, wide},
};

const HEADS: usize = 2;
const WIDTH: usize = HEADS * HEAD;

/// The elements of an f64 tensor.
pub(crate) fn flat(x: &Tensor) -> Result<Vec<f64>> {
    x.flatten_all()?.to_vec1()
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

/// `[o, dq, dk, dv]` of the naive implementation, from what forward left; all in f64.
fn naive(attention: Attention<'_>, saved: &Saved, d_o: &Tensor) -> Result<[Tensor; 4]> {
    let Attention { ragged, scale, dropout, span, .. } = attention;
    let t = ragged.tokens();
    let [q, k, v, o, d_o, lse] =
        [&saved.q, &saved.k, &saved.v, &saved.o, d_o, &saved.lse].map(flat);
    let (q, k, v, o, d_o, lse) = (q?, k?, v?, o?, d_o?, lse?);
    let mut all: [Vec<f64>; 4] = std::array::from_fn(|_| vec![f64::NAN; t * WIDTH]);
    for (sequence, head) in (0..ragged.sequences()).flat_map(|s| (0..HEADS).map(move |h| (s, h))) {
        let range = ragged.range(sequence);
        let factors = factors(dropout, ragged.sample(sequence), head, range.len());
        let rows = |x: &[f64]| part(x, WIDTH, range.clone(), head);
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
            put(all, WIDTH, range.start, head, rows);
        }
    }
    let [o, dq, dk, dv] = all.map(|x| Tensor::from_vec(x, (t, WIDTH), &Device::Cpu));
    Ok([o?, dq?, dk?, dv?])
}

fn compare(lengths: &[usize], span: Span, dropout: Option<&Dropout>) -> Result<()> {
    let samples: Vec<u32> = (0..lengths.len() as u32).map(|i| 100 * i + 7).collect();
    let ragged = Ragged::new(lengths, &samples)?;
    let matrix = |seed| rounded(&(random(&[ragged.tokens(), WIDTH], seed)? * 2.0)?, DType::BF16);
    let (q, k, v, d_o) = (matrix(1)?, matrix(2)?, matrix(3)?, matrix(4)?);
    let attention = Attention { ragged: &ragged, heads: HEADS, scale: 0.125, dropout, span };
    let (o, lse) = device::forward(attention, &q, &k, &v)?;
    let saved = Saved { q, k, v, o, lse };
    let (dq, dk, dv) = device::backward(attention, &saved, &d_o)?;

    // Backward starts from what the kernels' forward left.
    let exact = Saved {
        q: wide(&saved.q)?,
        k: wide(&saved.k)?,
        v: wide(&saved.v)?,
        o: wide(&saved.o)?,
        lse: wide(&saved.lse)?,
    };
    let (exact_o, exact_lse) = forward(attention, &exact.q, &exact.k, &exact.v)?;
    let (exact_dq, exact_dk, exact_dv) = backward(attention, &exact, &wide(&d_o)?)?;
    let naive = naive(attention, &exact, &wide(&d_o)?)?;
    let what = |name| format!("{name} {lengths:?} {span:?}");
    // Scores reach 40; their log-sum-exp in f32 is good to a few units in the last place.
    check_against(&what("lse"), &saved.lse, &exact_lse, &exact_lse, 1e-6)?;
    check_against(&what("o"), &saved.o, &exact_o, &naive[0], 1e-6)?;
    check_against(&what("dq"), &dq, &exact_dq, &naive[1], 1e-6)?;
    check_against(&what("dk"), &dk, &exact_dk, &naive[2], 1e-6)?;
    check_against(&what("dv"), &dv, &exact_dv, &naive[3], 1e-6)
}

const fn span(causal: bool, window: Option<usize>) -> Span {
    Span { causal, window }
}

#[test]
fn host_flash_attention_matches_the_cpu() -> Result<()> {
    let dropout = Dropout::new(0.2, DropoutKey { seed: 5 << 33 | 3, step: 2, stream: 1 }, 4);
    in_every_order(|| {
        compare(&[1, 17, 130, 64, 2], span(false, None), None)?;
        compare(&[97, 3, 65], span(false, None), dropout.as_ref())?;
        compare(&[97, 3, 130], span(true, None), dropout.as_ref())?;
        compare(&[200, 5], span(false, Some(3)), None)?;
        compare(&[130, 64], span(true, Some(64)), dropout.as_ref())?;
        compare(&[70], span(false, Some(0)), None)
    })
}

#[test]
fn host_other_heads_and_dtypes_are_refused() -> Result<()> {
    let ragged = Ragged::new(&[3], &[1])?;
    let of = |heads, dtype| {
        let x = rounded(&random(&[3, WIDTH], 1)?, dtype)?;
        let attention =
            Attention { ragged: &ragged, heads, scale: 0.1, dropout: None, span: Span::default() };
        device::forward(attention, &x, &x, &x)
    };
    let error = of(4, DType::BF16).unwrap_err().to_string();
    assert!(error.contains("heads of 32; the CUDA kernels take heads of 64"), "{error}");
    let error = of(HEADS, DType::F32).unwrap_err().to_string();
    assert!(error.contains("q of F32; the CUDA kernels take BF16"), "{error}");
    Ok(())
}
