//! DeBERTa-v2-xlarge's branch beside the first block: a convolution over tokens (never across the
//! border of a sequence) -> dropout -> activation -> added to the block's output -> norm.

use allreel_kernels::{
    Ragged,
    activation::{self, Activation},
    convolution, dropout, linear,
    norm::{self, Junction},
};
use candle_core::Tensor;

use super::{Sites, norm::Norm, site};
use crate::{
    Result,
    model::{
        parameters::{Group, Init, Parameter, Parameters, Spec},
        plan::ConvolutionPlan,
    },
};

/// Weight, bias and norm.
pub struct Convolution {
    weight: Parameter,
    bias: Parameter,
    groups: usize,
    activation: Activation,
    norm: Norm,
    dropout: f64,
}

/// What the branch's backward needs.
pub struct Saved {
    /// What it read, if its weight trains.
    x: Option<Tensor>,
    /// The convolution after its dropout.
    h: Tensor,
    norm: norm::Saved,
}

impl Convolution {
    /// Declares the branch's parameters.
    pub fn declare(group: &mut Group, plan: &ConvolutionPlan) {
        let width = plan.norm.width;
        let shape = [width, width / plan.groups, plan.kernel];
        group.specs.push(Spec::new(format!("{}.weight", plan.name), &shape, plan.init));
        group.specs.push(Spec::new(format!("{}.bias", plan.name), &[width], Init::Zeros));
        Norm::declare(group, &plan.norm);
    }

    /// Takes the declared parameters.
    ///
    /// # Errors
    /// If they were not declared.
    pub fn new(parameters: &Parameters, plan: &ConvolutionPlan) -> Result<Self> {
        Ok(Self {
            weight: parameters.get(&format!("{}.weight", plan.name))?,
            bias: parameters.get(&format!("{}.bias", plan.name))?,
            groups: plan.groups,
            activation: plan.activation,
            norm: Norm::new(parameters, &plan.norm)?,
            dropout: plan.dropout,
        })
    }

    /// The branch of `x` added to `y`, normed, `[T, H]`.
    pub(super) fn forward(
        &self,
        x: &Tensor,
        y: &Tensor,
        ragged: &Ragged,
        sites: Sites,
    ) -> Result<(Tensor, Saved)> {
        let dropout = sites.dropout(self.dropout, site::CONVOLUTION);
        let (weight, bias) = (&self.weight.value, Some(&self.bias.value));
        let h = convolution::forward(x, weight, bias, self.groups, ragged)?;
        let h = dropout::apply(&h, dropout.as_ref(), ragged.token_rows())?;
        let branch = activation::forward(&h, None, self.activation)?;
        let junction = Junction { residual: Some(y), ..Junction::default() };
        let (sum, norm) = norm::forward(&branch, junction, self.norm.layer_norm())?;
        let x = self.weight.gradient.is_some().then(|| x.clone());
        Ok((sum, Saved { x, h, norm }))
    }

    /// `(dx of the branch unless nothing below trains, dy)`; adds the branch's gradients.
    pub(super) fn backward(
        &self,
        saved: &Saved,
        d_sum: &Tensor,
        ragged: &Ragged,
        sites: Sites,
        input_trains: bool,
    ) -> Result<(Option<Tensor>, Tensor)> {
        let dropout = sites.dropout(self.dropout, site::CONVOLUTION);
        let (d_branch, dy) = norm::backward(
            d_sum,
            &saved.norm,
            None,
            Junction::default(),
            self.norm.layer_norm(),
            self.norm.gradients(None),
        )?;
        let dh = activation::backward(&d_branch, &saved.h, None, self.activation, None)?;
        let dh = dropout::apply(&dh, dropout.as_ref(), ragged.token_rows())?;
        if let Some(x) = &saved.x {
            let weight = self.weight.gradient.as_ref();
            convolution::backward_parameters(&dh, x, self.groups, ragged, weight, None)?;
        }
        if let Some(bias) = &self.bias.gradient {
            linear::backward_bias(&dh, bias)?;
        }
        let dx = input_trains
            .then(|| convolution::backward_input(&dh, &self.weight.value, self.groups, ragged));
        Ok((dx.transpose()?, dy))
    }
}
