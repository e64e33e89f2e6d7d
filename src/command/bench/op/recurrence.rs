//! A bidirectional layer of LSTM and of GRU, as models over word vectors have it: both directions, each with
//! the product that makes its gates' inputs.

use allreel_kernels::{
    linear,
    recurrence::{self, Cell, Recurrence, Weights},
};
use candle_core::{Result, Tensor};

use super::{Case, Pass, Setup, Work, linear::works};
use crate::command::bench::measure::Body;

/// Columns of the word vectors, and H of each direction.
const INPUTS: usize = 300;
const HIDDEN: usize = 128;

/// Both cells at each length.
pub fn cases(setup: &Setup) -> Vec<Case> {
    let of_length = |length: &usize| {
        let length = *length;
        let each = move |cell| Pass::ALL.map(|pass| case(setup, cell, length, pass));
        [Cell::Lstm, Cell::Gru].into_iter().flat_map(each)
    };
    setup.sizes.lengths.iter().flat_map(of_length).collect()
}

fn case(setup: &Setup, cell: Cell, length: usize, pass: Pass) -> Case {
    let tokens = setup.sizes.tokens;
    let work = work(tokens, INPUTS, HIDDEN, cell, setup.element(), pass);
    let name = format!("{} {}", format!("{cell:?}").to_lowercase(), pass.name());
    let sizes = format!("{tokens} tokens, L {length}, {INPUTS} to 2 x {HIDDEN}");
    Case::new(name, sizes, work, move |setup| run(setup, cell, length, pass))
}

/// Two directions. Of each, beside its linear: the steps read gx and W_hh and write the gates, h and c (f32);
/// backward reads these and dh, writes dgx and adds to gradients of W_hh and b_hh.
pub fn work(
    tokens: usize,
    inputs: usize,
    hidden: usize,
    cell: Cell,
    element: f64,
    pass: Pass,
) -> Work {
    let rows = cell.gates() * hidden;
    let [forward, input, parameters] = works(tokens, inputs, rows, element);
    let (t, h, g) = (tokens as f64, hidden as f64, rows as f64);
    let (gates, state, c, w) = (element * t * g, element * t * h, 4.0 * t * h, element * g * h);
    let product = 2.0 * t * g * h;
    let steps = Work { bytes: 2.0 * gates + w + 4.0 * g + state + c, flops: product };
    let gradients = 8.0 * g * h + 8.0 * g;
    let back = Work { bytes: 2.0 * gates + w + 2.0 * state + c + gradients, flops: 2.0 * product };
    pass.work(forward + steps, input + parameters + back) * 2.0
}

/// One direction's parameters and their gradients.
struct Direction {
    reverse: bool,
    w_ih: Tensor,
    w_hh: Tensor,
    bias: Tensor,
    d_w_ih: Tensor,
    d_w_hh: Tensor,
    d_bias: Tensor,
}

impl Direction {
    fn new(setup: &Setup, cell: Cell, reverse: bool) -> Result<Self> {
        let rows = cell.gates() * HIDDEN;
        // So small that gates are not all shut.
        let weight = |columns: usize| setup.normal((rows, columns))? * 0.05;
        Ok(Self {
            reverse,
            w_ih: weight(INPUTS)?,
            w_hh: weight(HIDDEN)?,
            bias: setup.zeros(rows)?,
            d_w_ih: setup.zeros((rows, INPUTS))?,
            d_w_hh: setup.zeros((rows, HIDDEN))?,
            d_bias: setup.zeros(rows)?,
        })
    }

    fn run(&self, op: Recurrence<'_>, x: &Tensor, dh: &Tensor, pass: Pass) -> Result<()> {
        let op = Recurrence { reverse: self.reverse, ..op };
        let gx = linear::forward(x, &self.w_ih, Some(&self.bias))?;
        let weights = Weights { w_hh: &self.w_hh, b_hh: Some(&self.bias) };
        let (_h, saved) = recurrence::forward(op, gx, weights, None)?;
        if pass == Pass::Both {
            let into = Weights { w_hh: &self.d_w_hh, b_hh: Some(&self.d_bias) };
            let d_gx = recurrence::backward(op, saved, &self.w_hh, dh, into)?.gx;
            linear::backward_input(&d_gx, &self.w_ih)?;
            linear::backward_weight(&d_gx, x, &self.d_w_ih)?;
            linear::backward_bias(&d_gx, &self.d_bias)?;
        }
        Ok(())
    }
}

fn run(setup: &Setup, cell: Cell, length: usize, pass: Pass) -> Result<Body> {
    let ragged = setup.ragged(length)?;
    let x = setup.normal((ragged.tokens(), INPUTS))?;
    let dh = setup.normal((ragged.tokens(), HIDDEN))?;
    let directions = [Direction::new(setup, cell, false)?, Direction::new(setup, cell, true)?];
    Ok(Box::new(move || {
        let op = Recurrence { cell, ragged: &ragged, reverse: false };
        directions.iter().try_for_each(|direction| direction.run(op, &x, &dh, pass))
    }))
}
