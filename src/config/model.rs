//! `[model]`: a pretrained directory or the shape of a new network, what of it trains, and how what
//! does not is kept.
//!
//! Keys that describe the encoder carry the names of Hugging Face's `config.json`.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{
    Family, Fault, Linear, Shape, ensure, ensure_path,
    linear::{Kind, LinearFile, LinearKind},
};

/// Dropout of a new encoder where nothing is said, as in Hugging Face's `BertConfig`.
const DROPOUT: f64 = 0.1;
/// Dropout of word vectors and of a classifier over them: small networks that see few texts need more
/// (Kim 2014).
const DROPOUT_ON_WORDS: f64 = 0.5;

/// The `[model]` section.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(into = "ModelFile")]
pub struct Model {
    /// Where the network's weights come from.
    pub weights: Weights,
    /// On words: a file of word vectors that the word table starts as; see [`crate::words`]. Default: it
    /// starts random.
    pub vectors: Option<PathBuf>,
    /// On words: whether the word table stays as it starts. Default false.
    pub freeze_embeddings: bool,
    /// Dropout after embeddings and sub-layers. Default: that of the pretrained `config.json`,
    /// 0.1 for a new encoder, 0.5 for a network on word vectors (0.1 for `transformer`).
    pub hidden_dropout_prob: Option<f64>,
    /// Dropout of the attention weights. Default: as for `hidden_dropout_prob`.
    pub attention_probs_dropout_prob: Option<f64>,
    /// Dropout before the classifier. Default: that of the pretrained `config.json`,
    /// `hidden_dropout_prob` for a new encoder.
    pub classifier_dropout: Option<f64>,
    /// GPT-2: whether the classifier has a bias, as in Raschka's book. transformers, whose
    /// classifier has none, leaves it out when it loads what was saved. Default: that of the
    /// pretrained `config.json`, false for a new network.
    pub score_bias: Option<bool>,
    /// Classes to tell apart. Default 2.
    pub num_labels: usize,
    /// Which weights train. Default `"all"`.
    pub trainable: Trainable,
    /// Keep only each layer's input and run it again for the backward pass: less memory, about a
    /// third more work. Default false.
    pub gradient_checkpointing: bool,
    /// In what form frozen linear layers keep their weights: `"int8"`, `"nf4"` or `"fp4"`. Default: as
    /// they were loaded.
    pub quantization: Option<Quantization>,
    /// Whether the frozen embeddings are kept in 8 bits, a scale for each row. Default false.
    pub quantize_embeddings: bool,
    /// `quantization = "int8"`: activations are quantised too, save columns that hold a number beyond
    /// this (LLM.int8; 0 = no column is spared, 6 is usual). Default: they are not.
    pub llm_int8_threshold: Option<f64>,
}

/// Where the network's weights come from.
#[derive(Debug, Clone, PartialEq)]
pub enum Weights {
    /// `model.path`: a directory in Hugging Face's format, or `org/name` or `org/name@revision` of a
    /// model on the Hub.
    Pretrained(PathBuf),
    /// A new network of this shape, with random weights.
    Random(Box<Shape>),
    /// No encoder at all: a linear classifier on n-grams, or the majority.
    Linear(Box<Linear>),
}

/// Which weights train.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Trainable {
    /// All of them.
    #[default]
    All,
    /// The last encoder layer, what norms its output (ModernBERT, GPT-2) and the head.
    LastBlock,
    /// The classification head and what norms its input (ModernBERT's and GPT-2's final norm).
    Head,
}

/// How frozen linear layers keep their weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Quantization {
    /// 8 bits, a scale for each row (Dettmers et al. 2022).
    Int8,
    /// 4 bits, quantiles of a normal distribution, scales in 8 bits (Dettmers et al. 2023).
    Nf4,
    /// 4 bits, small floating-point numbers, scales in 8 bits.
    Fp4,
}

/// The section as it is written: `path`, or the keys of a [`Shape`].
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct ModelFile {
    path: Option<PathBuf>,
    #[serde(flatten)]
    shape: Shape,
    vectors: Option<PathBuf>,
    freeze_embeddings: bool,
    /// In the place of the shape's own, which knows networks only, and written after it.
    kind: Option<Kind>,
    #[serde(flatten)]
    linear: LinearFile,
    hidden_dropout_prob: Option<f64>,
    attention_probs_dropout_prob: Option<f64>,
    classifier_dropout: Option<f64>,
    score_bias: Option<bool>,
    num_labels: usize,
    trainable: Trainable,
    gradient_checkpointing: bool,
    quantization: Option<Quantization>,
    quantize_embeddings: bool,
    llm_int8_threshold: Option<f64>,
}

