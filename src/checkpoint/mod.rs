//! What a run leaves on disk, and going on from it.
//!
//! ```text
//! RUN_DIR/best/                       a Hugging Face model directory, or a PEFT adapter's
//! RUN_DIR/checkpoints/step-00000120/  the same, and optimizer.safetensors, state.json,
//!                                     MANIFEST.json: names, sizes and hashes of all others
//! ```
//!
//! | file | owns |
//! |---|---|
//! | this | [`Checkpoints`]: writing, choosing and pruning checkpoints |
//! | [`adapter`] | the files of an adapter, in PEFT's format |
//! | [`files`] | the files of a model directory and of the optimizer |
//! | [`state`] | [`State`]: where a run is |
//!
//! A checkpoint is written under another name, synced, and renamed; its manifest is written last.
//! One without a manifest, or that does not match it, does not exist.

pub mod adapter;
pub mod files;
pub mod state;

use std::{
    collections::BTreeMap,
    fs::{self, File},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::{
    Error, Result,
    data::Tokenizer,
    model::{Classifier, Training},
};
pub use state::{Best, EpochSums, State};

const MANIFEST: &str = "MANIFEST.json";
/// Changes when older versions could not read a checkpoint, or would read it wrongly.
const FORMAT: u32 = 1;
const UNFINISHED: &str = ".unfinished-";

/// The checkpoints of one run.
pub struct Checkpoints {
    run: PathBuf,
    keep: usize,
}

#[derive(Serialize, Deserialize)]
struct Manifest {
    format: u32,
    files: BTreeMap<String, Entry>,
}

#[derive(Serialize, Deserialize, PartialEq)]
struct Entry {
    bytes: u64,
    blake3: String,
}

impl Checkpoints {
    /// The checkpoints under `run`, of which the last `keep` stay.
    pub fn new(run: &Path, keep: usize) -> Self {
        Self { run: run.to_owned(), keep }
    }

    fn root(&self) -> PathBuf {
        self.run.join("checkpoints")
    }

    /// Where the best model is.
    pub fn best(&self) -> PathBuf {
        self.run.join("best")
    }

    /// Removes what a killed run left half-written, and checkpoints beyond `step`, where the run goes
    /// on (they are damaged, or would have been chosen); puts back a best model that was being
    /// exchanged.
    ///
    /// # Errors
    /// `Device` if the directory cannot be changed.
    pub fn sweep(&self, step: u64) -> Result<()> {
        let old = self.run.join(format!("{UNFINISHED}best-old"));
        if old.is_dir() && !self.best().exists() {
            fs::rename(&old, self.best()).map_err(|e| Error::writing(&old, e))?;
        }
        for root in [self.run.clone(), self.root()] {
            for path in entries(&root)? {
                let name = name(&path);
                if name.starts_with(UNFINISHED) {
                    fs::remove_dir_all(&path).map_err(|e| Error::writing(&path, e))?;
                } else if crate::atomic::is_temporary(&name) {
                    fs::remove_file(&path).map_err(|e| Error::writing(&path, e))?;
                }
            }
        }
        for later in self.complete()? {
            if name(&later) > directory(step) {
                self.remove(&later)?;
            }
        }
        Ok(())
    }

    /// Writes a checkpoint of `state.step`, then removes those beyond the last `keep`.
    ///
    /// # Errors
    /// `Device` if it cannot be written; earlier checkpoints are untouched then.
    pub fn save(
        &self,
        classifier: &Classifier,
        tokenizer: &Tokenizer,
        state: &State,
    ) -> Result<()> {
        self.write(state, |dir| {
            let Training { adapter, quantization, .. } = &classifier.training;
            if adapter.is_some() || quantization.is_none() {
                save_result(dir, classifier, tokenizer)?;
            }
            // Weights in fewer bits come from where the run began: whole, they would not fit here.
            if adapter.is_some() || quantization.is_some() {
                files::save_trained(dir, classifier)?;
            }
            files::save_optimizer(dir, classifier)
        })
    }

    /// The same of whatever `fill` puts into the checkpoint's directory.
    ///
    /// # Errors
    /// As there.
    pub fn write(&self, state: &State, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
        let name = directory(state.step);
        let unfinished = self.root().join(format!("{UNFINISHED}{name}"));
        self.replace(&unfinished, &self.root().join(name), |dir| {
            fill(dir)?;
            state.write(dir)?;
            write_manifest(dir)
        })?;
        let complete = self.complete()?;
        for old in &complete[..complete.len().saturating_sub(self.keep.max(1))] {
            self.remove(old)?;
        }
        Ok(())
    }

    /// Removes a checkpoint; hidden first, so that a kill in the middle leaves none with files
    /// missing.
    fn remove(&self, checkpoint: &Path) -> Result<()> {
        let doomed = self.root().join(format!("{UNFINISHED}{}", name(checkpoint)));
        fs::rename(checkpoint, &doomed)
            .and_then(|()| fs::remove_dir_all(&doomed))
            .map_err(|e| Error::writing(checkpoint, e))
    }

    /// Writes the model as the best so far.
    ///
    /// # Errors
    /// `Device` if it cannot be written; the previous best is untouched then.
    pub fn save_best(&self, classifier: &Classifier, tokenizer: &Tokenizer) -> Result<()> {
        self.write_best(|dir| save_result(dir, classifier, tokenizer))
    }

    /// The same of whatever `fill` puts into the directory.
    ///
    /// # Errors
    /// As there.
    pub fn write_best(&self, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
        let unfinished = self.run.join(format!("{UNFINISHED}best"));
        self.replace(&unfinished, &self.best(), fill)
    }

    /// Fills a directory under a temporary name and puts it in the place of `target`.
    fn replace(
        &self,
        unfinished: &Path,
        target: &Path,
        fill: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<()> {
        let parent = unfinished.parent().unwrap_or(&self.run);
        fs::create_dir_all(parent).map_err(|e| Error::writing(parent, e))?;
        if unfinished.exists() {
            fs::remove_dir_all(unfinished).map_err(|e| Error::writing(unfinished, e))?;
        }
        fs::create_dir(unfinished).map_err(|e| Error::writing(unfinished, e))?;
        let filled = fill(unfinished).and_then(|()| sync(unfinished));
        if let Err(error) = filled {
            // Give the space back; the first error is the one to report.
            let _ = fs::remove_dir_all(unfinished);
            return Err(error);
        }
        let old = parent.join(format!("{UNFINISHED}{}-old", name(target)));
        let exchange = || -> std::io::Result<()> {
            if target.exists() {
                fs::rename(target, &old)?;
            }
            fs::rename(unfinished, target)?;
            if old.exists() {
                fs::remove_dir_all(&old)?;
            }
            File::open(parent)?.sync_all()
        };
        exchange().map_err(|e| Error::writing(target, e))
    }

    /// Directories that have a manifest, oldest first.
    fn complete(&self) -> Result<Vec<PathBuf>> {
        let mut complete: Vec<PathBuf> = entries(&self.root())?
            .into_iter()
            .filter(|path| name(path).starts_with("step-") && path.join(MANIFEST).is_file())
            .collect();
        complete.sort();
        Ok(complete)
    }

    /// The newest checkpoint whose files are what its manifest says, and its state. One that is
    /// damaged is reported through `warn` and passed over.
    ///
    /// # Errors
    /// `Data` if there are checkpoints but all are damaged.
    pub fn latest(&self, mut warn: impl FnMut(&str)) -> Result<Option<(PathBuf, State)>> {
        let complete = self.complete()?;
        for path in complete.iter().rev() {
            match verify(path).and_then(|()| State::read(path)) {
                Ok(state) => return Ok(Some((path.clone(), state))),
                Err(error) => warn(&format!("{error}; trying the one before it")),
            }
        }
        match complete.is_empty() {
            true => Ok(None),
            false => Err(Error::Data(format!(
                "every checkpoint in {} is damaged; start again in another run.dir",
                self.root().display()
            ))),
        }
    }
}

/// Writes what a run is for: an adapter, or a whole model.
fn save_result(dir: &Path, classifier: &Classifier, tokenizer: &Tokenizer) -> Result<()> {
    match &classifier.training.adapter {
        Some(adapter) => adapter::save_adapter(dir, classifier, adapter, tokenizer),
        None => files::save_model(dir, classifier, tokenizer),
    }
}

fn name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// Name of the checkpoint of a step; names sort as steps do.
fn directory(step: u64) -> String {
    format!("step-{step:08}")
}

/// What is in a directory; nothing if there is none.
fn entries(dir: &Path) -> Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(dir) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.and_then(|entries| entries.map(|e| Ok(e?.path())).collect()),
    };
    entries.map_err(|e| Error::reading(dir, e))
}

