//! PEFT's `adapter_config.json` (huggingface/peft 0.21), read and written.
//!
//! Owns what each key means. What would change the result and is not computed here is refused by name;
//! what only says how training began is passed over.

use std::collections::HashSet;
use std::path::Path;

use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use super::{CLASSIFIERS, saved_modules, wanted};
use crate::config::{
    ALL_LINEAR, Adapter, Family, Lora, Method, PTuning, PoolRow, PrefixTuning, PromptTuning,
    Reparameterization, TargetModules,
};
use crate::{Error, Result};

/// The settings, beside the weights.
pub const CONFIG: &str = "adapter_config.json";

/// The model that an adapter is for, as far as `adapter_config.json` says it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Base {
    /// A directory, or `org/name` of a model on the Hub; empty for one that no file holds.
    pub name: String,
    /// Branch, tag or commit on the Hub, if it is not the newest.
    pub revision: Option<String>,
    /// Its family.
    pub family: Family,
    /// Width of the word embeddings, before which prompts stand.
    pub embedding_size: usize,
    /// Width of the layers.
    pub hidden_size: usize,
    /// Number of layers.
    pub layers: usize,
    /// Heads of each.
    pub heads: usize,
}

/// What `adapter_config.json` says.
#[derive(Clone, Debug, PartialEq)]
pub struct Description {
    /// The adapter. `modules_to_save` is always given, without the classifier.
    pub adapter: Adapter,
    /// What `model.path` was, if it is named: a directory, `org/name` or `org/name@revision`.
    pub base: Option<String>,
}

/// Keys that are read here, or that say nothing about what is computed: where the file comes from, how
/// training began, switches of PEFT's own running.
const PASSED_OVER: [&str; 41] = [
    "peft_type",
    "task_type",
    "pool",
    "modules_to_save",
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "bias",
    "use_rslora",
    "init_lora_weights",
    "num_virtual_tokens",
    "num_transformer_submodules",
    "prompt_tuning_init",
    "prompt_tuning_init_text",
    "encoder_reparameterization_type",
    "encoder_hidden_size",
    "encoder_num_layers",
    "encoder_dropout",
    "prefix_projection",
    "token_dim",
    "num_layers",
    "num_attention_heads",
    "base_model_name_or_path",
    "revision",
    "auto_mapping",
    "peft_version",
    "inference_mode",
    "fan_in_fan_out",
    "layers_pattern",
    "init_weights",
    "tokenizer_name_or_path",
    "tokenizer_kwargs",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "velora_config",
    "runtime_config",
    "ensure_weight_tying",
    "megatron_core",
];

/// Starts of LoRA that leave the base model's weights as they are.
const NEUTRAL_STARTS: [&str; 4] = ["gaussian", "eva", "orthogonal", "mica"];

/// Reads `adapter_config.json`.
///
/// # Errors
/// `Data` naming the file, the key and its value, if it is not what PEFT writes, or asks for something
/// that is not computed here.
pub fn read(path: &Path) -> Result<Description> {
    let text = std::fs::read_to_string(path).map_err(|e| Error::reading(path, e))?;
    let keys: Map<String, Value> = serde_json::from_str(&text)
        .map_err(|e| Error::Data(format!("{}: not a JSON object: {e}", path.display())))?;
    let file = File { path, keys };
    file.refuse_unsupported()?;
    let method = file.method()?;
    // Where no virtual tokens stand before a sequence, both say the same.
    let prompts = matches!(method, Method::PromptTuning(_) | Method::PTuning(_));
    let fallback = if prompts { PoolRow::FirstPosition } else { PoolRow::default() };
    let pool = file.get("pool", "\"first_token\" or \"first_position\"")?.unwrap_or(fallback);
    let mut modules: Vec<String> =
        file.get("modules_to_save", "a list of names")?.unwrap_or_default();
    modules.retain(|module| !CLASSIFIERS.contains(&module.as_str()));
    let mut seen = HashSet::new();
    modules.retain(|module| seen.insert(module.clone()));
    let adapter = Adapter { method, modules_to_save: Some(modules), pool };
    adapter.check_in(path)?;
    let base: Option<String> = file.get("base_model_name_or_path", "text")?;
    let base = base.filter(|base| !base.is_empty());
    let revision: Option<String> = file.get("revision", "text")?;
    let at = revision.map(|revision| format!("@{revision}")).unwrap_or_default();
    Ok(Description { adapter, base: base.map(|base| base + &at) })
}

/// The file while it is read.
struct File<'a> {
    path: &'a Path,
    keys: Map<String, Value>,
}

