//! The kernels of op.cu, run on the host, against the CPU implementation in f64; they may be twice as
//! wrong as a naive bf16 implementation.

use candle_core::Result;
use half::bf16;

use super::*;
use crate::{
    DropoutKey,
    attention::{
        Span,
        host::{Operands, Parameters as AttentionParameters, factors, part, put},
        naive::{HEAD, Head, Relative},
    },
    common::host_run::{
        Address, Buffer, check_against, check_within, in_every_order, kernels, launch, rounded,
    },
    testing::random,
};

/// `Positions` of position.cuh.
#[derive(Clone, Copy)]
#[repr(C)]
struct PositionParameters {
    pk: Address,
    pq: Address,
    slots: Address,
    partials: Address,
    stride: i32,
    center: i32,
    rows: i32,
    tiles: i32,
}

#[repr(C)]
struct Parameters {
    attention: AttentionParameters,
    positions: PositionParameters,
}

#[repr(C)]
struct SumPositions {
    partials: Address,
    gradient: Address,
    parts: i32,
    heads: i32,
    rows: i32,
}

kernels!(
    Parameters: host_disentangled_forward, host_disentangled_backward_queries,
        host_disentangled_backward_keys;
    SumPositions: host_disentangled_sum_positions;
);

const FORWARD_BYTES: usize = 111104;
const BACKWARD_BYTES: usize = 103424;
const HEADS: usize = 2;
const WIDTH: usize = HEADS * HEAD;
/// Blocks that share the tiles of a backward pass; fewer than tiles in some cases.
const PARTS: usize = 3;

struct Case {
    ragged: Ragged,
    positions: Positions,
    dropout: Option<Dropout>,
    /// `[q, k, v, do]`.
    x: [Tensor; 4],
    pk: Option<Tensor>,
    pq: Option<Tensor>,
}

fn flat(x: &Tensor) -> Result<Vec<f64>> {
    x.flatten_all()?.to_vec1::<f64>()
}

