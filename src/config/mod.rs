//! The settings of a run: one TOML file plus `--set section.key=value`, parsed once into types.
//!
//! Owns every setting's name, meaning and default, and refuses what can be refused without
//! opening another file: unknown keys, wrong types, values out of range, settings that exclude
//! each other. Relative paths stay as written: they are relative to the working directory.

mod adapter;
mod data;
mod linear;
mod model;
mod run;
mod shape;
mod source;
mod train;

#[cfg(test)]
mod tests;

pub use adapter::{
    ALL_LINEAR, Adapter, Bias, Lora, Method, PTuning, PoolRow, PrefixTuning, PromptTuning,
    Reparameterization, TargetModules,
};
pub use data::{Cleaning, Data, Reviews, TokenizerSource, Truncation, Validation};
pub use linear::{ColumnsBy, Linear, Ngram, Weighting};
pub use model::{Model, Quantization, Trainable, Weights};
pub use run::{Checkpoint, Run};
pub use shape::{Activation, Family, Shape};
pub use train::{Batch, Schedule, Train, Warmup};

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::{Error, Result};
use adapter::AdapterFile;
use model::ModelFile;
use source::Source;

/// A complete, checked set of settings: what was given, and the default of everything else.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Config {
    /// `[data]`: which reviews, and how they become tokens.
    pub data: Data,
    /// `[model]`: which encoder, and what of it trains.
    pub model: Model,
    /// `[adapter]`: what trains beside a frozen encoder. Default: nothing does.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub adapter: Option<Adapter>,
    /// `[train]`: optimizer, schedule, batches.
    pub train: Train,
    /// `[checkpoint]`: when the state of training is saved, and how much is kept.
    pub checkpoint: Checkpoint,
    /// `[run]`: where the run writes and what it may use; never changes its result.
    pub run: Run,
}

/// The file as it is written, before the settings that depend on each other are resolved.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
struct File {
    data: Data,
    model: ModelFile,
    adapter: AdapterFile,
    train: Train,
    checkpoint: Checkpoint,
    run: Run,
}

/// A setting that cannot be used, before it is known in which file and line it was written.
#[derive(Debug)]
struct Fault {
    key: Cow<'static, str>,
    message: String,
}

/// The one form every range check takes: `holds`, or `key` is at fault and `message` says what
/// to write instead.
fn ensure(
    holds: bool,
    key: impl Into<Cow<'static, str>>,
    message: impl Into<String>,
) -> Result<(), Fault> {
    if holds { Ok(()) } else { Err(Fault { key: key.into(), message: message.into() }) }
}

/// A path that was written as `""` names nothing, and would surface much later as the working
/// directory.
fn ensure_path(path: Option<&Path>, key: &'static str) -> Result<(), Fault> {
    let given = path.is_none_or(|path| !path.as_os_str().is_empty());
    ensure(given, key, "must not be empty; leave the key out to have none")
}

/// The keys of a section that were given, with their values.
fn fields(section: &impl Serialize) -> Map<String, Value> {
    let Ok(Value::Object(mut fields)) = serde_json::to_value(section) else { return Map::new() };
    fields.retain(|_, value| !value.is_null());
    fields
}

/// Refuses a key among `fields` that is only for other kinds than `kind`, which `section.chooser` is:
/// `special` lists such keys with the kinds that have them.
fn ensure_kind<K: Serialize + PartialEq>(
    fields: &Map<String, Value>,
    special: &[(&[K], &[&str])],
    kind: K,
    section: &str,
    chooser: &str,
) -> Result<(), Fault> {
    for (kinds, keys) in special {
        for key in keys.iter().filter(|key| fields.contains_key(**key)) {
            let names: Vec<String> =
                kinds.iter().map(|kind| serde_json::json!(kind).to_string()).collect();
            ensure(
                kinds.contains(&kind),
                format!("{section}.{key}"),
                format!("is only for {section}.{chooser} = {}; remove it", names.join(", ")),
            )?;
        }
    }
    Ok(())
}

impl Config {
    /// Reads the file at `path`, applies `overrides` (`section.key=value`, as given to `--set`)
    /// and checks the result.
    ///
    /// # Errors
    /// [`Error::User`] naming the file and line, or the override, with the key, the value and
    /// what to write instead.
    pub fn load(path: &Path, overrides: &[String]) -> Result<Self> {
        let text = std::fs::read_to_string(path)
            .map_err(|error| Error::User(format!("cannot read {}: {error}", path.display())))?;
        Self::parse(&text, path, overrides)
    }