impl File<'_> {
    /// The value of `key`, which is `what`; `None` if it is absent or null.
    fn get<T: DeserializeOwned>(&self, key: &str, what: &str) -> Result<Option<T>> {
        let value = self.keys.get(key).filter(|value| !value.is_null());
        value
            .map(|value| serde_json::from_value(value.clone()))
            .transpose()
            .map_err(|_| self.bad(key, &format!("expected {what}")))
    }

    fn need<T: DeserializeOwned>(&self, key: &str, what: &str) -> Result<T> {
        self.get(key, what)?.ok_or_else(|| self.bad(key, &format!("missing: write {what}")))
    }

    fn bad(&self, key: &str, message: &str) -> Error {
        let value = self.keys.get(key).map_or("absent".to_owned(), Value::to_string);
        Error::Data(format!("{}: {key} = {value}: {message}", self.path.display()))
    }

    fn refuse_unsupported(&self) -> Result<()> {
        if self.keys.get("task_type").and_then(Value::as_str) != Some("SEQ_CLS") {
            return Err(self.bad("task_type", "only classifiers are read here: \"SEQ_CLS\""));
        }
        let submodules = self.get("num_transformer_submodules", "a whole number")?;
        if submodules.is_some_and(|count: usize| count != 1) {
            let message = "one encoder is all that there is here: 1";
            return Err(self.bad("num_transformer_submodules", message));
        }
        match self.keys.get("init_lora_weights") {
            None | Some(Value::Null | Value::Bool(_)) => {}
            Some(Value::String(start)) if NEUTRAL_STARTS.contains(&&*start.to_lowercase()) => {}
            Some(_) => {
                let message = "it starts from changed weights of the base model; have PEFT save the \
                               adapter for the unchanged ones (save_pretrained with \
                               path_initial_model_for_weight_conversion)";
                return Err(self.bad("init_lora_weights", message));
            }
        }
        // A switch that is on, of PEFT's present or future variants.
        let on = |value: &Value| match value {
            Value::Bool(on) => *on,
            Value::Array(list) => !list.is_empty(),
            Value::Object(keys) => !keys.is_empty(),
            Value::Null | Value::Number(_) | Value::String(_) => false,
        };
        // These choose among the modules by a number or a text as well.
        let chooses = |key: &str, value: &Value| {
            let a_text = value.as_str().is_some_and(|text| !text.is_empty());
            ["layers_to_transform", "exclude_modules"].contains(&key)
                && (value.is_number() || a_text)
        };
        let unknown = self.keys.iter().find(|(key, value)| {
            !PASSED_OVER.contains(&key.as_str()) && (on(value) || chooses(key, value))
        });
        match unknown {
            Some((key, _)) => Err(self.bad(
                key,
                "not supported, and it may change what the adapter computes; train without it",
            )),
            None => Ok(()),
        }
    }

    fn method(&self) -> Result<Method> {
        let count = "a whole number";
        let kind: String = self.need("peft_type", "a name")?;
        Ok(match kind.as_str() {
            "LORA" => Method::Lora(self.lora()?),
            "PROMPT_TUNING" => Method::PromptTuning(PromptTuning {
                num_virtual_tokens: self.need("num_virtual_tokens", count)?,
                prompt_tuning_init_text: match self.keys.get("prompt_tuning_init") {
                    Some(start) if start == "TEXT" => {
                        self.get("prompt_tuning_init_text", "text")?
                    }
                    _ => None,
                },
            }),
            "P_TUNING" => Method::PTuning(self.p_tuning()?),
            "PREFIX_TUNING" => {
                let projects = self.get("prefix_projection", "true or false")?.unwrap_or(false);
                let width = match self.get("encoder_hidden_size", count)? {
                    _ if !projects => None,
                    None => Some(self.need("token_dim", count)?),
                    width => width,
                };
                let num_virtual_tokens = self.need("num_virtual_tokens", count)?;
                Method::PrefixTuning(PrefixTuning { num_virtual_tokens, projection: width })
            }
            _ => {
                let message =
                    "only LORA, PROMPT_TUNING, P_TUNING and PREFIX_TUNING are computed here";
                return Err(self.bad("peft_type", message));
            }
        })
    }

    fn lora(&self) -> Result<Lora> {
        let (number, usual) = ("a number", Lora::default());
        Ok(Lora {
            r: self.get("r", "a whole number")?.unwrap_or(usual.r),
            lora_alpha: self.get("lora_alpha", number)?.unwrap_or(usual.lora_alpha),
            lora_dropout: self.get("lora_dropout", number)?.unwrap_or(usual.lora_dropout),
            target_modules: match self
                .get("target_modules", "a list of names, or \"all-linear\"")?
            {
                Some(TargetModules::Pattern(pattern)) if pattern.to_lowercase() == ALL_LINEAR => {
                    Some(TargetModules::Pattern(ALL_LINEAR.into()))
                }
                Some(TargetModules::Pattern(_)) => {
                    let message = "regular expressions are not read; list the names of the modules";
                    return Err(self.bad("target_modules", message));
                }
                names => names,
            },
            bias: self.get("bias", "\"none\", \"all\" or \"lora_only\"")?.unwrap_or(usual.bias),
            use_rslora: self.get("use_rslora", "true or false")?.unwrap_or(usual.use_rslora),
        })
    }

    fn p_tuning(&self) -> Result<PTuning> {
        let count = "a whole number";
        let network = self.get("encoder_reparameterization_type", "\"MLP\" or \"LSTM\"")?;
        let network = network.unwrap_or_default();
        let prompt = PTuning {
            encoder_hidden_size: self.get("encoder_hidden_size", count)?,
            ..PTuning::new(self.need("num_virtual_tokens", count)?, network)
        };
        Ok(match network {
            // PEFT writes an LSTM's settings beside an MLP too, where they mean nothing.
            Reparameterization::Mlp => prompt,
            Reparameterization::Lstm => PTuning {
                encoder_num_layers: self
                    .get("encoder_num_layers", count)?
                    .unwrap_or(prompt.encoder_num_layers),
                encoder_dropout: self.get("encoder_dropout", "a number")?.unwrap_or(0.0),
                ..prompt
            },
        })
    }
}

