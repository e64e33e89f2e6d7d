//! Linear classifiers on n-grams, and the majority: part of `[model]`, in the place of an encoder's shape.

use serde::{Deserialize, Deserializer, Serialize, de::IntoDeserializer, de::value::Error};

use super::{Config, Data, Family, Fault, Train, Weights, ensure, fields, model::ModelFile};
use crate::device::Choice;

/// Buckets that keys of n-grams fall into where nothing is said. Only those that reviews fill cost
/// anything, so there are enough that the 4 million n-grams of 20,000 reviews hardly ever share one.
const BUCKETS: u64 = 1 << 28;

/// A linear classifier, by `model.kind`.
#[derive(Debug, Clone, PartialEq)]
pub enum Linear {
    /// `"majority"`: says of every review what most training reviews are.
    Majority,
    /// `"ngram"`: logistic regression on n-grams.
    Ngram(Ngram),
}

/// Logistic regression on n-grams of words.
#[derive(Debug, Clone, PartialEq)]
pub struct Ngram {
    /// Fewest and most words of an n-gram. Default `[1, 3]`. scikit-learn: `ngram_range`.
    pub ngram_range: [usize; 2],
    /// What an n-gram of a review counts. Default `"binary"`.
    pub features: Weighting,
    /// Whether punctuation marks are words. Default false.
    pub punctuation: bool,
    /// Fewest training reviews that an n-gram must be in. Default 2. scikit-learn: `min_df`.
    pub min_count: usize,
    /// How n-grams become columns.
    pub columns: ColumnsBy,
    /// Whether features are scaled by naive Bayes' log-count ratios (Wang & Manning 2012). Default true.
    pub naive_bayes: bool,
    /// Inverse of the strength of the L2 regularisation, as in LIBLINEAR and scikit-learn. Default 1.
    pub c: f64,
}

/// How n-grams become columns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ColumnsBy {
    /// `model.buckets`: hashed into this many; those that share one share a weight. Default 2^28.
    Hashing(u64),
    /// `model.vocabulary = true`: each has its own, and the model keeps a list of them.
    Vocabulary,
}

/// The value of an n-gram that a review has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Weighting {
    /// 1.
    #[default]
    Binary,
    /// How often it has it.
    Count,
    /// `(1 + ln count) · idf`, each review scaled to length 1.
    TfIdf,
}

/// What `model.kind` names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub(super) enum Kind {
    Network(Family),
    Linear(LinearKind),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum LinearKind {
    Ngram,
    Majority,
}

impl<'de> Deserialize<'de> for Kind {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let name = String::deserialize(deserializer)?;
        let linear = LinearKind::deserialize(name.as_str().into_deserializer());
        let linear = linear.map(Self::Linear).or_else(|_: Error| {
            Family::deserialize(name.as_str().into_deserializer()).map(Self::Network)
        });
        // Serde's list of the families, and what else there is.
        linear.map_err(|error: Error| {
            serde::de::Error::custom(format!("{error}, `ngram`, `majority`"))
        })
    }
}

/// The keys as they are written.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct LinearFile {
    ngram_range: Option<[usize; 2]>,
    features: Option<Weighting>,
    punctuation: Option<bool>,
    min_count: Option<usize>,
    buckets: Option<u64>,
    vocabulary: Option<bool>,
    naive_bayes: Option<bool>,
    c: Option<f64>,
}

impl LinearFile {
    /// Refuses every key for a model that is not `"ngram"`.
    pub(super) fn refuse(&self) -> Result<(), Fault> {
        match fields(self).keys().next() {
            Some(key) => Err(Fault {
                key: format!("model.{key}").into(),
                message: "is only for model.kind = \"ngram\"; remove it".into(),
            }),
            None => Ok(()),
        }
    }

    pub(super) fn resolve(self, kind: LinearKind) -> Result<Linear, Fault> {
        if kind == LinearKind::Majority {
            return self.refuse().map(|()| Linear::Majority);
        }
        let vocabulary = self.vocabulary == Some(true);
        ensure(
            !vocabulary || self.buckets.is_none(),
            "model.buckets",
            "given together with model.vocabulary, which hashes nothing; remove one of them",
        )?;
        Ok(Linear::Ngram(Ngram {
            ngram_range: self.ngram_range.unwrap_or([1, 3]),
            features: self.features.unwrap_or_default(),
            punctuation: self.punctuation.unwrap_or(false),
            min_count: self.min_count.unwrap_or(2),
            columns: match vocabulary {
                true => ColumnsBy::Vocabulary,
                false => ColumnsBy::Hashing(self.buckets.unwrap_or(BUCKETS)),
            },
            naive_bayes: self.naive_bayes.unwrap_or(true),
            c: self.c.unwrap_or(1.0),
        }))
    }
}

