//! A LayerNorm's parameters, as the kernels want them.

use allreel_kernels::norm::{self, Gradients, Junction, Saved};
use candle_core::Tensor;

use crate::{
    Result,
    model::{
        parameters::{Group, Init, Parameter, Parameters, Spec},
        plan::NormPlan,
    },
};

/// `y = γ·ẑ + β`.
pub struct Norm {
    weight: Parameter,
    bias: Option<Parameter>,
    eps: f64,
}

impl Norm {
    /// Declares `name.weight` and, if it has one, `name.bias`.
    pub fn declare(group: &mut Group, plan: &NormPlan) {
        let name = |leaf: &str| format!("{}.{leaf}", plan.name);
        let weight = Spec::new(name("weight"), &[plan.width], Init::Ones);
        group.specs.push(Spec { decays: false, ..weight });
        if plan.bias {
            group.specs.push(Spec::new(name("bias"), &[plan.width], Init::Zeros));
        }
    }

    /// Takes the declared parameters.
    ///
    /// # Errors
    /// If they were not declared.
    pub fn new(parameters: &Parameters, plan: &NormPlan) -> Result<Self> {
        let get = |leaf: &str| parameters.get(&format!("{}.{leaf}", plan.name));
        let bias = plan.bias.then(|| get("bias")).transpose()?;
        Ok(Self { weight: get("weight")?, bias, eps: plan.eps })
    }

    /// The norm of `x` alone, `[T, H]`, and what backward needs.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn forward(&self, x: &Tensor) -> Result<(Tensor, Saved)> {
        Ok(norm::forward(x, Junction::default(), self.layer_norm())?)
    }

    /// `dx` of [`forward`](Self::forward), with `dx_past` added: what reached `x` past the norm. Adds
    /// the norm's gradients, if it trains.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn backward(&self, dy: &Tensor, saved: &Saved, dx_past: Option<&Tensor>) -> Result<Tensor> {
        let (norm, gradients) = (self.layer_norm(), self.gradients(None));
        Ok(norm::backward(dy, saved, dx_past, Junction::default(), norm, gradients)?.0)
    }

    /// Scale, shift and epsilon.
    pub fn layer_norm(&self) -> norm::LayerNorm<'_> {
        let beta = self.bias.as_ref().map(|bias| &bias.value);
        norm::LayerNorm { gamma: &self.weight.value, beta, eps: self.eps }
    }

    /// Where gradients go, and that of the `bias` of the linear before it; `None` if frozen.
    pub fn gradients<'a>(&'a self, bias: Option<&'a Parameter>) -> Option<Gradients<'a>> {
        Some(Gradients {
            gamma: self.weight.gradient.as_ref()?,
            beta: self.bias.as_ref().and_then(|bias| bias.gradient.as_ref()),
            bias: bias.and_then(|bias| bias.gradient.as_ref()),
        })
    }
}
