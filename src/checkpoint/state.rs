//! Where a run is: everything that going on needs beside weights and optimizer moments. Random
//! state is only the seed and the step, since all randomness is counted.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

const FILE: &str = "state.json";

/// A run's position, sums and best result.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq)]
pub struct State {
    /// Version of allreel that wrote it.
    pub version: String,
    /// Optimizer steps done.
    pub step: u64,
    /// Epoch that the next step belongs to, from 1.
    pub epoch: usize,
    /// Batches of that epoch already done.
    pub next_batch: usize,
    /// Sums over that epoch so far.
    pub sums: EpochSums,
    /// The best evaluation so far.
    pub best: Option<Best>,
    /// Evaluations since then.
    pub stale: usize,
    /// Training accuracy of the last whole epoch.
    pub train_accuracy: f64,
    /// Validation accuracy of the last evaluation.
    pub val_accuracy: f64,
    /// Samples trained on, and time that took, over all processes that worked on this run.
    pub samples: u64,
    /// Tokens likewise.
    pub tokens: u64,
    /// Seconds spent in steps.
    pub train_seconds: f64,
    /// Seconds in all.
    pub seconds: f64,
    /// Whether nothing is left to do.
    pub finished: bool,
    /// Hash of the training set: resuming on other data is refused.
    pub data: String,
    /// Hash of the frozen weights, likewise; empty in checkpoints of before there was one.
    #[serde(default)]
    pub frozen: String,
}

/// Sums over the steps of an epoch.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize, PartialEq)]
pub struct EpochSums {
    /// Losses.
    pub loss: f64,
    /// Hits.
    pub correct: usize,
    /// Samples.
    pub samples: usize,
    /// Tokens.
    pub tokens: usize,
    /// Seconds.
    pub seconds: f64,
}

/// The best evaluation of a run.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, PartialEq)]
pub struct Best {
    /// Validation accuracy.
    pub accuracy: f64,
    /// Validation loss, which decides between equal accuracies.
    pub loss: f64,
    /// Epoch.
    pub epoch: usize,
    /// Step.
    pub step: u64,
}

impl State {
    /// Writes `state.json` into a checkpoint.
    ///
    /// # Errors
    /// `Device` if it cannot be written.
    pub fn write(&self, dir: &Path) -> Result<()> {
        let text = serde_json::to_vec_pretty(self).map_err(|e| Error::Bug(e.to_string()))?;
        crate::atomic::write_atomic(&dir.join(FILE), &text)
    }

    /// Reads `state.json` from a checkpoint.
    ///
    /// # Errors
    /// `Data` if it is missing or not a state.
    pub fn read(dir: &Path) -> Result<Self> {
        let path = dir.join(FILE);
        let text = std::fs::read(&path).map_err(|e| Error::reading(&path, e))?;
        serde_json::from_slice(&text).map_err(|e| Error::reading(&path, e))
    }
}
