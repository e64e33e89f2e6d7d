//! The families of networks: each reads its `config.json` and says what the network is.
//!
//! | file | family |
//! |---|---|
//! | [`bert`] | BERT, and RoBERTa, which differs in names, positions and head |
//! | [`distilbert`] | DistilBERT |
//! | [`deberta`] | DeBERTa-v2 and v3 |
//! | [`modernbert`] | ModernBERT |
//! | [`gpt2`] | GPT-2 |
//! | [`words`] | networks on word vectors, which have no pretrained weights |

pub mod bert;
pub mod deberta;
pub mod distilbert;
pub mod gpt2;
pub mod modernbert;
pub mod words;

use allreel_kernels::activation::Activation;
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Map, Value};

use super::plan::Plan;
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
    /// The `model_type` of its `config.json`.
    pub fn model_type(self) -> &'static str {
        match self {
            Self::Bert => "bert",
            Self::DistilBert => "distilbert",
            Self::Roberta => "roberta",
            Self::DebertaV2 => "deberta-v2",
            Self::ModernBert => "modernbert",
            Self::Gpt2 => "gpt2",
            Self::Cnn => "cnn",
            Self::Lstm => "lstm",
            Self::Gru => "gru",
            Self::CnnLstm => "cnnlstm",
            Self::AttentionLstm => "attention_lstm",
            Self::CapsuleLstm => "capsule_lstm",
            Self::Transformer => "transformer",
        }
    }

    /// The class of transformers that loads what is saved, if it has one.
    pub fn class(self) -> Option<&'static str> {
        Some(match self {
            Self::Bert => "BertForSequenceClassification",
            Self::DistilBert => "DistilBertForSequenceClassification",
            Self::Roberta => "RobertaForSequenceClassification",
            Self::DebertaV2 => "DebertaV2ForSequenceClassification",
            Self::ModernBert => "ModernBertForSequenceClassification",
            Self::Gpt2 => "GPT2ForSequenceClassification",
            _ => return None,
        })
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
            _ => "",
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
            _ => &[],
        }
    }

    /// Parts of published checkpoints that classification does not use: pretraining heads, stored
    /// position ids and masks. Matched against the beginning or, with a leading dot, the end.
    pub fn unused(self) -> &'static [&'static str] {
        match self {
            Self::Bert => &["cls.", ".position_ids"],
            Self::DistilBert => &["vocab_", ".position_ids"],
            Self::Roberta => &["lm_head.", "pooler.", "roberta.pooler.", ".position_ids"],
            Self::DebertaV2 => &[
                "mask_predictions.",
                "lm_predictions.",
                "cls.",
                ".position_ids",
                ".position_embeddings.weight",
            ],
            Self::ModernBert => &["decoder."],
            Self::Gpt2 => &["lm_head.", ".attn.bias", ".attn.masked_bias"],
            _ => &[],
        }
    }

    /// Keys of a new encoder's shape that the family calls otherwise.
    fn own_names(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Self::DistilBert => &[
                ("hidden_size", "dim"),
                ("num_hidden_layers", "n_layers"),
                ("num_attention_heads", "n_heads"),
                ("intermediate_size", "hidden_dim"),
                ("hidden_act", "activation"),
            ],
            Self::ModernBert => {
                &[("hidden_act", "hidden_activation"), ("layer_norm_eps", "norm_eps")]
            }
            Self::Gpt2 => &[
                ("max_position_embeddings", "n_positions"),
                ("hidden_size", "n_embd"),
                ("num_hidden_layers", "n_layer"),
                ("num_attention_heads", "n_head"),
                ("intermediate_size", "n_inner"),
                ("hidden_act", "activation_function"),
                ("layer_norm_eps", "layer_norm_epsilon"),
            ],
            _ => &[],
        }
    }

    /// How the dropouts are called.
    pub fn dropout_keys(self) -> DropoutKeys {
        match self {
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
                classifier: &["score_dropout"],
            },
            _ => DropoutKeys {
                hidden: &["hidden_dropout_prob"],
                attention: &["attention_probs_dropout_prob"],
                classifier: &["classifier_dropout"],
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
            Self::Roberta => read::<bert::BertConfig>(&roberta(config))?.roberta(num_labels),
            Self::DistilBert => read::<distilbert::DistilBertConfig>(config)?.plan(num_labels),
            Self::DebertaV2 => read::<deberta::DebertaV2Config>(config)?.plan(num_labels),
            Self::ModernBert => read::<modernbert::ModernBertConfig>(config)?.plan(num_labels),
            Self::Gpt2 => read::<gpt2::Gpt2Config>(config)?.plan(num_labels),
            _ => read::<words::WordsConfig>(config)?.plan(self, num_labels),
        }
    }

    /// The config of a new network: `fields`, which have the names of `[model]`, under the family's own
    /// names, and transformers' default for each absent key (for DeBERTa: those of v3).
    ///
    /// # Errors
    /// Says which key is of the wrong type.
    pub fn complete(self, fields: &Map<String, Value>) -> Result<Map<String, Value>, String> {
        let own = |key: &str| self.own_names().iter().find(|(name, _)| *name == key);
        let config = fields.iter().map(|(key, value)| {
            (own(key).map_or(key.as_str(), |(_, own)| own).to_owned(), value.clone())
        });
        let config: Map<String, Value> = config.collect();
        match self {
            Self::Bert => complete::<bert::BertConfig>(&config),
            Self::Roberta => complete::<bert::BertConfig>(&roberta(&config)),
            Self::DistilBert => complete::<distilbert::DistilBertConfig>(&config),
            Self::DebertaV2 => {
                let mut fields = deberta::v3_defaults();
                fields.extend(config);
                complete::<deberta::DebertaV2Config>(&fields)
            }
            Self::ModernBert => complete::<modernbert::ModernBertConfig>(&config),
            Self::Gpt2 => complete::<gpt2::Gpt2Config>(&config),
            _ => complete::<words::WordsConfig>(&config),
        }
    }
}

