use candle_core::{DType, Device, Result};

use super::*;
use crate::{
    DropoutKey,
    attention::{self, Attention, Span},
    common::host::read,
    disentangled::{self, Disentangled, Positions},
    testing::{assert_close, check_gradient, dropout, narrow, random, weighted, zeros},
};

const HEADS: usize = 3;
const SCALE: f64 = 0.4;

/// Attention over a sequence's own keys.
#[derive(Clone)]
enum Own {
    Plain(Span),
    /// With PK and PQ.
    Disentangled(Positions, [Tensor; 2]),
}

/// A batch, its attention and a prefix.
struct Case {
    ragged: Ragged,
    own: Own,
    /// Of attention's probabilities, and of the prefix's.
    dropouts: Option<[Dropout; 2]>,
    /// q, k, v, the prefix's keys and values.
    x: [Tensor; 5],
    d_o: Tensor,
}

fn dropouts() -> [Dropout; 2] {
    let key = DropoutKey { seed: 3, step: 2, stream: 0 };
    [dropout(), Dropout::new(0.2, key, 2).expect("p > 0")]
}

impl Case {
    /// Heads of 4 columns and `n` keys in the prefix; without dropout.
    fn new(lengths: &[usize], n: usize, own: Own) -> Result<Self> {
        Self::wide(lengths, n, own, 4)
    }

    /// The same with heads of `d` columns.
    fn wide(lengths: &[usize], n: usize, own: Own, d: usize) -> Result<Self> {
        let samples: Vec<u32> = (0..lengths.len() as u32).map(|i| 7 + 13 * i).collect();
        let operand = |rows, seed| random(&[rows, HEADS * d], seed);
        let t = lengths.iter().sum();
        Ok(Self {
            ragged: Ragged::new(lengths, &samples)?,
            own,
            dropouts: None,
            x: [operand(t, 1)?, operand(t, 2)?, operand(t, 3)?, operand(n, 5)?, operand(n, 6)?],
            d_o: operand(t, 4)?,
        })
    }

