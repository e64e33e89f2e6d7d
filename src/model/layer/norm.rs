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
    /// Where the weight's gradient goes that nobody wants: it may be frozen while a bias trains.
    unread: Option<Tensor>,
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
        let weight = get("weight")?;
        let unread = weight.gradient.is_none().then(|| weight.value.zeros_like()).transpose()?;
        Ok(Self { weight, bias, unread, eps: plan.eps })
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

    /// Whether anything of it trains.
    pub fn trains(&self) -> bool {
        self.gradients(None).is_some()
    }

    /// Where gradients go, and that of the `bias` of the linear before it; `None` if all are frozen.
    pub fn gradients<'a>(&'a self, bias: Option<&'a Parameter>) -> Option<Gradients<'a>> {
        let gradient = |bias: &'a Parameter| bias.gradient.as_ref();
        let (beta, bias) = (self.bias.as_ref().and_then(gradient), bias.and_then(gradient));
        let gamma = self.weight.gradient.as_ref();
        if gamma.is_none() && beta.is_none() && bias.is_none() {
            return None;
        }
        Some(Gradients { gamma: gamma.or(self.unread.as_ref())?, beta, bias })
    }
}