/// The config of one family; transformers' defaults where a key is absent.
fn read<T: DeserializeOwned>(config: &Map<String, Value>) -> Result<T, String> {
    serde_json::from_value(Value::Object(config.clone())).map_err(|e| {
        // Every key has a default, so that each can be read alone: which one is it?
        let alone = |(key, value): (&String, &Value)| {
            let one = Map::from_iter([(key.clone(), value.clone())]);
            serde_json::from_value::<T>(Value::Object(one)).is_err().then(|| key.clone())
        };
        config.iter().find_map(alone).map_or_else(|| e.to_string(), |key| format!("{key}: {e}"))
    })
}

/// `config` with what `RobertaConfig` has for an absent key where `BertConfig` has something else.
fn roberta(config: &Map<String, Value>) -> Map<String, Value> {
    let mut config = config.clone();
    config.entry("pad_token_id").or_insert(1.into());
    config.entry("vocab_size").or_insert(50265.into());
    config
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
fn check(
    hidden: usize,
    heads: usize,
    layers: usize,
    sizes: &[(&str, usize)],
) -> Result<(), String> {
    let all = [("hidden_size", hidden), ("num_hidden_layers", layers)];
    if let Some((key, _)) = all.iter().chain(sizes).find(|(_, size)| *size == 0) {
        return Err(format!("{key} is 0"));
    }
    if heads == 0 || !hidden.is_multiple_of(heads) {
        return Err(format!("num_attention_heads {heads} does not divide hidden_size {hidden}"));
    }
    if heads > 256 || layers > 4096 {
        return Err("more than 256 heads or 4096 layers (dropout keys end there)".into());
    }
    Ok(())
}

/// Checks that probabilities are below 1 and not negative.
fn check_dropouts(dropouts: &[(&str, f64)]) -> Result<(), String> {
    match dropouts.iter().find(|(_, p)| !(0.0..1.0).contains(p)) {
        Some((key, p)) => Err(format!("{key} {p} must lie in [0, 1)")),
        None => Ok(()),
    }
}

/// Checks that numbers are positive and finite.
fn check_positive(numbers: &[(&str, f64)]) -> Result<(), String> {
    match numbers.iter().find(|(_, x)| !(*x > 0.0 && x.is_finite())) {
        Some((key, x)) => Err(format!("{key} {x} must be greater than 0 and finite")),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests;
