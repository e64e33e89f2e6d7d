//! `[model]`: a pretrained directory or the shape of a new encoder, and what of it trains.
//!
//! Keys that describe the encoder carry the names of Hugging Face's `config.json`.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{Fault, ensure, ensure_path};

/// Dropout of a new encoder where nothing is said, as in Hugging Face's `BertConfig`.
const DROPOUT: f64 = 0.1;

/// The `[model]` section.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(into = "ModelFile")]
pub struct Model {
    /// Where the encoder's weights come from.
    pub weights: Weights,
    /// Dropout after embeddings and sub-layers. Default: that of the pretrained `config.json`,
    /// 0.1 for a new encoder.
    pub hidden_dropout_prob: Option<f64>,
    /// Dropout of the attention weights. Default: as for `hidden_dropout_prob`.
    pub attention_probs_dropout_prob: Option<f64>,
    /// Dropout before the classifier. Default: that of the pretrained `config.json`,
    /// `hidden_dropout_prob` for a new encoder.
    pub classifier_dropout: Option<f64>,
    /// Classes to tell apart. Default 2.
    pub num_labels: usize,
    /// Which weights train. Default `"all"`.
    pub trainable: Trainable,
    /// Keep only each layer's input and run it again for the backward pass: less memory, about a
    /// third more work. Default false.
    pub gradient_checkpointing: bool,
}

/// Where the encoder's weights come from.
#[derive(Debug, Clone, PartialEq)]
pub enum Weights {
    /// `model.path`: a directory in Hugging Face's format.
    Pretrained(PathBuf),
    /// A new encoder of this shape, with random weights.
    Random(Architecture),
}

/// The shape of a new encoder, under the names of Hugging Face's `config.json`.
#[derive(Debug, Clone, PartialEq)]
pub struct Architecture {
    /// The family. Default `"bert"`. Hugging Face: `model_type`.
    pub kind: Kind,
    /// Tokens the embedding holds. Required.
    pub vocab_size: usize,
    /// Width of a token's activations. Required.
    pub hidden_size: usize,
    /// Number of layers. Required.
    pub num_hidden_layers: usize,
    /// Attention heads per layer; must divide `hidden_size`. Required.
    pub num_attention_heads: usize,
    /// Width inside the feed-forward sub-layer. Required.
    pub intermediate_size: usize,
    /// Tokens of the longest sequence. Default 512.
    pub max_position_embeddings: usize,
    /// Kinds of segments. Default 2.
    pub type_vocab_size: usize,
    /// The feed-forward activation. Default `"gelu"`.
    pub hidden_act: Activation,
    /// Added to the variance in layer norms. Default 1e-12.
    pub layer_norm_eps: f64,
    /// Standard deviation of the initial weights. Default 0.02.
    pub initializer_range: f64,
}

/// A family of encoders.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// BERT (Devlin et al., 2019).
    #[default]
    Bert,
}

/// A feed-forward activation, under Hugging Face's name.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// GELU by the error function.
    #[default]
    Gelu,
    /// GELU by its tanh approximation.
    GeluNew,
    /// max(x, 0).
    Relu,
}

/// Which weights train.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Trainable {
    /// All of them.
    #[default]
    All,
    /// The last encoder layer, the pooler and the classifier.
    LastBlock,
    /// The pooler and the classifier.
    Head,
}

/// The section as it is written: `path`, or the keys of an [`Architecture`].
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct ModelFile {
    path: Option<PathBuf>,
    kind: Option<Kind>,
    vocab_size: Option<usize>,
    hidden_size: Option<usize>,
    num_hidden_layers: Option<usize>,
    num_attention_heads: Option<usize>,
    intermediate_size: Option<usize>,
    max_position_embeddings: Option<usize>,
    type_vocab_size: Option<usize>,
    hidden_act: Option<Activation>,
    layer_norm_eps: Option<f64>,
    initializer_range: Option<f64>,
    hidden_dropout_prob: Option<f64>,
    attention_probs_dropout_prob: Option<f64>,
    classifier_dropout: Option<f64>,
    num_labels: usize,
    trainable: Trainable,
    gradient_checkpointing: bool,
}

impl Default for ModelFile {
    fn default() -> Self {
        Self {
            path: None,
            kind: None,
            vocab_size: None,
            hidden_size: None,
            num_hidden_layers: None,
            num_attention_heads: None,
            intermediate_size: None,
            max_position_embeddings: None,
            type_vocab_size: None,
            hidden_act: None,
            layer_norm_eps: None,
            initializer_range: None,
            hidden_dropout_prob: None,
            attention_probs_dropout_prob: None,
            classifier_dropout: None,
            num_labels: 2,
            trainable: Trainable::default(),
            gradient_checkpointing: false,
        }
    }
}