    fn prefix(&self) -> Prefix<'_> {
        let dropout = self.dropouts.as_ref().map(|[_, prefix]| prefix);
        Prefix { ragged: &self.ragged, heads: HEADS, scale: SCALE, dropout }
    }

    fn attention(&self, span: Span) -> Attention<'_> {
        let dropout = self.dropouts.as_ref().map(|[own, _]| own);
        Attention { ragged: &self.ragged, heads: HEADS, scale: SCALE, dropout, span }
    }

    fn disentangled<'a>(&'a self, positions: &'a Positions) -> Disentangled<'a> {
        let dropout = self.dropouts.as_ref().map(|[own, _]| own);
        Disentangled { ragged: &self.ragged, heads: HEADS, scale: SCALE, dropout, positions }
    }

    /// What attention over the own keys alone leaves: o and lse.
    fn own(&self, [q, k, v]: [&Tensor; 3]) -> Result<(Tensor, Tensor)> {
        match &self.own {
            Own::Plain(span) => attention::forward(self.attention(*span), q, k, v),
            Own::Disentangled(positions, [pk, pq]) => {
                disentangled::forward(self.disentangled(positions), q, k, v, Some(pk), Some(pq))
            }
        }
    }

    /// o' and lse' of operands instead of its own.
    fn forward_of(&self, [q, k, v, keys, values]: [&Tensor; 5]) -> Result<(Tensor, Tensor)> {
        let (o, lse) = self.own([q, k, v])?;
        forward(self.prefix(), q, [keys, values], [&o, &lse])
    }

    fn forward(&self) -> Result<(Tensor, Tensor)> {
        self.forward_of(self.x.each_ref())
    }

    /// Gradients of `x` through the whole chain: attention's backward, given o' and lse', then the
    /// prefix's.
    fn backward(&self) -> Result<[Tensor; 5]> {
        let (o, lse) = self.forward()?;
        let [q, k, v, keys, values] = self.x.clone();
        let saved = Saved { q: &self.x[0], keys: &keys, values: &values, o: &o, lse: &lse };
        let (o, lse) = (o.clone(), lse.clone());
        let (dq, dk, dv) = match &self.own {
            Own::Plain(span) => {
                let saved = attention::Saved { q, k, v, o, lse };
                attention::backward(self.attention(*span), &saved, &self.d_o)?
            }
            Own::Disentangled(positions, [pk, pq]) => {
                let (pk, pq) = (Some(pk.clone()), Some(pq.clone()));
                let saved = disentangled::Saved { q, k, v, pk, pq, o, lse };
                let op = self.disentangled(positions);
                let all = disentangled::backward(op, &saved, &self.d_o, false)?;
                (all.q, all.k, all.v)
            }
        };
        let (d_keys, d_values) = backward(self.prefix(), saved, &self.d_o, Some(&dq))?;
        Ok([dq, dk, dv, d_keys, d_values])
    }

    fn narrow(&self) -> Result<Self> {
        let own = match &self.own {
            Own::Plain(span) => Own::Plain(*span),
            Own::Disentangled(positions, [pk, pq]) => {
                let tables = narrow(&[pk, pq])?.try_into().expect("two");
                Own::Disentangled(positions.clone(), tables)
            }
        };
        Ok(Self {
            ragged: self.ragged.clone(),
            own,
            dropouts: self.dropouts,
            x: narrow(&self.x.each_ref())?.try_into().expect("five"),
            d_o: self.d_o.to_dtype(DType::F32)?,
        })
    }

    /// Score of an own key, or `None` where the query does not see it. `i` and `j` count in the sequence
    /// that starts at row `start`.
    fn score(&self, head: usize, start: usize, i: usize, j: usize) -> Result<Option<f64>> {
        let [q, k, ..] = &self.x;
        let (q, k) = (of_head(q, start + i, head)?, of_head(k, start + j, head)?);
        Ok(match &self.own {
            Own::Plain(Span { causal, window }) => {
                let seen = (!causal || j <= i) && window.is_none_or(|w| i.abs_diff(j) <= w);
                seen.then(|| SCALE * dot(&q, &k))
            }
            Own::Disentangled(positions, [pk, pq]) => {
                let row = positions.slot(i as isize - j as isize) - positions.rows().start;
                let (pk, pq) = (of_head(pk, row, head)?, of_head(pq, row, head)?);
                Some(SCALE * (dot(&q, &k) + dot(&q, &pk) + dot(&k, &pq)))
            }
        })
    }

    /// o' and lse' of one softmax over the own keys and the prefix's, one score at a time.
    fn naive(&self) -> Result<(Tensor, Tensor)> {
        let [q, _, v, keys, values] = &self.x;
        let ((t, width), n) = (q.dims2()?, keys.dim(0)?);
        let (mut o, mut lse) = (vec![0.0; t * width], vec![0.0; HEADS * t]);
        for (s, head) in (0..self.ragged.sequences()).flat_map(|s| (0..HEADS).map(move |h| (s, h)))
        {
            let (range, sample) = (self.ragged.range(s), self.ragged.sample(s));
            for i in 0..range.len() {
                let row = range.start + i;
                let mut seen = Vec::new();
                let own_factors = self.factors(0, sample, head, i, range.len());
                for j in 0..range.len() {
                    if let Some(score) = self.score(head, range.start, i, j)? {
                        let value = of_head(v, range.start + j, head)?;
                        seen.push((score, own_factors[j], value));
                    }
                }
                let factors = self.factors(1, sample, head, i, n);
                let q = of_head(q, row, head)?;
                for j in 0..n {
                    let score = SCALE * dot(&q, &of_head(keys, j, head)?);
                    seen.push((score, factors[j], of_head(values, j, head)?));
                }
                let sum: f64 = seen.iter().map(|(score, ..)| score.exp()).sum();
                lse[head * t + row] = sum.ln();
                for (score, factor, value) in seen {
                    for (c, v) in value.into_iter().enumerate() {
                        o[row * width + head * (width / HEADS) + c] +=
                            score.exp() / sum * factor * v;
                    }
                }
            }
        }
        let lse = Tensor::from_vec(lse, (HEADS, t), &Device::Cpu)?;
        Ok((Tensor::from_vec(o, (t, width), &Device::Cpu)?, lse))
    }

    /// Of one row of probabilities: attention's (0) or the prefix's (1).
    fn factors(&self, of: usize, sample: u32, head: usize, i: usize, n: usize) -> Vec<f64> {
        let mut factors = vec![1.0; n];
        if let Some(dropouts) = &self.dropouts {
            dropouts[of].head(head).factors(sample, i as u32, &mut factors);
        }
        factors
    }
}