impl Default for ModelFile {
    fn default() -> Self {
        Self {
            path: None,
            shape: Shape::default(),
            vectors: None,
            freeze_embeddings: false,
            kind: None,
            linear: LinearFile::default(),
            hidden_dropout_prob: None,
            attention_probs_dropout_prob: None,
            classifier_dropout: None,
            score_bias: None,
            num_labels: 2,
            trainable: Trainable::default(),
            gradient_checkpointing: false,
            quantization: None,
            quantize_embeddings: false,
            llm_int8_threshold: None,
        }
    }
}

impl ModelFile {
    /// Decides between the two ways to give a model, and fills in what depends on it.
    pub(super) fn resolve(mut self) -> Result<Model, Fault> {
        if let Some(Kind::Network(family)) = self.kind {
            self.shape.family = Some(family);
        }
        let weights = match (self.path.take(), self.first_key(), self.kind) {
            (Some(path), None, _) => {
                self.linear.refuse()?;
                Weights::Pretrained(path)
            }
            (Some(path), Some(key), _) => {
                let message = format!(
                    "model.path is given too, and {}/config.json decides this; remove one of them",
                    path.display()
                );
                return Err(Fault { key: key.into(), message });
            }
            (None, _, Some(Kind::Linear(kind))) => self.linear(kind)?,
            (None, Some(_), _) => {
                self.linear.refuse()?;
                let family = self.shape.family();
                let recurrent = family.is_on_words() && family != Family::Transformer;
                let usual = if recurrent { DROPOUT_ON_WORDS } else { DROPOUT };
                let hidden = *self.hidden_dropout_prob.get_or_insert(usual);
                if !recurrent {
                    self.attention_probs_dropout_prob.get_or_insert(DROPOUT);
                }
                // GPT-2's classifier has none in transformers.
                let classifier = if family == Family::Gpt2 { 0.0 } else { hidden };
                self.classifier_dropout.get_or_insert(classifier);
                Weights::Random(Box::new(self.shape))
            }
            (None, None, _) => {
                let message = "missing: give the directory of a pretrained encoder or its name on \
                               the Hub, or the shape of a new one (model.vocab_size, \
                               model.hidden_size, ...), or model.kind = \"cnn\", \"lstm\", ... for \
                               a network on word vectors";
                return Err(Fault { key: "model.path".into(), message: message.into() });
            }
        };
        Ok(Model {
            weights,
            vectors: self.vectors,
            freeze_embeddings: self.freeze_embeddings,
            hidden_dropout_prob: self.hidden_dropout_prob,
            attention_probs_dropout_prob: self.attention_probs_dropout_prob,
            classifier_dropout: self.classifier_dropout,
            score_bias: self.score_bias,
            num_labels: self.num_labels,
            trainable: self.trainable,
            gradient_checkpointing: self.gradient_checkpointing,
            quantization: self.quantization,
            quantize_embeddings: self.quantize_embeddings,
            llm_int8_threshold: self.llm_int8_threshold,
        })
    }
}

impl ModelFile {
    /// The first key that says what the model is.
    fn first_key(&self) -> Option<String> {
        self.kind.map(|_| "model.kind".to_owned()).or_else(|| self.shape.first_key())
    }

    /// The linear classifier that the keys describe.
    fn linear(&mut self, kind: LinearKind) -> Result<Weights, Fault> {
        match self.shape.first_key() {
            Some(key) => {
                let message =
                    "means nothing to a linear model; remove it, or give another model.kind";
                Err(Fault { key: key.into(), message: message.into() })
            }
            None => {
                let linear = std::mem::take(&mut self.linear).resolve(kind)?;
                Ok(Weights::Linear(Box::new(linear)))
            }
        }
    }
}

