//! `[data]`: where the reviews come from and how they become tokens.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{Fault, ensure, ensure_path};
use crate::{Error, Result};

/// How often a word must occur to have an id, where `data.min_count` does not say.
const MIN_COUNT: usize = 2;

/// How many reviews `data.train = "synthetic"` generates where `data.limit` does not say.
const SYNTHETIC_REVIEWS: usize = 6000;

/// The `[data]` section.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Data {
    /// The labelled reviews to train on: a file or directory, or `"synthetic"` for the built-in
    /// generator. Required in a file.
    pub train: Reviews,
    /// What the model is measured on while it trains: a share of `train`, drawn with the classes
    /// in proportion, or a file. Default 0.1.
    pub validation: Validation,
    /// Labelled reviews to score once, at the end. Default: none.
    pub test: Option<PathBuf>,
    /// At most this many reviews of `train`, drawn by the seed with the classes in proportion;
    /// the number generated for `"synthetic"` (default 6000). Default: all.
    pub limit: Option<usize>,
    /// The most tokens of one review, special tokens included; the rest is cut. Default 512.
    pub max_length: usize,
    /// What is done to the text before the tokenizer. Default `"html"`.
    pub cleaning: Cleaning,
    /// Which part of a review longer than `max_length` is kept. Default `"head"`.
    pub truncation: Truncation,
    /// Whether shorter reviews are filled up to `max_length` with a padding token that the model
    /// attends to like text, as in Raschka's book (ch. 6). Costs time; default false.
    pub pad_to_max_length: bool,
    /// The tokenizer: a file or directory, or `"wordpiece"` to train one of `model.vocab_size`
    /// pieces on the training reviews, or `"words"` for their words, at most `model.vocab_size` of
    /// them where that is given. Default: the one in `model.path`; `"words"` for a network on word vectors.
    pub tokenizer: Option<TokenizerSource>,
    /// With `"words"`: how often a word must occur to have an id. Default 2.
    pub min_count: Option<usize>,
    /// Where tokenised reviews are kept between runs; see [`Data::cache_dir`].
    cache_dir: Option<PathBuf>,
}

impl Default for Data {
    fn default() -> Self {
        Self {
            train: Reviews::Synthetic,
            validation: Validation::Share(0.1),
            test: None,
            limit: None,
            max_length: 512,
            cleaning: Cleaning::default(),
            truncation: Truncation::default(),
            pad_to_max_length: false,
            tokenizer: None,
            min_count: None,
            cache_dir: None,
        }
    }
}

/// A source of training reviews.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub enum Reviews {
    /// The built-in generator; `"synthetic"`.
    Synthetic,
    /// A file or directory.
    Path(PathBuf),
}

impl From<String> for Reviews {
    fn from(text: String) -> Self {
        if text == "synthetic" { Self::Synthetic } else { Self::Path(text.into()) }
    }
}

impl From<Reviews> for String {
    fn from(reviews: Reviews) -> Self {
        match reviews {
            Reviews::Synthetic => "synthetic".into(),
            Reviews::Path(path) => path.to_string_lossy().into_owned(),
        }
    }
}

/// What the model is measured on while it trains.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged, expecting = "a share of the training reviews such as 0.1, or a path")]
pub enum Validation {
    /// This share of the training reviews, which are then not trained on.
    Share(f64),
    /// A file or directory of its own.
    Path(PathBuf),
}

/// What is done to the text before the tokenizer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Cleaning {
    /// Nothing.
    None,
    /// Tags become spaces, entities their character, runs of white space one space.
    #[default]
    Html,
    /// As `Html`, then lower-cased letters, digits and apostrophes only.
    Words,
    /// As `Html`, then lower-cased ASCII letters only.
    Letters,
}

/// Which part of a long review is kept.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Truncation {
    /// The beginning, as Hugging Face does.
    #[default]
    #[serde(rename = "head")]
    Head,
    /// A quarter from the beginning and the rest from the end, where reviews pass judgement.
    #[serde(rename = "head+tail")]
    HeadTail,
}

