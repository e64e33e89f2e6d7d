//! The block of ModernBERT and GPT-2: the norm comes before each sub-layer.
//!
//! ```text
//! x -> LN -> q, k, v -> (rotary) -> attention -> dense -> dropout -> x + . = z
//! z -> LN -> dense -> act (gated) -> dropout -> dense -> dropout -> z + .
//! ```

use std::sync::Arc;

use allreel_kernels::{
    Dropout, DropoutKey, Ragged,
    activation::{self, Activation},
    attention::{self, Attention, Span},
    dropout,
    norm::{self, Junction},
    rotary,
};
use candle_core::Tensor;

use super::{Sites, linear::Linear, norm::Norm, post_norm::dropped, site};
use crate::{
    Result,
    model::{
        parameters::{Group, Parameters},
        plan::PreNormPlan,
    },
};

/// One block.
pub struct PreNorm {
    attention_norm: Option<Norm>,
    /// Queries, keys and values: three parts of one weight.
    qkv: [Linear; 3],
    rotary: Option<Arc<rotary::Table>>,
    attention_output: Linear,
    mlp_norm: Norm,
    mlp_input: Linear,
    activation: Activation,
    gated: bool,
    mlp_output: Linear,
    heads: usize,
    scale: f64,
    span: Span,
    attention_dropout: f64,
    attention_output_dropout: f64,
    mlp_dropout: f64,
    output_dropout: f64,
    first_site: u16,
}

/// What a block's backward needs.
pub struct Saved {
    attention_norm: Option<norm::Saved>,
    /// The input after its norm.
    n: Tensor,
    /// Queries and keys after the rotation.
    attention: attention::Saved,
    mlp_norm: norm::Saved,
    /// What the feed-forward part read.
    m: Tensor,
    /// Its first product before the bias, and after activation and dropout.
    h: Tensor,
    activated: Tensor,
}

/// The dropouts of a block in one step.
struct Dropouts {
    probabilities: Option<Dropout>,
    attention: Option<Dropout>,
    mlp: Option<Dropout>,
    output: Option<Dropout>,
}

impl PreNorm {
    /// The group of the block's parameters.
    pub fn declare(plan: &PreNormPlan, trains: bool) -> Group {
        let mut group = Group::new(&plan.name, trains);
        if let Some(norm) = &plan.attention_norm {
            Norm::declare(&mut group, norm);
        }
        Linear::declare(&mut group, &plan.qkv);
        Linear::declare(&mut group, &plan.attention_output);
        Norm::declare(&mut group, &plan.mlp_norm);
        Linear::declare(&mut group, &plan.mlp_input);
        Linear::declare(&mut group, &plan.mlp_output);
        group
    }

    /// Takes the parameters of block `i`, which turns queries and keys by `rotary`.
    ///
    /// # Errors
    /// If they were not declared.
    pub fn new(
        parameters: &Parameters,
        plan: &PreNormPlan,
        i: usize,
        rotary: Option<Arc<rotary::Table>>,
    ) -> Result<Self> {
        let qkv = Linear::new(parameters, &plan.qkv)?;
        let width = plan.qkv.outputs / 3;
        let attention_norm = plan.attention_norm.as_ref();
        Ok(Self {
            attention_norm: attention_norm.map(|norm| Norm::new(parameters, norm)).transpose()?,
            qkv: [qkv.rows(0, width)?, qkv.rows(width, width)?, qkv.rows(2 * width, width)?],
            rotary,
            attention_output: Linear::new(parameters, &plan.attention_output)?,
            mlp_norm: Norm::new(parameters, &plan.mlp_norm)?,
            mlp_input: Linear::new(parameters, &plan.mlp_input)?,
            activation: plan.activation,
            gated: plan.gated,
            mlp_output: Linear::new(parameters, &plan.mlp_output)?,
            heads: plan.heads,
            scale: plan.scale,
            span: plan.span,
            attention_dropout: plan.attention_dropout,
            attention_output_dropout: plan.attention_output_dropout,
            mlp_dropout: plan.mlp_dropout,
            output_dropout: plan.output_dropout,
            first_site: site::block(i),
        })
    }

    fn dropouts(&self, key: Option<DropoutKey>) -> Dropouts {
        let sites = Sites { first: self.first_site, key };
        Dropouts {
            probabilities: sites.dropout(self.attention_dropout, site::PROBABILITIES),
            attention: sites.dropout(self.attention_output_dropout, site::ATTENTION),
            mlp: sites.dropout(self.mlp_dropout, site::MLP),
            output: sites.dropout(self.output_dropout, site::OUTPUT),
        }
    }

    fn attention<'a>(&self, ragged: &'a Ragged, dropouts: &'a Dropouts) -> Attention<'a> {
        let dropout = dropouts.probabilities.as_ref();
        Attention { ragged, heads: self.heads, scale: self.scale, span: self.span, dropout }
    }

    /// Queries, keys and values of the normed input, rotated.
    fn project(&self, n: &Tensor, ragged: &Ragged) -> Result<[Tensor; 3]> {
        let [query, key, value] = &self.qkv;
        let (mut q, mut k) = (query.forward(n)?, key.forward(n)?);
        if let Some(table) = &self.rotary {
            q = rotary::forward(&q, table, ragged, self.heads)?;
            k = rotary::forward(&k, table, ragged, self.heads)?;
        }
        Ok([q, k, value.forward(n)?])
    }