impl From<Model> for ModelFile {
    fn from(model: Model) -> Self {
        let file = Self {
            vectors: model.vectors,
            freeze_embeddings: model.freeze_embeddings,
            hidden_dropout_prob: model.hidden_dropout_prob,
            attention_probs_dropout_prob: model.attention_probs_dropout_prob,
            classifier_dropout: model.classifier_dropout,
            score_bias: model.score_bias,
            num_labels: model.num_labels,
            trainable: model.trainable,
            gradient_checkpointing: model.gradient_checkpointing,
            quantization: model.quantization,
            quantize_embeddings: model.quantize_embeddings,
            llm_int8_threshold: model.llm_int8_threshold,
            ..Self::default()
        };
        match model.weights {
            Weights::Pretrained(path) => Self { path: Some(path), ..file },
            Weights::Random(mut shape) => {
                let kind = shape.family.take().map(Kind::Network);
                Self { shape: *shape, kind, ..file }
            }
            Weights::Linear(linear) => {
                let (kind, linear) = (*linear).into();
                Self { kind: Some(kind), linear, ..file }
            }
        }
    }
}

impl Model {
    /// Whether it is a network on word vectors.
    pub fn is_on_words(&self) -> bool {
        matches!(&self.weights, Weights::Random(shape) if shape.family().is_on_words())
    }

    pub(super) fn check(&self) -> Result<(), Fault> {
        match &self.weights {
            Weights::Pretrained(path) => ensure_path(Some(path), "model.path")?,
            Weights::Random(shape) => shape.check()?,
            Weights::Linear(linear) => linear.check()?,
        }
        self.check_words()?;
        for (dropout, key) in [
            (self.hidden_dropout_prob, "model.hidden_dropout_prob"),
            (self.attention_probs_dropout_prob, "model.attention_probs_dropout_prob"),
            (self.classifier_dropout, "model.classifier_dropout"),
        ] {
            ensure(
                dropout.is_none_or(|dropout| (0.0..1.0).contains(&dropout)),
                key,
                "must lie in [0, 1); 0.1 is usual, 0 is none",
            )?;
        }
        ensure(self.num_labels >= 2, "model.num_labels", "must be at least 2")?;
        ensure(
            self.llm_int8_threshold.is_none_or(|limit| limit >= 0.0 && limit.is_finite()),
            "model.llm_int8_threshold",
            "must be 0 (no column is spared) or more, and finite; 6 is usual",
        )?;
        ensure(
            self.llm_int8_threshold.is_none() || self.quantization == Some(Quantization::Int8),
            "model.llm_int8_threshold",
            "is only for model.quantization = \"int8\"; remove it",
        )
    }

    /// Refuses what only networks on word vectors have, and what they have not.
    fn check_words(&self) -> Result<(), Fault> {
        ensure_path(self.vectors.as_deref(), "model.vectors")?;
        let on_words = self.is_on_words();
        for (given, key) in [
            (self.vectors.is_some(), "model.vectors"),
            (self.freeze_embeddings, "model.freeze_embeddings"),
        ] {
            ensure(
                !given || on_words,
                key,
                "is only for a network on word vectors (model.kind = \"cnn\", \"lstm\", \"gru\", \
                 \"cnnlstm\", \"attention_lstm\", \"capsule_lstm\", \"transformer\"); remove it",
            )?;
        }
        for (given, key) in [
            (self.quantization.is_some(), "model.quantization"),
            (self.quantize_embeddings, "model.quantize_embeddings"),
        ] {
            ensure(!given || !on_words, key, "is only for encoders; remove it")?;
        }
        let attends = match &self.weights {
            Weights::Random(shape) => !on_words || shape.family() == Family::Transformer,
            Weights::Pretrained(_) => true,
            Weights::Linear(_) => false,
        };
        ensure(
            self.attention_probs_dropout_prob.is_none() || attends,
            "model.attention_probs_dropout_prob",
            "is only for networks with attention; remove it",
        )
    }

    /// Refuses to quantise weights that train, which `adapter` decides where there is one.
    pub(super) fn check_frozen(&self, adapter: bool) -> Result<(), Fault> {
        ensure(
            !adapter || !self.is_on_words(),
            "model.kind",
            "given together with [adapter], which is for encoders; remove one of them",
        )?;
        ensure(
            !adapter || self.trainable == Trainable::All,
            "model.trainable",
            "given together with [adapter], which says itself what trains; remove one of them",
        )?;
        for (quantized, key) in [
            (self.quantization.is_some(), "model.quantization"),
            (self.quantize_embeddings, "model.quantize_embeddings"),
        ] {
            ensure(
                !quantized || adapter || self.trainable == Trainable::Head,
                key,
                "weights in so few bits cannot train: add [adapter], or set model.trainable = \
                 \"head\", or remove it",
            )?;
        }
        Ok(())
    }
}
