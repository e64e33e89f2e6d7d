//! Token sets from files: read, selected, tokenised once per node and cached for every rank.

use std::{
    path::{Path, PathBuf},
    sync::OnceLock,
};

use crate::{
    Error, Result,
    collective::{Collective, agree},
    config::{Config, Reviews, TokenizerSource, Validation, Weights},
    data::{self, Key, Limit, Review, Source, TokenSet, Tokenizer, split},
};

/// What a run trains on and is judged by.
pub struct Datasets {
    /// Tokenises later input the same way.
    pub tokenizer: Tokenizer,
    /// To train on.
    pub train: TokenSet,
    /// To choose the best model by.
    pub validation: TokenSet,
    /// To judge the best model by.
    pub test: Option<TokenSet>,
}

/// Loads all sets of a config. One rank of each node tokenises what is not in the cache yet; the
/// others then read it.
///
/// # Errors
/// `Data` for files that are missing or wrong, on every rank.
pub fn load(config: &Config, collective: &mut dyn Collective) -> Result<Datasets> {
    once_per_node(collective, || Loader::new(config)?.sets())
}

/// Runs `load` first on one rank of each node, which fills the node's cache, then on the others.
///
/// # Errors
/// Those of `load`, on every rank.
pub fn once_per_node<T>(
    collective: &mut dyn Collective,
    load: impl Fn() -> Result<T>,
) -> Result<T> {
    let first = (collective.local_rank() == 0).then(&load).transpose();
    match agree(collective, first)? {
        Some(loaded) => agree(collective, Ok(loaded)),
        None => agree(collective, load()),
    }
}

struct Loader<'a> {
    config: &'a Config,
    cache: PathBuf,
    tokenizer: Tokenizer,
    /// The training reviews, read at most once.
    reviews: OnceLock<Vec<Review>>,
}

/// The part of the training file that a set is.
#[derive(Clone, Copy)]
enum Part {
    Train,
    Validation,
}

impl<'a> Loader<'a> {
    fn new(config: &'a Config) -> Result<Self> {
        let cache = config.data.cache_dir()?;
        std::fs::create_dir_all(&cache).map_err(|e| Error::writing(&cache, e))?;
        let reviews = OnceLock::new();
        let tokenizer = match (&config.data.tokenizer, &config.model.weights) {
            (Some(TokenizerSource::Path(path)), _) => Tokenizer::load(path)?,
            (None, Weights::Pretrained(path)) => Tokenizer::load(path)?,
            (
                Some(kind @ (TokenizerSource::WordPiece | TokenizerSource::Words)),
                Weights::Random(shape),
            ) => trained_tokenizer(config, kind, shape.vocab_size, &cache, &reviews)?,
            _ => return Err(Error::User("data.tokenizer is missing".into())),
        };
        let tokenizer = if config.data.pad_to_max_length { tokenizer.padded()? } else { tokenizer };
        Ok(Self { config, cache, tokenizer, reviews })
    }

    fn limit(&self) -> Limit {
        let data = &self.config.data;
        Limit { max_length: data.max_length, truncation: data.truncation }
    }

    fn sets(self) -> Result<Datasets> {
        let (train, validation) = match &self.config.data.validation {
            Validation::Share(share) => (
                self.part(Some((*share, Part::Train)))?,
                self.part(Some((*share, Part::Validation)))?,
            ),
            Validation::Path(path) => (self.part(None)?, self.file(path, true)?),
        };
        let test =
            self.config.data.test.as_deref().map(|path| self.file(path, true)).transpose()?;
        Ok(Datasets { tokenizer: self.tokenizer, train, validation, test })
    }

    /// A whole file.
    fn file(&self, path: &Path, labelled: bool) -> Result<TokenSet> {
        let config = &self.config.data;
        file(path, labelled, &self.tokenizer, config.cleaning, &self.limit(), &self.cache)
    }

    /// A part of the training file, or all of it.
    fn part(&self, part: Option<(f64, Part)>) -> Result<TokenSet> {
        let (data, seed) = (&self.config.data, self.config.train.seed);
        let name = match part {
            None => "all".to_owned(),
            Some((share, Part::Train)) => format!("train without {share}"),
            Some((share, Part::Validation)) => format!("validation {share}"),
        };
        let selection = format!("{name} limit {:?} seed {seed}", data.limit);
        let key = Key::new(
            source(self.config),
            &self.tokenizer,
            data.cleaning,
            &self.limit(),
            &selection,
        )?;
        TokenSet::load_or_build(&self.cache, &key, || {
            let reviews = reviews(self.config, &self.reviews)?;
            let labels: Vec<u32> = reviews.iter().filter_map(|review| review.label).collect();
            let chosen = match part {
                None => reviews.to_vec(),
                Some((share, part)) => {
                    let (train, validation) = split::stratified(&labels, share, seed)?;
                    let rows = match part {
                        Part::Train => train,
                        Part::Validation => validation,
                    };
                    rows.into_iter().map(|row| reviews[row].clone()).collect()
                }
            };
            TokenSet::build(&chosen, data.cleaning, &self.tokenizer, &self.limit())
        })
    }
}

