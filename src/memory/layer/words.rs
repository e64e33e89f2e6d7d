//! Layers over word vectors: recurrent ones, convolutions of several widths, and poolings that learn.

use allreel_kernels::{capsule::Routing, recurrence::Cell};

use super::linear::{Linear, Saved, Trained};
use crate::{
    memory::{
        kernels::{Machine, Ragged},
        ledger::Held,
    },
    model::plan::{FiltersPlan, PoolPlan, RecurrentPlan},
};

/// `recurrent::Recurrent`.
#[derive(Clone, Debug)]
pub struct Recurrent {
    cell: Cell,
    inputs: usize,
    hidden: usize,
    layers: usize,
    drops: bool,
}

impl Recurrent {
    /// The layers of `plan`; in evaluation nothing `drops`.
    pub fn new(plan: &RecurrentPlan, drops: bool) -> Self {
        Self {
            cell: plan.cell,
            inputs: plan.inputs,
            hidden: plan.hidden_size,
            layers: plan.num_layers,
            drops: drops && plan.dropout > 0.0,
        }
    }

    /// Columns of what layer `i` reads.
    fn inputs(&self, i: usize) -> usize {
        if i == 0 { self.inputs } else { 2 * self.hidden }
    }

    /// `y`, and what backward needs.
    pub fn forward(&self, machine: &Machine, x: &Held, tokens: usize) -> (Held, Vec<SavedLayer>) {
        let (mut x, mut saved) = (x.clone(), Vec::new());
        for i in 0..self.layers {
            x = machine.dropout(&x, (tokens, self.inputs(i)), i > 0 && self.drops);
            let direction = || {
                let gates = self.cell.gates() * self.hidden;
                machine.packing_forward(gates, self.inputs(i));
                let rest = machine.tensor(tokens, 2 * self.hidden);
                [machine.tensor(tokens, gates).saved(), rest.saved()]
            };
            saved.push(SavedLayer { _x: x.saved(), directions: [direction(), direction()] });
            x = machine.tensor(tokens, 2 * self.hidden);
        }
        (x, saved)
    }

    /// `dx`, unless nothing below trains.
    pub fn backward(
        &self,
        machine: &Machine,
        saved: Vec<SavedLayer>,
        dy: &Held,
        tokens: usize,
        input_trains: bool,
    ) -> Option<Held> {
        let mut dy = dy.clone();
        for (i, SavedLayer { _x, directions }) in saved.into_iter().enumerate().rev() {
            let gates = self.cell.gates() * self.hidden;
            let _d_gates = directions.map(|[of_gates, rest]| {
                let _half = machine.tensor(tokens, self.hidden);
                // h of the step before, and what of a GRU's gates differs from their inputs.
                let apart = if self.cell == Cell::Gru { gates } else { 0 };
                let steps = machine.tensor(tokens, self.hidden + apart);
                machine.packing_gradient(tokens, gates, self.hidden);
                drop((steps, rest));
                machine.packing_gradient(tokens, gates, self.inputs(i));
                of_gates
            });
            if i == 0 && !input_trains {
                return None;
            }
            let dx = machine.tensor(tokens, self.inputs(i));
            dy = machine.dropout(&dx, (tokens, self.inputs(i)), i > 0 && self.drops);
        }
        Some(dy)
    }
}

/// Of each layer what it read, and of both directions the gates, and cells and outputs.
#[derive(Debug)]
pub struct SavedLayer {
    _x: Held,
    directions: [[Held; 2]; 2],
}

/// `filters::Filters`.
#[derive(Clone, Debug)]
pub struct Filters {
    inputs: usize,
    kernels: Vec<usize>,
    filters: usize,
    drops: bool,
}

impl Filters {
    /// The convolutions of `plan`; in evaluation nothing `drops`.
    pub fn new(plan: &FiltersPlan, drops: bool) -> Self {
        Self {
            inputs: plan.inputs,
            kernels: plan.kernels.clone(),
            filters: plan.filters,
            drops: drops && plan.dropout > 0.0,
        }
    }

    fn outputs(&self) -> usize {
        self.kernels.len() * self.filters
    }

