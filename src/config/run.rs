//! `[checkpoint]` and `[run]`: what a run keeps, where, and with what; nothing that changes its
//! result.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::device::Choice;

use super::{Fault, ensure, ensure_path};

/// The `[checkpoint]` section.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Checkpoint {
    /// Save every this many optimizer steps, besides the end of each epoch. Default: only there.
    /// Hugging Face: `save_steps`.
    pub every_steps: Option<usize>,
    /// How many of the latest checkpoints are kept; the best model always is. Default 2.
    /// Hugging Face: `save_total_limit`.
    pub keep: usize,
}

impl Default for Checkpoint {
    fn default() -> Self {
        Self { every_steps: None, keep: 2 }
    }
}

impl Checkpoint {
    pub(super) fn check(&self) -> Result<(), Fault> {
        ensure(
            self.every_steps != Some(0),
            "checkpoint.every_steps",
            "must be at least 1; leave it out to save at the end of each epoch only",
        )?;
        ensure(self.keep > 0, "checkpoint.keep", "must be at least 1, or nothing can be resumed")
    }
}

/// The `[run]` section.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Run {
    /// The directory everything is written to. Default `runs/` and the config file's name
    /// without its ending. Hugging Face: `output_dir`.
    pub dir: PathBuf,
    /// `"auto"` (a CUDA device where there is one), `"cpu"`, or `"cuda"` (an error where there is none).
    /// Default `"auto"`.
    pub device: Choice,
    /// Threads per rank. Default: the node's cores divided by the ranks on it.
    pub threads: Option<usize>,
}

impl Run {
    pub(super) fn check(&self) -> Result<(), Fault> {
        ensure_path(Some(&self.dir), "run.dir")?;
        ensure(
            self.threads != Some(0),
            "run.threads",
            "must be at least 1; leave it out to share the cores out",
        )
    }
}
