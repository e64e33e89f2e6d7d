//! The kernels of op.cu, run on the host, against the CPU implementation in f64; they may be twice as
//! wrong as a naive bf16 implementation.

use candle_core::Result;
use half::bf16;

use super::{
    naive::{HEAD, Head, Rows},
    *,
};
use crate::{
    DropoutKey,
    common::host_run::{
        Address, Buffer, DropoutParameters, check_against, check_within, in_every_order, kernels,
        launch, rounded, seqlens, work,
    },
    testing::random,
};

/// `Attention` of tile.cuh.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Parameters {
    pub(crate) q: Address,
    pub(crate) k: Address,
    pub(crate) v: Address,
    pub(crate) o: Address,
    pub(crate) lse: Address,
    pub(crate) d_o: Address,
    pub(crate) delta: Address,
    pub(crate) dq: Address,
    pub(crate) dk: Address,
    pub(crate) dv: Address,
    pub(crate) cu_seqlens: Address,
    pub(crate) samples: Address,
    pub(crate) work: Address,
    pub(crate) stride: i32,
    pub(crate) tokens: i32,
    pub(crate) causal: i32,
    pub(crate) window: i32,
    pub(crate) scale: f32,
    pub(crate) dropout: DropoutParameters,
}

kernels!(
    Parameters: host_attention_forward, host_attention_backward_queries,
        host_attention_backward_keys;
);

const SHARED_BYTES: usize = 58368;
const HEADS: usize = 2;
const WIDTH: usize = HEADS * HEAD;

/// All operands and results of attention in memory of kernels.
pub(crate) struct Operands {
    pub(crate) q: Buffer<bf16>,
    pub(crate) k: Buffer<bf16>,
    pub(crate) v: Buffer<bf16>,
    pub(crate) o: Buffer<bf16>,
    pub(crate) d_o: Buffer<bf16>,
    pub(crate) dq: Buffer<bf16>,
    pub(crate) dk: Buffer<bf16>,
    pub(crate) dv: Buffer<bf16>,
    pub(crate) lse: Buffer<f32>,
    delta: Buffer<f32>,
    cu_seqlens: Buffer<i32>,
    samples: Buffer<u32>,
    work: Buffer<[i32; 2]>,
}

impl Operands {
    /// Of `[q, k, v, do]`.
    pub(crate) fn new(ragged: &Ragged, heads: usize, x: &[Tensor; 4]) -> Result<Self> {
        let tensor = |i: usize| Buffer::tensor(&x[i]);
        let matrix = || Buffer::poisoned(ragged.tokens() * heads * HEAD);
        let rows = || Buffer::poisoned(heads * ragged.tokens());
        Ok(Self {
            q: tensor(0)?,
            k: tensor(1)?,
            v: tensor(2)?,
            d_o: tensor(3)?,
            o: matrix(),
            dq: matrix(),
            dk: matrix(),
            dv: matrix(),
            lse: rows(),
            delta: rows(),
            cu_seqlens: seqlens(ragged),
            samples: Buffer::of(&ragged.sequence_rows().sample),
            work: work(ragged, 64),
        })
    }

    /// Tiles of 64 rows in the batch.
    pub(crate) fn tiles(&self) -> usize {
        self.work.values().len()
    }

    pub(crate) fn parameters(
        &self,
        heads: usize,
        scale: f64,
        span: Span,
        dropout: Option<&Dropout>,
    ) -> Parameters {
        Parameters {
            q: self.q.address(),
            k: self.k.address(),
            v: self.v.address(),
            o: self.o.address(),
            lse: self.lse.address(),
            d_o: self.d_o.address(),
            delta: self.delta.address(),
            dq: self.dq.address(),
            dk: self.dk.address(),
            dv: self.dv.address(),
            cu_seqlens: self.cu_seqlens.address(),
            samples: self.samples.address(),
            work: self.work.address(),
            stride: (heads * HEAD) as i32,
            tokens: (self.lse.values().len() / heads) as i32,
            causal: i32::from(span.causal),
            window: span.window.map_or(i32::MAX, |w| i32::try_from(w).unwrap_or(i32::MAX)),
            scale: scale as f32,
            dropout: DropoutParameters::new(dropout),
        }
    }
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

fn compare(lengths: &[usize], span: Span, dropout: Option<&Dropout>) -> Result<()> {
    let samples: Vec<u32> = (0..lengths.len() as u32).map(|i| 100 * i + 7).collect();
    let ragged = Ragged::new(lengths, &samples)?;
    let t = ragged.tokens();
    let matrix = |seed| rounded::<bf16>(&(random(&[t, WIDTH], seed)? * 2.0)?);
    let x = [matrix(1)?, matrix(2)?, matrix(3)?, matrix(4)?];
    let attention = Attention { ragged: &ragged, heads: HEADS, scale: 0.125, dropout, span };
    let operands = Operands::new(&ragged, HEADS, &x)?;
    let parameters = operands.parameters(HEADS, attention.scale, span, dropout);
    let grid = [operands.tiles(), HEADS, 1];
    launch(host_attention_forward, grid, SHARED_BYTES, &parameters);
    launch(host_attention_backward_queries, grid, SHARED_BYTES, &parameters);
    launch(host_attention_backward_keys, grid, SHARED_BYTES, &parameters);

    let (o, lse) = forward(attention, &x[0], &x[1], &x[2])?;
    let [exact_o, exact_lse] = [&o, &lse].map(|x| x.flatten_all()?.to_vec1::<f64>());
    // Scores reach 40; their log-sum-exp in f32 is good to a few units in the last place.
    check_within("lse", &operands.lse.wide(), &exact_lse?, 0.0, 1e-6)?;
    // Backward starts from what forward left.
    let stored = |buffer: &[f64], shape: (usize, usize)| {
        Tensor::from_vec(buffer.to_vec(), shape, &Device::Cpu)
    };
    let (o, lse) = (operands.o.wide(), operands.lse.wide());
    let saved = Saved {
        q: x[0].clone(),
        k: x[1].clone(),
        v: x[2].clone(),
        o: stored(&o, (t, WIDTH))?,
        lse: stored(&lse, (HEADS, t))?,
    };
    let (dq, dk, dv) = backward(attention, &saved, &x[3])?;
    let exact = [dq, dk, dv].map(|x| x.flatten_all()?.to_vec1::<f64>());
    let [q, k, v, d_o] = x.each_ref().map(|x| x.flatten_all()?.to_vec1::<f64>());
    let (q, k, v, d_o) = (q?, k?, v?, d_o?);
    let mut naive: [Vec<f64>; 4] = std::array::from_fn(|_| vec![f64::NAN; t * WIDTH]);
    for (sequence, head) in (0..lengths.len()).flat_map(|s| (0..HEADS).map(move |h| (s, h))) {
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
            scale: attention.scale,
            relative: None,
            sees: &|i, j| span.keys(i, range.len()).contains(&j),
            factor: &|i, j| factors[i][j],
        };
        let gradients = one.backward();
        let all = [&one.forward(), &gradients.q, &gradients.k, &gradients.v];
        for (naive, rows) in naive.iter_mut().zip(all) {
            put(naive, WIDTH, range.start, head, rows);
        }
    }
    let what = format!("{lengths:?} {span:?}");
    check_against(&format!("o {what}"), &operands.o, &exact_o?, &naive[0])?;
    let got = [&operands.dq, &operands.dk, &operands.dv];
    for (i, exact) in exact.into_iter().enumerate() {
        check_against(&format!("d{} {what}", ["q", "k", "v"][i]), got[i], &exact?, &naive[i + 1])?;
    }
    Ok(())
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
