//! A linear layer and a norm.

use std::collections::HashSet;

use crate::{
    config::Quantization,
    memory::{
        kernels::Machine,
        ledger::{Component, Held},
    },
    model::plan::{LinearPlan, NormPlan},
};

/// Names of the parameters that train.
pub type Trained = HashSet<String>;

/// A linear layer.
#[derive(Clone, Debug)]
pub struct Linear {
    outputs: usize,
    inputs: usize,
    weight_trains: bool,
    bias_trains: bool,
    /// What a frozen weight is kept in, and whether activations are in 8 bits too.
    quantized: Option<bool>,
    lora: Option<Lora>,
}

#[derive(Clone, Copy, Debug)]
struct Lora {
    rank: usize,
    drops: bool,
}

/// `linear::Saved`: x and u, where something needs them.
#[derive(Clone, Debug)]
pub struct Saved {
    _x: Option<Held>,
    _small: Option<Held>,
}

impl Linear {
    /// The layer of `plan`; in evaluation nothing `drops`.
    pub fn new(plan: &LinearPlan, trained: &Trained, drops: bool) -> Self {
        let trains = |leaf: &str| trained.contains(&format!("{}.{leaf}", plan.name));
        let weight_trains = trains("weight");
        let int8 = |q: crate::model::plan::Quantized| {
            q.quantization == Quantization::Int8 && q.threshold.is_some()
        };
        let lora = |plan: &crate::model::plan::LoraPlan| Lora {
            rank: plan.rank,
            drops: drops && plan.dropout > 0.0,
        };
        Self {
            outputs: plan.outputs,
            inputs: plan.inputs,
            weight_trains,
            bias_trains: plan.bias && trains("bias"),
            quantized: plan.quantization.filter(|_| !weight_trains).map(int8),
            lora: plan.lora.as_ref().map(lora),
        }
    }

    /// One of three layers that lie in this one.
    #[must_use]
    pub fn third(&self) -> Self {
        Self { outputs: self.outputs / 3, ..self.clone() }
    }

    /// N.
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// Whether the bias trains.
    pub fn bias_trains(&self) -> bool {
        self.bias_trains
    }

    /// Whether anything of it trains.
    pub fn trains(&self) -> bool {
        self.weight_trains || self.bias_trains || self.lora.is_some()
    }

    /// `y`, and what backward needs.
    pub fn forward(&self, machine: &Machine, x: &Held, rows: usize) -> (Held, Saved) {
        let y = self.product(machine, rows);
        let small = self.lora.map(|lora| {
            let _x = machine.dropout(x, (rows, self.inputs), lora.drops);
            machine.packing_forward(lora.rank, self.inputs);
            let unscaled = machine.tensor(rows, lora.rank);
            let u = machine.tensor(rows, lora.rank);
            drop(unscaled);
            u.saved()
        });
        let wanted = small.is_some() || self.weight_trains;
        (y, Saved { _x: wanted.then(|| x.saved()), _small: small })
    }

    /// `linear::forward`, `quantized::forward` or `forward_int8`.
    fn product(&self, machine: &Machine, rows: usize) -> Held {
        let dequantized = || machine.dequantized(rows, self.outputs, self.inputs, true);
        match self.quantized {
            None => {
                let y = machine.tensor(rows, self.outputs);
                machine.packing_forward(self.outputs, self.inputs);
                y
            }
            // x as f32, its codes, and those as f32, of which the last stay.
            Some(true) => {
                machine.ledger.touch(rows * self.inputs * (4 + 1 + 4));
                let codes = machine.numbers(rows * self.inputs);
                let y = machine.tensor(rows, self.outputs);
                dequantized();
                drop(codes);
                y
            }
            Some(false) => {
                let y = machine.tensor(rows, self.outputs);
                dequantized();
                y
            }
        }
    }

