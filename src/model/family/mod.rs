//! The families of pretrained encoders: each reads its `config.json` and says what the network is.
//!
//! | file | family |
//! |---|---|
//! | [`bert`] | BERT, and RoBERTa, which differs in names, positions and head |
//! | [`distilbert`] | DistilBERT |
//! | [`deberta`] | DeBERTa-v2 and v3 |
//! | [`modernbert`] | ModernBERT |
//! | [`gpt2`] | GPT-2 |

pub mod bert;
pub mod deberta;
pub mod distilbert;
pub mod gpt2;
pub mod modernbert;

use allreel_kernels::activation::Activation;
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Map, Value};

use super::plan::{LinearPlan, Plan};
pub use crate::config::Family;

/// Keys of a family's config that carry the dropouts that `[model]` can override.
pub struct DropoutKeys {
    /// After embeddings and sub-layers.
    pub hidden: &'static [&'static str],
    /// Of attention probabilities.
    pub attention: &'static [&'static str],
    /// Before the classifier.
    pub classifier: &'static [&'static str],
}

impl Family {
    /// Every family.
    pub const ALL: [Self; 6] = [
        Self::Bert,
        Self::DistilBert,
        Self::Roberta,
        Self::DebertaV2,
        Self::ModernBert,
        Self::Gpt2,
    ];

    /// The `model_type` of its `config.json`.
    pub fn model_type(self) -> &'static str {
        match self {
            Self::Bert => "bert",
            Self::DistilBert => "distilbert",
            Self::Roberta => "roberta",
            Self::DebertaV2 => "deberta-v2",
            Self::ModernBert => "modernbert",
            Self::Gpt2 => "gpt2",
        }
    }

    /// The class of transformers that loads what is saved.
    pub fn class(self) -> &'static str {
        match self {
            Self::Bert => "BertForSequenceClassification",
            Self::DistilBert => "DistilBertForSequenceClassification",
            Self::Roberta => "RobertaForSequenceClassification",
            Self::DebertaV2 => "DebertaV2ForSequenceClassification",
            Self::ModernBert => "ModernBertForSequenceClassification",
            Self::Gpt2 => "GPT2ForSequenceClassification",
        }
    }

    /// Prefix of the encoder's parameters, which a bare encoder is saved without.
    pub fn prefix(self) -> &'static str {
        match self {
            Self::Bert => "bert.",
            Self::DistilBert => "distilbert.",
            Self::Roberta => "roberta.",
            Self::DebertaV2 => "deberta.",
            Self::ModernBert => "model.",
            Self::Gpt2 => "transformer.",
        }
    }

    /// How names inside the encoder begin.
    pub fn roots(self) -> &'static [&'static str] {
        match self {
            Self::Bert => &["embeddings.", "encoder.", "pooler."],
            Self::DistilBert => &["embeddings.", "transformer."],
            Self::Roberta | Self::DebertaV2 => &["embeddings.", "encoder."],
            Self::ModernBert => &["embeddings.", "layers.", "final_norm."],
            Self::Gpt2 => &["wte.", "wpe.", "h.", "ln_f."],
        }
    }

    /// Parts of published checkpoints that classification does not use: pretraining heads, stored
    /// position ids and masks. Matched against the beginning or, with a leading dot, the end.
    pub fn unused(self) -> &'static [&'static str] {
        match self {
            Self::Bert => &["cls.", ".position_ids"],
            Self::DistilBert => &["vocab_", ".position_ids"],
            Self::Roberta => &["lm_head.", "pooler.", "roberta.pooler.", ".position_ids"],
            Self::DebertaV2 => &["mask_predictions.", "lm_predictions.", "cls.", ".position_ids"],
            Self::ModernBert => &["decoder."],
            Self::Gpt2 => &["lm_head.", ".attn.bias", ".attn.masked_bias"],
        }
    }

    /// How the dropouts are called.
    pub fn dropout_keys(self) -> DropoutKeys {
        match self {
            Self::Bert | Self::Roberta => DropoutKeys {
                hidden: &["hidden_dropout_prob"],
                attention: &["attention_probs_dropout_prob"],
                classifier: &["classifier_dropout"],
            },
            Self::DistilBert => DropoutKeys {
                hidden: &["dropout"],
                attention: &["attention_dropout"],
                classifier: &["seq_classif_dropout"],
            },
            Self::DebertaV2 => DropoutKeys {
                hidden: &["hidden_dropout_prob"],
                attention: &["attention_probs_dropout_prob"],
                classifier: &["cls_dropout"],
            },
            Self::ModernBert => DropoutKeys {
                hidden: &["embedding_dropout", "mlp_dropout"],
                attention: &["attention_dropout"],
                classifier: &["classifier_dropout"],
            },
            Self::Gpt2 => DropoutKeys {
                hidden: &["embd_pdrop", "resid_pdrop"],
                attention: &["attn_pdrop"],
                classifier: &[],
            },
        }
    }

    /// What the network of this `config.json` is.
    ///
    /// # Errors
    /// Says which key is missing, of the wrong type or unsupported.
    pub fn plan(self, config: &Map<String, Value>, num_labels: usize) -> Result<Plan, String> {
        match self {
            Self::Bert => read::<bert::BertConfig>(config)?.bert(num_labels),
            Self::Roberta => read::<bert::BertConfig>(config)?.roberta(num_labels),
            Self::DistilBert => read::<distilbert::DistilBertConfig>(config)?.plan(num_labels),
            Self::DebertaV2 => read::<deberta::DebertaV2Config>(config)?.plan(num_labels),
            Self::ModernBert => read::<modernbert::ModernBertConfig>(config)?.plan(num_labels),
            Self::Gpt2 => read::<gpt2::Gpt2Config>(config)?.plan(num_labels),
        }
    }

    /// `config` with transformers' default for each absent key (of DeBERTa: those of v3), under the
    /// family's own names: what a new network saves.
    ///
    /// # Errors
    /// Says which key is of the wrong type.
    pub fn complete(self, config: &Map<String, Value>) -> Result<Map<String, Value>, String> {
        match self {
            Self::Bert | Self::Roberta => complete::<bert::BertConfig>(config),
            Self::DistilBert => complete::<distilbert::DistilBertConfig>(config),
            Self::DebertaV2 => {
                let mut fields = deberta::v3_defaults();
                fields.extend(config.clone());
                complete::<deberta::DebertaV2Config>(&fields)
            }
            Self::ModernBert => complete::<modernbert::ModernBertConfig>(config),
            Self::Gpt2 => complete::<gpt2::Gpt2Config>(config),
        }
    }
}

