//! `summary.json`: what a finished run comes to, one object for scripts.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::number;
use crate::atomic::write_atomic;
use crate::{Error, Result};

/// The file's name in the run's directory.
const NAME: &str = "summary.json";

/// What a run comes to.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// The version of this program.
    pub version: String,
    /// The model's name: its directory's, or its kind.
    pub model: String,
    /// Number of ranks.
    pub world_size: usize,
    /// Threads each rank computed with.
    pub threads_per_rank: usize,
    /// Weights in the model.
    pub parameters: usize,
    /// Those of them that trained.
    pub trainable_parameters: usize,
    /// Optimizer steps made, before a resume included.
    pub steps: usize,
    /// Epochs completed.
    pub epochs: usize,
    /// Training accuracy of the last epoch.
    #[serde(with = "number")]
    pub train_accuracy: f64,
    /// Validation accuracy at the end.
    #[serde(with = "number")]
    pub val_accuracy: f64,
    /// The highest validation accuracy, which `best/` has.
    #[serde(with = "number")]
    pub best_val_accuracy: f64,
    /// The epoch it was reached in, from 1.
    pub best_epoch: usize,
    /// Accuracy of `best/` on `data.test`, where that is given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub test_accuracy: Option<f64>,
    /// Training samples per second over all ranks, evaluation not counted.
    #[serde(with = "number")]
    pub samples_per_second: f64,
    /// Training tokens per second over all ranks, evaluation not counted.
    #[serde(with = "number")]
    pub tokens_per_second: f64,
    /// Share of the computed tokens that fill up batches: 0, since batches are ragged. (What
    /// `data.pad_to_max_length` adds are tokens of the reviews.)
    #[serde(with = "number")]
    pub padding_share: f64,
    /// The most memory a rank held at once, the highest over the ranks; 0 if unknown.
    pub peak_host_bytes: u64,
    /// How long the run took, over all processes that worked on it.
    #[serde(with = "number")]
    pub seconds: f64,
    /// What exchanging gradients cost, with more than one rank.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allreduce: Option<AllReduce>,
}

/// What exchanging gradients cost.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct AllReduce {
    /// Bytes of gradients each rank put in, over the run.
    pub bytes: u64,
    /// How long exchanges were under way.
    #[serde(with = "number")]
    pub seconds: f64,
    /// `bytes / seconds`.
    #[serde(with = "number")]
    pub bytes_per_second: f64,
    /// The share of `seconds` during which backward went on computing.
    #[serde(with = "number")]
    pub hidden_share: f64,
}

impl Summary {
    /// Writes the file into the run's directory `dir`, whole or not at all.
    ///
    /// # Errors
    /// [`Error::Device`] if it cannot be written.
    pub fn write(&self, dir: &Path) -> Result<()> {
        let mut text = serde_json::to_string_pretty(self)
            .map_err(|error| Error::Bug(format!("summary: {error}")))?;
        text.push('\n');
        write_atomic(&dir.join(NAME), text.as_bytes())
    }

    /// Reads it back from the run's directory `dir`.
    ///
    /// # Errors
    /// [`Error::Data`] if there is none, naming the line of what is not a summary.
    pub fn read(dir: &Path) -> Result<Self> {
        let path = dir.join(NAME);
        let text = std::fs::read_to_string(&path).map_err(|error| Error::reading(&path, error))?;
        serde_json::from_str(&text).map_err(|error| Error::reading(&path, error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_reads_back_to_what_was_written() {
        let dir = tempfile::tempdir().unwrap();
        let mut summary = Summary {
            model: "minilm".into(),
            world_size: 2,
            val_accuracy: 0.85,
            best_epoch: 1,
            peak_host_bytes: 1 << 40,
            seconds: 1.0 / 3.0,
            ..Summary::default()
        };
        summary.write(dir.path()).unwrap();
        assert_eq!(Summary::read(dir.path()).unwrap(), summary);
        let text = std::fs::read_to_string(dir.path().join("summary.json")).unwrap();
        assert!(!text.contains("test_accuracy") && !text.contains("allreduce"), "{text}");

        summary.test_accuracy = Some(0.5);
        let allreduce = AllReduce { bytes: 7, hidden_share: 0.9, ..AllReduce::default() };
        summary.allreduce = Some(allreduce);
        summary.write(dir.path()).unwrap();
        assert_eq!(Summary::read(dir.path()).unwrap(), summary);
    }

    #[test]
    fn a_diverged_run_says_nan_and_not_null() {
        let dir = tempfile::tempdir().unwrap();
        let summary = Summary { val_accuracy: f64::NAN, ..Summary::default() };
        summary.write(dir.path()).unwrap();
        let text = std::fs::read_to_string(dir.path().join("summary.json")).unwrap();
        assert!(text.contains("\"val_accuracy\": \"NaN\""), "{text}");
        assert!(Summary::read(dir.path()).unwrap().val_accuracy.is_nan());
    }

    #[test]
    fn a_missing_or_broken_summary_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("summary.json");
        let error = Summary::read(dir.path()).unwrap_err().to_string();
        assert!(error.starts_with(&format!("cannot read {}", path.display())), "{error}");
        std::fs::write(&path, "{\n\"model\": 3}").unwrap();
        let error = Summary::read(dir.path()).unwrap_err().to_string();
        assert!(error.contains("summary.json") && error.contains("line 2"), "{error}");
    }
}
