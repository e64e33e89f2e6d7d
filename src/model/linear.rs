//! A linear layer: which gradients it makes depends only on what trains.

use allreel_kernels::linear;
use candle_core::Tensor;

use super::parameters::{Group, Init, Parameter, Parameters, Spec};
use crate::Result;

/// `y = x·Wᵀ + b`.
pub struct Linear {
    /// `[N, K]`.
    pub weight: Parameter,
    /// `[N]`.
    pub bias: Parameter,
}

impl Linear {
    /// Declares `name.weight` and `name.bias`.
    pub fn declare(group: &mut Group, name: &str, outputs: usize, inputs: usize, deviation: f64) {
        let name = |leaf: &str| format!("{name}.{leaf}");
        group.specs.push(Spec::new(name("weight"), &[outputs, inputs], Init::Normal(deviation)));
        group.specs.push(Spec::new(name("bias"), &[outputs], Init::Zeros));
    }

    /// Takes `name.weight` and `name.bias`.
    ///
    /// # Errors
    /// If they were not declared.
    pub fn new(parameters: &Parameters, name: &str) -> Result<Self> {
        Ok(Self {
            weight: parameters.get(&format!("{name}.weight"))?,
            bias: parameters.get(&format!("{name}.bias"))?,
        })
    }

    /// `x·Wᵀ + b`.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(linear::forward(x, &self.weight.value, Some(&self.bias.value))?)
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
        if let Some(gradient) = &self.bias.gradient {
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
