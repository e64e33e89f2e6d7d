//! How the rows of a sequence become one: some of them, a mean or maximum, a mean with learnt weights, or
//! capsules.

use allreel_kernels::{
    Ragged,
    activation::{self, Activation},
    attention_pooling::{self, Operands},
    capsule::{self, Routing},
    pooling::{self, Pool},
};
use candle_core::Tensor;

use super::linear::{self, Linear, Rows};
use crate::{
    Error, Result,
    model::{
        parameters::{Group, Init, Parameter, Parameters, Spec},
        plan::PoolPlan,
    },
};

/// A pooling and its parameters.
pub enum Pooling {
    /// Of rows as they are, behind `skip` rows of virtual tokens.
    Rows {
        /// Which rows.
        pool: Pool,
        /// Rows at the head of each sequence that are not its own.
        skip: usize,
    },
    /// With learnt weights.
    Attention {
        /// To what weighs a row, before its tanh.
        dense: Linear,
        /// v `[A]`.
        context: Parameter,
    },
    /// By capsules.
    Capsules {
        /// To the predictions of each row, `[J·D, H]`.
        predictions: Linear,
        /// How many, how large, how often.
        routing: Routing,
    },
}

/// What backward needs.
pub enum Saved {
    /// Of [`Pooling::Rows`].
    Rows(pooling::Saved),
    /// Of [`Pooling::Attention`].
    Attention {
        /// What was pooled.
        x: Tensor,
        /// Of the dense layer.
        dense: linear::Saved,
        /// Its product before its bias.
        h: Tensor,
        /// The same after the activation.
        u: Tensor,
        /// The weights of the rows, `[T]`.
        weights: Tensor,
    },
    /// Of [`Pooling::Capsules`].
    Capsules {
        /// Of the linear layer.
        linear: linear::Saved,
        /// What it made.
        votes: Tensor,
        /// Of the routing.
        routed: capsule::Saved,
    },
}

impl Pooling {
    /// Declares the parameters, if it has any.
    pub fn declare(group: &mut Group, plan: &PoolPlan) {
        match plan {
            PoolPlan::Rows(_) => {}
            PoolPlan::Attention { dense, context } => {
                Linear::declare(group, dense);
                let bound = (dense.outputs as f64).recip().sqrt();
                group.specs.push(Spec::new(context, &[dense.outputs], Init::Uniform(bound)));
            }
            PoolPlan::Capsules { predictions, .. } => Linear::declare(group, predictions),
        }
    }

    /// Takes the declared parameters.
    ///
    /// # Errors
    /// If they were not declared.
    pub fn new(parameters: &Parameters, plan: &PoolPlan, skip: usize) -> Result<Self> {
        Ok(match plan {
            PoolPlan::Rows(pool) => Self::Rows { pool: *pool, skip },
            PoolPlan::Attention { dense, context } => Self::Attention {
                dense: Linear::new(parameters, dense)?,
                context: parameters.get(context)?,
            },
            PoolPlan::Capsules { predictions, routing } => Self::Capsules {
                predictions: Linear::new(parameters, predictions)?,
                routing: *routing,
            },
        })
    }

    /// Whether it has parameters.
    pub fn learns(&self) -> bool {
        !matches!(self, Self::Rows { .. })
    }

    /// `[B, H']` from `[T, H]`, and what backward needs.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn forward(&self, x: &Tensor, ragged: &Ragged, rows: Rows<'_>) -> Result<(Tensor, Saved)> {
        Ok(match self {
            Self::Rows { pool, skip } => {
                let (y, saved) = pooling::forward(x, ragged, *pool, *skip)?;
                (y, Saved::Rows(saved))
            }
            Self::Attention { dense, context } => {
                let (h, saved) = dense.forward_without_bias(x, rows)?;
                let u = activation::forward(&h, dense.bias_value(), Activation::Tanh)?;
                let operands = Operands { x, u: &u, v: &context.value };
                let (y, weights) = attention_pooling::forward(operands, ragged)?;
                (y, Saved::Attention { x: x.clone(), dense: saved, h, u, weights })
            }
            Self::Capsules { predictions, routing } => {
                let (votes, linear) = predictions.forward(x, rows)?;
                let (v, routed) = capsule::forward(&votes, ragged, *routing)?;
                (v, Saved::Capsules { linear, votes, routed })
            }
        })
    }

    /// `dx [T, H]`; adds the gradients of the parameters.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn backward(
        &self,
        saved: &Saved,
        dy: &Tensor,
        ragged: &Ragged,
        rows: Rows<'_>,
    ) -> Result<Tensor> {
        match (self, saved) {
            (Self::Rows { .. }, Saved::Rows(saved)) => Ok(pooling::backward(dy, ragged, saved)?),
            (
                Self::Attention { dense, context },
                Saved::Attention { x, dense: saved, h, u, weights },
            ) => {
                let operands = Operands { x, u, v: &context.value };
                let gradient = context.gradient.as_ref();
                let gradients =
                    attention_pooling::backward(operands, weights, dy, ragged, gradient)?;
                let (bias, gradient) = (dense.bias_value(), dense.bias_gradient());
                let dh = activation::backward(&gradients.u, h, bias, Activation::Tanh, gradient)?;
                let into = dense.backward_into(&dh, saved, rows, Some(gradients.x))?;
                into.ok_or_else(|| Error::Bug("a gradient that was given did not return".into()))
            }
            (
                Self::Capsules { predictions, routing },
                Saved::Capsules { linear, votes, routed },
            ) => {
                let d_votes = capsule::backward(votes, routed, dy, ragged, *routing)?;
                predictions.backward_bias(&d_votes)?;
                predictions.backward(&d_votes, linear, rows)
            }
            _ => Err(Error::Bug("a pooling's backward got another pooling's forward".into())),
        }
    }
}
