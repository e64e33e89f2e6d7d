//! The block of BERT, DistilBERT, RoBERTa and DeBERTa: the norm comes after each sub-layer.
//!
//! ```text
//! x -> q, k, v -> attention -> dense -> dropout -> LN(x + .) = a
//! a -> dense -> act -> dense -> dropout -> LN(a + .)
//! ```
//!
//! DeBERTa's attention also scores relative positions; the first block of DeBERTa-v2-xlarge has a
//! convolution of `x` beside it.

use allreel_kernels::{
    Dropout, DropoutKey, Ragged, RowIds,
    activation::{self, Activation},
    attention::{self, Attention, Span},
    norm::{self, Junction},
};
use candle_core::Tensor;

use super::{
    Sites,
    convolution::{self, Convolution},
    disentangled::{self, DisentangledAttention},
    linear::Linear,
    norm::Norm,
    relative::Relative,
    site,
};
use crate::{
    Error, Result,
    model::{
        parameters::{Group, Parameters},
        plan::PostNormPlan,
    },
};

/// One block.
pub struct PostNorm {
    query: Linear,
    key: Linear,
    value: Linear,
    attention_output: Linear,
    attention_norm: Norm,
    intermediate: Linear,
    output: Linear,
    output_norm: Norm,
    disentangled: Option<DisentangledAttention>,
    convolution: Option<Convolution>,
    activation: Activation,
    heads: usize,
    scale: f64,
    attention_dropout: f64,
    attention_output_dropout: f64,
    output_dropout: f64,
    first_site: u16,
}

/// What a block's backward needs: nothing of `[T, T]`, no mask, no normalised copy.
pub struct Saved {
    x: Tensor,
    attention: SavedAttention,
    attention_norm: norm::Saved,
    a: Tensor,
    /// Intermediate product before its bias, and after the activation.
    h: Tensor,
    activated: Tensor,
    output_norm: norm::Saved,
    convolution: Option<convolution::Saved>,
}

enum SavedAttention {
    Plain(attention::Saved),
    Disentangled(disentangled::Saved),
}

impl SavedAttention {
    /// The attention's output.
    fn o(&self) -> &Tensor {
        match self {
            Self::Plain(saved) => &saved.o,
            Self::Disentangled(saved) => &saved.op.o,
        }
    }
}

/// The part of a junction that its backward reads.
pub(super) fn dropped<'a>(dropout: Option<&'a Dropout>, rows: &'a RowIds) -> Junction<'a> {
    Junction { dropout: dropout.map(|dropout| (dropout, rows)), ..Junction::default() }
}

/// The dropouts of a block in one step.
struct Dropouts {
    probabilities: Option<Dropout>,
    attention: Option<Dropout>,
    output: Option<Dropout>,
}

impl PostNorm {
    /// The group of the block's parameters.
    pub fn declare(plan: &PostNormPlan, trains: bool) -> Group {
        let mut group = Group::new(&plan.name, trains);
        for linear in [&plan.query, &plan.key, &plan.value] {
            Linear::declare(&mut group, linear);
        }
        if let Some(disentangled) = &plan.disentangled {
            DisentangledAttention::declare(&mut group, disentangled);
        }
        Linear::declare(&mut group, &plan.attention_output);
        Norm::declare(&mut group, &plan.attention_norm);
        Linear::declare(&mut group, &plan.intermediate);
        Linear::declare(&mut group, &plan.output);
        Norm::declare(&mut group, &plan.output_norm);
        if let Some(convolution) = &plan.convolution {
            Convolution::declare(&mut group, convolution);
        }
        group
    }