impl ModelFile {
    /// The first key of an architecture that is given.
    fn architecture_key(&self) -> Option<&'static str> {
        [
            (self.kind.is_some(), "model.kind"),
            (self.vocab_size.is_some(), "model.vocab_size"),
            (self.hidden_size.is_some(), "model.hidden_size"),
            (self.num_hidden_layers.is_some(), "model.num_hidden_layers"),
            (self.num_attention_heads.is_some(), "model.num_attention_heads"),
            (self.intermediate_size.is_some(), "model.intermediate_size"),
            (self.max_position_embeddings.is_some(), "model.max_position_embeddings"),
            (self.type_vocab_size.is_some(), "model.type_vocab_size"),
            (self.hidden_act.is_some(), "model.hidden_act"),
            (self.layer_norm_eps.is_some(), "model.layer_norm_eps"),
            (self.initializer_range.is_some(), "model.initializer_range"),
        ]
        .into_iter()
        .find_map(|(given, key)| given.then_some(key))
    }

    fn architecture(&self) -> Result<Architecture, Fault> {
        let needed = |value: Option<usize>, key| {
            value.ok_or_else(|| Fault {
                key,
                message: "missing: a new encoder needs it; give it, or set model.path for a \
                          pretrained one"
                    .into(),
            })
        };
        Ok(Architecture {
            kind: self.kind.unwrap_or_default(),
            vocab_size: needed(self.vocab_size, "model.vocab_size")?,
            hidden_size: needed(self.hidden_size, "model.hidden_size")?,
            num_hidden_layers: needed(self.num_hidden_layers, "model.num_hidden_layers")?,
            num_attention_heads: needed(self.num_attention_heads, "model.num_attention_heads")?,
            intermediate_size: needed(self.intermediate_size, "model.intermediate_size")?,
            max_position_embeddings: self.max_position_embeddings.unwrap_or(512),
            type_vocab_size: self.type_vocab_size.unwrap_or(2),
            hidden_act: self.hidden_act.unwrap_or_default(),
            layer_norm_eps: self.layer_norm_eps.unwrap_or(1e-12),
            initializer_range: self.initializer_range.unwrap_or(0.02),
        })
    }

    /// Decides between the two ways to give a model, and fills in what depends on it.
    pub(super) fn resolve(mut self) -> Result<Model, Fault> {
        let weights = match (self.path.take(), self.architecture_key()) {
            (Some(path), None) => Weights::Pretrained(path),
            (Some(path), Some(key)) => {
                let message = format!(
                    "model.path is given too, and {}/config.json decides this; remove one of them",
                    path.display()
                );
                return Err(Fault { key, message });
            }
            (None, Some(_)) => {
                let hidden = *self.hidden_dropout_prob.get_or_insert(DROPOUT);
                self.attention_probs_dropout_prob.get_or_insert(DROPOUT);
                self.classifier_dropout.get_or_insert(hidden);
                Weights::Random(self.architecture()?)
            }
            (None, None) => {
                let message = "missing: give the directory of a pretrained encoder, or the \
                               shape of a new one (model.vocab_size, model.hidden_size, ...)";
                return Err(Fault { key: "model.path", message: message.into() });
            }
        };
        Ok(Model {
            weights,
            hidden_dropout_prob: self.hidden_dropout_prob,
            attention_probs_dropout_prob: self.attention_probs_dropout_prob,
            classifier_dropout: self.classifier_dropout,
            num_labels: self.num_labels,
            trainable: self.trainable,
            gradient_checkpointing: self.gradient_checkpointing,
        })
    }
}

impl From<Model> for ModelFile {
    fn from(model: Model) -> Self {
        let file = Self {
            hidden_dropout_prob: model.hidden_dropout_prob,
            attention_probs_dropout_prob: model.attention_probs_dropout_prob,
            classifier_dropout: model.classifier_dropout,
            num_labels: model.num_labels,
            trainable: model.trainable,
            gradient_checkpointing: model.gradient_checkpointing,
            ..Self::default()
        };
        match model.weights {
            Weights::Pretrained(path) => Self { path: Some(path), ..file },
            Weights::Random(architecture) => Self {
                kind: Some(architecture.kind),
                vocab_size: Some(architecture.vocab_size),
                hidden_size: Some(architecture.hidden_size),
                num_hidden_layers: Some(architecture.num_hidden_layers),
                num_attention_heads: Some(architecture.num_attention_heads),
                intermediate_size: Some(architecture.intermediate_size),
                max_position_embeddings: Some(architecture.max_position_embeddings),
                type_vocab_size: Some(architecture.type_vocab_size),
                hidden_act: Some(architecture.hidden_act),
                layer_norm_eps: Some(architecture.layer_norm_eps),
                initializer_range: Some(architecture.initializer_range),
                ..file
            },
        }
    }
}

impl Model {
    pub(super) fn check(&self) -> Result<(), Fault> {
        match &self.weights {
            Weights::Pretrained(path) => ensure_path(Some(path), "model.path")?,
            Weights::Random(architecture) => architecture.check()?,
        }
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
        ensure(self.num_labels >= 2, "model.num_labels", "must be at least 2")
    }
}

impl Architecture {
    fn check(&self) -> Result<(), Fault> {
        for (size, key) in [
            (self.vocab_size, "model.vocab_size"),
            (self.hidden_size, "model.hidden_size"),
            (self.num_hidden_layers, "model.num_hidden_layers"),
            (self.num_attention_heads, "model.num_attention_heads"),
            (self.intermediate_size, "model.intermediate_size"),
            (self.max_position_embeddings, "model.max_position_embeddings"),
            (self.type_vocab_size, "model.type_vocab_size"),
        ] {
            ensure(size > 0, key, "must be at least 1")?;
        }
        ensure(
            u32::try_from(self.vocab_size).is_ok(),
            "model.vocab_size",
            "must be below 2^32, as token ids are 32 bits wide",
        )?;
        ensure(
            self.hidden_size.is_multiple_of(self.num_attention_heads),
            "model.num_attention_heads",
            format!("must divide model.hidden_size, which is {}", self.hidden_size),
        )?;
        ensure(
            self.layer_norm_eps > 0.0 && self.layer_norm_eps.is_finite(),
            "model.layer_norm_eps",
            "must be greater than 0 and finite; 1e-12 is usual",
        )?;
        ensure(
            self.initializer_range > 0.0 && self.initializer_range.is_finite(),
            "model.initializer_range",
            "must be greater than 0 and finite; 0.02 is usual",
        )
    }
}
