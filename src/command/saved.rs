//! A model that a run left behind, with the settings that its input needs.

use std::path::{Path, PathBuf};

use super::model;
use crate::{
    Error, Result,
    adapter::peft::{self, CONFIG, Description},
    checkpoint::adapter::{labels, load_adapter},
    config::{self, Adapter, Cleaning, Config, Trainable, Truncation, Weights},
    data::{Limit, Tokenizer},
    device::Placement,
    hub::{Hub, Source},
    model::{Classifier, Dropouts, ModelConfig, Training, classifier::LoadReport},
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

/// What a path names.
enum Found {
    /// A run, with its settings.
    Run(Box<Config>),
    /// A model's directory.
    Model(PathBuf),
    /// An adapter's, saved by PEFT or here.
    Adapter(Description),
}

/// The directory of a model that was fetched from the Hub, if this is the name of one.
fn fetched(name: &Path) -> Result<Option<PathBuf>> {
    let Ok(Source::Hub(id)) = Source::of(name) else { return Ok(None) };
    Ok(Hub::from_env()?.cached(&id).ok())
}

fn find(dir: &Path) -> Result<Found> {
    let own = dir.join("config.toml");
    if own.is_file() {
        return Ok(Found::Run(Box::new(Config::load(&own, &[])?)));
    }
    let adapter = dir.join(CONFIG);
    if adapter.is_file() {
        return Ok(Found::Adapter(peft::read(&adapter)?));
    }
    if dir.join("config.json").is_file() {
        return Ok(Found::Model(dir.to_owned()));
    }
    fetched(dir)?.map(Found::Model).ok_or_else(|| {
        Error::User(format!(
            "{} is neither a run directory (with config.toml) nor a model directory (with config.json) nor \
             an adapter's (with {CONFIG}), nor a model of the Hub that `allreel fetch` has fetched",
            dir.display()
        ))
    })
}

/// Opens the best model of a run, or any Hugging Face model, by its directory or the name it was
/// fetched by, or an adapter's directory (whose text is then taken as it is, up to the model's own length).
///
/// # Errors
/// `User` if `dir` is none of them.
pub fn open(placement: &Placement, dir: &Path, max_length: Option<usize>) -> Result<Saved> {
    let found = find(dir)?;
    let (model, classifier, tokenizer) = match &found {
        Found::Run(config) => {
            let best = best(dir)?;
            let tokenizer = Tokenizer::load(&best)?;
            let classifier = match &config.adapter {
                Some(adapter) => run_adapter(placement, config, adapter, &best, &tokenizer)?,
                None => whole(placement, &best, config.model.num_labels)?,
            };
            (best, classifier, tokenizer)
        }
        Found::Model(model) => {
            let labels = ModelConfig::num_labels(&model.join("config.json"))?;
            (model.clone(), whole(placement, model, labels)?, Tokenizer::load(model)?)
        }
        Found::Adapter(description) => foreign_adapter(placement, dir, description)?,
    };
    let config = match &found {
        Found::Run(config) => Some(config),
        _ => None,
    };
    let longest = classifier.config.plan.longest_text();
    let data = config.map(|config| &config.data);
    let asked = max_length.or(data.map(|data| data.max_length));
    let asked = asked.or(longest).unwrap_or(DEFAULT_LENGTH);
    if let Some(longest) = longest.filter(|longest| asked > *longest) {
        return Err(Error::User(format!(
            "max_length {asked} is beyond the model's {longest} positions; use at most {longest}"
        )));
    }
    let truncation = data.map_or(Truncation::Head, |data| data.truncation);
    let padded = data.is_some_and(|data| data.pad_to_max_length);
    Ok(Saved {
        tokenizer: if padded { tokenizer.padded()? } else { tokenizer },
        cleaning: data.map_or(Cleaning::None, |data| data.cleaning),
        limit: Limit { max_length: asked, truncation },
        micro_tokens: config.map_or(8192, |config| config.train.micro_tokens),
        cache: match data {
            Some(data) => data.cache_dir()?,
            None => config::Data::default_cache_dir()?,
        },
        threads: config.and_then(|config| config.run.threads),
        model,
        classifier,
    })
}

/// Where a run has its best model.
pub(super) fn best(dir: &Path) -> Result<PathBuf> {
    let best = dir.join("best");
    match best.is_dir() {
        true => Ok(best),
        false => Err(Error::User(format!(
            "{} has no best model yet: the run ended before its first evaluation; go on with \
             `allreel train {} --resume`",
            dir.display(),
            dir.join("config.toml").display()
        ))),
    }
}

/// A model that has all its weights in `dir`.
fn whole(placement: &Placement, dir: &Path, labels: usize) -> Result<Classifier> {
    let (classifier, report) =
        Classifier::load(placement, dir, Dropouts::default(), Trainable::Head, labels, 0)?;
    complete(dir, &report)?;
    Ok(classifier)
}

/// A run's model with the adapter that the run trained, in `best`.
fn run_adapter(
    placement: &Placement,
    config: &Config,
    adapter: &Adapter,
    best: &Path,
    tokenizer: &Tokenizer,
) -> Result<Classifier> {
    let mut local = config.clone();
    if let Weights::Pretrained(name) = &config.model.weights {
        // From elsewhere than where the run was, by the whole path that its adapter names.
        let base =
            beneath(name, best).or_else(|error| match peft::read(&best.join(CONFIG))?.base {
                Some(base) => beneath(Path::new(&base), best),
                None => Err(error),
            });
        local.model.weights = Weights::Pretrained(base?);
    }
    local.adapter = Some(adapter.without_network());
    let (classifier, _) = model::load(&local, &local, placement, tokenizer)?;
    load_adapter(best, &classifier, adapter)?;
    Ok(classifier)
}

/// An adapter that comes without a run's settings, over the model that it names.
fn foreign_adapter(
    placement: &Placement,
    dir: &Path,
    Description { adapter, base }: &Description,
) -> Result<(PathBuf, Classifier, Tokenizer)> {
    let file = dir.join(CONFIG);
    let base = base.as_ref().ok_or_else(|| {
        Error::Data(format!(
            "{}: base_model_name_or_path is not given: write the model that the adapter was trained on",
            file.display()
        ))
    })?;
    let base = beneath(Path::new(base), dir)?;
    let training = Training {
        adapter: Some(adapter.without_network()),
        file: Some(file),
        ..Training::default()
    };
    let labels = labels(dir)?;
    let (classifier, report) =
        Classifier::load(placement, &base, Dropouts::default(), training, labels, 0)?;
    if let Some(name) = model::random(&classifier, &report) {
        return Err(Error::Data(format!(
            "{name} is neither in {} nor in the adapter {}: it was random where the adapter was trained, and is \
             lost; train the adapter again with that module in modules_to_save",
            base.display(),
            dir.display()
        )));
    }
    load_adapter(dir, &classifier, adapter)?;
    let own = dir.join("tokenizer.json").is_file();
    let tokenizer = Tokenizer::load(if own { dir } else { &base })?;
    Ok((base, classifier, tokenizer))
}

/// The directory of the model beneath the adapter in `dir`: a path from here or from there, or a name on
/// the Hub.
fn beneath(name: &Path, dir: &Path) -> Result<PathBuf> {
    for path in [name.to_owned(), dir.join(name)] {
        if path.is_dir() {
            return Ok(path);
        }
    }
    fetched(name)?.ok_or_else(|| {
        Error::Data(format!(
            "{} is an adapter over {}, which is neither a directory here nor fetched from the Hub; \
             `allreel fetch {}` fetches it",
            dir.display(),
            name.display(),
            name.display()
        ))
    })
}

fn complete(model: &Path, report: &LoadReport) -> Result<()> {
    match report.missing.first() {
        None => Ok(()),
        Some(name) => Err(Error::Data(format!(
            "{} has no {name}: it is a bare encoder; train it first",
            model.display()
        ))),
    }
}