/// The object for `adapter_config.json`; `updated` are the modules with LoRA, which stand there in place of
/// `"all-linear"` (in DistilBERT PEFT takes another set for that, and fails).
pub fn to_json<N: AsRef<str>>(adapter: &Adapter, base: &Base, updated: &[N]) -> Value {
    let mut keys = json!({
        "task_type": "SEQ_CLS",
        "inference_mode": true,
        "base_model_name_or_path": Some(&base.name).filter(|name| !name.is_empty()),
        "revision": base.revision,
        "modules_to_save": saved_modules(adapter, base.family),
    });
    let more = match &adapter.method {
        Method::Lora(lora) => lora_json(lora, base, updated),
        Method::PromptTuning(prompt) => {
            let text = prompt.prompt_tuning_init_text.as_ref();
            json!({
                "peft_type": "PROMPT_TUNING",
                "num_virtual_tokens": prompt.num_virtual_tokens,
                "prompt_tuning_init": if text.is_some() { "TEXT" } else { "RANDOM" },
                "prompt_tuning_init_text": text,
                // PEFT insists on one beside a text, and reads it only to start anew.
                "tokenizer_name_or_path": text.map(|_| &base.name),
            })
        }
        Method::PTuning(prompt) => json!({
            "peft_type": "P_TUNING",
            "num_virtual_tokens": prompt.num_virtual_tokens,
            "encoder_reparameterization_type": prompt.encoder_reparameterization_type,
            "encoder_hidden_size": prompt.encoder_hidden_size.unwrap_or(base.embedding_size),
            "encoder_num_layers": prompt.encoder_num_layers,
            "encoder_dropout": prompt.encoder_dropout,
        }),
        Method::PrefixTuning(prefix) => json!({
            "peft_type": "PREFIX_TUNING",
            "num_virtual_tokens": prefix.num_virtual_tokens,
            "encoder_hidden_size": prefix.projection.unwrap_or(base.hidden_size),
            "prefix_projection": prefix.projection.is_some(),
        }),
    };
    let rows = match &adapter.method {
        Method::Lora(_) => json!({}),
        Method::PrefixTuning(_) => json!({ "token_dim": base.hidden_size }),
        Method::PromptTuning(_) | Method::PTuning(_) => {
            json!({ "token_dim": base.embedding_size, "pool": adapter.pool })
        }
    };
    let shape = match &adapter.method {
        Method::Lora(_) => json!({}),
        _ => json!({
            "num_layers": base.layers,
            "num_attention_heads": base.heads,
            "num_transformer_submodules": 1,
        }),
    };
    for part in [more, rows, shape] {
        if let (Value::Object(keys), Value::Object(part)) = (&mut keys, part) {
            keys.extend(part);
        }
    }
    keys
}

fn lora_json<N: AsRef<str>>(lora: &Lora, base: &Base, updated: &[N]) -> Value {
    let whole = lora.lora_alpha.fract() == 0.0 && lora.lora_alpha.abs() < 1e9;
    json!({
        "peft_type": "LORA",
        "r": lora.r,
        // An integer in PEFT, where it can be.
        "lora_alpha": if whole { json!(lora.lora_alpha as i64) } else { json!(lora.lora_alpha) },
        "lora_dropout": lora.lora_dropout,
        "target_modules": match wanted(lora, base.family) {
            Some(names) => names,
            None => updated.iter().map(|name| name.as_ref().to_owned()).collect(),
        },
        "bias": lora.bias,
        "use_rslora": lora.use_rslora,
        "init_lora_weights": true,
        // GPT-2's Conv1D keeps its weight as [K, N].
        "fan_in_fan_out": base.family == Family::Gpt2,
    })
}
