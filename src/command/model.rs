//! The model that a run's settings name, with what they let train.

use std::collections::HashSet;

use serde_json::{Map, Value};

use crate::{
    Error, Result,
    config::{self, Adapter, Config, Method, Truncation, Weights},
    data::{Limit, Tokenizer},
    device::Placement,
    hub::Source,
    model::{
        Classifier, Dropouts, ModelConfig, Overrides, Training, classifier::LoadReport,
        training::BaseName,
    },
    words::vectors::{self, Table},
};

/// Loads or makes the network of `config`, whose `model.path` is a directory; `named` is what the user
/// called it, for those who load an adapter later. A network on word vectors has a row for each word of
/// `tokenizer`.
///
/// # Errors
/// `Data` if a file is missing, damaged or does not fit; `User` if the settings do not.
pub(super) fn load(
    config: &Config,
    named: &Config,
    placement: &Placement,
    tokenizer: &Tokenizer,
) -> Result<(Classifier, LoadReport)> {
    let (model, seed) = (&config.model, config.train.seed);
    let overrides = overrides(model);
    if let Some(threshold) = model.llm_int8_threshold.filter(|_| placement.is_cuda()) {
        return Err(Error::User(format!(
            "model.llm_int8_threshold = {threshold}: activations in 8 bits are computed on CPUs only so far; \
             remove it, which keeps the weights in 8 bits, or use run.device = \"cpu\""
        )));
    }
    let training = training(config, named)?;
    match &model.weights {
        Weights::Pretrained(path) => {
            let loaded =
                Classifier::load(placement, path, overrides, training, model.num_labels, seed)?;
            if let Some(name) = random(&loaded.0, &loaded.1) {
                return Err(Error::User(format!(
                    "adapter.modules_to_save: {name} is not in {}, and would stay as random as it starts; add \
                     its module, or leave modules_to_save out, which trains the whole head",
                    path.display()
                )));
            }
            Ok(loaded)
        }
        Weights::Random(shape) => {
            let mut fields = shape.fields();
            let table = match model.is_on_words() {
                true => on_words(model, &mut fields, tokenizer, seed)?,
                false => None,
            };
            let vectors = table.as_ref().map(|table| (table.found, table.words));
            let table = table.map(|table| table.values);
            let config = ModelConfig::fresh(shape.family(), &fields, model.num_labels, overrides)
                .map_err(|e| Error::User(format!("[model]: {e}")))?;
            let classifier = Classifier::with_words(placement, config, training, seed, table)?;
            Ok((classifier, LoadReport { vectors, ..LoadReport::default() }))
        }
        Weights::Linear(linear) => Err(no_network(linear)),
    }
}

/// Gives a network on word vectors the sizes of its vocabulary, and of the vectors that its table starts as,
/// which it returns.
fn on_words(
    model: &config::Model,
    fields: &mut Map<String, Value>,
    tokenizer: &Tokenizer,
    seed: u64,
) -> Result<Option<Table>> {
    fields.insert("vocab_size".into(), tokenizer.vocab_size().into());
    fields.insert("pad_token_id".into(), tokenizer.pad_id().into());
    let Some(path) = &model.vectors else { return Ok(None) };
    let table = vectors::table(path, tokenizer, seed)?;
    let columns = table.values.dim(1)?;
    match fields.insert("embedding_size".into(), columns.into()) {
        Some(given) if given != columns => Err(Error::User(format!(
            "model.embedding_size = {given}: the vectors of {} have {columns} columns; leave it out",
            path.display()
        ))),
        _ => Ok(Some(table)),
    }
}

/// What is said where only a network will do.
pub(super) fn no_network(linear: &config::Linear) -> Error {
    Error::User(format!(
        "model.kind = \"{}\" is no network: this command is for networks only",
        linear.name()
    ))
}

/// The first parameter that starts new and is not the adapter's to bring: a network with it is not the same
/// twice.
pub(super) fn random<'a>(classifier: &Classifier, report: &'a LoadReport) -> Option<&'a String> {
    let trained: HashSet<&str> = classifier.parameters.trained().collect();
    report.missing.iter().find(|name| !trained.contains(name.as_str()))
}

/// What the settings put in place of the checkpoint's `config.json`.
pub(super) fn overrides(model: &config::Model) -> Overrides {
    let dropouts = Dropouts {
        hidden: model.hidden_dropout_prob,
        attention: model.attention_probs_dropout_prob,
        classifier: model.classifier_dropout,
    };
    Overrides { dropouts, score_bias: model.score_bias }
}

/// What trains, and how the rest is kept.
fn training(config: &Config, named: &Config) -> Result<Training> {
    let (prompt, base) = (first_prompt(config)?, base(config, named)?);
    Ok(Training { prompt, base, ..Training::from(config) })
}

/// What PEFT shall load beneath an adapter: a name on the Hub, or a directory from wherever it is called.
fn base(config: &Config, named: &Config) -> Result<Option<BaseName>> {
    let (Weights::Pretrained(here), Weights::Pretrained(path)) =
        (&config.model.weights, &named.model.weights)
    else {
        return Ok(None);
    };
    Ok(Some(match Source::of(path)? {
        Source::Hub(id) => {
            // The commit, which the cache calls its directory by: a branch moves.
            let commit = here.file_name().map(|name| name.to_string_lossy().into_owned());
            BaseName { name: id.repo, revision: commit.or(Some(id.revision)) }
        }
        Source::Directory(dir) => {
            let path = dir.canonicalize().map_err(|e| Error::reading(&dir, e))?;
            BaseName { name: path.display().to_string(), revision: None }
        }
    }))
}

/// Ids of the text that virtual tokens start as, special tokens included, as in PEFT.
fn first_prompt(config: &Config) -> Result<Option<Vec<u32>>> {
    let Some(Adapter { method: Method::PromptTuning(prompt), .. }) = &config.adapter else {
        return Ok(None);
    };
    let Some(text) = &prompt.prompt_tuning_init_text else { return Ok(None) };
    let Weights::Pretrained(path) = &config.model.weights else {
        return Err(Error::User(
            "adapter.prompt_tuning_init_text: the words of a new encoder mean nothing yet; use \
             prompt_tuning_init = \"RANDOM\", or give model.path"
                .into(),
        ));
    };
    let limit = Limit { max_length: usize::MAX, truncation: Truncation::Head };
    let tokenizer = Tokenizer::load(path)?;
    Ok(tokenizer.encode_all(&[text], &limit)?.pop())
}