/// One row of one head.
fn of_head(x: &Tensor, row: usize, head: usize) -> Result<Vec<f64>> {
    let width = x.dim(1)?;
    Ok(read::<f64>(x)?[row * width..][..width][head * width / HEADS..][..width / HEADS].to_vec())
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

const fn span(causal: bool, window: Option<usize>) -> Own {
    Own::Plain(Span { causal, window })
}

/// With tables for sequences of up to `longest` tokens, of heads of `d` columns.
fn relative(longest: usize, d: usize) -> Result<Own> {
    let positions = Positions::new(Some(8), 32, longest);
    let table = |seed| random(&[positions.rows().len(), HEADS * d], seed);
    let tables = [table(7)?, table(8)?];
    Ok(Own::Disentangled(positions, tables))
}

/// Every kind of attention; prefixes of one key, of an odd number, of more than a vector; sequences of one
/// token and of more than a tile.
fn cases() -> Result<Vec<Case>> {
    Ok(vec![
        Case::new(&[5, 1, 9], 1, span(false, None))?,
        Case::new(&[5, 1, 9], 21, span(true, None))?,
        Case::new(&[67, 2], 7, span(false, Some(3)))?,
        Case::new(&[67, 2], 130, span(true, Some(2)))?,
        Case::new(&[5, 1, 9], 17, relative(9, 4)?)?,
        Case::wide(&[67, 3], 9, relative(67, 20)?, 20)?,
    ])
}

fn with_dropout(case: Case) -> Case {
    Case { dropouts: Some(dropouts()), ..case }
}

#[test]
fn values_are_those_of_one_softmax_over_all_keys() -> Result<()> {
    for case in cases()?.into_iter().chain(cases()?.into_iter().map(with_dropout)) {
        let ((o, lse), (want_o, want_lse)) = (case.forward()?, case.naive()?);
        // Sums of up to 200 terms, in f64: about 200^0.5·1.1e-16 either way. Measured: 6e-16 and 3e-16.
        assert_close("o'", &o, &want_o, 3e-15)?;
        assert_close("lse'", &lse, &want_lse, 3e-15)?;
    }
    Ok(())
}

#[test]
fn gradients_of_the_whole_chain_match_finite_differences() -> Result<()> {
    for case in cases()?.into_iter().chain(cases()?.into_iter().map(with_dropout)) {
        for (i, gradient) in case.backward()?.iter().enumerate() {
            let name = ["q", "k", "v", "the prefix's keys", "the prefix's values"][i];
            check_gradient(name, &case.x[i], gradient, |value| {
                let mut x = case.x.each_ref();
                x[i] = value;
                weighted(&case.forward_of(x)?.0, &case.d_o)
            })?;
        }
    }
    Ok(())
}

/// With o and lse held fixed, and what dq held before taken off.
#[test]
fn gradients_of_the_op_alone_match_finite_differences() -> Result<()> {
    let case = with_dropout(Case::new(&[5, 1, 9], 11, span(false, None))?);
    let [q, k, v, keys, values] = &case.x;
    let (own_o, own_lse) = case.own([q, k, v])?;
    let loss = |q: &Tensor, keys: &Tensor, values: &Tensor| {
        let own = [&own_o, &own_lse];
        weighted(&forward(case.prefix(), q, [keys, values], own)?.0, &case.d_o)
    };
    let (o, lse) = forward(case.prefix(), q, [keys, values], [&own_o, &own_lse])?;
    let saved = Saved { q, keys, values, o: &o, lse: &lse };
    let before = random(q.dims(), 9)?;
    let dq = before.copy()?;
    let (d_keys, d_values) = backward(case.prefix(), saved, &case.d_o, Some(&dq))?;
    check_gradient("q", q, &(dq - before)?, |q| loss(q, keys, values))?;
    check_gradient("keys", keys, &d_keys, |keys| loss(q, keys, values))?;
    check_gradient("values", values, &d_values, |values| loss(q, keys, values))?;
    let without = backward(case.prefix(), saved, &case.d_o, None)?;
    assert_eq!(*read::<f64>(&without.0)?, *read::<f64>(&d_keys)?);
    assert_eq!(*read::<f64>(&without.1)?, *read::<f64>(&d_values)?);
    Ok(())
}

/// More tokens than one task takes; odd sequences across the borders of tiles and of tasks.
const LENGTHS: [usize; 6] = [1, 2, 97, 257, 13, 400];

#[test]
fn packed_sequences_equal_the_same_alone() -> Result<()> {
    let packed = with_dropout(Case::new(&LENGTHS, 20, relative(400, 4)?)?);
    let ((o, lse), gradients) = (packed.forward()?, packed.backward()?);
    // As they meet other rows in a product: sums of up to 770 terms in f64 lose 770^0.5·1.1e-16 either way.
    // Measured: 1.1e-16.
    const LOST: f64 = 6e-15;
    let (mut start, mut sums) = (0, [zeros(&packed.x[3])?, zeros(&packed.x[4])?]);
    for (i, len) in LENGTHS.into_iter().enumerate() {
        let part = |x: &Tensor| x.narrow(0, start, len)?.contiguous();
        let [q, k, v, keys, values] = &packed.x;
        let alone = Case {
            ragged: Ragged::new(&[len], &[packed.ragged.sample(i)])?,
            own: packed.own.clone(),
            dropouts: packed.dropouts,
            x: [part(q)?, part(k)?, part(v)?, keys.clone(), values.clone()],
            d_o: part(&packed.d_o)?,
        };
        let (own_o, own_lse) = alone.forward()?;
        assert_close("o'", &part(&o)?, &own_o, LOST)?;
        assert_close("lse'", &lse.narrow(1, start, len)?, &own_lse, LOST)?;
        let one = alone.backward()?;
        for i in 0..3 {
            assert_close("dq, dk or dv", &part(&gradients[i])?, &one[i], LOST)?;
        }
        sums = [(&sums[0] + &one[3])?, (&sums[1] + &one[4])?];
        start += len;
    }
    assert_close("the prefix's keys", &gradients[3], &sums[0], LOST)?;
    assert_close("the prefix's values", &gradients[4], &sums[1], LOST)
}

/// The bits of o', lse' and all gradients on `threads` threads.
fn bits(case: &Case, threads: usize) -> Result<Vec<Vec<u32>>> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
    pool.install(|| {
        let (o, lse) = case.forward()?;
        let all = [o, lse].into_iter().chain(case.backward()?);
        all.map(|x| Ok(read::<f32>(&x)?.iter().map(|x| x.to_bits()).collect())).collect()
    })
}

