//! `config.json`, read from a checkpoint or made from our own settings, and written beside what is
//! saved. What it means is the family's to say.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::{family::Family, plan::Plan};
use crate::{Error, Result};

/// What a run sets in place of the checkpoint's `config.json`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Overrides {
    /// Dropouts.
    pub dropouts: Dropouts,
    /// Whether GPT-2's classifier has a bias.
    pub score_bias: Option<bool>,
}

impl From<Dropouts> for Overrides {
    fn from(dropouts: Dropouts) -> Self {
        Self { dropouts, score_bias: None }
    }
}

/// Dropouts that a run sets in place of the checkpoint's.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Dropouts {
    /// After embeddings and sub-layers.
    pub hidden: Option<f64>,
    /// Of attention probabilities.
    pub attention: Option<f64>,
    /// Before the classifier.
    pub classifier: Option<f64>,
}

impl Dropouts {
    /// None anywhere.
    pub const OFF: Self = Self { hidden: Some(0.0), attention: Some(0.0), classifier: Some(0.0) };
}

/// What kind of network, and how large.
#[derive(Clone, Debug)]
pub struct ModelConfig {
    /// Its family.
    pub family: Family,
    /// Number of classes.
    pub num_labels: usize,
    /// What it is made of.
    pub plan: Plan,
    /// The whole object, to be written back with the model.
    raw: Map<String, Value>,
}

impl ModelConfig {
    /// Reads `config.json`.
    ///
    /// # Errors
    /// `Data` if the file is unreadable, of no family that there is, or asks for something
    /// unsupported.
    pub fn read(path: &Path, num_labels: usize, overrides: Overrides) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|e| Error::reading(path, e))?;
        Self::parse(&text, &path.display().to_string(), num_labels, overrides)
    }

    /// Reads the text of a `config.json` that errors call `name`.
    ///
    /// # Errors
    /// `Data` if it is of no family that there is, or asks for something unsupported.
    pub fn parse(text: &str, name: &str, num_labels: usize, overrides: Overrides) -> Result<Self> {
        let bad = |what: String| Error::Data(format!("{name}: {what}"));
        let raw: Map<String, Value> =
            serde_json::from_str(text).map_err(|e| bad(format!("not a JSON object: {e}")))?;
        let model_type = raw.get("model_type").cloned().unwrap_or_default();
        let mut families = Family::ENCODERS.into_iter().chain(Family::ON_WORDS);
        let family = families.find(|family| model_type == family.model_type());
        let Some(family) = family else {
            let known = Family::ENCODERS.map(Family::model_type).join(", ");
            return Err(bad(format!("model_type is {model_type}; this build trains {known}")));
        };
        Self::new(family, raw, num_labels, overrides).map_err(bad)
    }

    /// A new network's, from the fields that matter; the others have transformers' defaults.
    ///
    /// # Errors
    /// Says which field cannot be used.
    pub fn fresh(
        family: Family,
        fields: &Map<String, Value>,
        num_labels: usize,
        overrides: Overrides,
    ) -> Result<Self, String> {
        let mut raw = family.complete(fields)?;
        let number = |key: &str| raw.get(key).and_then(Value::as_u64);
        if number("pad_token_id") >= number("vocab_size") {
            // A family's default lies in its own large vocabulary.
            raw.insert("pad_token_id".into(), Value::Null);
        }
        Self::new(family, raw, num_labels, overrides)
    }

    fn new(
        family: Family,
        mut raw: Map<String, Value>,
        num_labels: usize,
        Overrides { dropouts, score_bias }: Overrides,
    ) -> Result<Self, String> {
        if let Some(bias) = score_bias {
            if family != Family::Gpt2 {
                return Err("score_bias is only for GPT-2; remove it".into());
            }
            raw.insert("score_bias".into(), json!(bias));
        }
        let keys = family.dropout_keys();
        for (p, keys) in [
            (dropouts.hidden, keys.hidden),
            (dropouts.attention, keys.attention),
            (dropouts.classifier, keys.classifier),
        ] {
            for key in keys {
                if let Some(p) = p {
                    raw.insert((*key).into(), json!(p));
                }
            }
        }
        let plan = family.plan(&raw, num_labels)?;
        Ok(Self { family, num_labels, plan, raw })
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

    /// What pads GPT-2's batches in transformers, which looks for the last token that is not it:
    /// the end of a text, or the first token of a vocabulary without one.
    fn gpt2_padding(&self) -> u64 {
        let end = self.raw.get("eos_token_id").and_then(Value::as_u64).unwrap_or(50256);
        if end < self.vocab_size() as u64 { end } else { 0 }
    }

    /// Rows of the word table.
    pub fn vocab_size(&self) -> usize {
        self.plan.embeddings.words.rows
    }

    /// Number of blocks.
    pub fn layers(&self) -> usize {
        self.plan.blocks.len()
    }

    /// The object for a new `config.json`, such that `AutoModelForSequenceClassification` loads it if
    /// transformers has the family.
    pub fn to_json(&self) -> Value {
        let mut object = self.raw.clone();
        // What was true of the checkpoint and is not of what is saved: its weights are f32 here.
        for stale in ["torch_dtype", "quantization_config", "auto_map", "problem_type"] {
            object.remove(stale);
        }
        object.insert("dtype".into(), json!("float32"));
        if self.family == Family::Gpt2 && object.get("pad_token_id").is_none_or(Value::is_null) {
            object.insert("pad_token_id".into(), json!(self.gpt2_padding()));
        }
        object.insert("model_type".into(), json!(self.family.model_type()));
        if let Some(class) = self.family.class() {
            object.insert("architectures".into(), json!([class]));
        }
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
