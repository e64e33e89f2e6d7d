//! `config.json` of a BERT, read from a checkpoint or made from our own settings.

use std::path::Path;

use allreel_kernels::activation::Activation;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::{Error, Result};

fn two() -> usize {
    2
}

fn positions() -> usize {
    512
}

fn tenth() -> f64 {
    0.1
}

fn epsilon() -> f64 {
    1e-12
}

fn range() -> f64 {
    0.02
}

fn gelu() -> String {
    "gelu".into()
}

/// The fields of Hugging Face's `BertConfig` that change what is computed; defaults are theirs.
#[derive(Clone, Debug, Deserialize, Serialize, PartialEq)]
pub struct BertConfig {
    /// Rows of the word table.
    pub vocab_size: usize,
    /// Width of the activations.
    pub hidden_size: usize,
    /// Number of blocks.
    pub num_hidden_layers: usize,
    /// Heads per block; divides `hidden_size`.
    pub num_attention_heads: usize,
    /// Width inside the feed-forward part.
    pub intermediate_size: usize,
    /// Rows of the position table.
    #[serde(default = "positions")]
    pub max_position_embeddings: usize,
    /// Rows of the token-type table.
    #[serde(default = "two")]
    pub type_vocab_size: usize,
    /// Activation in the feed-forward part.
    #[serde(default = "gelu")]
    pub hidden_act: String,
    /// Added to the variance in every LayerNorm.
    #[serde(default = "epsilon")]
    pub layer_norm_eps: f64,
    /// Standard deviation of new weights.
    #[serde(default = "range")]
    pub initializer_range: f64,
    /// Dropout on activations.
    #[serde(default = "tenth")]
    pub hidden_dropout_prob: f64,
    /// Dropout on attention probabilities.
    #[serde(default = "tenth")]
    pub attention_probs_dropout_prob: f64,
    /// Dropout before the classifier; `hidden_dropout_prob` when absent.
    #[serde(default)]
    pub classifier_dropout: Option<f64>,
    /// Row of the word table that never gets a gradient.
    #[serde(default)]
    pub pad_token_id: Option<u32>,
    /// Classes; not a field of the file (it writes `id2label`).
    #[serde(skip, default = "two")]
    pub num_labels: usize,
}

impl BertConfig {
    /// Reads `config.json`; also returns the whole object, to be written back with the model.
    ///
    /// # Errors
    /// `Data` if the file is unreadable, not a BERT's, or asks for something unsupported.
    pub fn read(path: &Path, num_labels: usize) -> Result<(Self, Map<String, Value>)> {
        let text = std::fs::read_to_string(path).map_err(|e| Error::reading(path, e))?;
        let bad = |what: String| Error::Data(format!("{}: {what}", path.display()));
        let raw: Map<String, Value> =
            serde_json::from_str(&text).map_err(|e| bad(format!("not a JSON object: {e}")))?;
        match raw.get("model_type").and_then(Value::as_str) {
            Some("bert") => {}
            other => {
                let kind = other.unwrap_or("missing");
                return Err(bad(format!("model_type is {kind}; this build trains \"bert\"")));
            }
        }
        if let Some(kind) = raw.get("position_embedding_type").and_then(Value::as_str)
            && kind != "absolute"
        {
            return Err(bad(format!(
                "position_embedding_type {kind:?} is not supported (use a checkpoint with \"absolute\")"
            )));
        }
        let mut config: Self =
            serde_json::from_value(Value::Object(raw.clone())).map_err(|e| bad(e.to_string()))?;
        config.num_labels = num_labels;
        // transformers' default when the key is absent.
        if !raw.contains_key("pad_token_id") {
            config.pad_token_id = Some(0);
        }
        config.check().map_err(bad)?;
        Ok((config, raw))
    }

    /// Number of classes that a saved classifier's `config.json` names; 2 if it names none.
    ///
    /// # Errors
    /// `Data` if the file is unreadable.
    pub fn num_labels(path: &Path) -> Result<usize> {
        let text = std::fs::read(path).map_err(|e| Error::reading(path, e))?;
        let raw: Value = serde_json::from_slice(&text).map_err(|e| Error::reading(path, e))?;
        Ok(raw["id2label"].as_object().map_or(2, Map::len))
    }