    /// Takes the parameters of block `i`.
    ///
    /// # Errors
    /// If they were not declared.
    pub fn new(parameters: &Parameters, plan: &PostNormPlan, i: usize) -> Result<Self> {
        let disentangled = plan.disentangled.as_ref();
        let convolution = plan.convolution.as_ref();
        Ok(Self {
            query: Linear::new(parameters, &plan.query)?,
            key: Linear::new(parameters, &plan.key)?,
            value: Linear::new(parameters, &plan.value)?,
            attention_output: Linear::new(parameters, &plan.attention_output)?,
            attention_norm: Norm::new(parameters, &plan.attention_norm)?,
            intermediate: Linear::new(parameters, &plan.intermediate)?,
            output: Linear::new(parameters, &plan.output)?,
            output_norm: Norm::new(parameters, &plan.output_norm)?,
            disentangled: disentangled
                .map(|plan| DisentangledAttention::new(parameters, plan))
                .transpose()?,
            convolution: convolution.map(|plan| Convolution::new(parameters, plan)).transpose()?,
            activation: plan.activation,
            heads: plan.heads,
            scale: plan.scale,
            attention_dropout: plan.attention_dropout,
            attention_output_dropout: plan.attention_output_dropout,
            output_dropout: plan.output_dropout,
            first_site: site::block(i),
        })
    }

    fn sites(&self, key: Option<DropoutKey>) -> Sites {
        Sites { first: self.first_site, key }
    }

    fn dropouts(&self, key: Option<DropoutKey>) -> Dropouts {
        let sites = self.sites(key);
        Dropouts {
            probabilities: sites.dropout(self.attention_dropout, site::PROBABILITIES),
            attention: sites.dropout(self.attention_output_dropout, site::ATTENTION),
            output: sites.dropout(self.output_dropout, site::OUTPUT),
        }
    }

    fn plain<'a>(&self, ragged: &'a Ragged, dropout: Option<&'a Dropout>) -> Attention<'a> {
        Attention { ragged, heads: self.heads, scale: self.scale, span: Span::default(), dropout }
    }

