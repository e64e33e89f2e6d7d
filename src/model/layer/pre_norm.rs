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

use super::{
    Sites,
    block::Shared,
    linear::{self, Linear, Rows},
    norm::Norm,
    post_norm::dropped,
    prefix::Joined,
    site,
};
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
    /// Its place among the blocks.
    number: usize,
}

/// What a block's backward needs.
pub struct Saved {
    attention_norm: Option<norm::Saved>,
    /// Of queries, keys and values.
    projections: [linear::Saved; 3],
    /// Queries and keys after the rotation.
    attention: attention::Saved,
    attention_output: linear::Saved,
    mlp_norm: norm::Saved,
    mlp_input: linear::Saved,
    /// The feed-forward part's first product before the bias.
    h: Tensor,
    mlp_output: linear::Saved,
}

/// The dropouts of a block in one step.
struct Dropouts {
    probabilities: Option<Dropout>,
    prefix: Option<Dropout>,
    attention: Option<Dropout>,
    mlp: Option<Dropout>,
    output: Option<Dropout>,
}

impl PreNorm {
    /// The group of the block's parameters.
    pub fn declare(plan: &PreNormPlan) -> Group {
        let mut group = Group::new(&plan.name);
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
            number: i,
        })
    }

    fn dropouts(&self, key: Option<DropoutKey>) -> Dropouts {
        let sites = Sites { first: self.first_site, key };
        Dropouts {
            probabilities: sites.dropout(self.attention_dropout, site::PROBABILITIES),
            prefix: sites.dropout(self.attention_dropout, site::PREFIX),
            attention: sites.dropout(self.attention_output_dropout, site::ATTENTION),
            mlp: sites.dropout(self.mlp_dropout, site::MLP),
            output: sites.dropout(self.output_dropout, site::OUTPUT),
        }
    }

    fn attention<'a>(&self, ragged: &'a Ragged, dropouts: &'a Dropouts) -> Attention<'a> {
        let dropout = dropouts.probabilities.as_ref();
        Attention { ragged, heads: self.heads, scale: self.scale, span: self.span, dropout }
    }

    fn joined<'a>(&self, ragged: &'a Ragged, dropouts: &'a Dropouts) -> Joined<'a> {
        let dropout = dropouts.prefix.as_ref();
        Joined { ragged, heads: self.heads, scale: self.scale, dropout, block: self.number }
    }

    /// Whether anything trains from the block's input up to the norm of its feed-forward part.
    fn attention_trains(&self, shared: &Shared) -> bool {
        self.qkv.iter().chain([&self.attention_output]).any(Linear::trains)
            || self.mlp_norm.trains()
            || self.attention_norm.as_ref().is_some_and(Norm::trains)
            || shared.train()
    }

    /// Queries, keys and values of the normed input, rotated, and what their layers saved.
    fn project(
        &self,
        n: &Tensor,
        ragged: &Ragged,
        rows: Rows<'_>,
    ) -> Result<([Tensor; 3], [linear::Saved; 3])> {
        let [query, key, value] = &self.qkv;
        let ((mut q, saved_q), (mut k, saved_k)) = (query.forward(n, rows)?, key.forward(n, rows)?);
        if let Some(table) = &self.rotary {
            q = rotary::forward(&q, table, ragged, self.heads)?;
            k = rotary::forward(&k, table, ragged, self.heads)?;
        }
        let (v, saved_v) = value.forward(n, rows)?;
        Ok(([q, k, v], [saved_q, saved_k, saved_v]))
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
        shared: &Shared,
    ) -> Result<(Tensor, Saved)> {
        let dropouts = self.dropouts(key);
        let ids = ragged.token_rows();
        let rows = Rows { ids, key };
        let (n, attention_norm) = match &self.attention_norm {
            Some(norm) => {
                let (n, saved) = norm.forward(x)?;
                (n, Some(saved))
            }
            None => (x.clone(), None),
        };
        let ([q, k, v], projections) = self.project(&n, ragged, rows)?;
        let (mut o, mut lse) = attention::forward(self.attention(ragged, &dropouts), &q, &k, &v)?;
        if let Some(prefix) = &shared.prefix {
            (o, lse) = prefix.join(self.joined(ragged, &dropouts), &q, &o, &lse)?;
        }
        let (dense, attention_output) = self.attention_output.forward_without_bias(&o, rows)?;
        let (m, mlp_norm) = norm::forward(
            &dense,
            Junction {
                bias: self.attention_output.bias_value(),
                residual: Some(x),
                ..dropped(dropouts.attention.as_ref(), ids)
            },
            self.mlp_norm.layer_norm(),
        )?;
        let (h, mlp_input) = self.mlp_input.forward_without_bias(&m, rows)?;
        let activated = dropout::apply(&self.activate(&h)?, dropouts.mlp.as_ref(), ids)?;
        let (dense, mlp_output) = self.mlp_output.forward_without_bias(&activated, rows)?;
        let y = norm::add(
            &dense,
            Junction {
                bias: self.mlp_output.bias_value(),
                residual: Some(mlp_norm.z()),
                ..dropped(dropouts.output.as_ref(), ids)
            },
        )?;
        let saved = Saved {
            attention_norm,
            projections,
            attention: attention::Saved { q, k, v, o, lse },
            attention_output,
            mlp_norm,
            mlp_input,
            h,
            mlp_output,
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
        let below = input_trains || self.attention_trains(shared);
        let Some(dm) = self.mlp_backward(saved, dy, rows, &dropouts, below)? else {
            return Ok(None);
        };
        let (d_dense, dx) = norm::backward(
            &dm,
            &saved.mlp_norm,
            Some(dy),
            dropped(dropouts.attention.as_ref(), rows.ids),
            self.mlp_norm.layer_norm(),
            self.mlp_norm.gradients(self.attention_output.bias.as_ref()),
        )?;
        let d_o = self.attention_output.backward(&d_dense, &saved.attention_output, rows)?;
        drop(d_dense);
        let (mut dq, mut dk, dv) =
            attention::backward(self.attention(ragged, &dropouts), &saved.attention, &d_o)?;
        if let Some(prefix) = &mut shared.prefix {
            let attention::Saved { q, o, lse, .. } = &saved.attention;
            prefix.backward(self.joined(ragged, &dropouts), [q, o, lse], &d_o, &dq)?;
        }
        if let Some(table) = &self.rotary {
            dq = rotary::backward(&dq, table, ragged, self.heads)?;
            dk = rotary::backward(&dk, table, ragged, self.heads)?;
        }
        let d_projected = [dq, dk, dv];
        // A norm that trains needs its own gradient even where nothing below does.
        let norm = self.attention_norm.as_ref().filter(|norm| input_trains || norm.trains());
        let mut d_read = (norm.is_none() && input_trains).then(|| dx.clone());
        for ((linear, saved), dy) in self.qkv.iter().zip(&saved.projections).zip(&d_projected) {
            linear.backward_bias(dy)?;
            d_read = match d_read {
                None if norm.is_some() => Some(linear.backward(dy, saved, rows)?),
                d_read => linear.backward_into(dy, saved, rows, d_read)?,
            };
        }
        let (Some(norm), Some(saved), Some(dn)) = (norm, &saved.attention_norm, &d_read) else {
            return Ok(d_read);
        };
        let dx = norm.backward(dn, saved, Some(&dx))?;
        Ok(input_trains.then_some(dx))
    }

    /// Adds the gradients of the feed-forward part; returns that of what it read, if something `below` trains.
    fn mlp_backward(
        &self,
        saved: &Saved,
        dy: &Tensor,
        rows: Rows<'_>,
        dropouts: &Dropouts,
        below: bool,
    ) -> Result<Option<Tensor>> {
        let junction = dropped(dropouts.output.as_ref(), rows.ids);
        let d_output = norm::add_backward(dy, junction, self.mlp_output.bias_gradient())?;
        if !below && !self.mlp_input.trains() {
            return self.mlp_output.backward_into(&d_output, &saved.mlp_output, rows, None);
        }
        let d_activated = self.mlp_output.backward(&d_output, &saved.mlp_output, rows)?;
        let d_activated = dropout::apply(&d_activated, dropouts.mlp.as_ref(), rows.ids)?;
        let dh = self.activate_backward(&d_activated, &saved.h)?;
        if below {
            return self.mlp_input.backward(&dh, &saved.mlp_input, rows).map(Some);
        }
        self.mlp_input.backward_into(&dh, &saved.mlp_input, rows, None)
    }
}
