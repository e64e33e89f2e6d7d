//! The block whose norms come after each sub-layer, and the convolution beside DeBERTa-v2-xlarge's first.

use allreel_kernels::attention::Span;

use super::{
    attention::{Attention, Projection, SavedAttention, Shared},
    block::Make,
    linear::{Linear, Norm, Saved, SavedNorm},
};
use crate::{
    memory::{
        kernels::{Machine, Ragged},
        ledger::Held,
    },
    model::plan::{ConvolutionPlan, PostNormPlan},
};

/// `post_norm::PostNorm`.
#[derive(Clone, Debug)]
pub struct PostNorm {
    width: usize,
    qkv: [Linear; 3],
    attention: Attention,
    attention_output: Linear,
    attention_norm: Norm,
    attention_drops: bool,
    intermediate: Linear,
    output: Linear,
    output_norm: Norm,
    output_drops: bool,
    convolution: Option<Convolution>,
}

/// `post_norm::Saved`.
#[derive(Debug)]
pub struct PostSaved {
    _projections: [Saved; 3],
    _attention: SavedAttention,
    _attention_output: Saved,
    _attention_norm: SavedNorm,
    _intermediate: Saved,
    _h: Held,
    _output: Saved,
    _output_norm: SavedNorm,
    _convolution: Option<SavedConvolution>,
}

impl PostNorm {
    /// The block of `plan`.
    pub(super) fn new(plan: &PostNormPlan, make: &Make<'_>) -> Self {
        let [query, key, value] = [&plan.query, &plan.key, &plan.value].map(|p| make.linear(p));
        let projections = |p| Projection::all(p, [&key, &query], make.trained, make.drops);
        let positions = plan.disentangled.as_ref().map(projections);
        let attention =
            Attention { heads: make.heads(plan.heads), span: Span::default(), positions };
        Self {
            width: make.width,
            attention,
            qkv: [query, key, value],
            attention_output: make.linear(&plan.attention_output),
            attention_norm: make.norm(&plan.attention_norm),
            attention_drops: make.drops(plan.attention_output_dropout),
            intermediate: make.linear(&plan.intermediate),
            output: make.linear(&plan.output),
            output_norm: make.norm(&plan.output_norm),
            output_drops: make.drops(plan.output_dropout),
            convolution: plan.convolution.as_ref().map(|plan| Convolution::new(plan, make)),
        }
    }

    /// Its norms.
    pub(super) fn norms(&self) -> Vec<Norm> {
        let branch = self.convolution.iter().map(|convolution| convolution.norm);
        [self.attention_norm, self.output_norm].into_iter().chain(branch).collect()
    }

    fn attention_trains(&self, shared: &Shared) -> bool {
        self.qkv.iter().chain([&self.attention_output]).any(Linear::trains)
            || self.attention_norm.trains()
            || self.attention.trains()
            || shared.train()
    }

    pub(super) fn forward(
        &self,
        machine: &Machine,
        x: &Held,
        ragged: Ragged,
        shared: &Shared,
    ) -> (Held, PostSaved) {
        let rows = ragged.tokens();
        let [q, k, v] = self.qkv.each_ref().map(|linear| linear.forward(machine, x, rows));
        let qkv = [q.0, k.0, v.0];
        let attention = self.attention.forward(machine, ragged, qkv, shared);
        let (dense, attention_output) = self.attention_output.forward(machine, attention.o(), rows);
        let (a, attention_norm) = self.attention_norm.forward(machine, rows);
        let (h, intermediate) = self.intermediate.forward(machine, &a, rows);
        let activated = machine.tensor(rows, self.intermediate.outputs());
        let (again, output) = self.output.forward(machine, &activated, rows);
        let (mut y, output_norm) = self.output_norm.forward(machine, rows);
        let mut saved_convolution = None;
        if let Some(convolution) = &self.convolution {
            let (sum, saved) = convolution.forward(machine, x, (rows, self.width));
            (y, saved_convolution) = (sum, Some(saved));
        }
        // As there, they live until the end.
        drop((dense, a, activated, again));
        let saved = PostSaved {
            _projections: [q.1, k.1, v.1],
            _attention: attention,
            _attention_output: attention_output,
            _attention_norm: attention_norm,
            _intermediate: intermediate,
            _h: h.saved(),
            _output: output,
            _output_norm: output_norm,
            _convolution: saved_convolution,
        };
        (y, saved)
    }