    fn call<'a>(
        &'a self,
        ragged: &'a Ragged,
        dropout: Option<&'a Dropout>,
        key: Option<DropoutKey>,
    ) -> disentangled::Call<'a> {
        disentangled::Call {
            ragged,
            heads: self.heads,
            scale: self.scale,
            dropout,
            key: &self.key,
            query: &self.query,
            sites: self.sites(key),
        }
    }

    /// The attention's output.
    fn attend(
        &self,
        x: &Tensor,
        ragged: &Ragged,
        dropout: Option<&Dropout>,
        key: Option<DropoutKey>,
        relative: Option<&Relative>,
    ) -> Result<SavedAttention> {
        let (q, k, v) = (self.query.forward(x)?, self.key.forward(x)?, self.value.forward(x)?);
        let Some(disentangled) = &self.disentangled else {
            let (o, lse) = attention::forward(self.plain(ragged, dropout), &q, &k, &v)?;
            return Ok(SavedAttention::Plain(attention::Saved { q, k, v, o, lse }));
        };
        let relative = relative.ok_or_else(no_relative)?;
        let call = self.call(ragged, dropout, key);
        Ok(SavedAttention::Disentangled(disentangled.forward(call, [q, k, v], relative)?))
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
        relative: Option<&Relative>,
    ) -> Result<(Tensor, Saved)> {
        let dropouts = self.dropouts(key);
        let rows = ragged.token_rows();
        let attention = self.attend(x, ragged, dropouts.probabilities.as_ref(), key, relative)?;
        let (a, attention_norm) = norm::forward(
            &self.attention_output.forward_without_bias(attention.o())?,
            Junction {
                bias: self.attention_output.bias_value(),
                residual: Some(x),
                ..dropped(dropouts.attention.as_ref(), rows)
            },
            self.attention_norm.layer_norm(),
        )?;
        let h = self.intermediate.forward_without_bias(&a)?;
        let activated = activation::forward(&h, self.intermediate.bias_value(), self.activation)?;
        let (mut y, output_norm) = norm::forward(
            &self.output.forward_without_bias(&activated)?,
            Junction {
                bias: self.output.bias_value(),
                residual: Some(&a),
                ..dropped(dropouts.output.as_ref(), rows)
            },
            self.output_norm.layer_norm(),
        )?;
        let mut saved_convolution = None;
        if let Some(convolution) = &self.convolution {
            let (sum, saved) = convolution.forward(x, &y, ragged, self.sites(key))?;
            (y, saved_convolution) = (sum, Some(saved));
        }
        let saved = Saved {
            x: x.clone(),
            attention,
            attention_norm,
            a,
            h,
            activated,
            output_norm,
            convolution: saved_convolution,
        };
        Ok((y, saved))
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
        relative: Option<&mut Relative>,
        input_trains: bool,
    ) -> Result<Option<Tensor>> {
        let dropouts = self.dropouts(key);
        let (mut d_branch, mut d_block) = (None, None);
        if let (Some(convolution), Some(saved_branch)) = (&self.convolution, &saved.convolution) {
            let sites = self.sites(key);
            let (dx, dy) =
                convolution.backward(saved_branch, &saved.x, dy, ragged, sites, input_trains)?;
            (d_branch, d_block) = (dx, Some(dy));
        }
        let da =
            self.feed_forward_backward(saved, d_block.as_ref().unwrap_or(dy), ragged, &dropouts)?;
        let (d_dense, mut dx) = norm::backward(
            &da,
            &saved.attention_norm,
            None,
            dropped(dropouts.attention.as_ref(), ragged.token_rows()),
            self.attention_norm.layer_norm(),
            self.attention_norm.gradients(self.attention_output.bias.as_ref()),
        )?;
        self.attention_output.backward_weight(&d_dense, saved.attention.o())?;
        let d_o = self.attention_output.backward_input(&d_dense)?;
        drop(d_dense);
        if let Some(d_branch) = d_branch {
            dx = (dx + d_branch)?;
        }
        let probabilities = dropouts.probabilities.as_ref();
        let gradients =
            self.attend_backward(&saved.attention, &d_o, ragged, probabilities, key, relative)?;
        for (linear, dy) in [&self.query, &self.key, &self.value].into_iter().zip(&gradients) {
            linear.backward_parameters(dy, &saved.x)?;
            if input_trains {
                linear.backward_input_into(dy, &dx)?;
            }
        }
        Ok(input_trains.then_some(dx))
    }

    /// Adds the gradients of the feed-forward part; returns that of its input.
    fn feed_forward_backward(
        &self,
        saved: &Saved,
        dy: &Tensor,
        ragged: &Ragged,
        dropouts: &Dropouts,
    ) -> Result<Tensor> {
        let (d_output, da) = norm::backward(
            dy,
            &saved.output_norm,
            None,
            dropped(dropouts.output.as_ref(), ragged.token_rows()),
            self.output_norm.layer_norm(),
            self.output_norm.gradients(self.output.bias.as_ref()),
        )?;
        self.output.backward_weight(&d_output, &saved.activated)?;
        let dh = activation::backward(
            &self.output.backward_input(&d_output)?,
            &saved.h,
            self.intermediate.bias_value(),
            self.activation,
            self.intermediate.bias_gradient(),
        )?;
        // d_output may share da's memory; from here on only da is read.
        drop(d_output);
        self.intermediate.backward_weight(&dh, &saved.a)?;
        self.intermediate.backward_input_into(&dh, &da)?;
        Ok(da)
    }

    /// `[dq, dk, dv]`.
    fn attend_backward(
        &self,
        saved: &SavedAttention,
        d_o: &Tensor,
        ragged: &Ragged,
        dropout: Option<&Dropout>,
        key: Option<DropoutKey>,
        relative: Option<&mut Relative>,
    ) -> Result<[Tensor; 3]> {
        match (saved, &self.disentangled) {
            (SavedAttention::Disentangled(saved), Some(disentangled)) => {
                let call = self.call(ragged, dropout, key);
                disentangled.backward(call, saved, d_o, relative.ok_or_else(no_relative)?)
            }
            (SavedAttention::Plain(saved), None) => {
                let (dq, dk, dv) = attention::backward(self.plain(ragged, dropout), saved, d_o)?;
                Ok([dq, dk, dv])
            }
            _ => Err(Error::Bug("a block's backward got another block's forward".into())),
        }
    }
}

fn no_relative() -> Error {
    Error::Bug("a disentangled block without the relative table".into())
}
