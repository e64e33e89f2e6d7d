//! The classification head: pool -> dropout -> dense -> norm -> dropout -> classifier, of which a
//! family has what its plan names.

use allreel_kernels::{
    Dropout, DropoutKey, Ragged,
    activation::{self, Activation},
    dropout, norm,
};
use candle_core::Tensor;

use super::{
    linear::{self, Linear, Rows},
    norm::Norm,
    pool::{self, Pooling},
    site,
};
use crate::{
    Result,
    model::{
        parameters::{Group, Parameters},
        plan::HeadPlan,
    },
};

/// The group of the head's parameters.
pub const HEAD: &str = "head";

/// Pooling, what is between, and the classifier.
pub struct Head {
    pool: Pooling,
    dense: Option<(Linear, Activation)>,
    norm: Option<Norm>,
    classifier: Linear,
    input_dropout: f64,
    output_dropout: f64,
}

/// What the head's backward needs.
pub struct Saved {
    pool: pool::Saved,
    /// Of the dense layer, and its product before its bias.
    dense: Option<(linear::Saved, Tensor)>,
    norm: Option<norm::Saved>,
    classifier: linear::Saved,
}

impl Head {
    /// Declares the head's parameters.
    pub fn declare(group: &mut Group, plan: &HeadPlan) {
        Pooling::declare(group, &plan.pool);
        if let Some((dense, _)) = &plan.dense {
            Linear::declare(group, dense);
        }
        if let Some(norm) = &plan.norm {
            Norm::declare(group, norm);
        }
        Linear::declare(group, &plan.classifier);
    }

    /// Takes the declared parameters.
    ///
    /// # Errors
    /// If they were not declared.
    pub fn new(parameters: &Parameters, plan: &HeadPlan) -> Result<Self> {
        let dense = match &plan.dense {
            Some((dense, activation)) => Some((Linear::new(parameters, dense)?, *activation)),
            None => None,
        };
        Ok(Self {
            pool: Pooling::new(parameters, &plan.pool, plan.skip)?,
            dense,
            norm: plan.norm.as_ref().map(|norm| Norm::new(parameters, norm)).transpose()?,
            classifier: Linear::new(parameters, &plan.classifier)?,
            input_dropout: plan.input_dropout,
            output_dropout: plan.output_dropout,
        })
    }

    /// The dropouts of the pooled rows and of the classifier's input.
    fn dropouts(&self, key: Option<DropoutKey>) -> [Option<Dropout>; 2] {
        let at = |p, site| Dropout::new(p, key?, site);
        [at(self.input_dropout, site::HEAD_INPUT), at(self.output_dropout, site::HEAD)]
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
    ) -> Result<(Tensor, Saved)> {
        let [input_dropout, output_dropout] = self.dropouts(key);
        let ids = ragged.sequence_rows();
        let rows = Rows { ids, key };
        let tokens = Rows { ids: ragged.token_rows(), key };
        let (pooled, pool) = self.pool.forward(x, ragged, tokens)?;
        let mut features = dropout::apply(&pooled, input_dropout.as_ref(), ids)?;
        let (mut saved_dense, mut moments) = (None, None);
        if let Some((dense, activation)) = &self.dense {
            let (h, saved) = dense.forward_without_bias(&features, rows)?;
            features = activation::forward(&h, dense.bias_value(), *activation)?;
            saved_dense = Some((saved, h));
        }
        if let Some(norm) = &self.norm {
            let (y, saved) = norm.forward(&features)?;
            (features, moments) = (y, Some(saved));
        }
        let features = dropout::apply(&features, output_dropout.as_ref(), ids)?;
        let (logits, classifier) = self.classifier.forward(&features, rows)?;
        Ok((logits, Saved { pool, dense: saved_dense, norm: moments, classifier }))
    }

    /// Adds the head's gradients; returns that of the encoder's output, `[T, H]`, unless nothing
    /// below its classifier trains.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn backward(
        &self,
        saved: &Saved,
        d_logits: &Tensor,
        ragged: &Ragged,
        key: Option<DropoutKey>,
        input_trains: bool,
    ) -> Result<Option<Tensor>> {
        let below = input_trains || self.pool.learns();
        let [input_dropout, output_dropout] = self.dropouts(key);
        let ids = ragged.sequence_rows();
        let rows = Rows { ids, key };
        self.classifier.backward_bias(d_logits)?;
        let dx = self.classifier.backward(d_logits, &saved.classifier, rows)?;
        let mut dx = dropout::apply(&dx, output_dropout.as_ref(), ids)?;
        if let (Some(norm), Some(saved)) = (&self.norm, &saved.norm) {
            dx = norm.backward(&dx, saved, None)?;
        }
        if let (Some((dense, activation)), Some((saved, h))) = (&self.dense, &saved.dense) {
            let (bias, gradient) = (dense.bias_value(), dense.bias_gradient());
            dx = activation::backward(&dx, h, bias, *activation, gradient)?;
            if !below {
                dense.backward_into(&dx, saved, rows, None)?;
                return Ok(None);
            }
            dx = dense.backward(&dx, saved, rows)?;
        }
        if !below {
            return Ok(None);
        }
        let dx = dropout::apply(&dx, input_dropout.as_ref(), ids)?;
        let tokens = Rows { ids: ragged.token_rows(), key };
        Ok(Some(self.pool.backward(&saved.pool, &dx, ragged, tokens)?))
    }
}