    /// The same from text already read, such as the resolved file of a run; `path` is what
    /// errors call it, and what `run.dir` is named after where it is not given.
    ///
    /// # Errors
    /// As for [`Config::load`].
    pub fn from_toml_str(text: &str, path: &Path) -> Result<Self> {
        Self::parse(text, path, &[])
    }

    fn parse(text: &str, path: &Path, overrides: &[String]) -> Result<Self> {
        let mut source = Source::parse(text, path)?;
        for argument in overrides {
            source.set(argument)?;
        }
        if !source.has("data.train") {
            let message = "missing: write train = \"reviews.tsv\" (or \"synthetic\") under [data]";
            return Err(source.error(message, "data.train", &BTreeMap::new()));
        }
        let file = source.file()?;
        let values = flatten(&file)?;
        Self::resolve(file, &source, path)
            .map_err(|fault| source.error(&fault.message, &fault.key, &values))
    }

    /// Fills in the defaults that depend on other settings, then checks.
    fn resolve(mut file: File, source: &Source, path: &Path) -> Result<Self, Fault> {
        if file.run.dir.as_os_str().is_empty() && !source.has("run.dir") {
            let stem = path.file_stem().unwrap_or("run".as_ref());
            // Lossy: the resolved file is TOML, which must be UTF-8.
            file.run.dir = PathBuf::from("runs").join(&*stem.to_string_lossy());
        }
        let model = file.model.resolve()?;
        file.data.resolve(model.is_on_words());
        file.train.resolve();
        let adapter = source.has_section("adapter").then(|| file.adapter.resolve()).transpose()?;
        let config = Self {
            data: file.data,
            model,
            adapter,
            train: file.train,
            checkpoint: file.checkpoint,
            run: file.run,
        };
        config.faults()?;
        Ok(config)
    }

    /// Checks everything that can be known without opening a file; [`Config::load`] has done it
    /// already, so this is for settings changed since.
    ///
    /// # Errors
    /// [`Error::User`] naming the key, its value and what to write instead.
    pub fn check(&self) -> Result<()> {
        self.described(self.faults())
    }

    /// A fault with the value that it is about.
    fn described(&self, outcome: Result<(), Fault>) -> Result<()> {
        let Err(Fault { key, message }) = outcome else { return Ok(()) };
        let values = flatten(self)?;
        let value = values.get(&*key).map_or("unset", String::as_str);
        Err(Error::User(format!("{key} = {value}: {message}")))
    }

    fn faults(&self) -> Result<(), Fault> {
        self.data.check()?;
        self.model.check()?;
        if let Some(adapter) = &self.adapter {
            adapter.check()?;
        }
        self.train.check()?;
        self.checkpoint.check()?;
        self.run.check()?;
        self.check_across_sections()
    }

    fn check_across_sections(&self) -> Result<(), Fault> {
        if let Weights::Linear(_) = &self.model.weights {
            return linear::check_alone(self);
        }
        let max_length = self.data.max_length;
        if let Weights::Random(shape) = &self.model.weights {
            self.fits(shape.longest(), "model.max_position_embeddings ends")?;
            ensure(
                self.data.tokenizer.is_some(),
                "data.tokenizer",
                "missing: without model.path there is no tokenizer to take; write \"wordpiece\" \
                 or \"words\" to train one, or the path of one",
            )?;
        } else {
            ensure(
                !matches!(
                    self.data.tokenizer,
                    Some(TokenizerSource::WordPiece | TokenizerSource::Words)
                ),
                "data.tokenizer",
                "a tokenizer trained anew does not fit the pretrained weights of model.path; \
                 leave it out to use the model's own",
            )?;
        }
        let rows = max_length + self.adapter.as_ref().map_or(0, Adapter::prompt_rows);
        let holds_a_review = match rows - max_length {
            0 => "must hold one review of data.max_length",
            _ => "must hold one review of data.max_length and adapter.num_virtual_tokens",
        };
        ensure(
            self.train.micro_tokens >= rows,
            "train.micro_tokens",
            format!("{holds_a_review}; use at least {rows}"),
        )?;
        if let Batch::Tokens(tokens) = self.train.batch() {
            ensure(
                tokens >= rows,
                "train.batch_tokens",
                format!("{holds_a_review}; use at least {rows}"),
            )?;
        }
        self.model.check_frozen(self.adapter.is_some())?;
        ensure(
            !self.train.offload || self.model.gradient_checkpointing,
            "train.offload",
            "is only for layers that are run again; set model.gradient_checkpointing = true, or remove it",
        )
    }

