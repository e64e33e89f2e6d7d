//! The kernels of op.cu, run on the host, against the CPU implementation in f64; they may be twice as
//! wrong as a naive bf16 implementation.

use candle_core::{DType, Device, Result};

use super::*;
use crate::{
    DropoutKey,
    attention::{
        host::{factors, flat, part, put},
        naive::{HEAD, Head, Relative},
    },
    common::host_run::in_every_order,
    testing::{check_against, random, rounded, wide},
};

const HEADS: usize = 2;
const WIDTH: usize = HEADS * HEAD;

struct Case {
    ragged: Ragged,
    positions: Positions,
    dropout: Option<Dropout>,
    /// `[q, k, v, do]`.
    x: [Tensor; 4],
    pk: Option<Tensor>,
    pq: Option<Tensor>,
}

impl Case {
    fn new(lengths: &[usize], buckets: Option<usize>, max_relative: usize) -> Result<Self> {
        let samples: Vec<u32> = (0..lengths.len() as u32).map(|i| 100 * i + 7).collect();
        let ragged = Ragged::new(lengths, &samples)?;
        let positions = Positions::new(buckets, max_relative, longest(&ragged));
        let matrix = |rows, seed| rounded(&(random(&[rows, WIDTH], seed)? * 1.5)?, DType::BF16);
        let (t, rows) = (ragged.tokens(), positions.rows().len());
        Ok(Self {
            x: [matrix(t, 1)?, matrix(t, 2)?, matrix(t, 3)?, matrix(t, 4)?],
            pk: Some(matrix(rows, 5)?),
            pq: Some(matrix(rows, 6)?),
            dropout: None,
            ragged,
            positions,
        })
    }

