//! `[train]`: batches, optimizer, schedule, and when to evaluate and stop.

use serde::{Deserialize, Serialize};

use super::{Fault, ensure};

/// Samples per optimizer step where neither a count nor a token budget is given.
const BATCH_SIZE: usize = 16;

/// The `[train]` section.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Train {
    /// Passes over the training reviews. Default 3. Hugging Face: `num_train_epochs`.
    pub epochs: usize,
    /// Stop after this many optimizer steps; the schedule then spans them. Default: `epochs`
    /// alone decides.
    pub max_steps: Option<usize>,
    batch_size: Option<usize>,
    batch_tokens: Option<usize>,
    /// The most tokens in one forward and backward pass on one rank; a batch is accumulated from
    /// as many passes as it takes. Default 8192. Hugging Face: `gradient_accumulation_steps`.
    pub micro_tokens: usize,
    /// Keep the inputs of layers that are run again for the backward pass in the host's memory: less of a
    /// device's, more time. Only with `model.gradient_checkpointing`. Default false.
    pub offload: bool,
    /// Reviews of similar length are put together within this many shuffled batches; 1 = never.
    /// Default 8. Hugging Face: `group_by_length`.
    pub group_window: usize,
    /// The highest learning rate of the schedule. Default 2e-5.
    pub learning_rate: f64,
    /// The learning rate's course after the warm-up. Default `"linear"`. Hugging Face:
    /// `lr_scheduler_type`.
    pub schedule: Schedule,
    warmup_steps: Option<usize>,
    warmup_ratio: Option<f64>,
    /// AdamW's decoupled weight decay, on weights but not on biases and norms. Default 0.01.
    pub weight_decay: f64,
    /// Decay of Adam's mean of the gradients. Default 0.9.
    pub adam_beta1: f64,
    /// Decay of Adam's mean of the squared gradients. Default 0.999.
    pub adam_beta2: f64,
    /// Added to Adam's denominator. Default 1e-8.
    pub adam_epsilon: f64,
    /// Gradients are scaled down to this global norm; 0 = never. Default 1.0.
    pub max_grad_norm: f64,
    /// The share of each target spread evenly over the labels. Default 0. Hugging Face:
    /// `label_smoothing_factor`.
    pub label_smoothing: f64,
    /// Decides the split, the order of the reviews, the initial weights and the dropout.
    /// Default 42.
    pub seed: u64,
    /// Evaluate every this many optimizer steps besides the end of each epoch. Default: only
    /// there.
    pub eval_steps: Option<usize>,
    /// Stop after this many evaluations in a row without a better validation accuracy. Default:
    /// never.
    pub early_stopping_patience: Option<usize>,
}

impl Default for Train {
    fn default() -> Self {
        Self {
            epochs: 3,
            max_steps: None,
            batch_size: None,
            batch_tokens: None,
            micro_tokens: 8192,
            offload: false,
            group_window: 8,
            learning_rate: 2e-5,
            schedule: Schedule::default(),
            warmup_steps: None,
            warmup_ratio: None,
            weight_decay: 0.01,
            adam_beta1: 0.9,
            adam_beta2: 0.999,
            adam_epsilon: 1e-8,
            max_grad_norm: 1.0,
            label_smoothing: 0.0,
            seed: 42,
            eval_steps: None,
            early_stopping_patience: None,
        }
    }
}

/// The learning rate's course after the warm-up.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Schedule {
    /// Straight down to 0 at the last step.
    #[default]
    Linear,
    /// Half a cosine down to 0 at the last step.
    Cosine,
    /// No change. Hugging Face: `constant_with_warmup`.
    Constant,
}

/// What one optimizer step is made of, over all ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Batch {
    /// `train.batch_size`: this many samples. Hugging Face: `per_device_train_batch_size` times
    /// devices times `gradient_accumulation_steps`.
    Samples(usize),
    /// `train.batch_tokens`: as many samples as fit into this many tokens.
    Tokens(usize),
}

/// How long the learning rate climbs from 0.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Warmup {
    /// `train.warmup_steps`: this many optimizer steps.
    Steps(usize),
    /// `train.warmup_ratio`: this share of all optimizer steps.
    Ratio(f64),
}

impl Train {
    /// `train.batch_size` (default 16) or `train.batch_tokens`.
    pub fn batch(&self) -> Batch {
        match self.batch_tokens {
            Some(tokens) => Batch::Tokens(tokens),
            None => Batch::Samples(self.batch_size.unwrap_or(BATCH_SIZE)),
        }
    }

