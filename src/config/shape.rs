//! The shape of a new network, part of `[model]`: an encoder, or a network on word vectors.
//!
//! Keys carry the names of Hugging Face's `config.json` where it has them.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{Fault, ensure, ensure_kind};

/// A family of networks: encoders by the `model_type` of Hugging Face's `config.json`, and those on word
/// vectors.
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
    /// Convolutions of several widths, the largest answer of each over time (Kim 2014).
    #[serde(rename = "cnn")]
    Cnn,
    /// Bidirectional LSTM, both final states.
    #[serde(rename = "lstm")]
    Lstm,
    /// Bidirectional GRU, both final states.
    #[serde(rename = "gru")]
    Gru,
    /// Convolutions, and a bidirectional LSTM over what they say of each word.
    #[serde(rename = "cnnlstm")]
    CnnLstm,
    /// Bidirectional LSTM, a mean over time with learnt weights (Yang et al. 2016).
    #[serde(rename = "attention_lstm")]
    AttentionLstm,
    /// Bidirectional LSTM, capsules with dynamic routing (Sabour et al. 2017).
    #[serde(rename = "capsule_lstm")]
    CapsuleLstm,
    /// Transformer blocks over words and positions (Vaswani et al. 2017), mean over time.
    #[serde(rename = "transformer")]
    Transformer,
}

impl Family {
    /// Families of encoders, of which pretrained weights are published.
    pub const ENCODERS: [Self; 6] = [
        Self::Bert,
        Self::DistilBert,
        Self::Roberta,
        Self::DebertaV2,
        Self::ModernBert,
        Self::Gpt2,
    ];

    /// Networks on word vectors, which start new.
    pub const ON_WORDS: [Self; 7] = [
        Self::Cnn,
        Self::Lstm,
        Self::Gru,
        Self::CnnLstm,
        Self::AttentionLstm,
        Self::CapsuleLstm,
        Self::Transformer,
    ];

    /// Whether it reads words, of which it has vectors.
    pub fn is_on_words(self) -> bool {
        Self::ON_WORDS.contains(&self)
    }
}

/// The shape of a new network, under the names of BERT's, DeBERTa's and ModernBERT's `config.json`
/// (DistilBERT's and GPT-2's own names for the same things are not used here). What is not given
/// is as in the family's config in transformers; for DeBERTa as in deberta-v3-base; for a network on word
/// vectors as in [`crate::model::family::words`].
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Shape {
    /// The family. Default `"bert"`. Hugging Face: `model_type`.
    #[serde(rename = "kind")]
    pub family: Option<Family>,
    /// Tokens the embedding holds. Required for an encoder; for a network on word vectors the most words
    /// of a vocabulary that is made of the training reviews, default all.
    pub vocab_size: Option<usize>,
    /// Width of a token's activations; of each direction of a recurrent layer. Required for an encoder.
    pub hidden_size: Option<usize>,
    /// Number of layers. Required for an encoder.
    pub num_hidden_layers: Option<usize>,
    /// Attention heads per layer; must divide `hidden_size`. Required for an encoder.
    pub num_attention_heads: Option<usize>,
    /// Width inside the feed-forward sub-layer. Required for an encoder.
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
    /// On words: columns of the word vectors. Default: those of `model.vectors`, else 100.
    pub embedding_size: Option<usize>,
    /// Convolutions: words that each of them reads, odd.
    pub kernel_sizes: Option<Vec<usize>>,
    /// Convolutions: outputs of each of them.
    pub num_filters: Option<usize>,
    /// `attention_lstm`: width of the layer that weighs words.
    pub attention_size: Option<usize>,
    /// `capsule_lstm`: capsules.
    pub num_capsules: Option<usize>,
    /// `capsule_lstm`: numbers of a capsule.
    pub capsule_size: Option<usize>,
    /// `capsule_lstm`: iterations of routing.
    pub num_routings: Option<usize>,
}

/// Encoders, and the transformer on word vectors.
const WITH_ATTENTION: [Family; 7] = [
    Family::Bert,
    Family::DistilBert,
    Family::Roberta,
    Family::DebertaV2,
    Family::ModernBert,
    Family::Gpt2,
    Family::Transformer,
];

/// Those with layers of a hidden size: all but `cnn`.
const WITH_LAYERS: [Family; 12] = [
    Family::Bert,
    Family::DistilBert,
    Family::Roberta,
    Family::DebertaV2,
    Family::ModernBert,
    Family::Gpt2,
    Family::Lstm,
    Family::Gru,
    Family::CnnLstm,
    Family::AttentionLstm,
    Family::CapsuleLstm,
    Family::Transformer,
];

/// Keys that only some families have.
const SPECIAL: [(&[Family], &[&str]); 11] = [
    (&WITH_LAYERS, &["hidden_size", "num_hidden_layers"]),
    (
        &WITH_ATTENTION,
        &["num_attention_heads", "intermediate_size", "max_position_embeddings", "hidden_act"],
    ),
    (&Family::ENCODERS, &["initializer_range"]),
    (&Family::ON_WORDS, &["embedding_size"]),
    (&[Family::Cnn, Family::CnnLstm], &["kernel_sizes", "num_filters"]),
    (&[Family::AttentionLstm], &["attention_size"]),
    (&[Family::CapsuleLstm], &["num_capsules", "capsule_size", "num_routings"]),
    (&[Family::Bert, Family::Roberta, Family::DebertaV2], &["type_vocab_size"]),
    (
        &[
            Family::Bert,
            Family::Roberta,
            Family::DebertaV2,
            Family::ModernBert,
            Family::Gpt2,
            Family::Transformer,
        ],
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
            Family::Bert | Family::Transformer => Some(self.max_position_embeddings.unwrap_or(512)),
            _ => self.max_position_embeddings,
        }
    }

    pub(super) fn check(&self) -> Result<(), Fault> {
        let sizes = [
            (self.vocab_size, "model.vocab_size"),
            (self.hidden_size, "model.hidden_size"),
            (self.num_hidden_layers, "model.num_hidden_layers"),
            (self.num_attention_heads, "model.num_attention_heads"),
            (self.intermediate_size, "model.intermediate_size"),
        ];
        let needed = if self.family().is_on_words() { &[][..] } else { &sizes };
        for (size, key) in needed {
            ensure(
                size.is_some(),
                *key,
                "missing: a new encoder needs it; give it, or set model.path for a pretrained one",
            )?;
        }
        let others = [
            (self.max_position_embeddings, "model.max_position_embeddings"),
            (self.local_attention, "model.local_attention"),
            (self.global_attn_every_n_layers, "model.global_attn_every_n_layers"),
            (self.embedding_size, "model.embedding_size"),
            (self.num_filters, "model.num_filters"),
            (self.attention_size, "model.attention_size"),
            (self.num_capsules, "model.num_capsules"),
            (self.capsule_size, "model.capsule_size"),
            (self.num_routings, "model.num_routings"),
        ];
        for (size, key) in sizes.into_iter().chain(others) {
            ensure(size != Some(0), key, "must be at least 1")?;
        }
        ensure(
            self.kernel_sizes
                .as_ref()
                .is_none_or(|sizes| !sizes.is_empty() && sizes.iter().all(|size| size % 2 == 1)),
            "model.kernel_sizes",
            "must be a list of odd numbers of words, such as [3, 5, 7]",
        )?;
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