#[test]
fn results_are_the_same_bits_on_any_number_of_threads() -> Result<()> {
    let case = with_dropout(Case::new(&LENGTHS, 20, span(true, None))?).narrow()?;
    let one = bits(&case, 1)?;
    assert_eq!(one, bits(&case, 2)?);
    assert_eq!(one, bits(&case, 3)?);
    Ok(())
}

#[test]
fn f32_matches_f64() -> Result<()> {
    for own in [span(false, None), relative(130, 64)?] {
        let case = with_dropout(Case::wide(&[130, 67], 20, own, 64)?);
        let (o, lse) = case.forward()?;
        let small = case.narrow()?;
        let (small_o, small_lse) = small.forward()?;
        // Measured: o' 1.1e-6, lse' 1.4e-7, gradients 1.2e-6, those of disentangled attention; of the prefix
        // itself 3.3e-7. Scores reach 10 and carry 10·2^-24 each, and so do the probabilities.
        assert_close("o'", &small_o, &o, 2.2e-6)?;
        assert_close("lse'", &small_lse, &lse, 3e-7)?;
        for (i, (got, want)) in small.backward()?.iter().zip(&case.backward()?).enumerate() {
            let tolerance = if i < 3 { 2.4e-6 } else { 7e-7 };
            assert_close(["dq", "dk", "dv", "dPK", "dPV"][i], got, want, tolerance)?;
        }
    }
    Ok(())
}

/// Where e^300 would overflow f32: either side may be all there is.
#[test]
fn a_side_that_outweighs_the_other_is_all() -> Result<()> {
    let case = Case::new(&[5, 9], 3, span(false, None))?.narrow()?;
    let [q, _, v, keys, values] = &case.x;
    let of = |o: &Tensor, lse: f32| {
        let lse = Tensor::full(lse, (HEADS, 14), &Device::Cpu)?;
        forward(case.prefix(), q, [keys, values], [o, &lse])
    };
    let (o, lse) = of(v, 300.0)?;
    assert_eq!(*read::<f32>(&o)?, *read::<f32>(v)?);
    assert_eq!(*read::<f32>(&lse)?, [300.0; 42]);
    let ((o, lse), (want_o, want_lse)) = (of(v, -300.0)?, of(&zeros(v)?, -400.0)?);
    assert_eq!(*read::<f32>(&o)?, *read::<f32>(&want_o)?);
    assert_eq!(*read::<f32>(&lse)?, *read::<f32>(&want_lse)?);
    assert!(read::<f32>(&lse)?.iter().all(|lse| lse.abs() < 10.0));
    Ok(())
}

#[test]
fn an_empty_batch_gives_the_prefix_nothing() -> Result<()> {
    let case = Case::new(&[], 3, span(false, None))?;
    assert_eq!(case.forward()?.0.dims(), [0, 12]);
    let gradients = case.backward()?;
    assert_eq!(*read::<f64>(&gradients[3])?, [0.0; 36]);
    assert_eq!(*read::<f64>(&gradients[4])?, [0.0; 36]);
    Ok(())
}

#[test]
fn what_does_not_fit_is_named() -> Result<()> {
    let case = Case::new(&[5, 9], 3, span(false, None))?;
    let [q, k, v, keys, values] = &case.x;
    let (o, lse) = case.own([q, k, v])?;
    let of = |tables: [&Tensor; 2], own: [&Tensor; 2]| {
        forward(case.prefix(), q, tables, own).unwrap_err().to_string()
    };
    let error = of([keys, q], [&o, &lse]);
    assert!(error.contains("prefix: PV has shape [14, 12], expected [3, 12]"), "{error}");
    let error = of([keys, values], [&o, &lse.t()?]);
    assert!(error.contains("prefix: lse has shape [14, 3], expected [3, 14]"), "{error}");
    let none = keys.narrow(0, 0, 0)?;
    let error = of([&none, &none], [&o, &lse]);
    assert!(error.contains("prefix: no keys"), "{error}");
    Ok(())
}
