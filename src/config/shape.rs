//! The shape of a new encoder, part of `[model]`.
//!
//! Keys carry the names of Hugging Face's `config.json`.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{Fault, ensure, ensure_kind};

/// A family of encoders, by the `model_type` of Hugging Face's `config.json`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Family {
    /// BERT (Devlin et al. 2019).
    #[default]
    #[serde(rename = "bert")]
    Bert,
    /// DistilBERT (Sanh et al. 2019).
    #[serde(rename = "distilbert")]
    DistilBert,
    /// RoBERTa (Liu et al. 2019).
    #[serde(rename = "roberta")]
    Roberta,
    /// DeBERTa-v2 and v3 (He et al. 2021).
    #[serde(rename = "deberta-v2")]
    DebertaV2,
    /// ModernBERT (Warner et al. 2024).
    #[serde(rename = "modernbert")]
    ModernBert,
    /// GPT-2 (Radford et al. 2019).
    #[serde(rename = "gpt2")]
    Gpt2,
}

/// The shape of a new encoder, under the names of BERT's, DeBERTa's and ModernBERT's `config.json`
/// (DistilBERT's and GPT-2's own names for the same things are not used here). What is not given
/// is as in the family's config in transformers; for DeBERTa as in deberta-v3-base.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Shape {
    /// The family. Default `"bert"`. Hugging Face: `model_type`.
    #[serde(rename = "kind")]
    pub family: Option<Family>,
    /// Tokens the embedding holds. Required.
    pub vocab_size: Option<usize>,
    /// Width of a token's activations. Required.
    pub hidden_size: Option<usize>,
    /// Number of layers. Required.
    pub num_hidden_layers: Option<usize>,
    /// Attention heads per layer; must divide `hidden_size`. Required.
    pub num_attention_heads: Option<usize>,
    /// Width inside the feed-forward sub-layer. Required.
    pub intermediate_size: Option<usize>,
    /// Rows of the position table; in DeBERTa the largest distance that is told apart.
    pub max_position_embeddings: Option<usize>,
    /// Kinds of segments (BERT, RoBERTa, DeBERTa).
    pub type_vocab_size: Option<usize>,
    /// The feed-forward activation.
    pub hidden_act: Option<Activation>,
    /// Added to the variance in layer norms (not DistilBERT).
    pub layer_norm_eps: Option<f64>,
    /// Standard deviation of the initial weights.
    pub initializer_range: Option<f64>,
    /// DeBERTa: buckets of the relative positions.
    pub position_buckets: Option<i64>,
    /// DeBERTa: largest distance, if not `max_position_embeddings`.
    pub max_relative_positions: Option<i64>,
    /// DeBERTa: `["c2p", "p2c"]` or one of them.
    pub pos_att_type: Option<Vec<String>>,
    /// DeBERTa: whether positions use the projections of content.
    pub share_att_key: Option<bool>,
    /// DeBERTa: `"layer_norm"` or `"none"`.
    pub norm_rel_ebd: Option<String>,
    /// DeBERTa: whether absolute positions are added to the words.
    pub position_biased_input: Option<bool>,
    /// DeBERTa: tokens that the convolution beside the first layer reads; 0 for none.
    pub conv_kernel_size: Option<usize>,
    /// ModernBERT: tokens that a local layer sees, half on either side.
    pub local_attention: Option<usize>,
    /// ModernBERT: every how many layers one is global.
    pub global_attn_every_n_layers: Option<usize>,
    /// ModernBERT: `"cls"` or `"mean"`.
    pub classifier_pooling: Option<String>,
}

/// Keys that only some families have.
const SPECIAL: [(&[Family], &[&str]); 4] = [
    (&[Family::Bert, Family::Roberta, Family::DebertaV2], &["type_vocab_size"]),
    (
        &[Family::Bert, Family::Roberta, Family::DebertaV2, Family::ModernBert, Family::Gpt2],
        &["layer_norm_eps"],
    ),
    (
        &[Family::DebertaV2],
        &[
            "position_buckets",
            "max_relative_positions",
            "pos_att_type",
            "share_att_key",
            "norm_rel_ebd",
            "position_biased_input",
            "conv_kernel_size",
        ],
    ),
    (
        &[Family::ModernBert],
        &["local_attention", "global_attn_every_n_layers", "classifier_pooling"],
    ),
];

/// A feed-forward activation, under Hugging Face's name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// GELU by the error function.
    Gelu,
    /// GELU by its tanh approximation.
    GeluNew,
    /// max(x, 0).
    Relu,
    /// x times the logistic function of x.
    Silu,
}

impl Shape {
    /// The family, BERT unless told.
    pub fn family(&self) -> Family {
        self.family.unwrap_or_default()
    }

    /// What was given, as fields of a `config.json`.
    pub fn fields(&self) -> Map<String, Value> {
        let mut fields = super::fields(self);
        fields.remove("kind");
        fields
    }

    /// The first key that is given.
    pub(super) fn first_key(&self) -> Option<String> {
        let kind = self.family.map(|_| "kind".to_owned());
        kind.or_else(|| self.fields().keys().next().cloned()).map(|key| format!("model.{key}"))
    }

    /// The longest sequence, where a table of absolute positions was given a length.
    pub(super) fn longest(&self) -> Option<usize> {
        match self.family() {
            Family::DebertaV2 if self.position_biased_input != Some(true) => None,
            Family::Roberta => Some(self.max_position_embeddings?.saturating_sub(2)),
            Family::Bert => Some(self.max_position_embeddings.unwrap_or(512)),
            _ => self.max_position_embeddings,
        }
    }

    pub(super) fn check(&self) -> Result<(), Fault> {
        let needed = [
            (self.vocab_size, "model.vocab_size"),
            (self.hidden_size, "model.hidden_size"),
            (self.num_hidden_layers, "model.num_hidden_layers"),
            (self.num_attention_heads, "model.num_attention_heads"),
            (self.intermediate_size, "model.intermediate_size"),
        ];
        for (size, key) in needed {
            ensure(
                size.is_some(),
                key,
                "missing: a new encoder needs it; give it, or set model.path for a pretrained one",
            )?;
        }
        let others = [
            (self.max_position_embeddings, "model.max_position_embeddings"),
            (self.local_attention, "model.local_attention"),
            (self.global_attn_every_n_layers, "model.global_attn_every_n_layers"),
        ];
        for (size, key) in needed.into_iter().chain(others) {
            ensure(size != Some(0), key, "must be at least 1")?;
        }
        ensure(
            self.type_vocab_size != Some(0) || self.family() == Family::DebertaV2,
            "model.type_vocab_size",
            "must be at least 1",
        )?;
        ensure(
            self.vocab_size.is_none_or(|size| u32::try_from(size).is_ok()),
            "model.vocab_size",
            "must be below 2^32, as token ids are 32 bits wide",
        )?;
        if let (Some(hidden), Some(heads)) = (self.hidden_size, self.num_attention_heads) {
            ensure(
                hidden.is_multiple_of(heads),
                "model.num_attention_heads",
                format!("must divide model.hidden_size, which is {hidden}"),
            )?;
        }
        for (value, key, usual) in [
            (self.layer_norm_eps, "model.layer_norm_eps", "1e-12"),
            (self.initializer_range, "model.initializer_range", "0.02"),
        ] {
            ensure(
                value.is_none_or(|value| value > 0.0 && value.is_finite()),
                key,
                format!("must be greater than 0 and finite; {usual} is usual"),
            )?;
        }
        ensure_kind(&self.fields(), &SPECIAL, self.family(), "model", "kind")
    }
}
