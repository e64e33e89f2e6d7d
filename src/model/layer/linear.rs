//! A linear layer: which gradients it makes depends only on what trains.

use allreel_kernels::linear;
use candle_core::Tensor;

use crate::{
    Result,
    model::{
        parameters::{Group, Init, Parameter, Parameters, Spec},
        plan::LinearPlan,
    },
};

/// `y = x·Wᵀ + b`.
pub struct Linear {
    /// `[N, K]`.
    pub weight: Parameter,
    /// `[N]`.
    pub bias: Option<Parameter>,
}

impl Linear {
    /// Declares `name.weight` and, if it has one, `name.bias`.
    pub fn declare(group: &mut Group, plan: &LinearPlan) {
        let name = |leaf: &str| format!("{}.{leaf}", plan.name);
        let weight = Spec::new(name("weight"), &[plan.outputs, plan.inputs], plan.init);
        group.specs.push(Spec { transposed: plan.transposed, ..weight });
        if plan.bias {
            group.specs.push(Spec::new(name("bias"), &[plan.outputs], Init::Zeros));
        }
    }

    /// Takes the declared parameters.
    ///
    /// # Errors
    /// If they were not declared.
    pub fn new(parameters: &Parameters, plan: &LinearPlan) -> Result<Self> {
        let get = |leaf: &str| parameters.get(&format!("{}.{leaf}", plan.name));
        let bias = plan.bias.then(|| get("bias")).transpose()?;
        Ok(Self { weight: get("weight")?, bias })
    }

    /// The layer whose outputs are `len` of this one's, from `first` on; it shares the memory.
    ///
    /// # Errors
    /// If there are fewer outputs.
    pub fn rows(&self, first: usize, len: usize) -> Result<Self> {
        let cut = |parameter: &Parameter| -> Result<Parameter> {
            let narrow = |tensor: &Tensor| tensor.narrow(0, first, len);
            Ok(Parameter {
                value: narrow(&parameter.value)?,
                gradient: parameter.gradient.as_ref().map(narrow).transpose()?,
            })
        };
        Ok(Self { weight: cut(&self.weight)?, bias: self.bias.as_ref().map(cut).transpose()? })
    }

    /// Value of the bias, for an op that adds it itself.
    pub fn bias_value(&self) -> Option<&Tensor> {
        self.bias.as_ref().map(|bias| &bias.value)
    }

    /// Gradient of the bias, for an op that adds to it itself; `None` if there is none or it is
    /// frozen.
    pub fn bias_gradient(&self) -> Option<&Tensor> {
        self.bias.as_ref().and_then(|bias| bias.gradient.as_ref())
    }

    /// Whether it trains.
    pub fn trains(&self) -> bool {
        self.weight.gradient.is_some()
    }

    /// `x·Wᵀ + b`.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(linear::forward(x, &self.weight.value, self.bias_value())?)
    }

    /// `x·Wᵀ`, for an op that adds the bias itself.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn forward_without_bias(&self, x: &Tensor) -> Result<Tensor> {
        Ok(linear::forward(x, &self.weight.value, None)?)
    }

    /// Adds the weight's gradient, if it trains.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn backward_weight(&self, dy: &Tensor, x: &Tensor) -> Result<()> {
        if let Some(gradient) = &self.weight.gradient {
            linear::backward_weight(dy, x, gradient)?;
        }
        Ok(())
    }

    /// Adds the gradients of weight and bias, if they train.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn backward_parameters(&self, dy: &Tensor, x: &Tensor) -> Result<()> {
        self.backward_weight(dy, x)?;
        if let Some(gradient) = self.bias_gradient() {
            linear::backward_bias(dy, gradient)?;
        }
        Ok(())
    }

    /// `dy·W`.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn backward_input(&self, dy: &Tensor) -> Result<Tensor> {
        Ok(linear::backward_input(dy, &self.weight.value)?)
    }

    /// `dx += dy·W`.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn backward_input_into(&self, dy: &Tensor, dx: &Tensor) -> Result<()> {
        Ok(linear::backward_input_into(dy, &self.weight.value, dx)?)
    }
}
