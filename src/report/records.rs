//! What one line of `metrics.jsonl` says: a step, an evaluation or an epoch.
//!
//! Scripts read these names, so they are part of the interface.

use serde::{Deserialize, Serialize};

use super::number;

/// One line, told apart by its `event`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "lowercase")]
pub enum Record {
    /// An optimizer step.
    Step(StepRecord),
    /// An evaluation between the ends of epochs.
    Eval(EvalRecord),
    /// The end of an epoch, evaluation included.
    Epoch(EpochRecord),
}

/// One optimizer step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepRecord {
    /// Optimizer steps done, this one included.
    pub step: usize,
    /// The epoch this step belongs to, from 1.
    pub epoch: usize,
    /// Mean loss over the samples of the step.
    #[serde(with = "number")]
    pub loss: f64,
    /// The learning rate it was made with.
    #[serde(with = "number")]
    pub learning_rate: f64,
    /// Global norm of the gradient before clipping.
    #[serde(with = "number")]
    pub grad_norm: f64,
    /// Samples in the step, over all ranks.
    pub samples: usize,
    /// Tokens in the step, over all ranks.
    pub tokens: usize,
    /// How long the step took.
    #[serde(with = "number")]
    pub seconds: f64,
}

/// An evaluation between the ends of epochs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EvalRecord {
    /// Optimizer steps done.
    pub step: usize,
    /// The epoch under way, from 1.
    pub epoch: usize,
    /// Share of the validation reviews classified correctly.
    #[serde(with = "number")]
    pub val_accuracy: f64,
    /// Mean loss over the validation reviews.
    #[serde(with = "number")]
    pub val_loss: f64,
    /// How long the run has taken up to here.
    #[serde(with = "number")]
    pub seconds: f64,
}

/// The end of an epoch.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EpochRecord {
    /// Optimizer steps done.
    pub step: usize,
    /// The epoch that ended, from 1.
    pub epoch: usize,
    /// Share of the epoch's training reviews classified correctly, as they were trained on.
    #[serde(with = "number")]
    pub train_accuracy: f64,
    /// Mean loss over the epoch's training reviews.
    #[serde(with = "number")]
    pub train_loss: f64,
    /// Share of the validation reviews classified correctly.
    #[serde(with = "number")]
    pub val_accuracy: f64,
    /// Mean loss over the validation reviews.
    #[serde(with = "number")]
    pub val_loss: f64,
    /// The learning rate of the last step.
    #[serde(with = "number")]
    pub learning_rate: f64,
    /// Training samples per second over all ranks, evaluation not counted.
    #[serde(with = "number")]
    pub samples_per_second: f64,
    /// Training tokens per second over all ranks, evaluation not counted.
    #[serde(with = "number")]
    pub tokens_per_second: f64,
    /// How long the epoch's steps took, evaluation not counted.
    #[serde(with = "number")]
    pub seconds: f64,
}

impl Record {
    /// Optimizer steps done when it was written.
    pub fn step(&self) -> usize {
        match self {
            Self::Step(record) => record.step,
            Self::Eval(record) => record.step,
            Self::Epoch(record) => record.step,
        }
    }
}

impl From<StepRecord> for Record {
    fn from(record: StepRecord) -> Self {
        Self::Step(record)
    }
}

impl From<EvalRecord> for Record {
    fn from(record: EvalRecord) -> Self {
        Self::Eval(record)
    }
}

impl From<EpochRecord> for Record {
    fn from(record: EpochRecord) -> Self {
        Self::Epoch(record)
    }
}