/// Syncs every file of a directory and the directory itself.
fn sync(dir: &Path) -> Result<()> {
    for path in entries(dir)? {
        File::open(&path).and_then(|f| f.sync_all()).map_err(|e| Error::writing(&path, e))?;
    }
    File::open(dir).and_then(|d| d.sync_all()).map_err(|e| Error::writing(dir, e))
}

fn hash(path: &Path) -> std::io::Result<Entry> {
    let mut hasher = blake3::Hasher::new();
    let mut file = File::open(path)?;
    hasher.update_reader(&mut file)?;
    Ok(Entry { bytes: file.metadata()?.len(), blake3: hasher.finalize().to_hex().to_string() })
}

fn write_manifest(dir: &Path) -> Result<()> {
    let mut files = BTreeMap::new();
    for path in entries(dir)? {
        files.insert(name(&path), hash(&path).map_err(|e| Error::writing(&path, e))?);
    }
    sync(dir)?;
    let manifest = serde_json::to_vec_pretty(&Manifest { format: FORMAT, files })
        .map_err(|e| Error::Bug(e.to_string()))?;
    crate::atomic::write_atomic(&dir.join(MANIFEST), &manifest)
}

fn verify(dir: &Path) -> Result<()> {
    let path = dir.join(MANIFEST);
    let text = fs::read(&path).map_err(|e| Error::reading(&path, e))?;
    let manifest: Manifest = serde_json::from_slice(&text).map_err(|e| Error::reading(&path, e))?;
    if manifest.format != FORMAT {
        return Err(Error::Data(format!(
            "{} has format {}, this version reads {FORMAT}",
            path.display(),
            manifest.format
        )));
    }
    for (file, entry) in &manifest.files {
        let path = dir.join(file);
        let found = hash(&path).map_err(|e| Error::reading(&path, e))?;
        if found != *entry {
            return Err(Error::Data(format!("{} is not as it was written", path.display())));
        }
    }
    Ok(())
}
