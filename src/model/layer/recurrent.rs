//! Bidirectional LSTM or GRU layers, under PyTorch's names; every layer reads both directions of the one
//! before, from and to each sequence's true ends.

use allreel_kernels::{
    Dropout, Ragged, dropout, linear,
    recurrence::{self, Cell, Recurrence, Weights},
};
use candle_core::Tensor;

use super::{linear::Rows, site};
use crate::{
    Error, Result,
    model::{
        parameters::{Group, Init, Parameter, Parameters, Spec},
        plan::{RecurrentPlan, RecurrentStart},
    },
};

/// Ends of the names of the two directions.
const DIRECTIONS: [&str; 2] = ["", "_reverse"];

/// The layers.
pub struct Recurrent {
    layers: Vec<[Direction; 2]>,
    dropout: f64,
}

/// One direction of one layer, of G gates.
struct Direction {
    cell: Cell,
    /// `[G·H, K]`.
    w_ih: Parameter,
    /// `[G·H, H]`.
    w_hh: Parameter,
    /// `[G·H]`.
    b_ih: Parameter,
    /// `[G·H]`.
    b_hh: Parameter,
    reverse: bool,
}

/// What backward needs, of each layer.
pub struct Saved(Vec<SavedLayer>);

struct SavedLayer {
    x: Tensor,
    directions: [recurrence::Saved; 2],
}

/// The starts of `weight_ih`, `weight_hh`, `bias_ih` and `bias_hh` of a layer that reads `inputs` columns.
fn starts(plan: &RecurrentPlan, inputs: usize) -> [Init; 4] {
    let hidden = plan.hidden_size;
    match plan.start {
        RecurrentStart::Uniform => [Init::Uniform((hidden as f64).recip().sqrt()); 4],
        RecurrentStart::Orthogonal => {
            let glorot = Init::Uniform((6.0 / (inputs + hidden) as f64).sqrt());
            let bias = match plan.cell {
                // Of the gates i f g o.
                Cell::Lstm => Init::OnesFrom { first: hidden, len: hidden },
                Cell::Gru => Init::Zeros,
            };
            [glorot, Init::Orthogonal, bias, Init::Zeros]
        }
    }
}

impl Recurrent {
    /// Declares the parameters of all layers.
    pub fn declare(group: &mut Group, plan: &RecurrentPlan) {
        let (h, gates) = (plan.hidden_size, plan.cell.gates());
        for layer in 0..plan.num_layers {
            let inputs = if layer == 0 { plan.inputs } else { 2 * h };
            let [w_ih, w_hh, b_ih, b_hh] = starts(plan, inputs);
            for end in DIRECTIONS {
                let name = |part: &str| format!("{}.{part}_l{layer}{end}", plan.name);
                group.specs.push(Spec::new(name("weight_ih"), &[gates * h, inputs], w_ih));
                group.specs.push(Spec::new(name("weight_hh"), &[gates * h, h], w_hh));
                for (part, init) in [("bias_ih", b_ih), ("bias_hh", b_hh)] {
                    let bias = Spec::new(name(part), &[gates * h], init);
                    group.specs.push(Spec { decays: false, ..bias });
                }
            }
        }
    }

    /// Takes the declared parameters.
    ///
    /// # Errors
    /// If they were not declared.
    pub fn new(parameters: &Parameters, plan: &RecurrentPlan) -> Result<Self> {
        let direction = |layer: usize, end: &str| -> Result<Direction> {
            let get = |part: &str| parameters.get(&format!("{}.{part}_l{layer}{end}", plan.name));
            Ok(Direction {
                cell: plan.cell,
                w_ih: get("weight_ih")?,
                w_hh: get("weight_hh")?,
                b_ih: get("bias_ih")?,
                b_hh: get("bias_hh")?,
                reverse: !end.is_empty(),
            })
        };
        let [forwards, backwards] = DIRECTIONS;
        let layers = (0..plan.num_layers)
            .map(|layer| Ok([direction(layer, forwards)?, direction(layer, backwards)?]));
        Ok(Self { layers: layers.collect::<Result<_>>()?, dropout: plan.dropout })
    }