/// A whole file, tokenised or from the cache.
///
/// # Errors
/// `Data` if it is wrong, or has no labels where they are needed.
pub fn file(
    path: &Path,
    labelled: bool,
    tokenizer: &Tokenizer,
    cleaning: crate::config::Cleaning,
    limit: &Limit,
    cache: &Path,
) -> Result<TokenSet> {
    let key = Key::new(Source::File(path), tokenizer, cleaning, limit, "all")?;
    let set = TokenSet::load_or_build(cache, &key, || {
        TokenSet::build(&data::read::read(path)?, cleaning, tokenizer, limit)
    })?;
    if labelled && set.labels.iter().any(Option::is_none) {
        return Err(unlabelled(path));
    }
    Ok(set)
}

/// The reviews of a run's sets, as they stand in their files.
pub struct Texts {
    /// To train on.
    pub train: Vec<Review>,
    /// To choose the best model by.
    pub validation: Vec<Review>,
    /// To judge the best model by.
    pub test: Option<Vec<Review>>,
}

/// Reads the sets of a config, split as [`load`] does.
///
/// # Errors
/// `Data` for files that are missing or wrong.
pub fn texts(config: &Config) -> Result<Texts> {
    let read = OnceLock::new();
    reviews(config, &read)?;
    let all = read.into_inner().unwrap_or_default();
    let (train, validation) = match &config.data.validation {
        Validation::Share(share) => {
            let labels: Vec<u32> = all.iter().filter_map(|review| review.label).collect();
            let (train, validation) = split::stratified(&labels, *share, config.train.seed)?;
            let take = |rows: Vec<usize>| -> Vec<Review> {
                rows.into_iter().map(|row| all[row].clone()).collect()
            };
            (take(train), take(validation))
        }
        Validation::Path(path) => (all, labelled(path)?),
    };
    let test = config.data.test.as_deref().map(labelled).transpose()?;
    Ok(Texts { train, validation, test })
}

/// The reviews of a file, all with labels.
///
/// # Errors
/// `Data` if it is wrong, or has no labels.
pub fn labelled(path: &Path) -> Result<Vec<Review>> {
    let reviews = data::read::read(path)?;
    match reviews.iter().any(|review| review.label.is_none()) {
        true => Err(unlabelled(path)),
        false => Ok(reviews),
    }
}

fn unlabelled(path: &Path) -> Error {
    Error::Data(format!(
        "{} has no labels; training and evaluation need a column `sentiment` or `label` with 0 or 1",
        path.display()
    ))
}

fn source(config: &Config) -> Source<'_> {
    match &config.data.train {
        Reviews::Synthetic => Source::Synthetic {
            // Resolved by the config.
            count: config.data.limit.unwrap_or_default(),
            seed: config.train.seed,
        },
        Reviews::Path(path) => Source::File(path),
    }
}

/// The training reviews after `data.limit`, before the split.
fn reviews<'r>(config: &Config, read: &'r OnceLock<Vec<Review>>) -> Result<&'r [Review]> {
    if let Some(reviews) = read.get() {
        return Ok(reviews);
    }
    let mut reviews = match source(config) {
        Source::Synthetic { count, seed } => data::synthetic::reviews(count, seed),
        Source::File(path) => labelled(path)?,
    };
    if let Some(limit) = config.data.limit.filter(|limit| *limit < reviews.len()) {
        let labels: Vec<u32> = reviews.iter().filter_map(|review| review.label).collect();
        let share = limit as f64 / labels.len() as f64;
        let (_, chosen) = split::stratified(&labels, share, config.train.seed)?;
        reviews = chosen.into_iter().map(|row| reviews[row].clone()).collect();
    }
    Ok(read.get_or_init(|| reviews))
}

/// A tokenizer trained on the training reviews, not on those to validate, or the one trained before.
fn trained_tokenizer(
    config: &Config,
    kind: &TokenizerSource,
    vocab_size: Option<usize>,
    cache: &Path,
    read: &OnceLock<Vec<Review>>,
) -> Result<Tokenizer> {
    let reviews = reviews(config, read)?;
    let rows = match config.data.validation {
        Validation::Share(share) => {
            let labels: Vec<u32> = reviews.iter().filter_map(|review| review.label).collect();
            split::stratified(&labels, share, config.train.seed)?.0
        }
        Validation::Path(_) => (0..reviews.len()).collect(),
    };
    let texts: Vec<String> = rows
        .into_iter()
        .map(|row| config.data.cleaning.clean(&reviews[row].text).into_owned())
        .collect();
    let mut hash = blake3::Hasher::new();
    let min_count = config.data.min_count.unwrap_or_default();
    for number in [vocab_size.unwrap_or_default(), min_count] {
        hash.update(&(number as u64).to_le_bytes());
    }
    for text in &texts {
        hash.update(&(text.len() as u64).to_le_bytes()).update(text.as_bytes());
    }
    let name = String::from(kind.clone());
    let path = cache.join(format!("{name}-{}.json", &hash.finalize().to_hex()[..32]));
    if !path.exists() {
        let tokenizer = match kind {
            TokenizerSource::Words => Tokenizer::train_words(&texts, min_count, vocab_size)?,
            _ => Tokenizer::train_wordpiece(&texts, vocab_size.unwrap_or_default())?,
        };
        crate::atomic::write_atomic(&path, tokenizer.to_json()?.as_bytes())?;
    }
    Tokenizer::load(&path)
}