    pub(super) fn backward(
        &self,
        machine: &Machine,
        dy: &Held,
        ragged: Ragged,
        shared: &mut Shared,
        input_trains: bool,
    ) -> Option<Held> {
        let rows = ragged.tokens();
        let (mut d_branch, mut _d_block) = (None, None);
        if let Some(convolution) = &self.convolution {
            let (dx, dy) = convolution.backward(machine, (rows, self.width), input_trains);
            (d_branch, _d_block) = (dx, Some(dy));
        }
        let _dy = dy;
        let below = input_trains || self.attention_trains(shared);
        let _da = self.feed_forward_backward(machine, rows, below)?;
        let bias = self.attention_output.bias_trains();
        let (d_dense, dx) = self.attention_norm.backward(machine, rows, self.attention_drops, bias);
        let _d_o = self.attention_output.backward(machine, rows);
        drop(d_dense);
        let mut dx = match (input_trains, d_branch) {
            (false, _) => None,
            (true, None) => Some(dx),
            (true, Some(_d_branch)) => {
                let sum = machine.tensor(rows, self.width);
                drop(dx);
                Some(sum)
            }
        };
        let _gradients = self.attention.backward(machine, ragged, shared);
        for linear in &self.qkv {
            linear.backward_bias(machine, rows);
            dx = linear.backward_into(machine, dx, rows);
        }
        dx
    }

    fn feed_forward_backward(&self, machine: &Machine, rows: usize, below: bool) -> Option<Held> {
        let bias = self.output.bias_trains();
        let (d_output, da) = self.output_norm.backward(machine, rows, self.output_drops, bias);
        if !below && !self.intermediate.trains() {
            return self.output.backward_into(machine, None, rows);
        }
        let d_activated = self.output.backward(machine, rows);
        let bias = self.intermediate.bias_trains();
        let _dh = machine.activation_backward(rows, self.intermediate.outputs(), bias);
        drop((d_activated, d_output));
        self.intermediate.backward_into(machine, below.then_some(da), rows)
    }
}

/// `convolution::Convolution`.
#[derive(Clone, Copy, Debug)]
struct Convolution {
    taps: usize,
    weight_trains: bool,
    bias_trains: bool,
    norm: Norm,
    drops: bool,
}

/// `convolution::Saved`.
#[derive(Debug)]
struct SavedConvolution {
    _x: Option<Held>,
    _h: Held,
    _norm: SavedNorm,
}

impl Convolution {
    fn new(plan: &ConvolutionPlan, make: &Make<'_>) -> Self {
        let trains = |leaf: &str| make.trained.contains(&format!("{}.{leaf}", plan.name));
        Self {
            taps: plan.kernel,
            weight_trains: trains("weight"),
            bias_trains: trains("bias"),
            norm: make.norm(&plan.norm),
            drops: make.drops(plan.dropout),
        }
    }

    fn forward(
        self,
        machine: &Machine,
        x: &Held,
        (rows, width): (usize, usize),
    ) -> (Held, SavedConvolution) {
        let raw = machine.convolution(rows, (width, width), self.taps);
        let h = machine.dropout(&raw, (rows, width), self.drops);
        let _branch = machine.tensor(rows, width);
        let (sum, norm) = self.norm.forward(machine, rows);
        let _x = self.weight_trains.then(|| x.saved());
        (sum, SavedConvolution { _x, _h: h.saved(), _norm: norm })
    }

    /// `(dx of the branch, dy)`.
    fn backward(
        self,
        machine: &Machine,
        (rows, width): (usize, usize),
        input_trains: bool,
    ) -> (Option<Held>, Held) {
        let (_d_branch, dy) = self.norm.backward(machine, rows, false, false);
        let raw = machine.activation_backward(rows, width, false);
        let _dh = machine.dropout(&raw, (rows, width), self.drops);
        if self.weight_trains {
            machine.convolution_weight(rows, (width, width), self.taps);
        }
        machine.column_sums(rows, width, usize::from(self.bias_trains));
        let dx = input_trains.then(|| machine.convolution_input(rows, (width, width), self.taps));
        (dx, dy)
    }
}