/// The config of one family; transformers' defaults where a key is absent.
fn read<T: DeserializeOwned>(config: &Map<String, Value>) -> Result<T, String> {
    serde_json::from_value(Value::Object(config.clone())).map_err(|e| e.to_string())
}

/// All fields of the config of one family that have a value.
fn complete<T: DeserializeOwned + Serialize>(
    config: &Map<String, Value>,
) -> Result<Map<String, Value>, String> {
    match serde_json::to_value(read::<T>(config)?) {
        Ok(Value::Object(all)) => Ok(all.into_iter().filter(|(_, v)| !v.is_null()).collect()),
        Ok(other) => Err(format!("not an object: {other}")),
        Err(e) => Err(e.to_string()),
    }
}

/// An activation by its name in transformers.
fn activation(key: &str, name: &str) -> Result<Activation, String> {
    match name {
        "gelu" => Ok(Activation::Gelu),
        "gelu_new" | "gelu_pytorch_tanh" => Ok(Activation::GeluTanh),
        "relu" => Ok(Activation::Relu),
        "silu" | "swish" => Ok(Activation::Silu),
        "tanh" => Ok(Activation::Tanh),
        other => Err(format!("{key} {other:?} is unknown; use gelu, gelu_new, relu, silu or tanh")),
    }
}

/// Checks what every family needs: no size is zero, the heads divide the width, dropout keys reach.
fn check(hidden: usize, heads: usize, layers: usize, sizes: &[usize]) -> Result<(), String> {
    if hidden == 0 || layers == 0 || sizes.contains(&0) {
        return Err("a size is zero".into());
    }
    if heads == 0 || !hidden.is_multiple_of(heads) {
        return Err(format!("num_attention_heads {heads} does not divide hidden_size {hidden}"));
    }
    if heads > 256 || layers > 4096 {
        return Err("more than 256 heads or 4096 layers (dropout keys end there)".into());
    }
    Ok(())
}

/// The classifier of `num_labels` outputs called `name`.
fn classifier(name: &str, num_labels: usize, inputs: usize, deviation: f64) -> LinearPlan {
    LinearPlan::new(name, num_labels, inputs, deviation)
}

#[cfg(test)]
mod tests;
