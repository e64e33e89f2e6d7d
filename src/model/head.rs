//! BERT's classification head: `tanh(pooler(first token)) -> dropout -> classifier`.

use allreel_kernels::{
    Dropout, DropoutKey, Ragged,
    activation::{self, Activation},
    dropout, linear,
    pooling::{self, Pool},
};
use candle_core::Tensor;

use super::{
    bert::SITE_HEAD,
    config::BertConfig,
    linear::Linear,
    parameters::{Group, Parameters},
};
use crate::Result;

/// The group of the head's parameters.
pub const HEAD: &str = "classifier";

/// Pooler and classifier.
pub struct Head {
    pooler: Linear,
    classifier: Linear,
    dropout: f64,
}

/// What the head's backward needs.
pub struct SavedHead {
    first: Tensor,
    /// The pooler's product before its bias.
    h: Tensor,
    pooled: Tensor,
}

impl Head {
    /// The head's parameters; new ones start as in Hugging Face: normal weights, zero biases.
    pub fn declare(config: &BertConfig) -> Group {
        let (h, std) = (config.hidden_size, config.initializer_range);
        let mut group = Group { name: HEAD.into(), specs: Vec::new(), trains: true, table: false };
        Linear::declare(&mut group, "bert.pooler.dense", h, h, std);
        Linear::declare(&mut group, "classifier", config.num_labels, h, std);
        group
    }

    /// Takes the declared parameters.
    ///
    /// # Errors
    /// If they were not declared.
    pub fn new(parameters: &Parameters, config: &BertConfig) -> Result<Self> {
        Ok(Self {
            pooler: Linear::new(parameters, "bert.pooler.dense")?,
            classifier: Linear::new(parameters, "classifier")?,
            dropout: config.classifier_dropout.unwrap_or(config.hidden_dropout_prob),
        })
    }

    fn dropout(&self, key: Option<DropoutKey>) -> Option<Dropout> {
        Dropout::new(self.dropout, key?, SITE_HEAD)
    }

    /// Logits `[B, C]` from the encoder's output `[T, H]`.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn forward(
        &self,
        x: &Tensor,
        ragged: &Ragged,
        key: Option<DropoutKey>,
    ) -> Result<(Tensor, SavedHead)> {
        let first = pooling::forward(x, ragged, Pool::First)?;
        let h = self.pooler.forward_without_bias(&first)?;
        let pooled = activation::forward(&h, Some(&self.pooler.bias.value), Activation::Tanh)?;
        let pooled = dropout::apply(&pooled, self.dropout(key).as_ref(), ragged.sequence_rows())?;
        let logits = self.classifier.forward(&pooled)?;
        Ok((logits, SavedHead { first, h, pooled }))
    }

    /// Adds the head's gradients; returns that of the encoder's output, `[T, H]`, unless nothing
    /// below trains.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn backward(
        &self,
        saved: &SavedHead,
        d_logits: &Tensor,
        ragged: &Ragged,
        key: Option<DropoutKey>,
        input_trains: bool,
    ) -> Result<Option<Tensor>> {
        self.classifier.backward_parameters(d_logits, &saved.pooled)?;
        let d_pooled = linear::backward_input(d_logits, &self.classifier.weight.value)?;
        let d_pooled =
            dropout::apply(&d_pooled, self.dropout(key).as_ref(), ragged.sequence_rows())?;
        let dh = activation::backward(
            &d_pooled,
            &saved.h,
            Some(&self.pooler.bias.value),
            Activation::Tanh,
            self.pooler.bias.gradient.as_ref(),
        )?;
        self.pooler.backward_weight(&dh, &saved.first)?;
        if !input_trains {
            return Ok(None);
        }
        let d_first = self.pooler.backward_input(&dh)?;
        Ok(Some(pooling::backward(&d_first, ragged, Pool::First)?))
    }
}
