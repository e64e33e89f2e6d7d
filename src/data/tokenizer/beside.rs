//! The files beside a vocabulary that say how it is used: `tokenizer_config.json`,
//! `special_tokens_map.json` and `added_tokens.json`, each of which may be missing.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::read_object;
use crate::{Error, Result};

/// What the special tokens of a tokenizer are for, with the names that are common.
pub(super) const ROLES: [(&str, &[&str]); 7] = [
    ("bos_token", &["<s>", "<|endoftext|>"]),
    ("eos_token", &["</s>", "<|endoftext|>"]),
    ("unk_token", &["[UNK]", "<unk>", "<|endoftext|>"]),
    ("cls_token", &["[CLS]", "<s>"]),
    ("sep_token", &["[SEP]", "</s>"]),
    ("pad_token", &["[PAD]", "<pad>"]),
    ("mask_token", &["[MASK]", "<mask>"]),
];

/// The three files; all empty where a tokenizer has none.
#[derive(Debug, Default)]
pub(super) struct Beside {
    config: Map<String, Value>,
    special: Map<String, Value>,
    added: BTreeMap<u64, String>,
}

impl Beside {
    pub(super) fn read(folder: &Path) -> Result<Self> {
        let read = |name: &str| {
            let path = folder.join(name);
            if path.exists() { read_object(&path) } else { Ok(Map::new()) }
        };
        let mut added = BTreeMap::new();
        for (token, id) in read("added_tokens.json")? {
            let path = folder.join("added_tokens.json");
            let id = id.as_u64().ok_or_else(|| {
                let path = path.display();
                Error::Data(format!("{path}: token \"{token}\" has the id {id}; use a number"))
            })?;
            added.insert(id, token);
        }
        Ok(Self {
            config: read("tokenizer_config.json")?,
            special: read("special_tokens_map.json")?,
            added,
        })
    }

    pub(super) fn flag(&self, key: &str) -> Option<bool> {
        self.config.get(key).and_then(Value::as_bool)
    }

    /// The token that these files give a role such as `cls_token`.
    pub(super) fn role(&self, role: &str) -> Option<&str> {
        self.role_value(role).and_then(content)
    }

    fn role_value(&self, role: &str) -> Option<&Value> {
        let given = |map: &Map<String, Value>| map.get(role).is_some_and(|v| !v.is_null());
        if given(&self.config) { self.config.get(role) } else { self.special.get(role) }
    }

    /// `tokenizer.json`'s `added_tokens`: those of `usual` that have an `id`, those with a role, and
    /// those that the files add; how each is recognised inside a text is as the files say.
    pub(super) fn added_tokens(&self, usual: &[&str], id: impl Fn(&str) -> Option<u64>) -> Value {
        let mut entries = BTreeMap::new();
        for (added, token) in &self.added {
            entries.insert(*added, entry(*added, token, false, &Value::Null));
        }
        for token in usual {
            if let Some(id) = id(token) {
                entries.insert(id, entry(id, token, true, &Value::Null));
            }
        }
        for (role, _) in ROLES {
            // The map rather than the config: where both are there, it is the map that has flags.
            let value = self.special.get(role).or_else(|| self.role_value(role));
            let known = |token: &str| {
                let added = self.added.iter().find(|(_, added)| *added == token);
                id(token).or(added.map(|(id, _)| *id))
            };
            if let Some((value, token)) = value.and_then(|value| Some((value, content(value)?)))
                && let Some(id) = known(token)
            {
                entries.insert(id, entry(id, token, true, value));
            }
        }
        let decoder = self.config.get("added_tokens_decoder").and_then(Value::as_object);
        for (id, value) in decoder.into_iter().flatten() {
            if let (Ok(id), Some(token)) = (id.parse(), content(value)) {
                let special = value["special"].as_bool().unwrap_or(false);
                entries.insert(id, entry(id, token, special, value));
            }
        }
        entries.into_values().collect()
    }

    /// The `tokenizer_config.json` that a tokenizer is saved with; `known` says which names are
    /// special tokens of it.
    ///
    /// The class is the one that takes `tokenizer.json` as it is. Others build their own from the
    /// vocabulary: transformers 5 makes a `DebertaV2Tokenizer` without the character map. What it
    /// hands to a model is named because that class otherwise adds token types, which some
    /// models refuse; a single text has none but zeros.
    pub(super) fn config(&self, known: impl Fn(&str) -> bool) -> Map<String, Value> {
        let mut config = self.config.clone();
        config.insert("tokenizer_class".into(), "PreTrainedTokenizerFast".into());
        config.entry("model_input_names").or_insert(json!(["input_ids", "attention_mask"]));
        for (role, names) in ROLES {
            // By name: how it is recognised is in `tokenizer.json`, and transformers refuses the
            // map's objects here.
            let usual = || names.iter().copied().find(|name| known(name));
            if let Some(token) = self.role(role).or_else(usual) {
                config.insert(role.into(), token.into());
            }
        }
        config
    }
}

/// A token as these files write it: its text, or an object with its `content` and flags.
pub(super) fn content(token: &Value) -> Option<&str> {
    token.as_str().or_else(|| token["content"].as_str())
}

fn entry(id: u64, token: &str, special: bool, flags: &Value) -> Value {
    let flag = |name: &str| flags[name].as_bool();
    json!({
        "id": id,
        "content": token,
        "single_word": flag("single_word").unwrap_or(false),
        "lstrip": flag("lstrip").unwrap_or(false),
        "rstrip": flag("rstrip").unwrap_or(false),
        "normalized": flag("normalized").unwrap_or(!special),
        "special": special,
    })
}
