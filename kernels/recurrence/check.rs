//! The kernels against the CPU implementation in f64.

use candle_core::{DType, Device, Result};
use half::bf16;

use super::{
    naive::{Naive, Passed, Rows},
    schedule::Group,
    *,
};
use crate::common::check::{Checker, LENGTHS, Sizes, batch, numbers, random, wide};

/// Both cells in both directions, with a start and without, sequences of one token and of many.
pub(crate) fn check(c: &mut Checker, sizes: Sizes) -> Result<()> {
    let (lengths, widths) = match sizes {
        Sizes::Odd => (&[1, 37, 2, 13][..], &[1, 19, 40][..]),
        // What the models over word vectors run.
        Sizes::Real => (&LENGTHS[..], &[128][..]),
    };
    let ragged = batch(lengths)?;
    for hidden in widths {
        for (cell, reverse) in [(Cell::Lstm, false), (Cell::Lstm, true), (Cell::Gru, true)] {
            let op = Recurrence { cell, ragged: &ragged, reverse };
            for dtype in c.stored() {
                compare(c, op, *hidden, !reverse || cell == Cell::Gru, dtype)?;
            }
        }
    }
    Ok(())
}

/// What forward reads.
struct Operands {
    gx: Tensor,
    w_hh: Tensor,
    b_hh: Tensor,
    start: Option<State>,
}

impl Operands {
    fn random(
        c: &Checker,
        op: Recurrence<'_>,
        hidden: usize,
        start: bool,
        dtype: DType,
    ) -> Result<Self> {
        let (t, b, rows) = (op.ragged.tokens(), op.ragged.sequences(), op.cell.gates() * hidden);
        let of_start = |_| {
            let of_c = |_| c.random(&[b, hidden], 5, DType::F32);
            let c0 = (op.cell == Cell::Lstm).then_some(()).map(of_c).transpose()?;
            Ok::<_, candle_core::Error>(State { h: c.random(&[b, hidden], 4, dtype)?, c: c0 })
        };
        // Weights by which sums over H stay about 1.
        let scale = 2.0 / (hidden as f64).sqrt();
        Ok(Self {
            gx: c.rounded(&(random(&[t, rows], 1)? * 2.0)?, dtype)?,
            w_hh: c.rounded(&(random(&[rows, hidden], 2)? * scale)?, dtype)?,
            b_hh: c.random(&[rows], 3, DType::F32)?,
            start: start.then_some(()).map(of_start).transpose()?,
        })
    }

    /// In f64.
    fn wide(&self) -> Result<Self> {
        let (gx, w_hh, b_hh) = (wide(&self.gx)?, wide(&self.w_hh)?, wide(&self.b_hh)?);
        Ok(Self { gx, w_hh, b_hh, start: self.start.as_ref().map(wide_state).transpose()? })
    }

    fn weights(&self) -> Weights<'_> {
        Weights { w_hh: &self.w_hh, b_hh: Some(&self.b_hh) }
    }
}

fn wide_state(state: &State) -> Result<State> {
    Ok(State { h: wide(&state.h)?, c: state.c.as_ref().map(wide).transpose()? })
}

fn compare(
    c: &mut Checker,
    op: Recurrence<'_>,
    hidden: usize,
    start: bool,
    dtype: DType,
) -> Result<()> {
    let Recurrence { cell, ragged, reverse } = op;
    c.case(format!(
        "{cell:?}, {} x {hidden}, reverse {reverse}, start {start}, {dtype:?}",
        ragged.tokens()
    ));
    let operands = Operands::random(c, op, hidden, start, dtype)?;
    let dh = c.random(&[ragged.tokens(), hidden], 6, dtype)?;
    let (exact, exact_dh) = (operands.wide()?, wide(&dh)?);
    let naive = Simple::new(op, &exact, dtype)?;
    // Sums over H, and functions that are off by up to 1.4e-7. What a step adds to it fades with later ones.
    let arithmetic = c.of_sums(hidden) + 3e-7;
    let (h, saved) = forward(op, operands.gx.copy()?, operands.weights(), operands.start.as_ref())?;
    let (exact_h, _) = forward(op, exact.gx.copy()?, exact.weights(), exact.start.as_ref())?;
    c.check_against("h", &h, &exact_h, &naive.forward(&exact.gx)?, arithmetic)?;

    // Backward starts from what forward left.
    let left = Saved {
        gates: wide(&saved.gates)?,
        cell: wide(&saved.cell)?,
        h: wide(&saved.h)?,
        start: exact.start.clone(),
    };
    let want = naive.backward(&left, &exact_dh)?;
    let rows = cell.gates() * hidden;
    let (dw, db) = (c.random(&[rows, hidden], 7, DType::F32)?, c.random(&[rows], 8, DType::F32)?);
    let (exact_dw, exact_db) = (wide(&dw)?, wide(&db)?);
    let naive_dw = (&exact_dw + want.a.t()?.matmul(&want.before)?)?;
    let naive_db = (&exact_db + want.a.sum(0)?)?;
    let got = backward(op, saved, &operands.w_hh, &dh, Weights { w_hh: &dw, b_hh: Some(&db) })?;
    let into = Weights { w_hh: &exact_dw, b_hh: Some(&exact_db) };
    let exact = backward(op, left, &exact.w_hh, &exact_dh, into)?;
    c.check_against("dgx", &got.gx, &exact.gx, &want.gx, arithmetic)?;
    let over_rows = arithmetic + c.of_sums(ragged.tokens());
    c.check_against("dw", &dw, &exact_dw, &naive_dw, over_rows)?;
    c.check_against("db", &db, &exact_db, &naive_db, over_rows)?;
    if let (Some(got), Some(exact)) = (got.start, exact.start) {
        c.check_against("dh0", &got.h, &exact.h, &want.h0, arithmetic)?;
        if let (Some(got), Some(exact), Some(want)) = (got.c, exact.c, want.c0) {
            c.check_against("dc0", &got, &exact, &want, arithmetic)?;
        }
    }
    Ok(())
}