    /// `dx`.
    pub fn backward(&self, machine: &Machine, rows: usize) -> Held {
        let dx = machine.tensor(rows, self.inputs);
        self.product_backward(machine, rows);
        self.gradient(machine, rows);
        match self.lora {
            Some(lora) => {
                let _du = self.lora_backward(machine, lora, rows);
                self.add_input(machine, lora, dx, rows)
            }
            None => dx,
        }
    }

    /// `dx` with this layer's part added, where it is wanted.
    pub fn backward_into(&self, machine: &Machine, dx: Option<Held>, rows: usize) -> Option<Held> {
        self.gradient(machine, rows);
        let _du = self.lora.map(|lora| self.lora_backward(machine, lora, rows));
        let dx = dx?;
        self.product_backward(machine, rows);
        match self.lora {
            Some(lora) => Some(self.add_input(machine, lora, dx, rows)),
            None => Some(dx),
        }
    }

    /// The bias' gradient, where no other op sums it.
    pub fn backward_bias(&self, machine: &Machine, rows: usize) {
        machine.column_sums(rows, self.outputs, usize::from(self.bias_trains));
    }

    fn product_backward(&self, machine: &Machine, rows: usize) {
        if self.quantized.is_some() {
            machine.dequantized(rows, self.inputs, self.outputs, false);
        }
    }

    fn gradient(&self, machine: &Machine, rows: usize) {
        if self.weight_trains {
            machine.packing_gradient(rows, self.outputs, self.inputs);
        }
    }

    fn lora_backward(&self, machine: &Machine, lora: Lora, rows: usize) -> Held {
        let unscaled = machine.tensor(rows, lora.rank);
        let du = machine.tensor(rows, lora.rank);
        drop(unscaled);
        if lora.drops {
            drop(machine.tensor(rows, self.inputs));
        }
        du
    }

    fn add_input(&self, machine: &Machine, lora: Lora, dx: Held, rows: usize) -> Held {
        if !lora.drops {
            return dx;
        }
        let _of_lora = machine.tensor(rows, self.inputs);
        machine.tensor(rows, self.inputs)
    }
}

/// A LayerNorm.
#[derive(Clone, Copy, Debug)]
pub struct Norm {
    width: usize,
    weight_trains: bool,
    bias_trains: bool,
}

/// `norm::Saved`: z and the moments of its rows.
#[derive(Clone, Debug)]
pub struct SavedNorm([Held; 2]);

impl SavedNorm {
    /// What was normed.
    pub fn z(&self) -> &Held {
        &self.0[0]
    }
}

impl Norm {
    /// The norm of `plan`.
    pub fn new(plan: &NormPlan, trained: &Trained) -> Self {
        let trains = |leaf: &str| trained.contains(&format!("{}.{leaf}", plan.name));
        let (weight_trains, bias_trains) = (trains("weight"), plan.bias && trains("bias"));
        Self { width: plan.width, weight_trains, bias_trains }
    }

    /// Whether anything of it trains.
    pub fn trains(self) -> bool {
        self.weight_trains || self.bias_trains
    }

    /// Where a frozen weight's gradient goes that nobody wants.
    pub fn unread(self, machine: &Machine) -> Held {
        let bytes = if self.weight_trains { 0 } else { self.width * 4 };
        machine.ledger.hold(Component::Gradients, bytes)
    }

    /// `y`, and what backward needs.
    pub fn forward(self, machine: &Machine, rows: usize) -> (Held, SavedNorm) {
        let (y, saved) = machine.norm(rows, self.width);
        (y, SavedNorm(saved))
    }

    /// `(dx, dz)`; `drops` before the norm, `bias_trains` of the linear there.
    pub fn backward(
        self,
        machine: &Machine,
        rows: usize,
        drops: bool,
        bias_trains: bool,
    ) -> (Held, Held) {
        let wanted = self.trains() || bias_trains;
        let sums = [wanted, self.bias_trains, bias_trains].map(usize::from).iter().sum();
        machine.norm_backward((rows, self.width), drops, sums)
    }
}
