//! Disentangled attention against the CPU implementation in f64. Kernels may be twice as wrong as a naive
//! bf16 implementation.

use candle_core::{DType, Device, Result};

use super::*;
use crate::{
    attention::{
        HEAD,
        check::{NAIVE_HEADS, factors, heads_of, hold, part, put},
        naive::{Head, Relative},
    },
    common::check::{Checker, HEADS, LENGTHS, Sizes, batch, dropout, numbers, random, wide},
};

/// Buckets and largest distance of [`Positions::new`].
type Buckets = (Option<usize>, usize);

/// Distances in the linear part, in the logarithmic one, beyond the largest, and no buckets; one table.
pub(crate) fn check(c: &mut Checker, sizes: Sizes) -> Result<()> {
    let new = |lengths: &[usize], buckets, c: &Checker| Case::new(c, lengths, NAIVE_HEADS, buckets);
    if sizes == Sizes::Real {
        let case = Case { dropout: dropout(), ..Case::new(c, &LENGTHS, HEADS, (Some(256), 512))? };
        return compare(c, &case, true);
    }
    let case = new(&[1, 97, 17], (Some(256), 512), c)?;
    compare(c, &case, true)?;
    let case = Case { dropout: dropout(), ..new(&[130, 2, 64], (Some(32), 64), c)? };
    compare(c, &case, true)?;
    let case = Case { dropout: dropout(), ..new(&[200], (Some(8), 32), c)? };
    compare(c, &case, false)?;
    let case = new(&[70, 65], (None, 40), c)?;
    compare(c, &case, true)?;
    let case = Case { pq: None, ..new(&[97, 3], (Some(16), 64), c)? };
    compare(c, &case, true)?;
    let case = Case { pk: None, ..new(&[97, 3], (Some(16), 64), c)? };
    compare(c, &case, true)
}

struct Case {
    name: String,
    ragged: Ragged,
    heads: usize,
    positions: Positions,
    dropout: Option<Dropout>,
    /// `[q, k, v, do]`.
    x: [Tensor; 4],
    pk: Option<Tensor>,
    pq: Option<Tensor>,
}

impl Case {
    fn new(
        c: &Checker,
        lengths: &[usize],
        heads: usize,
        (buckets, max_relative): Buckets,
    ) -> Result<Self> {
        let (ragged, dtype) = (batch(lengths)?, c.attention_dtype());
        let positions = Positions::new(buckets, max_relative, longest(&ragged));
        let matrix = |rows, seed| c.rounded(&(random(&[rows, heads * HEAD], seed)? * 1.5)?, dtype);
        let (t, rows) = (ragged.tokens(), positions.rows().len());
        Ok(Self {
            name: format!("{lengths:?}, {heads} heads, buckets {buckets:?}, {dtype:?}"),
            x: [matrix(t, 1)?, matrix(t, 2)?, matrix(t, 3)?, matrix(t, 4)?],
            pk: Some(matrix(rows, 5)?),
            pq: Some(matrix(rows, 6)?),
            dropout: None,
            heads,
            ragged,
            positions,
        })
    }

    fn op(&self) -> Disentangled<'_> {
        Disentangled {
            ragged: &self.ragged,
            heads: self.heads,
            scale: 0.07,
            dropout: self.dropout.as_ref(),
            positions: &self.positions,
        }
    }

    /// Row of the tables for a distance.
    fn slot(&self, delta: isize) -> usize {
        self.positions.slot(delta) - self.positions.rows().start
    }
}

/// Makes the naive implementation's heads of a table's gradient zero, to be added to.
fn clear(gradient: &mut [f64], width: usize) {
    for row in gradient.chunks_mut(width) {
        let naive = width.min(NAIVE_HEADS * HEAD);
        row[..naive].fill(0.0);
    }
}