    /// Checks that a review of `data.max_length` tokens, with the adapter's virtual tokens before it, has
    /// room in a model of `longest` positions (`None`: any number of them). Where the model's shape is in
    /// the file, [`Config::load`] has done it already.
    ///
    /// # Errors
    /// [`Error::User`] naming the key, its value and what to write instead.
    pub fn check_length(&self, longest: Option<usize>) -> Result<()> {
        self.described(self.fits(longest, "the model's positions end"))
    }

    /// `end` says in an error what ends at `longest`.
    fn fits(&self, longest: Option<usize>, end: &str) -> Result<(), Fault> {
        let Some(longest) = longest else { return Ok(()) };
        let taken = self.adapter.as_ref().map_or(0, Adapter::virtual_tokens);
        ensure(
            taken < longest,
            "adapter.num_virtual_tokens",
            format!("must be below {longest}, where {end}, or there is no room for a review"),
        )?;
        let room = longest - taken;
        let virtual_too = match taken {
            0 => "there".to_owned(),
            n => format!("at {longest}, of which adapter.num_virtual_tokens takes {n}"),
        };
        ensure(
            self.data.max_length <= room,
            "data.max_length",
            format!("must be at most {room}: {end} {virtual_too}"),
        )
    }

    /// The resolved settings as a file that [`Config::from_toml_str`] reads back to the same.
    ///
    /// # Errors
    /// [`Error::Bug`] for what TOML cannot hold, which no file can have brought in.
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string(self).map_err(|error| Error::Bug(format!("config: {error}")))
    }

    /// One line `section.key = value` for every setting that can change the result, sorted: all
    /// but `checkpoint.*`, `run.*` and `data.cache_dir`. The same text for the same settings on
    /// every machine, so that ranks may compare its hash.
    ///
    /// # Errors
    /// As for [`Config::to_toml`].
    pub fn fingerprint(&self) -> Result<String> {
        let lines = self.decisive()?;
        Ok(lines.iter().map(|(key, value)| format!("{key} = {value}\n")).collect())
    }

    /// The first setting (in the order of [`Config::fingerprint`]) that differs from `other`'s,
    /// as `section.key is A, not B`: A of `self`, B of `other`.
    ///
    /// # Errors
    /// As for [`Config::to_toml`].
    pub fn difference(&self, other: &Self) -> Result<Option<String>> {
        let (ours, theirs) = (self.decisive()?, other.decisive()?);
        let value = |of: &BTreeMap<String, String>, key: &String| {
            of.get(key).cloned().unwrap_or_else(|| "unset".to_owned())
        };
        // `[adapter]` may be there in one of them only.
        let keys: BTreeSet<&String> = ours.keys().chain(theirs.keys()).collect();
        Ok(keys
            .into_iter()
            .find(|key| ours.get(*key) != theirs.get(*key))
            .map(|key| format!("{key} is {}, not {}", value(&ours, key), value(&theirs, key))))
    }

    fn decisive(&self) -> Result<BTreeMap<String, String>> {
        let mut values = flatten(self)?;
        values.retain(|key, _| {
            !key.starts_with("checkpoint.") && !key.starts_with("run.") && key != "data.cache_dir"
        });
        Ok(values)
    }
}

/// Every `section.key` with its value as JSON, `unset` for an optional one that is not given.
/// JSON, unlike TOML, can say "not given", so this is also the list of all known keys.
fn flatten(sections: &impl Serialize) -> Result<BTreeMap<String, String>> {
    let bug = |error: String| Error::Bug(format!("config: {error}"));
    let tree = serde_json::to_value(sections).map_err(|error| bug(error.to_string()))?;
    let mut values = BTreeMap::new();
    for (section, keys) in tree.as_object().ok_or_else(|| bug("not an object".into()))? {
        let keys = keys.as_object().ok_or_else(|| bug(format!("{section} is not an object")))?;
        for (key, value) in keys {
            let value = if value.is_null() { "unset".to_owned() } else { value.to_string() };
            values.insert(format!("{section}.{key}"), value);
        }
    }
    Ok(values)
}