    /// Checks that the numbers fit together.
    ///
    /// # Errors
    /// Says which do not.
    pub fn check(&self) -> Result<(), String> {
        if self.num_attention_heads == 0
            || !self.hidden_size.is_multiple_of(self.num_attention_heads)
        {
            return Err(format!(
                "num_attention_heads {} does not divide hidden_size {}",
                self.num_attention_heads, self.hidden_size
            ));
        }
        let sizes =
            [self.vocab_size, self.hidden_size, self.num_hidden_layers, self.intermediate_size];
        if sizes.contains(&0) || self.max_position_embeddings == 0 || self.type_vocab_size == 0 {
            return Err("a size is zero".into());
        }
        if self.num_attention_heads > 256 || self.num_hidden_layers > 4096 {
            return Err("more than 256 heads or 4096 layers (dropout keys end there)".into());
        }
        self.activation().map(|_| ())
    }

    /// `hidden_act` as the kernels know it.
    ///
    /// # Errors
    /// Names an activation that there is no kernel for.
    pub fn activation(&self) -> Result<Activation, String> {
        match self.hidden_act.as_str() {
            "gelu" => Ok(Activation::Gelu),
            "gelu_new" | "gelu_pytorch_tanh" => Ok(Activation::GeluTanh),
            "relu" => Ok(Activation::Relu),
            "tanh" => Ok(Activation::Tanh),
            other => {
                Err(format!("hidden_act {other:?} is unknown; use gelu, gelu_new, relu or tanh"))
            }
        }
    }

    /// The object for a new `config.json`, on top of what `raw` already holds (the checkpoint's own
    /// fields), such that `AutoModelForSequenceClassification` loads it.
    pub fn to_json(&self, raw: &Map<String, Value>) -> Value {
        let mut object = raw.clone();
        if let Ok(Value::Object(own)) = serde_json::to_value(self) {
            object.extend(own);
        }
        object.insert("model_type".into(), json!("bert"));
        object.insert("architectures".into(), json!(["BertForSequenceClassification"]));
        let names: Vec<String> = match self.num_labels {
            2 => vec!["negative".into(), "positive".into()],
            n => (0..n).map(|i| format!("LABEL_{i}")).collect(),
        };
        let id2label: Map<String, Value> =
            names.iter().enumerate().map(|(i, name)| (i.to_string(), json!(name))).collect();
        let label2id: Map<String, Value> =
            names.iter().enumerate().map(|(i, name)| (name.clone(), json!(i))).collect();
        object.insert("id2label".into(), Value::Object(id2label));
        object.insert("label2id".into(), Value::Object(label2id));
        Value::Object(object)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<(BertConfig, Map<String, Value>)> {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("config.json");
        std::fs::write(&path, text).expect("written");
        BertConfig::read(&path, 2)
    }

    const GOOD: &str = r#"{"model_type": "bert", "vocab_size": 10, "hidden_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 2, "intermediate_size": 16, "torch_dtype": "float32"}"#;

    #[test]
    fn defaults_are_hugging_faces_and_unknown_fields_survive() -> Result<()> {
        let (config, raw) = read(GOOD)?;
        assert_eq!((config.max_position_embeddings, config.type_vocab_size), (512, 2));
        assert_eq!(config.pad_token_id, Some(0));
        let json = config.to_json(&raw);
        assert_eq!(json["torch_dtype"], "float32");
        assert_eq!(json["id2label"]["1"], "positive");
        Ok(())
    }

    #[test]
    fn what_cannot_be_run_is_refused() {
        for (from, to, says) in [
            ("\"bert\"", "\"t5\"", "t5"),
            ("\"num_attention_heads\": 2", "\"num_attention_heads\": 3", "does not divide"),
            ("\"hidden_size\": 8", "\"hidden_act\": \"silu\", \"hidden_size\": 8", "silu"),
            ("\"hidden_size\": 8,", "", "hidden_size"),
        ] {
            let error = read(&GOOD.replace(from, to)).unwrap_err();
            assert_eq!(error.exit_code(), 2);
            assert!(error.to_string().contains(says), "{error}");
        }
    }
}
