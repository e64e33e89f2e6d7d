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
    block::Shared,
    convolution::{self, Convolution},
    disentangled::{self, DisentangledAttention},
    linear::{self, Linear, Rows},
    norm::Norm,
    prefix::Joined,
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
    /// Its place among the blocks.
    number: usize,
}

/// What a block's backward needs: nothing of `[T, T]`, no mask, no normalised copy.
pub struct Saved {
    /// Of queries, keys and values.
    projections: [linear::Saved; 3],
    attention: SavedAttention,
    attention_output: linear::Saved,
    attention_norm: norm::Saved,
    intermediate: linear::Saved,
    /// Intermediate product before its bias.
    h: Tensor,
    output: linear::Saved,
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
        self.queries_output_and_lse()[1]
    }

    fn queries_output_and_lse(&self) -> [&Tensor; 3] {
        match self {
            Self::Plain(saved) => [&saved.q, &saved.o, &saved.lse],
            Self::Disentangled(saved) => [&saved.op.q, &saved.op.o, &saved.op.lse],
        }
    }

    /// Puts output and log-sum-exp over more keys in place of the block's own.
    fn set(&mut self, joined: (Tensor, Tensor)) {
        let (o, lse) = match self {
            Self::Plain(saved) => (&mut saved.o, &mut saved.lse),
            Self::Disentangled(saved) => (&mut saved.op.o, &mut saved.op.lse),
        };
        (*o, *lse) = joined;
    }
}

/// The part of a junction that its backward reads.
pub(super) fn dropped<'a>(dropout: Option<&'a Dropout>, rows: &'a RowIds) -> Junction<'a> {
    Junction { dropout: dropout.map(|dropout| (dropout, rows)), ..Junction::default() }
}

/// The dropouts of a block in one step.
struct Dropouts {
    probabilities: Option<Dropout>,
    prefix: Option<Dropout>,
    attention: Option<Dropout>,
    output: Option<Dropout>,
}