    fn activate(&self, h: &Tensor) -> Result<Tensor> {
        let bias = self.mlp_input.bias_value();
        Ok(match self.gated {
            true => activation::gated_forward(h, bias, self.activation)?,
            false => activation::forward(h, bias, self.activation)?,
        })
    }

    fn activate_backward(&self, dy: &Tensor, h: &Tensor) -> Result<Tensor> {
        let (bias, gradient) = (self.mlp_input.bias_value(), self.mlp_input.bias_gradient());
        Ok(match self.gated {
            true => activation::gated_backward(dy, h, bias, self.activation, gradient)?,
            false => activation::backward(dy, h, bias, self.activation, gradient)?,
        })
    }

    /// `[T, H]` and what backward needs.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn forward(
        &self,
        x: &Tensor,
        ragged: &Ragged,
        key: Option<DropoutKey>,
    ) -> Result<(Tensor, Saved)> {
        let dropouts = self.dropouts(key);
        let rows = ragged.token_rows();
        let (n, attention_norm) = match &self.attention_norm {
            Some(norm) => {
                let (n, saved) = norm.forward(x)?;
                (n, Some(saved))
            }
            None => (x.clone(), None),
        };
        let [q, k, v] = self.project(&n, ragged)?;
        let (o, lse) = attention::forward(self.attention(ragged, &dropouts), &q, &k, &v)?;
        let (m, mlp_norm) = norm::forward(
            &self.attention_output.forward_without_bias(&o)?,
            Junction {
                bias: self.attention_output.bias_value(),
                residual: Some(x),
                ..dropped(dropouts.attention.as_ref(), rows)
            },
            self.mlp_norm.layer_norm(),
        )?;
        let h = self.mlp_input.forward_without_bias(&m)?;
        let activated = dropout::apply(&self.activate(&h)?, dropouts.mlp.as_ref(), rows)?;
        let y = norm::add(
            &self.mlp_output.forward_without_bias(&activated)?,
            Junction {
                bias: self.mlp_output.bias_value(),
                residual: Some(mlp_norm.z()),
                ..dropped(dropouts.output.as_ref(), rows)
            },
        )?;
        let attention = attention::Saved { q, k, v, o, lse };
        Ok((y, Saved { attention_norm, n, attention, mlp_norm, m, h, activated }))
    }

    /// Adds the block's gradients; returns that of its input unless nothing below trains.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn backward(
        &self,
        saved: &Saved,
        dy: &Tensor,
        ragged: &Ragged,
        key: Option<DropoutKey>,
        input_trains: bool,
    ) -> Result<Option<Tensor>> {
        let dropouts = self.dropouts(key);
        let rows = ragged.token_rows();
        let dm = self.mlp_backward(saved, dy, ragged, &dropouts)?;
        let (d_dense, dx) = norm::backward(
            &dm,
            &saved.mlp_norm,
            Some(dy),
            dropped(dropouts.attention.as_ref(), rows),
            self.mlp_norm.layer_norm(),
            self.mlp_norm.gradients(self.attention_output.bias.as_ref()),
        )?;
        self.attention_output.backward_weight(&d_dense, &saved.attention.o)?;
        let d_o = self.attention_output.backward_input(&d_dense)?;
        drop(d_dense);
        let (mut dq, mut dk, dv) =
            attention::backward(self.attention(ragged, &dropouts), &saved.attention, &d_o)?;
        if let Some(table) = &self.rotary {
            dq = rotary::backward(&dq, table, ragged, self.heads)?;
            dk = rotary::backward(&dk, table, ragged, self.heads)?;
        }
        let d_projected = [dq, dk, dv];
        for (linear, dy) in self.qkv.iter().zip(&d_projected) {
            linear.backward_parameters(dy, &saved.n)?;
        }
        let (Some(norm), Some(saved_norm)) = (&self.attention_norm, &saved.attention_norm) else {
            if input_trains {
                for (linear, dy) in self.qkv.iter().zip(&d_projected) {
                    linear.backward_input_into(dy, &dx)?;
                }
            }
            return Ok(input_trains.then_some(dx));
        };
        // Needed even where nothing below trains: the norm itself does.
        let dn = self.qkv[0].backward_input(&d_projected[0])?;
        for (linear, dy) in self.qkv.iter().zip(&d_projected).skip(1) {
            linear.backward_input_into(dy, &dn)?;
        }
        let dx = norm.backward(&dn, saved_norm, Some(&dx))?;
        Ok(input_trains.then_some(dx))
    }

    /// Adds the gradients of the feed-forward part; returns that of what it read.
    fn mlp_backward(
        &self,
        saved: &Saved,
        dy: &Tensor,
        ragged: &Ragged,
        dropouts: &Dropouts,
    ) -> Result<Tensor> {
        let rows = ragged.token_rows();
        let junction = dropped(dropouts.output.as_ref(), rows);
        let d_output = norm::add_backward(dy, junction, self.mlp_output.bias_gradient())?;
        self.mlp_output.backward_weight(&d_output, &saved.activated)?;
        let d_activated = self.mlp_output.backward_input(&d_output)?;
        let d_activated = dropout::apply(&d_activated, dropouts.mlp.as_ref(), rows)?;
        let dh = self.activate_backward(&d_activated, &saved.h)?;
        self.mlp_input.backward_weight(&dh, &saved.m)?;
        self.mlp_input.backward_input(&dh)
    }
}