/// `[o, dq, dk, dv, dPK, dPQ]` of the naive implementation in its heads, and of `exact` in all others, from
/// what forward left; all in f64, but the tables' gradients, sums over sequences, rounded to bf16.
fn naive(case: &Case, saved: &Saved, d_o: &Tensor, exact: [&Tensor; 6]) -> Result<[Tensor; 6]> {
    let (t, width) = (case.ragged.tokens(), case.heads * HEAD);
    let rows = case.positions.rows().len();
    let table = |x: &Option<Tensor>| x.as_ref().map_or(Ok(vec![0.0; rows * width]), numbers);
    let (pk, pq) = (table(&saved.pk)?, table(&saved.pq)?);
    let [q, k, v, o, d_o, lse] =
        [&saved.q, &saved.k, &saved.v, &saved.o, d_o, &saved.lse].map(numbers);
    let (q, k, v, o, d_o, lse) = (q?, k?, v?, o?, d_o?, lse?);
    let mut all = exact.into_iter().map(numbers).collect::<Result<Vec<_>>>()?;
    all[4..].iter_mut().for_each(|gradient| clear(gradient, width));
    for (sequence, head) in heads_of(&case.ragged, case.heads) {
        let range = case.ragged.range(sequence);
        let sample = case.ragged.sample(sequence);
        let factors = factors(case.dropout.as_ref(), sample, head, range.len());
        let of_head = |x: &[f64]| part(x, width, range.clone(), head);
        let one = Head {
            q: of_head(&q),
            k: of_head(&k),
            v: of_head(&v),
            o: of_head(&o),
            d_o: of_head(&d_o),
            lse: lse[head * t + range.start..][..range.len()].to_vec(),
            scale: case.op().scale,
            relative: Some(Relative {
                pk: part(&pk, width, 0..rows, head),
                pq: part(&pq, width, 0..rows, head),
                slot: &|delta| case.slot(delta),
            }),
            sees: &|_, _| true,
            factor: &|i, j| factors[i][j],
        };
        let gradients = one.backward();
        let of_tokens = [&one.forward(), &gradients.q, &gradients.k, &gradients.v];
        for (all, rows) in all.iter_mut().zip(of_tokens) {
            put(all, width, range.start, head, rows);
        }
        for (all, table) in all[4..].iter_mut().zip([&gradients.pk, &gradients.pq]) {
            for (at, row) in table.iter().enumerate() {
                let sums = &mut all[at * width + head * HEAD..][..HEAD];
                sums.iter_mut().zip(row).for_each(|(sum, x)| *sum += x);
            }
        }
    }
    let tensor =
        |x: &Vec<f64>| Tensor::from_slice(x.as_slice(), (x.len() / width, width), &Device::Cpu);
    let round = |x: Tensor| wide(&x.to_dtype(DType::BF16)?);
    let [o, dq, dk, dv] = [0, 1, 2, 3].map(|i| tensor(&all[i]));
    let [pk, pq] = [4, 5].map(|i| round(tensor(&all[i])?));
    Ok([o?, dq?, dk?, dv?, pk?, pq?])
}