impl From<Linear> for (Kind, LinearFile) {
    fn from(linear: Linear) -> Self {
        let Linear::Ngram(ngram) = linear else {
            return (Kind::Linear(LinearKind::Majority), LinearFile::default());
        };
        let (buckets, vocabulary) = match ngram.columns {
            ColumnsBy::Hashing(buckets) => (Some(buckets), None),
            ColumnsBy::Vocabulary => (None, Some(true)),
        };
        let file = LinearFile {
            ngram_range: Some(ngram.ngram_range),
            features: Some(ngram.features),
            punctuation: Some(ngram.punctuation),
            min_count: Some(ngram.min_count),
            buckets,
            vocabulary,
            naive_bayes: Some(ngram.naive_bayes),
            c: Some(ngram.c),
        };
        (Kind::Linear(LinearKind::Ngram), file)
    }
}

impl Linear {
    /// The name of its kind.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Majority => "majority",
            Self::Ngram(_) => "ngram",
        }
    }

    pub(super) fn check(&self) -> Result<(), Fault> {
        let Self::Ngram(ngram) = self else { return Ok(()) };
        let [fewest, most] = ngram.ngram_range;
        ensure(
            1 <= fewest && fewest <= most && most <= 8,
            "model.ngram_range",
            "must be the fewest and the most words of an n-gram, 1 to 8, in this order; [1, 3] is usual",
        )?;
        ensure(ngram.min_count > 0, "model.min_count", "must be at least 1; 2 is usual")?;
        ensure(
            ngram.columns != ColumnsBy::Hashing(0),
            "model.buckets",
            "must be at least 1; leave it out to have 2^28",
        )?;
        ensure(
            ngram.c > 0.0 && ngram.c.is_finite(),
            "model.c",
            "must be greater than 0 and finite; 1 is usual, less regularises more",
        )
    }
}

/// Keys that mean nothing to a linear model, by section.
const NETWORK_ONLY: [(&str, &[&str]); 3] = [
    ("data", &["max_length", "truncation", "pad_to_max_length", "tokenizer"]),
    (
        "model",
        &[
            "hidden_dropout_prob",
            "attention_probs_dropout_prob",
            "classifier_dropout",
            "score_bias",
            "trainable",
            "gradient_checkpointing",
            "quantization",
            "quantize_embeddings",
            "llm_int8_threshold",
        ],
    ),
    (
        "train",
        &[
            "epochs",
            "batch_size",
            "batch_tokens",
            "micro_tokens",
            "offload",
            "group_window",
            "learning_rate",
            "schedule",
            "warmup_steps",
            "warmup_ratio",
            "weight_decay",
            "adam_beta1",
            "adam_beta2",
            "adam_epsilon",
            "max_grad_norm",
            "label_smoothing",
        ],
    ),
];

/// Refuses settings that a linear model has no use for. By value, not by whether they were written: the
/// resolved file of a run has all of them.
pub(super) fn check_alone(config: &Config) -> Result<(), Fault> {
    let Weights::Linear(linear) = &config.model.weights else { return Ok(()) };
    let mut train = Train::default();
    train.resolve();
    for (section, keys) in NETWORK_ONLY {
        let (given, default) = match section {
            "data" => (fields(&config.data), fields(&Data::default())),
            "model" => (fields(&config.model), fields(&ModelFile::default())),
            _ => (fields(&config.train), fields(&train)),
        };
        if let Some(key) = keys.iter().find(|key| given.get(**key) != default.get(**key)) {
            let message = format!("means nothing to model.kind = \"{}\"; remove it", linear.name());
            return Err(Fault { key: format!("{section}.{key}").into(), message });
        }
    }
    ensure(
        config.adapter.is_none(),
        "adapter.method",
        format!("[adapter] means nothing to model.kind = \"{}\"; remove it", linear.name()),
    )?;
    ensure(
        config.model.num_labels == 2,
        "model.num_labels",
        format!(
            "must be 2 for model.kind = \"{}\": it has one weight for each n-gram",
            linear.name()
        ),
    )?;
    ensure(
        config.run.device != Choice::Cuda,
        "run.device",
        format!("model.kind = \"{}\" is computed on CPUs only; remove it", linear.name()),
    )
}