    /// Dropout of what layer `i` reads; of the first there is none.
    fn dropout(&self, rows: Rows<'_>, i: usize) -> Option<Dropout> {
        let between = i.checked_sub(1)?;
        Dropout::new(self.dropout, rows.key?, site::RECURRENT + between as u16)
    }

    /// `[T, 2·H]` and what backward needs; `rows` are those of `ragged`.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn forward(&self, x: &Tensor, ragged: &Ragged, rows: Rows<'_>) -> Result<(Tensor, Saved)> {
        let (mut x, mut saved) = (x.clone(), Vec::with_capacity(self.layers.len()));
        for (i, [forwards, backwards]) in self.layers.iter().enumerate() {
            x = dropout::apply(&x, self.dropout(rows, i).as_ref(), rows.ids)?;
            let (h, saved_h) = forwards.forward(&x, ragged)?;
            let (r, saved_r) = backwards.forward(&x, ragged)?;
            saved.push(SavedLayer { x, directions: [saved_h, saved_r] });
            x = Tensor::cat(&[h, r], 1)?;
        }
        Ok((x, Saved(saved)))
    }

    /// `dx`, unless nothing below trains; adds the gradients of all parameters.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn backward(
        &self,
        Saved(saved): Saved,
        dy: &Tensor,
        ragged: &Ragged,
        rows: Rows<'_>,
        input_trains: bool,
    ) -> Result<Option<Tensor>> {
        let mut dy = dy.clone();
        let layers = self.layers.iter().zip(saved).enumerate();
        for (i, ([forwards, backwards], SavedLayer { x, directions })) in layers.rev() {
            let [saved_h, saved_r] = directions;
            let width = dy.dim(1)? / 2;
            // A copy, also of a single row: kernels want rows at multiples of 16 bytes.
            let half = |part: usize| dy.narrow(1, part * width, width)?.force_contiguous();
            let d_forwards = forwards.backward(saved_h, &x, &half(0)?, ragged)?;
            let d_backwards = backwards.backward(saved_r, &x, &half(1)?, ragged)?;
            if i == 0 && !input_trains {
                return Ok(None);
            }
            let dx = linear::backward_input(&d_forwards, &forwards.w_ih.value)?;
            linear::backward_input_into(&d_backwards, &backwards.w_ih.value, &dx)?;
            dy = dropout::apply(&dx, self.dropout(rows, i).as_ref(), rows.ids)?;
        }
        Ok(Some(dy))
    }
}

impl Direction {
    fn op<'a>(&self, ragged: &'a Ragged) -> Recurrence<'a> {
        Recurrence { cell: self.cell, ragged, reverse: self.reverse }
    }

    fn forward(&self, x: &Tensor, ragged: &Ragged) -> Result<(Tensor, recurrence::Saved)> {
        let gx = linear::forward(x, &self.w_ih.value, Some(&self.b_ih.value))?;
        let weights = Weights { w_hh: &self.w_hh.value, b_hh: Some(&self.b_hh.value) };
        Ok(recurrence::forward(self.op(ragged), gx, weights, None)?)
    }

    /// The gradient of gates before their functions; adds those of the parameters.
    fn backward(
        &self,
        saved: recurrence::Saved,
        x: &Tensor,
        dh: &Tensor,
        ragged: &Ragged,
    ) -> Result<Tensor> {
        let gradient = |parameter: &'_ Parameter| {
            let gradient = parameter.gradient.clone();
            gradient
                .ok_or_else(|| Error::Bug("a recurrent layer that is frozen ran backward".into()))
        };
        let (w_hh, b_hh) = (gradient(&self.w_hh)?, gradient(&self.b_hh)?);
        let weights = Weights { w_hh: &w_hh, b_hh: Some(&b_hh) };
        let op = self.op(ragged);
        let d_gates = recurrence::backward(op, saved, &self.w_hh.value, dh, weights)?.gx;
        linear::backward_weight(&d_gates, x, &gradient(&self.w_ih)?)?;
        linear::backward_bias(&d_gates, &gradient(&self.b_ih)?)?;
        Ok(d_gates)
    }
}