impl PostNorm {
    /// The group of the block's parameters.
    pub fn declare(plan: &PostNormPlan) -> Group {
        let mut group = Group::new(&plan.name);
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
            number: i,
        })
    }

    fn sites(&self, key: Option<DropoutKey>) -> Sites {
        Sites { first: self.first_site, key }
    }

    fn dropouts(&self, key: Option<DropoutKey>) -> Dropouts {
        let sites = self.sites(key);
        Dropouts {
            probabilities: sites.dropout(self.attention_dropout, site::PROBABILITIES),
            prefix: sites.dropout(self.attention_dropout, site::PREFIX),
            attention: sites.dropout(self.attention_output_dropout, site::ATTENTION),
            output: sites.dropout(self.output_dropout, site::OUTPUT),
        }
    }

    fn plain<'a>(&self, ragged: &'a Ragged, dropout: Option<&'a Dropout>) -> Attention<'a> {
        Attention { ragged, heads: self.heads, scale: self.scale, span: Span::default(), dropout }
    }

    fn joined<'a>(&self, ragged: &'a Ragged, dropouts: &'a Dropouts) -> Joined<'a> {
        let dropout = dropouts.prefix.as_ref();
        Joined { ragged, heads: self.heads, scale: self.scale, dropout, block: self.number }
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

    /// Whether anything trains from the block's input up to the output of its attention.
    fn attention_trains(&self, shared: &Shared) -> bool {
        let linears = [&self.query, &self.key, &self.value, &self.attention_output];
        linears.into_iter().any(Linear::trains)
            || self.attention_norm.trains()
            || self.disentangled.as_ref().is_some_and(DisentangledAttention::trains)
            || shared.train()
    }

    /// The attention and what its projections saved.
    fn attend(
        &self,
        x: &Tensor,
        ragged: &Ragged,
        dropouts: &Dropouts,
        key: Option<DropoutKey>,
        shared: &Shared,
    ) -> Result<(SavedAttention, [linear::Saved; 3])> {
        let rows = Rows { ids: ragged.token_rows(), key };
        let (q, saved_q) = self.query.forward(x, rows)?;
        let (k, saved_k) = self.key.forward(x, rows)?;
        let (v, saved_v) = self.value.forward(x, rows)?;
        let dropout = dropouts.probabilities.as_ref();
        let mut saved = match &self.disentangled {
            None => {
                let (o, lse) = attention::forward(self.plain(ragged, dropout), &q, &k, &v)?;
                SavedAttention::Plain(attention::Saved { q, k, v, o, lse })
            }
            Some(disentangled) => {
                let relative = shared.relative.as_ref().ok_or_else(no_relative)?;
                let call = self.call(ragged, dropout, key);
                SavedAttention::Disentangled(disentangled.forward(call, [q, k, v], relative)?)
            }
        };
        if let Some(prefix) = &shared.prefix {
            let [q, o, lse] = saved.queries_output_and_lse();
            let joined = prefix.join(self.joined(ragged, dropouts), q, o, lse)?;
            saved.set(joined);
        }
        Ok((saved, [saved_q, saved_k, saved_v]))
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
        shared: &Shared,
    ) -> Result<(Tensor, Saved)> {
        let dropouts = self.dropouts(key);
        let ids = ragged.token_rows();
        let rows = Rows { ids, key };
        let (attention, projections) = self.attend(x, ragged, &dropouts, key, shared)?;
        let (dense, attention_output) =
            self.attention_output.forward_without_bias(attention.o(), rows)?;
        let (a, attention_norm) = norm::forward(
            &dense,
            Junction {
                bias: self.attention_output.bias_value(),
                residual: Some(x),
                ..dropped(dropouts.attention.as_ref(), ids)
            },
            self.attention_norm.layer_norm(),
        )?;
        let (h, intermediate) = self.intermediate.forward_without_bias(&a, rows)?;
        let activated = activation::forward(&h, self.intermediate.bias_value(), self.activation)?;
        let (dense, output) = self.output.forward_without_bias(&activated, rows)?;
        let (mut y, output_norm) = norm::forward(
            &dense,
            Junction {
                bias: self.output.bias_value(),
                residual: Some(&a),
                ..dropped(dropouts.output.as_ref(), ids)
            },
            self.output_norm.layer_norm(),
        )?;
        let mut saved_convolution = None;
        if let Some(convolution) = &self.convolution {
            let (sum, saved) = convolution.forward(x, &y, ragged, self.sites(key))?;
            (y, saved_convolution) = (sum, Some(saved));
        }
        let saved = Saved {
            projections,
            attention,
            attention_output,
            attention_norm,
            intermediate,
            h,
            output,
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
        shared: &mut Shared,
        input_trains: bool,
    ) -> Result<Option<Tensor>> {
        let dropouts = self.dropouts(key);
        let rows = Rows { ids: ragged.token_rows(), key };
        let (mut d_branch, mut d_block) = (None, None);
        if let (Some(convolution), Some(saved)) = (&self.convolution, &saved.convolution) {
            let (dx, dy) =
                convolution.backward(saved, dy, ragged, self.sites(key), input_trains)?;
            (d_branch, d_block) = (dx, Some(dy));
        }
        let dy = d_block.as_ref().unwrap_or(dy);
        let below = input_trains || self.attention_trains(shared);
        let Some(da) = self.feed_forward_backward(saved, dy, rows, &dropouts, below)? else {
            return Ok(None);
        };
        let (d_dense, dx) = norm::backward(
            &da,
            &saved.attention_norm,
            None,
            dropped(dropouts.attention.as_ref(), rows.ids),
            self.attention_norm.layer_norm(),
            self.attention_norm.gradients(self.attention_output.bias.as_ref()),
        )?;
        let d_o = self.attention_output.backward(&d_dense, &saved.attention_output, rows)?;
        drop(d_dense);
        let mut dx = match (input_trains, d_branch) {
            (false, _) => None,
            (true, None) => Some(dx),
            (true, Some(d_branch)) => Some((dx + d_branch)?),
        };
        let gradients =
            self.attend_backward(&saved.attention, &d_o, ragged, &dropouts, key, shared)?;
        let linears = [&self.query, &self.key, &self.value];
        for ((linear, saved), dy) in linears.into_iter().zip(&saved.projections).zip(&gradients) {
            linear.backward_bias(dy)?;
            dx = linear.backward_into(dy, saved, rows, dx)?;
        }
        Ok(dx)
    }

    /// Adds the gradients of the feed-forward part; returns that of its input, if something `below` trains.
    fn feed_forward_backward(
        &self,
        saved: &Saved,
        dy: &Tensor,
        rows: Rows<'_>,
        dropouts: &Dropouts,
        below: bool,
    ) -> Result<Option<Tensor>> {
        let (d_output, da) = norm::backward(
            dy,
            &saved.output_norm,
            None,
            dropped(dropouts.output.as_ref(), rows.ids),
            self.output_norm.layer_norm(),
            self.output_norm.gradients(self.output.bias.as_ref()),
        )?;
        if !below && !self.intermediate.trains() {
            return self.output.backward_into(&d_output, &saved.output, rows, None);
        }
        let dh = activation::backward(
            &self.output.backward(&d_output, &saved.output, rows)?,
            &saved.h,
            self.intermediate.bias_value(),
            self.activation,
            self.intermediate.bias_gradient(),
        )?;
        // d_output may share da's memory; from here on only da is read.
        drop(d_output);
        self.intermediate.backward_into(&dh, &saved.intermediate, rows, below.then_some(da))
    }

    /// `[dq, dk, dv]`.
    fn attend_backward(
        &self,
        saved: &SavedAttention,
        d_o: &Tensor,
        ragged: &Ragged,
        dropouts: &Dropouts,
        key: Option<DropoutKey>,
        shared: &mut Shared,
    ) -> Result<[Tensor; 3]> {
        let dropout = dropouts.probabilities.as_ref();
        let gradients = match (saved, &self.disentangled) {
            (SavedAttention::Disentangled(saved), Some(disentangled)) => {
                let call = self.call(ragged, dropout, key);
                let relative = shared.relative.as_mut().ok_or_else(no_relative)?;
                disentangled.backward(call, saved, d_o, relative)?
            }
            (SavedAttention::Plain(saved), None) => {
                let (dq, dk, dv) = attention::backward(self.plain(ragged, dropout), saved, d_o)?;
                [dq, dk, dv]
            }
            _ => return Err(Error::Bug("a block's backward got another block's forward".into())),
        };
        if let Some(prefix) = &mut shared.prefix {
            let saved = saved.queries_output_and_lse();
            prefix.backward(self.joined(ragged, dropouts), saved, d_o, &gradients[0])?;
        }
        Ok(gradients)
    }
}

fn no_relative() -> Error {
    Error::Bug("a disentangled block without the relative table".into())
}