impl Case {
    fn new(lengths: &[usize], buckets: Option<usize>, max_relative: usize) -> Result<Self> {
        let samples: Vec<u32> = (0..lengths.len() as u32).map(|i| 100 * i + 7).collect();
        let ragged = Ragged::new(lengths, &samples)?;
        let positions = Positions::new(buckets, max_relative, longest(&ragged));
        let matrix = |rows, seed| rounded::<bf16>(&(random(&[rows, WIDTH], seed)? * 1.5)?);
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

/// What the kernels leave beside `Operands`: dPK and dPQ.
struct Tables {
    pk: Option<Buffer<f32>>,
    pq: Option<Buffer<f32>>,
}

fn run(case: &Case, operands: &Operands, gradients: bool) -> Result<Tables> {
    let op = case.op();
    let (rows, center) = (case.positions.rows().len(), case.positions.max_len() as isize - 1);
    let slots: Vec<i32> = (-center..=center).map(|delta| case.slot(delta) as i32).collect();
    let tables = [&case.pk, &case.pq].map(|x| x.as_ref().map(Buffer::<bf16>::tensor).transpose());
    let [pk, pq] = tables;
    let (pk, pq, slots) = (pk?, pq?, Buffer::of(&slots));
    let partials = || Buffer::<f32>::poisoned(PARTS * HEADS * rows * HEAD);
    let [d_pk, d_pq] = [&pk, &pq].map(|x| x.as_ref().filter(|_| gradients).map(|_| partials()));
    let parameters = |partials: Option<&Buffer<f32>>| Parameters {
        attention: operands.parameters(HEADS, op.scale, Span::default(), op.dropout),
        positions: PositionParameters {
            pk: Address::of(pk.as_ref()),
            pq: Address::of(pq.as_ref()),
            slots: slots.address(),
            partials: Address::of(partials),
            stride: WIDTH as i32,
            center: center as i32,
            rows: rows as i32,
            tiles: operands.tiles() as i32,
        },
    };
    let grid = [operands.tiles(), HEADS, 1];
    launch(host_disentangled_forward, grid, FORWARD_BYTES, &parameters(None));
    let grid = [PARTS, HEADS, 1];
    let queries = parameters(d_pk.as_ref());
    launch(host_disentangled_backward_queries, grid, BACKWARD_BYTES, &queries);
    let keys = parameters(d_pq.as_ref());
    launch(host_disentangled_backward_keys, grid, BACKWARD_BYTES, &keys);
    let [pk, pq] = [d_pk, d_pq].map(|partials| {
        let gradient = Buffer::poisoned(rows * WIDTH);
        let parameters = SumPositions {
            partials: partials.as_ref()?.address(),
            gradient: gradient.address(),
            parts: PARTS as i32,
            heads: HEADS as i32,
            rows: rows as i32,
        };
        let grid = [(rows * WIDTH).div_ceil(256), 1, 1];
        launch(host_disentangled_sum_positions, grid, 0, &parameters);
        Some(gradient)
    });
    Ok(Tables { pk, pq })
}

/// `[o, dq, dk, dv, dPK, dPQ]` of the naive implementation, from what the kernels' forward left.
fn naive(case: &Case, o: &[f64], lse: &[f64]) -> Result<[Vec<f64>; 6]> {
    let (t, rows) = (case.ragged.tokens(), case.positions.rows().len());
    let table = |x: &Option<Tensor>| x.as_ref().map_or(Ok(vec![0.0; rows * WIDTH]), flat);
    let (pk, pq) = (table(&case.pk)?, table(&case.pq)?);
    let [q, k, v, d_o] = case.x.each_ref().map(flat);
    let (q, k, v, d_o) = (q?, k?, v?, d_o?);
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
            o: of_head(o),
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
    Ok(all)
}

fn compare(case: &Case, gradients: bool) -> Result<()> {
    let operands = Operands::new(&case.ragged, HEADS, &case.x)?;
    let tables = run(case, &operands, gradients)?;
    let [q, k, v, d_o] = &case.x;
    let (pk, pq) = (case.pk.as_ref(), case.pq.as_ref());
    let (exact_o, exact_lse) = forward(case.op(), q, k, v, pk, pq)?;
    // Scores in f32, of sums of 192 products.
    check_within("lse", &operands.lse.wide(), &flat(&exact_lse)?, 0.0, 1e-6)?;
    // Backward starts from what forward left.
    let (o, lse) = (operands.o.wide(), operands.lse.wide());
    let t = case.ragged.tokens();
    let saved = Saved {
        q: q.clone(),
        k: k.clone(),
        v: v.clone(),
        pk: case.pk.clone(),
        pq: case.pq.clone(),
        o: Tensor::from_vec(o.clone(), (t, WIDTH), &Device::Cpu)?,
        lse: Tensor::from_vec(lse.clone(), (HEADS, t), &Device::Cpu)?,
    };
    let exact = backward(case.op(), &saved, d_o, gradients)?;
    let naive = naive(case, &o, &lse)?;
    check_against("o", &operands.o, &flat(&exact_o)?, &naive[0])?;
    check_against("dq", &operands.dq, &flat(&exact.q)?, &naive[1])?;
    check_against("dk", &operands.dk, &flat(&exact.k)?, &naive[2])?;
    check_against("dv", &operands.dv, &flat(&exact.v)?, &naive[3])?;
    let sides = [("dPK", tables.pk, exact.pk), ("dPQ", tables.pq, exact.pq)];
    for ((what, got, exact), naive) in sides.into_iter().zip(&naive[4..]) {
        assert_eq!(got.is_some(), exact.is_some(), "{what}");
        if let (Some(got), Some(exact)) = (got, exact) {
            check_against(what, &got, &flat(&exact)?, naive)?;
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
