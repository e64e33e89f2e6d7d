//! Recurrence: one direction of one LSTM or GRU layer over a ragged batch, to each sequence's true end.
//!
//! ```text
//! gx [T, G·H] = x·W_ihᵀ + b_ih, by `linear`     W_hh [G·H, H]   b_hh [G·H]   h, dh [T, H]
//! a = h'·W_hhᵀ + b_hh, primes being of the step before, at first h₀ and c₀ [B, H] (zero if not given)
//!
//! LSTM, G = 4 (i f g o)   i, f, o = σ(gx + a)   g = tanh(gx + a)   c = f·c' + i·g   h = o·tanh(c)
//! GRU,  G = 3 (r z n)     r, z = σ(gx + a)      n = tanh(gx + r·a)                  h = n + z·(h' - n)
//! ```
//!
//! Gates, their order and the place of b_hn are PyTorch's: LSTM of Gers et al. 2000, GRU of Cho et al. 2014
//! with the reset gate after the product. Backward goes through time, e being what comes from the step after:
//!
//! ```text
//! LSTM   dh += e_h             dc = e_c + dh·o·(1 - tanh²(c))                       e_c' = dc·f
//!        da = dc·g·i(1-i)   dc·c'·f(1-f)   dc·i·(1-g²)   dh·tanh(c)·o(1-o)          e_h' = da·W_hh
//!        dgx = da
//! GRU    dh += e_h             dn = dh·(1-z)·(1-n²)
//!        da = dn·a_n·r(1-r)    dh·(h'-n)·z(1-z)    dn·r                             e_h' = da·W_hh + dh·z
//!        dgx = da, but dn for the last
//! dW_hh += daᵀ·h'              db_hh += Σ_t da
//! ```
//!
//! Saved are the gates after their functions, in gx's own memory, where backward leaves dgx in turn: `[T, G·H]`
//! is by far the most that is moved. Besides c (LSTM) or a_n (GRU); tanh(c) is computed again.

pub(crate) mod check;
mod cpu;
#[cfg(device)]
mod device;
mod naive;
mod schedule;
#[cfg(test)]
mod test;

use candle_core::{Result, Tensor, bail};

use crate::{
    common::{Ragged, expect_shape, run},
    linear,
};

const OP: &str = "recurrence";

/// What a step computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cell {
    /// Long short-term memory.
    Lstm,
    /// Gated recurrent unit.
    Gru,
}

impl Cell {
    /// G, gates of a unit: W_ih and W_hh have so many times H rows.
    pub fn gates(self) -> usize {
        match self {
            Self::Lstm => 4,
            Self::Gru => 3,
        }
    }
}

/// What runs over which batch.
#[derive(Clone, Copy, Debug)]
pub struct Recurrence<'a> {
    /// What a step computes.
    pub cell: Cell,
    /// The sequences.
    pub ragged: &'a Ragged,
    /// Whether each starts at its last token.
    pub reverse: bool,
}

/// The recurrent parameters, or their gradients, which are added to.
#[derive(Clone, Copy)]
pub struct Weights<'a> {
    /// `[G·H, H]`.
    pub w_hh: &'a Tensor,
    /// `[G·H]`. An LSTM's may as well be part of b_ih.
    pub b_hh: Option<&'a Tensor>,
}

/// What the first step of each sequence starts from, or its gradient.
#[derive(Clone, Debug)]
pub struct State {
    /// `[B, H]`, stored as activations are.
    pub h: Tensor,
    /// `[B, H]`, of an LSTM only; on a device f32.
    pub c: Option<Tensor>,
}

/// What backward needs.
#[derive(Debug)]
pub struct Saved {
    /// `[T, G·H]`, after their functions.
    gates: Tensor,
    /// `[T, H]`: c of an LSTM, a_n of a GRU. On a device f32.
    cell: Tensor,
    /// `[T, H]`.
    h: Tensor,
    start: Option<State>,
}

/// The gradients of what a step reads.
#[derive(Debug)]
pub struct Gradients {
    /// Of gx, `[T, G·H]`.
    pub gx: Tensor,
    /// Of the state at the start, if one was given.
    pub start: Option<State>,
}

/// What backward through time leaves.
struct Steps {
    /// dgx, in the memory of the gates.
    d_gx: Tensor,
    /// da, `[T, G·H]`, where it is not dgx: of a GRU.
    d_a: Option<Tensor>,
    /// h', `[T, H]`.
    before: Tensor,
    start: Option<State>,
}

/// h `[T, H]`, each row in its token's place. gx becomes the gates: no other handle on its memory may be
/// in use.
///
/// # Errors
/// If the shapes do not fit, or on a device without an implementation.
pub fn forward(
    op: Recurrence<'_>,
    gx: Tensor,
    weights: Weights<'_>,
    start: Option<&State>,
) -> Result<(Tensor, Saved)> {
    let hidden = check_weights(op, weights)?;
    expect_shape(OP, "gx", &gx, &[op.ragged.tokens(), op.cell.gates() * hidden])?;
    check_start(op, start, hidden)?;
    let (h, cell) = run!("recurrence", &gx, forward(op, &gx, weights, start))?;
    Ok((h.clone(), Saved { gates: gx, cell, h, start: start.cloned() }))
}

/// The gradients, from `dh [T, H]`; adds those of the parameters to `gradients`.
///
/// # Errors
/// As [`forward`].
pub fn backward(
    op: Recurrence<'_>,
    saved: Saved,
    w_hh: &Tensor,
    dh: &Tensor,
    gradients: Weights<'_>,
) -> Result<Gradients> {
    let hidden = check_weights(op, Weights { w_hh, b_hh: None })?;
    expect_shape(OP, "the saved h", &saved.h, &[op.ragged.tokens(), hidden])?;
    expect_shape(OP, "the saved gates", &saved.gates, &[op.ragged.tokens(), w_hh.dim(0)?])?;
    expect_shape(OP, "dh", dh, saved.h.dims())?;
    let steps = run!("recurrence", dh, backward(op, saved, w_hh, dh))?;
    let d_a = steps.d_a.as_ref().unwrap_or(&steps.d_gx);
    linear::backward_weight(d_a, &steps.before, gradients.w_hh)?;
    if let Some(b_hh) = gradients.b_hh {
        linear::backward_bias(d_a, b_hh)?;
    }
    Ok(Gradients { gx: steps.d_gx, start: steps.start })
}

/// H.
fn check_weights(op: Recurrence<'_>, weights: Weights<'_>) -> Result<usize> {
    let (rows, hidden) = weights.w_hh.dims2()?;
    if hidden == 0 || rows != op.cell.gates() * hidden {
        bail!(
            "{OP}: W_hh {:?} of {:?}, whose rows are {} times its columns",
            weights.w_hh.dims(),
            op.cell,
            op.cell.gates()
        );
    }
    if let Some(b_hh) = weights.b_hh {
        expect_shape(OP, "b_hh", b_hh, &[rows])?;
    }
    Ok(hidden)
}

fn check_start(op: Recurrence<'_>, start: Option<&State>, hidden: usize) -> Result<()> {
    let Some(start) = start else { return Ok(()) };
    let shape = [op.ragged.sequences(), hidden];
    expect_shape(OP, "h0", &start.h, &shape)?;
    match (&start.c, op.cell) {
        (Some(c), Cell::Lstm) => expect_shape(OP, "c0", c, &shape),
        (None, Cell::Gru) => Ok(()),
        (c, cell) => bail!(
            "{OP}: {cell:?} does not start {} c",
            if c.is_some() { "from a" } else { "without" }
        ),
    }
}
