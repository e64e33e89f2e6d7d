//! The block whose norms come before each sub-layer.

use super::{
    attention::{Attention, SavedAttention, Shared},
    block::Make,
    linear::{Linear, Norm, Saved, SavedNorm},
};
use crate::{
    memory::{
        kernels::{Machine, Ragged},
        ledger::Held,
    },
    model::plan::PreNormPlan,
};

/// `pre_norm::PreNorm`.
#[derive(Clone, Debug)]
pub struct PreNorm {
    width: usize,
    attention: Attention,
    attention_norm: Option<Norm>,
    /// Each of queries, keys and values.
    qkv: Linear,
    rotates: bool,
    attention_output: Linear,
    attention_drops: bool,
    mlp_norm: Norm,
    mlp_input: Linear,
    gated: bool,
    mlp_drops: bool,
    mlp_output: Linear,
    output_drops: bool,
}

/// `pre_norm::Saved`.
#[derive(Debug)]
pub struct PreSaved {
    _attention_norm: Option<SavedNorm>,
    _projections: [Saved; 3],
    _attention: SavedAttention,
    _attention_output: Saved,
    _mlp_norm: SavedNorm,
    _mlp_input: Saved,
    _h: Held,
    _mlp_output: Saved,
}

impl PreNorm {
    /// The block of `plan`.
    pub(super) fn new(plan: &PreNormPlan, make: &Make<'_>) -> Self {
        let qkv = make.linear(&plan.qkv);
        Self {
            width: make.width,
            attention: Attention {
                heads: make.heads(plan.heads),
                span: plan.span,
                positions: None,
            },
            attention_norm: plan.attention_norm.as_ref().map(|norm| make.norm(norm)),
            qkv: qkv.third(),
            rotates: plan.rotary_theta.is_some(),
            attention_output: make.linear(&plan.attention_output),
            attention_drops: make.drops(plan.attention_output_dropout),
            mlp_norm: make.norm(&plan.mlp_norm),
            mlp_input: make.linear(&plan.mlp_input),
            gated: plan.gated,
            mlp_drops: make.drops(plan.mlp_dropout),
            mlp_output: make.linear(&plan.mlp_output),
            output_drops: make.drops(plan.output_dropout),
        }
    }

    /// Its norms.
    pub(super) fn norms(&self) -> Vec<Norm> {
        self.attention_norm.into_iter().chain([self.mlp_norm]).collect()
    }

    fn attention_trains(&self, shared: &Shared) -> bool {
        self.qkv.trains()
            || self.attention_output.trains()
            || self.mlp_norm.trains()
            || self.attention_norm.is_some_and(Norm::trains)
            || shared.train()
    }

    /// Columns between the parts of the feed-forward sub-layer.
    fn inner(&self) -> usize {
        self.mlp_input.outputs() / if self.gated { 2 } else { 1 }
    }

    fn project(&self, machine: &Machine, n: &Held, rows: usize) -> ([Held; 3], [Saved; 3]) {
        let (mut q, saved_q) = self.qkv.forward(machine, n, rows);
        let (mut k, saved_k) = self.qkv.forward(machine, n, rows);
        if self.rotates {
            q = machine.tensor(rows, self.width);
            k = machine.tensor(rows, self.width);
        }
        let (v, saved_v) = self.qkv.forward(machine, n, rows);
        ([q, k, v], [saved_q, saved_k, saved_v])
    }

    pub(super) fn forward(
        &self,
        machine: &Machine,
        x: &Held,
        ragged: Ragged,
        shared: &Shared,
    ) -> (Held, PreSaved) {
        let rows = ragged.tokens();
        let (n, attention_norm) = match self.attention_norm {
            Some(norm) => {
                let (n, saved) = norm.forward(machine, rows);
                (n, Some(saved))
            }
            None => (x.clone(), None),
        };
        let (qkv, projections) = self.project(machine, &n, rows);
        let attention = self.attention.forward(machine, ragged, qkv, shared);
        let (dense, attention_output) = self.attention_output.forward(machine, attention.o(), rows);
        let (m, mlp_norm) = self.mlp_norm.forward(machine, rows);
        let (h, mlp_input) = self.mlp_input.forward(machine, &m, rows);
        let raw = machine.tensor(rows, self.inner());
        let activated = machine.dropout(&raw, (rows, self.inner()), self.mlp_drops);
        drop(raw);
        let (again, mlp_output) = self.mlp_output.forward(machine, &activated, rows);
        let y = machine.tensor(rows, self.width);
        // As there, they live until the end.
        drop((n, dense, m, activated, again));
        let saved = PreSaved {
            _attention_norm: attention_norm,
            _projections: projections,
            _attention: attention,
            _attention_output: attention_output,
            _mlp_norm: mlp_norm,
            _mlp_input: mlp_input,
            _h: h.saved(),
            _mlp_output: mlp_output,
        };
        (y, saved)
    }

    pub(super) fn backward(
        &self,
        machine: &Machine,
        _dy: &Held,
        ragged: Ragged,
        shared: &mut Shared,
        input_trains: bool,
    ) -> Option<Held> {
        let rows = ragged.tokens();
        let below = input_trains || self.attention_trains(shared);
        let _dm = self.mlp_backward(machine, _dy, rows, below)?;
        let bias = self.attention_output.bias_trains();
        let (d_dense, dx) = self.mlp_norm.backward(machine, rows, self.attention_drops, bias);
        let _d_o = self.attention_output.backward(machine, rows);
        drop(d_dense);
        let [mut dq, mut dk, dv] = self.attention.backward(machine, ragged, shared);
        if self.rotates {
            dq = machine.tensor(rows, self.width);
            dk = machine.tensor(rows, self.width);
        }
        let _d_projected = [dq, dk, dv];
        let norm = self.attention_norm.filter(|norm| input_trains || norm.trains());
        let mut d_read = (norm.is_none() && input_trains).then(|| dx.clone());
        for _ in 0..3 {
            self.qkv.backward_bias(machine, rows);
            d_read = match d_read {
                None if norm.is_some() => Some(self.qkv.backward(machine, rows)),
                d_read => self.qkv.backward_into(machine, d_read, rows),
            };
        }
        let Some(norm) = norm else { return d_read };
        let (dx, _) = norm.backward(machine, rows, false, false);
        input_trains.then_some(dx)
    }

    fn mlp_backward(&self, machine: &Machine, dy: &Held, rows: usize, below: bool) -> Option<Held> {
        let _d_output = machine.dropout(dy, (rows, self.width), self.output_drops);
        let sums = usize::from(self.mlp_output.bias_trains());
        machine.column_sums(rows, self.width, sums);
        if !below && !self.mlp_input.trains() {
            return self.mlp_output.backward_into(machine, None, rows);
        }
        let raw = self.mlp_output.backward(machine, rows);
        let _d_activated = machine.dropout(&raw, (rows, self.inner()), self.mlp_drops);
        let bias = self.mlp_input.bias_trains();
        let _dh = machine.activation_backward(rows, self.mlp_input.outputs(), bias);
        if below {
            return Some(self.mlp_input.backward(machine, rows));
        }
        self.mlp_input.backward_into(machine, None, rows)
    }
}
