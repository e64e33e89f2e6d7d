//! A model that a run left behind, with the settings that its input needs.

use std::path::{Path, PathBuf};

use crate::{
    Error, Result,
    config::{self, Cleaning, Config, Trainable, Truncation},
    data::{Limit, Tokenizer},
    device::Placement,
    hub::{Hub, Source},
    model::{Classifier, Dropouts, ModelConfig},
};

/// Length limit of a model without absolute positions where nothing says another.
const DEFAULT_LENGTH: usize = 512;

/// A trained classifier, ready to read text.
pub struct Saved {
    /// Where it was read from.
    pub model: PathBuf,
    /// The network.
    pub classifier: Classifier,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// Cleaning before tokenising.
    pub cleaning: Cleaning,
    /// Length limit.
    pub limit: Limit,
    /// Tokens in one forward pass.
    pub micro_tokens: usize,
    /// Where token sets are cached.
    pub cache: PathBuf,
    /// Worker threads asked for.
    pub threads: Option<usize>,
}

/// The directory of a model that was fetched from the Hub, if this is the name of one.
fn fetched(name: &Path) -> Result<Option<PathBuf>> {
    let Ok(Source::Hub(id)) = Source::of(name) else { return Ok(None) };
    Ok(Hub::from_env()?.cached(&id).ok())
}

/// Opens the best model of a run, or any Hugging Face model, by its directory or the name it was
/// fetched by (whose text is then taken as it is, up to the model's own length).
///
/// # Errors
/// `User` if `dir` is neither.
pub fn open(placement: &Placement, dir: &Path, max_length: Option<usize>) -> Result<Saved> {
    let own = dir.join("config.toml");
    let (model, config) = if own.is_file() {
        (dir.join("best"), Some(Config::load(&own, &[])?))
    } else if dir.join("config.json").is_file() {
        (dir.to_owned(), None)
    } else if let Some(snapshot) = fetched(dir)? {
        (snapshot, None)
    } else {
        return Err(Error::User(format!(
            "{} is neither a run directory (with config.toml) nor a model directory (with \
             config.json), nor a model of the Hub that `allreel fetch` has fetched",
            dir.display()
        )));
    };
    if !model.is_dir() {
        return Err(Error::User(format!(
            "{} has no best model yet: the run ended before its first evaluation; go on with \
             `allreel train {} --resume`",
            dir.display(),
            own.display()
        )));
    }
    let labels = match &config {
        Some(config) => config.model.num_labels,
        None => ModelConfig::num_labels(&model.join("config.json"))?,
    };
    let (classifier, report) =
        Classifier::load(placement, &model, Dropouts::default(), Trainable::Head, labels, 0)?;
    if let Some(name) = report.missing.first() {
        return Err(Error::Data(format!(
            "{} has no {name}: it is a bare encoder; train it first",
            model.display()
        )));
    }
    let longest = classifier.config.plan.longest;
    let data = config.as_ref().map(|config| &config.data);
    let asked = max_length.or(data.map(|data| data.max_length));
    let asked = asked.or(longest).unwrap_or(DEFAULT_LENGTH);
    if let Some(longest) = longest.filter(|longest| asked > *longest) {
        return Err(Error::User(format!(
            "max_length {asked} is beyond the model's {longest} positions; use at most {longest}"
        )));
    }
    let truncation = data.map_or(Truncation::Head, |data| data.truncation);
    let tokenizer = Tokenizer::load(&model)?;
    let padded = data.is_some_and(|data| data.pad_to_max_length);
    Ok(Saved {
        tokenizer: if padded { tokenizer.padded()? } else { tokenizer },
        cleaning: data.map_or(Cleaning::None, |data| data.cleaning),
        limit: Limit { max_length: asked, truncation },
        micro_tokens: config.as_ref().map_or(8192, |config| config.train.micro_tokens),
        cache: match data {
            Some(data) => data.cache_dir()?,
            None => config::Data::default_cache_dir()?,
        },
        threads: config.as_ref().and_then(|config| config.run.threads),
        model,
        classifier,
    })
}