/// A tokenizer other than the model's own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub enum TokenizerSource {
    /// Trained on the training reviews; `"wordpiece"`.
    WordPiece,
    /// The words of the training reviews; `"words"`.
    Words,
    /// `tokenizer.json`, `vocab.txt`, `spm.model`, `vocab.json` with `merges.txt`, or a directory with
    /// one of these.
    Path(PathBuf),
}

impl From<String> for TokenizerSource {
    fn from(text: String) -> Self {
        match text.as_str() {
            "wordpiece" => Self::WordPiece,
            "words" => Self::Words,
            _ => Self::Path(text.into()),
        }
    }
}

impl From<TokenizerSource> for String {
    fn from(source: TokenizerSource) -> Self {
        match source {
            TokenizerSource::WordPiece => "wordpiece".into(),
            TokenizerSource::Words => "words".into(),
            TokenizerSource::Path(path) => path.to_string_lossy().into_owned(),
        }
    }
}

impl Data {
    /// Where tokenised reviews are kept between runs: `data.cache_dir`, else `$ALLREEL_CACHE`,
    /// else `$XDG_CACHE_HOME/allreel`, else `~/.cache/allreel`. Not resolved into the run's
    /// config: another machine may read that.
    ///
    /// # Errors
    /// [`Error::User`] if none of them is set.
    pub fn cache_dir(&self) -> Result<PathBuf> {
        self.cache_dir_with(|name| std::env::var_os(name))
    }

    /// [`Data::cache_dir`] where there is no config.
    ///
    /// # Errors
    /// As there.
    pub fn default_cache_dir() -> Result<PathBuf> {
        Self::default().cache_dir()
    }

    pub(super) fn cache_dir_with(
        &self,
        variable: impl Fn(&str) -> Option<OsString>,
    ) -> Result<PathBuf> {
        let variable = |name| variable(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        self.cache_dir
            .clone()
            .or_else(|| variable("ALLREEL_CACHE"))
            .or_else(|| variable("XDG_CACHE_HOME").map(|dir| dir.join("allreel")))
            .or_else(|| variable("HOME").map(|dir| dir.join(".cache").join("allreel")))
            .ok_or_else(|| {
                Error::User(
                    "data.cache_dir is not set and there is no $HOME to put a cache in; \
                     set data.cache_dir or $ALLREEL_CACHE"
                        .into(),
                )
            })
    }

    /// Fills in what depends on other settings; `on_words` is whether the model is a network on word vectors.
    pub(super) fn resolve(&mut self, on_words: bool) {
        if on_words {
            self.tokenizer.get_or_insert(TokenizerSource::Words);
        }
        if self.train == Reviews::Synthetic {
            self.limit.get_or_insert(SYNTHETIC_REVIEWS);
        }
        if self.tokenizer == Some(TokenizerSource::Words) {
            self.min_count.get_or_insert(MIN_COUNT);
        }
    }

    pub(super) fn check(&self) -> Result<(), Fault> {
        if let Reviews::Path(path) = &self.train {
            ensure_path(Some(path), "data.train")?;
        }
        match &self.validation {
            Validation::Share(share) => ensure(
                *share > 0.0 && *share < 1.0,
                "data.validation",
                "a share must lie between 0 and 1, both excluded; 0.1 is usual",
            )?,
            Validation::Path(path) => ensure_path(Some(path), "data.validation")?,
        }
        ensure_path(self.test.as_deref(), "data.test")?;
        ensure_path(self.cache_dir.as_deref(), "data.cache_dir")?;
        if let Some(TokenizerSource::Path(path)) = &self.tokenizer {
            ensure_path(Some(Path::new(path)), "data.tokenizer")?;
        }
        ensure(self.min_count != Some(0), "data.min_count", "must be at least 1; 2 is usual")?;
        ensure(
            self.min_count.is_none() || self.tokenizer == Some(TokenizerSource::Words),
            "data.min_count",
            "is only for data.tokenizer = \"words\"; remove it",
        )?;
        ensure(
            self.limit != Some(0),
            "data.limit",
            "must be at least 1; leave it out to use every review",
        )?;
        ensure(self.max_length > 0, "data.max_length", "must be at least 1; 512 is usual")
    }
}