    /// `y`, and what backward needs.
    pub fn forward(&self, machine: &Machine, x: &Held, tokens: usize) -> (Held, Vec<Held>) {
        let (mut saved, mut activated) = (vec![x.saved()], Vec::new());
        for kernel in &self.kernels {
            let h = machine.convolution(tokens, (self.inputs, self.filters), *kernel);
            activated.push(machine.tensor(tokens, self.filters));
            saved.push(h.saved());
        }
        let y = machine.tensor(tokens, self.outputs());
        drop(activated);
        (machine.dropout(&y, (tokens, self.outputs()), self.drops), saved)
    }

    /// `dx`, unless nothing below trains.
    pub fn backward(
        &self,
        machine: &Machine,
        dy: &Held,
        tokens: usize,
        input_trains: bool,
    ) -> Option<Held> {
        let _dropped = machine.dropout(dy, (tokens, self.outputs()), self.drops);
        let mut dx: Option<Held> = None;
        for kernel in &self.kernels {
            let _part = machine.tensor(tokens, self.filters);
            let _dh = machine.activation_backward(tokens, self.filters, false);
            machine.convolution_weight(tokens, (self.inputs, self.filters), *kernel);
            if input_trains {
                let shape = (self.inputs, self.filters);
                let part = machine.convolution_input(tokens, shape, *kernel);
                let both = dx.take().map(|sum| (sum, machine.tensor(tokens, self.inputs)));
                dx = Some(both.map_or(part, |(_, sum)| sum));
            }
        }
        dx
    }
}

/// `pool::Pooling`.
#[derive(Clone, Debug)]
pub enum Pooling {
    /// Of rows as they are.
    Rows,
    /// With learnt weights.
    Attention(Linear),
    /// By capsules.
    Capsules(Linear, Routing),
}

/// `pool::Saved`.
#[derive(Debug, Default)]
pub struct SavedPool {
    _linear: Option<Saved>,
    _held: Vec<Held>,
}

impl Pooling {
    /// The pooling of `plan`.
    pub fn new(plan: &PoolPlan, trained: &Trained, drops: bool) -> Self {
        match plan {
            PoolPlan::Rows(_) => Self::Rows,
            PoolPlan::Attention { dense, .. } => {
                Self::Attention(Linear::new(dense, trained, drops))
            }
            PoolPlan::Capsules { predictions, routing } => {
                Self::Capsules(Linear::new(predictions, trained, drops), *routing)
            }
        }
    }

    /// Whether it has parameters.
    pub fn learns(&self) -> bool {
        !matches!(self, Self::Rows)
    }

    /// Columns of what it makes of `width`.
    pub fn outputs(&self, width: usize) -> usize {
        match self {
            Self::Rows | Self::Attention(_) => width,
            Self::Capsules(predictions, _) => predictions.outputs(),
        }
    }

    /// One row for each sequence of `x`, and what backward needs.
    pub fn forward(
        &self,
        machine: &Machine,
        x: &Held,
        ragged: Ragged,
        width: usize,
    ) -> (Held, SavedPool) {
        let (tokens, sequences) = (ragged.tokens(), ragged.sequences);
        let pooled = || machine.tensor(sequences, self.outputs(width));
        match self {
            Self::Rows => (pooled(), SavedPool::default()),
            Self::Attention(dense) => {
                let (h, saved) = dense.forward(machine, x, tokens);
                let u = machine.tensor(tokens, dense.outputs());
                let _held = vec![x.saved(), h.saved(), u.saved(), machine.numbers(tokens).saved()];
                (pooled(), SavedPool { _linear: Some(saved), _held })
            }
            Self::Capsules(predictions, routing) => {
                let (p, saved) = predictions.forward(machine, x, tokens);
                let sums = machine.numbers(sequences * routing.iterations * routing.columns());
                let _held = vec![p.saved(), sums.saved()];
                (pooled(), SavedPool { _linear: Some(saved), _held })
            }
        }
    }

    /// `dx`.
    pub fn backward(&self, machine: &Machine, ragged: Ragged, width: usize) -> Held {
        let tokens = ragged.tokens();
        match self {
            Self::Rows => machine.tensor(tokens, width),
            Self::Attention(dense) => {
                let (dx, _du) =
                    (machine.tensor(tokens, width), machine.tensor(tokens, dense.outputs()));
                let _dh = machine.activation_backward(tokens, dense.outputs(), dense.bias_trains());
                dense.backward_into(machine, Some(dx.clone()), tokens);
                dx
            }
            Self::Capsules(predictions, _) => {
                let _dp = machine.tensor(tokens, predictions.outputs());
                predictions.backward(machine, tokens)
            }
        }
    }
}