/// The naive implementation over a batch.
struct Simple<'a> {
    op: Recurrence<'a>,
    hidden: usize,
    w_hh: Vec<f64>,
    b_hh: Vec<f64>,
    h0: Vec<f64>,
    c0: Vec<f64>,
    dtype: DType,
}

/// What it leaves, by row or by sequence.
struct SimpleGradients {
    gx: Tensor,
    a: Tensor,
    before: Tensor,
    h0: Tensor,
    c0: Option<Tensor>,
}

impl<'a> Simple<'a> {
    fn new(op: Recurrence<'a>, exact: &Operands, dtype: DType) -> Result<Self> {
        let hidden = exact.w_hh.dim(1)?;
        let or_zeros = |state: Option<&Tensor>| match state {
            Some(state) => numbers(state),
            None => Ok(vec![0.0; op.ragged.sequences() * hidden]),
        };
        let start = exact.start.as_ref();
        let (h0, c0) = (start.map(|start| &start.h), start.and_then(|start| start.c.as_ref()));
        Ok(Self {
            op,
            hidden,
            w_hh: numbers(&exact.w_hh)?,
            b_hh: numbers(&exact.b_hh)?,
            h0: or_zeros(h0)?,
            c0: or_zeros(c0)?,
            dtype,
        })
    }

    fn layer(&self) -> Naive<'_> {
        let round: &dyn Fn(f64) -> f64 = match self.dtype {
            DType::BF16 => &|x| bf16::from_f64(x).to_f64(),
            _ => &|x| f64::from(x as f32),
        };
        let Self { op, hidden, w_hh, b_hh, .. } = self;
        Naive { cell: op.cell, hidden: *hidden, w_hh, b_hh, round }
    }

    /// The rows of a sequence in the order of its steps.
    fn steps(&self, sequence: usize) -> Vec<usize> {
        let group = Group { op: self.op, sequences: &[sequence] };
        (0..group.steps()).map(|step| group.row(0, step)).collect()
    }

    /// Its h₀ and c₀.
    fn start(&self, sequence: usize) -> (Vec<f64>, Vec<f64>) {
        let own = |state: &[f64]| state[sequence * self.hidden..][..self.hidden].to_vec();
        (own(&self.h0), own(&self.c0))
    }

    /// h.
    fn forward(&self, gx: &Tensor) -> Result<Tensor> {
        let (gx, layer) = (gx.to_vec2::<f64>()?, self.layer());
        let mut h = vec![vec![]; gx.len()];
        for sequence in 0..self.op.ragged.sequences() {
            let (steps, (h0, c0)) = (self.steps(sequence), self.start(sequence));
            scatter(&mut h, &steps, layer.forward(&gather(&gx, &steps), h0, c0).h);
        }
        Tensor::new(h, &Device::Cpu)
    }

    fn backward(&self, left: &Saved, dh: &Tensor) -> Result<SimpleGradients> {
        let rows = |tensor: &Tensor| tensor.to_vec2::<f64>();
        let (gates, cell, h, dh) =
            (rows(&left.gates)?, rows(&left.cell)?, rows(&left.h)?, rows(dh)?);
        let [mut gx, mut a, mut before] = [(); 3].map(|()| vec![vec![]; dh.len()]);
        let (mut d_h0, mut d_c0) = (vec![], vec![]);
        for sequence in 0..self.op.ragged.sequences() {
            let (steps, (h0, c0)) = (self.steps(sequence), self.start(sequence));
            let own = |rows: &Rows| gather(rows, &steps);
            let passed = Passed { gates: own(&gates), cell: own(&cell), h: own(&h), h0, c0 };
            let back = self.layer().backward(&passed, &own(&dh));
            scatter(&mut gx, &steps, back.gx);
            scatter(&mut a, &steps, back.a);
            scatter(&mut before, &steps, back.before);
            d_h0.push(back.h0);
            d_c0.push(back.c0);
        }
        let tensor = |rows: Rows| Tensor::new(rows, &Device::Cpu);
        let c0 = (self.op.cell == Cell::Lstm).then(|| tensor(d_c0)).transpose()?;
        Ok(SimpleGradients {
            gx: tensor(gx)?,
            a: tensor(a)?,
            before: tensor(before)?,
            h0: tensor(d_h0)?,
            c0,
        })
    }
}

fn gather(rows: &Rows, at: &[usize]) -> Rows {
    at.iter().map(|row| rows[*row].clone()).collect()
}

fn scatter(to: &mut Rows, at: &[usize], rows: Rows) {
    for (row, values) in at.iter().zip(rows) {
        to[*row] = values;
    }
}

#[cfg(all(test, feature = "host-kernels"))]
mod host {
    use super::*;
    use crate::testing::on_host;

    #[test]
    fn host_recurrence_matches_the_cpu() -> Result<()> {
        on_host(|c| check(c, Sizes::Odd))
    }
}
