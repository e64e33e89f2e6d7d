//! Learnt rows, of which an adapter makes virtual tokens or keys and values: a table, and in P-tuning and
//! prefix tuning a small network over it, which training alone needs.
//!
//! ```text
//! table [n, width] -> LSTM -> linear layers with activations -> rows
//! ```

use allreel_kernels::{
    DropoutKey, Ragged,
    activation::{self, Activation},
};
use candle_core::Tensor;

use super::{
    linear::{self, Linear, Rows},
    recurrent::{self, Recurrent},
};
use crate::{
    Result,
    model::{
        parameters::{Group, Init, Parameter, Parameters, Spec},
        plan::RowsPlan,
    },
};

/// The group of the table and its network, and the beginning of their names, as in PEFT.
pub const ROWS: &str = "prompt_encoder";

/// The table and its network.
pub struct LearntRows {
    table: Parameter,
    lstm: Option<Recurrent>,
    layers: Vec<(Linear, Option<Activation>)>,
    /// The rows are one sequence, of no sample: all of them share it.
    ragged: Ragged,
}

/// What backward needs.
pub struct Saved {
    lstm: Option<recurrent::Saved>,
    /// Of each linear layer, and its product before bias and activation.
    layers: Vec<(linear::Saved, Option<Tensor>)>,
    key: Option<DropoutKey>,
}

impl LearntRows {
    /// The group of the table and its network; all of it trains.
    pub fn declare(plan: &RowsPlan) -> Group {
        let mut group = Group::new(ROWS);
        // As PyTorch starts a table.
        let shape = [plan.rows, plan.width];
        group.specs.push(Spec::added(Self::table_name(), &shape, Init::Normal(1.0)));
        if let Some(lstm) = &plan.lstm {
            Recurrent::declare(&mut group, lstm);
        }
        for (linear, _) in &plan.layers {
            Linear::declare(&mut group, linear);
        }
        for spec in &mut group.specs {
            (spec.trains, spec.added) = (true, true);
        }
        group
    }

    /// Whether the rows are the table's own.
    pub fn is_table(&self) -> bool {
        self.lstm.is_none() && self.layers.is_empty()
    }

    /// Whether the parameter called `name` is the table or of its network.
    pub fn owns(name: &str) -> bool {
        name.strip_prefix(ROWS).is_some_and(|rest| rest.starts_with('.'))
    }

    /// Name of the table.
    pub fn table_name() -> String {
        format!("{ROWS}.embedding.weight")
    }

    /// Takes the declared parameters.
    ///
    /// # Errors
    /// If they were not declared.
    pub fn new(parameters: &Parameters, plan: &RowsPlan) -> Result<Self> {
        let layers = plan
            .layers
            .iter()
            .map(|(linear, activation)| Ok((Linear::new(parameters, linear)?, *activation)));
        let lstm = plan.lstm.as_ref().map(|plan| Recurrent::new(parameters, plan));
        Ok(Self {
            table: parameters.get(&Self::table_name())?,
            lstm: lstm.transpose()?,
            layers: layers.collect::<Result<_>>()?,
            ragged: Ragged::new(&[plan.rows], &[u32::MAX])?,
        })
    }

    /// The rows, and what backward needs.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn forward(&self, key: Option<DropoutKey>) -> Result<(Tensor, Saved)> {
        let rows = Rows { ids: self.ragged.token_rows(), key };
        let (mut x, mut lstm) = (self.table.value.clone(), None);
        if let Some(layers) = &self.lstm {
            let (y, saved) = layers.forward(&x, &self.ragged, rows)?;
            (x, lstm) = (y, Some(saved));
        }
        let mut layers = Vec::with_capacity(self.layers.len());
        for (linear, act) in &self.layers {
            let Some(act) = act else {
                let (y, saved) = linear.forward(&x, rows)?;
                x = y;
                layers.push((saved, None));
                continue;
            };
            let (h, saved) = linear.forward_without_bias(&x, rows)?;
            x = activation::forward(&h, linear.bias_value(), *act)?;
            layers.push((saved, Some(h)));
        }
        Ok((x, Saved { lstm, layers, key }))
    }

    /// Adds the gradients of table and network from that of the rows, `[n, …]` in f32 or as computed.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn backward(&self, saved: Saved, d_rows: &Tensor) -> Result<()> {
        let rows = Rows { ids: self.ragged.token_rows(), key: saved.key };
        let mut dx = d_rows.to_dtype(self.table.value.dtype())?;
        for ((linear, act), (saved, h)) in self.layers.iter().zip(&saved.layers).rev() {
            match (act, h) {
                (Some(act), Some(h)) => {
                    let (bias, gradient) = (linear.bias_value(), linear.bias_gradient());
                    dx = activation::backward(&dx, h, bias, *act, gradient)?;
                }
                _ => linear.backward_bias(&dx)?,
            }
            dx = linear.backward(&dx, saved, rows)?;
        }
        if let (Some(lstm), Some(saved)) = (&self.lstm, saved.lstm)
            && let Some(d_table) = lstm.backward(saved, &dx, &self.ragged, rows, true)?
        {
            dx = d_table;
        }
        let Some(gradient) = &self.table.gradient else { return Ok(()) };
        // Without a network, the gradient as it came.
        let dx = if self.is_table() { d_rows.clone() } else { dx };
        let sum = (gradient + dx.to_dtype(gradient.dtype())?)?;
        Ok(gradient.slice_set(&sum, 0, 0)?)
    }
}