    /// `train.warmup_steps` or `train.warmup_ratio`; default: no warm-up.
    pub fn warmup(&self) -> Warmup {
        match self.warmup_ratio {
            Some(ratio) => Warmup::Ratio(ratio),
            None => Warmup::Steps(self.warmup_steps.unwrap_or(0)),
        }
    }

    pub(super) fn resolve(&mut self) {
        if self.batch_tokens.is_none() {
            self.batch_size.get_or_insert(BATCH_SIZE);
        }
        if self.warmup_ratio.is_none() {
            self.warmup_steps.get_or_insert(0);
        }
    }

    pub(super) fn check(&self) -> Result<(), Fault> {
        self.check_batches()?;
        self.check_schedule()?;
        self.check_optimizer()?;
        ensure(
            (0.0..1.0).contains(&self.label_smoothing),
            "train.label_smoothing",
            "must lie in [0, 1); 0.1 is usual, 0 is none",
        )?;
        // TOML's integers are signed, and the seed has to survive a round trip through them.
        ensure(i64::try_from(self.seed).is_ok(), "train.seed", "must be below 2^63")?;
        ensure(
            self.eval_steps != Some(0),
            "train.eval_steps",
            "must be at least 1; leave it out to evaluate at the end of each epoch only",
        )?;
        ensure(
            self.early_stopping_patience != Some(0),
            "train.early_stopping_patience",
            "must be at least 1; leave it out to train to the end",
        )
    }

    fn check_batches(&self) -> Result<(), Fault> {
        ensure(
            self.batch_size.is_none() || self.batch_tokens.is_none(),
            "train.batch_tokens",
            "given together with train.batch_size; a batch is counted in samples or in tokens, \
             so remove one of them",
        )?;
        ensure(self.epochs > 0, "train.epochs", "must be at least 1")?;
        ensure(
            self.max_steps != Some(0),
            "train.max_steps",
            "must be at least 1; leave it out to train for all of train.epochs",
        )?;
        ensure(self.batch_size != Some(0), "train.batch_size", "must be at least 1")?;
        ensure(self.batch_tokens != Some(0), "train.batch_tokens", "must be at least 1")?;
        ensure(self.micro_tokens > 0, "train.micro_tokens", "must be at least 1")?;
        ensure(
            self.group_window > 0,
            "train.group_window",
            "must be at least 1, which groups nothing",
        )
    }

    fn check_schedule(&self) -> Result<(), Fault> {
        ensure(
            self.learning_rate > 0.0 && self.learning_rate.is_finite(),
            "train.learning_rate",
            "must be greater than 0 and finite; 2e-5 is usual",
        )?;
        ensure(
            self.warmup_steps.is_none() || self.warmup_ratio.is_none(),
            "train.warmup_ratio",
            "given together with train.warmup_steps; remove one of them",
        )?;
        ensure(
            self.warmup_ratio.is_none_or(|ratio| (0.0..=1.0).contains(&ratio)),
            "train.warmup_ratio",
            "must lie in [0, 1]; 0.1 is usual",
        )?;
        if let (Some(warmup), Some(max)) = (self.warmup_steps, self.max_steps) {
            ensure(
                warmup <= max,
                "train.warmup_steps",
                format!("longer than the run, which train.max_steps ends after {max} steps"),
            )?;
        }
        Ok(())
    }

    fn check_optimizer(&self) -> Result<(), Fault> {
        ensure(
            self.weight_decay >= 0.0 && self.weight_decay.is_finite(),
            "train.weight_decay",
            "must be 0 or more and finite; 0.01 is usual",
        )?;
        for (beta, key) in
            [(self.adam_beta1, "train.adam_beta1"), (self.adam_beta2, "train.adam_beta2")]
        {
            ensure((0.0..1.0).contains(&beta), key, "must lie in [0, 1)")?;
        }
        ensure(
            self.adam_epsilon > 0.0 && self.adam_epsilon.is_finite(),
            "train.adam_epsilon",
            "must be greater than 0 and finite; 1e-8 is usual",
        )?;
        ensure(
            self.max_grad_norm >= 0.0 && self.max_grad_norm.is_finite(),
            "train.max_grad_norm",
            "must be 0 (never clip) or more, and finite",
        )
    }
}