    fn op(&self) -> Disentangled<'_> {
        Disentangled {
            ragged: &self.ragged,
            heads: HEADS,
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

/// `[o, dq, dk, dv, dPK, dPQ]` of the naive implementation, from what forward left; all in f64, but the
/// tables' gradients, sums over sequences, rounded to bf16.
fn naive(case: &Case, saved: &Saved, d_o: &Tensor) -> Result<[Tensor; 6]> {
    let (t, rows) = (case.ragged.tokens(), case.positions.rows().len());
    let table = |x: &Option<Tensor>| x.as_ref().map_or(Ok(vec![0.0; rows * WIDTH]), flat);
    let (pk, pq) = (table(&saved.pk)?, table(&saved.pq)?);
    let [q, k, v, o, d_o, lse] =
        [&saved.q, &saved.k, &saved.v, &saved.o, d_o, &saved.lse].map(flat);
    let (q, k, v, o, d_o, lse) = (q?, k?, v?, o?, d_o?, lse?);
    let sizes = [t, t, t, t, rows, rows];
    let mut all = sizes.map(|rows| vec![0.0; rows * WIDTH]);
    for (sequence, head) in
        (0..case.ragged.sequences()).flat_map(|s| (0..HEADS).map(move |h| (s, h)))
    {
        let range = case.ragged.range(sequence);
        let sample = case.ragged.sample(sequence);
        let factors = factors(case.dropout.as_ref(), sample, head, range.len());
        let of_head = |x: &[f64]| part(x, WIDTH, range.clone(), head);
        let one = Head {
            q: of_head(&q),
            k: of_head(&k),
            v: of_head(&v),
            o: of_head(&o),
            d_o: of_head(&d_o),
            lse: lse[head * t + range.start..][..range.len()].to_vec(),
            scale: case.op().scale,
            relative: Some(Relative {
                pk: part(&pk, WIDTH, 0..rows, head),
                pq: part(&pq, WIDTH, 0..rows, head),
                slot: &|delta| case.slot(delta),
            }),
            sees: &|_, _| true,
            factor: &|i, j| factors[i][j],
        };
        let gradients = one.backward();
        let of_tokens = [&one.forward(), &gradients.q, &gradients.k, &gradients.v];
        for (all, rows) in all.iter_mut().zip(of_tokens) {
            put(all, WIDTH, range.start, head, rows);
        }
        for (all, table) in all[4..].iter_mut().zip([&gradients.pk, &gradients.pq]) {
            for (at, row) in table.iter().enumerate() {
                let sums = &mut all[at * WIDTH + head * HEAD..][..HEAD];
                sums.iter_mut().zip(row).for_each(|(sum, x)| *sum += x);
            }
        }
    }
    let tensor = |x: Vec<f64>| {
        let rows = x.len() / WIDTH;
        Tensor::from_vec(x, (rows, WIDTH), &Device::Cpu)
    };
    let [o, dq, dk, dv, pk, pq] = all.map(tensor);
    Ok([o?, dq?, dk?, dv?, rounded(&pk?, DType::BF16)?, rounded(&pq?, DType::BF16)?])
}

fn compare(case: &Case, gradients: bool) -> Result<()> {
    let [q, k, v, d_o] = case.x.clone();
    let (pk, pq) = (case.pk.clone(), case.pq.clone());
    let (o, lse) = device::forward(case.op(), [&q, &k, &v], pk.as_ref(), pq.as_ref())?;
    let saved = Saved { q, k, v, pk, pq, o, lse };
    let got = device::backward(case.op(), &saved, &d_o, gradients)?;

    // Backward starts from what the kernels' forward left.
    let exact = Saved {
        q: wide(&saved.q)?,
        k: wide(&saved.k)?,
        v: wide(&saved.v)?,
        pk: saved.pk.as_ref().map(wide).transpose()?,
        pq: saved.pq.as_ref().map(wide).transpose()?,
        o: wide(&saved.o)?,
        lse: wide(&saved.lse)?,
    };
    let tables = (exact.pk.as_ref(), exact.pq.as_ref());
    let (o, lse) = forward(case.op(), &exact.q, &exact.k, &exact.v, tables.0, tables.1)?;
    let want = backward(case.op(), &exact, &wide(&d_o)?, gradients)?;
    let naive = naive(case, &exact, &wide(&d_o)?)?;
    // Scores in f32, of sums of 192 products.
    check_against("lse", &saved.lse, &lse, &lse, 1e-6)?;
    check_against("o", &saved.o, &o, &naive[0], 1e-6)?;
    check_against("dq", &got.q, &want.q, &naive[1], 1e-6)?;
    check_against("dk", &got.k, &want.k, &naive[2], 1e-6)?;
    check_against("dv", &got.v, &want.v, &naive[3], 1e-6)?;
    let sides = [("dPK", got.pk, want.pk), ("dPQ", got.pq, want.pq)];
    for ((what, got, want), naive) in sides.into_iter().zip(&naive[4..]) {
        assert_eq!(got.is_some(), want.is_some(), "{what}");
        if let (Some(got), Some(want)) = (got, want) {
            check_against(what, &got, &want, naive, 1e-6)?;
        }
    }
    Ok(())
}

#[test]
fn host_disentangled_attention_matches_the_cpu() -> Result<()> {
    let dropout = Dropout::new(0.2, DropoutKey { seed: 5 << 33 | 3, step: 2, stream: 1 }, 4);
    in_every_order(|| {
        // Distances in the linear part, in the logarithmic one, beyond the largest, and no buckets.
        compare(&Case::new(&[1, 97, 17], Some(256), 512)?, true)?;
        compare(&Case { dropout, ..Case::new(&[130, 2, 64], Some(32), 64)? }, true)?;
        compare(&Case { dropout, ..Case::new(&[200], Some(8), 32)? }, false)?;
        compare(&Case::new(&[70, 65], None, 40)?, true)
    })
}

#[test]
fn host_disentangled_attention_with_one_table_matches_the_cpu() -> Result<()> {
    in_every_order(|| {
        compare(&Case { pq: None, ..Case::new(&[97, 3], Some(16), 64)? }, true)?;
        compare(&Case { pk: None, ..Case::new(&[97, 3], Some(16), 64)? }, true)
    })
}