fn compare(c: &mut Checker, case: &Case, gradients: bool) -> Result<()> {
    let (dropped, tables) = (case.dropout.is_some(), [&case.pk, &case.pq].map(Option::is_some));
    c.case(format!("{}, dropout {dropped}, tables {tables:?}", case.name));
    let [q, k, v, d_o] = case.x.clone();
    let (pk, pq) = (case.pk.clone(), case.pq.clone());
    let (o, lse) = forward(case.op(), &q, &k, &v, pk.as_ref(), pq.as_ref())?;
    let saved = Saved { q, k, v, pk, pq, o, lse };
    let got = backward(case.op(), &saved, &d_o, gradients)?;

    // Backward starts from what forward left.
    let exact = Saved {
        q: wide(&saved.q)?,
        k: wide(&saved.k)?,
        v: wide(&saved.v)?,
        pk: saved.pk.as_ref().map(wide).transpose()?,
        pq: saved.pq.as_ref().map(wide).transpose()?,
        o: wide(&saved.o)?,
        lse: wide(&saved.lse)?,
    };
    let (pk, pq) = (exact.pk.as_ref(), exact.pq.as_ref());
    let (o, lse) = forward(case.op(), &exact.q, &exact.k, &exact.v, pk, pq)?;
    let d_o = wide(&d_o)?;
    let want = backward(case.op(), &exact, &d_o, gradients)?;
    // Scores in f32, of sums of 192 products.
    c.check_against("lse", &saved.lse, &lse, &lse, 1e-6)?;
    let none = Tensor::zeros((case.positions.rows().len(), o.dim(1)?), DType::F64, &Device::Cpu)?;
    let [want_pk, want_pq] = [&want.pk, &want.pq].map(|x| x.as_ref().unwrap_or(&none));
    let want_all = [&o, &want.q, &want.k, &want.v, want_pk, want_pq];
    let naive = match c.attention_dtype() {
        DType::BF16 => Some(naive(case, &exact, &d_o, want_all)?),
        _ => None,
    };
    c.same(
        "gradients of tables",
        [got.pk.is_some(), got.pq.is_some()],
        [want.pk.is_some(), want.pq.is_some()],
    );
    let got = [Some(saved.o), Some(got.q), Some(got.k), Some(got.v), got.pk, got.pq];
    for (i, what) in ["o", "dq", "dk", "dv", "dPK", "dPQ"].into_iter().enumerate() {
        let Some(got) = &got[i] else { continue };
        hold(c, what, got, want_all[i], naive.as_ref().map(|naive| &naive[i]))?;
    }
    Ok(())
}

#[cfg(all(test, feature = "host-kernels"))]
mod host {
    use super::*;
    use crate::testing::{assert_close, on_host};

    #[test]
    fn host_disentangled_attention_matches_the_cpu() -> Result<()> {
        on_host(|c| check(c, Sizes::Odd))
    }

    /// Heads of 32, as the CPU has them: widened only for the kernels.
    #[test]
    fn host_narrow_heads_match_the_cpu() -> Result<()> {
        let ragged = batch(&[5, 70])?;
        let positions = Positions::new(Some(8), 32, longest(&ragged));
        let matrix = |rows, seed| random(&[rows, 64], seed)?.to_dtype(DType::BF16);
        let rows = positions.rows().len();
        let (q, k, v, d_o) = (matrix(75, 1)?, matrix(75, 2)?, matrix(75, 3)?, matrix(75, 4)?);
        let (pk, pq) = (matrix(rows, 5)?, matrix(rows, 6)?);
        let dropout = dropout();
        let (scale, dropout) = (0.1, dropout.as_ref());
        let op = Disentangled { ragged: &ragged, heads: 2, scale, dropout, positions: &positions };
        let (o, lse) = forward(op, &q, &k, &v, Some(&pk), Some(&pq))?;
        let saved = Saved { q, k, v, pk: Some(pk), pq: Some(pq), o, lse };
        let wide_of = |x: &Option<Tensor>| x.as_ref().map(wide).transpose();
        let from = Saved {
            q: wide(&saved.q)?,
            k: wide(&saved.k)?,
            v: wide(&saved.v)?,
            pk: wide_of(&saved.pk)?,
            pq: wide_of(&saved.pq)?,
            o: wide(&saved.o)?,
            lse: wide(&saved.lse)?,
        };
        let exact = forward(op, &from.q, &from.k, &from.v, from.pk.as_ref(), from.pq.as_ref())?;
        // A few roundings to bf16, each of 1 in 512; measured: less than 5e-3 of the largest.
        assert_close("o", &saved.o, &exact.0, 1e-2)?;
        let got = backward(op, &saved, &d_o, true)?;
        let want = backward(op, &from, &wide(&d_o)?, true)?;
        for (got, want) in [(&got.q, &want.q), (&got.k, &want.k), (&got.v, &want.v)] {
            assert_close("dq, dk or dv", got, want, 1e-2)?;
        }
        for (got, want) in [(&got.pk, &want.pk), (&got.pq, &want.pq)] {
            let (got, want) = (got.as_ref().expect("one"), want.as_ref().expect("one"));
            assert_close("a table's", got, want, 1e-2)?;
        }
        Ok(())
    }
}
