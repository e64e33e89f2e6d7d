//! Which files make a model, in a list of the Hub's or in a directory.

use std::{collections::BTreeMap, path::Path};

use serde::Deserialize;

use crate::{Error, Result};

/// Sizes and rates of the network.
pub const CONFIG: &str = "config.json";

/// The forms that weights come in, the better ones first. An index names its shards.
pub const WEIGHTS: [&str; 4] = [
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
];

/// What a tokenizer may be made of.
const TOKENIZER: [&str; 8] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spm.model",
];

/// Of the files listed, those that are wanted whatever form the weights have.
pub fn small(listed: &[String]) -> Vec<&'static str> {
    let wanted = std::iter::once(CONFIG).chain(TOKENIZER);
    wanted.filter(|name| listed.iter().any(|listed| listed == name)).collect()
}

/// The best form of weights among the files listed.
pub fn weights(listed: &[String]) -> Option<&'static str> {
    WEIGHTS.into_iter().find(|name| listed.iter().any(|listed| listed == name))
}

/// Whether a file of weights is an index of shards.
pub fn is_index(name: &str) -> bool {
    name.ends_with(".index.json")
}

/// The shard of every tensor, from an index.
///
/// # Errors
/// `Data` if it is no index, or names a file outside its directory.
pub fn weight_map(index: &Path) -> Result<BTreeMap<String, String>> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let bytes = std::fs::read(index).map_err(|e| Error::reading(index, e))?;
    let index: Index = serde_json::from_slice(&bytes).map_err(|e| {
        Error::Data(format!(
            "{} is damaged or no index of weights ({e}); fetch it again",
            index.display()
        ))
    })?;
    Ok(index.weight_map)
}

/// The files that an index names, each once.
///
/// # Errors
/// As [`weight_map`], and `Data` if one of them lies outside the index's directory.
pub fn shards(index: &Path) -> Result<Vec<String>> {
    let mut shards: Vec<String> = weight_map(index)?.into_values().collect();
    shards.sort();
    shards.dedup();
    if let Some(shard) = shards.iter().find(|shard| !is_plain(shard)) {
        return Err(Error::Data(format!(
            "{} names the shard {shard:?}, which is not a file beside it; fetch it again",
            index.display()
        )));
    }
    Ok(shards)
}

/// Whether a name from elsewhere is that of a file, and leads to no other directory.
fn is_plain(name: &str) -> bool {
    !name.is_empty() && !name.starts_with('.') && !name.contains(['/', '\\', '\0'])
}

/// The first file that a model needs and `dir` lacks; `None` if it is complete.
pub fn missing(dir: &Path) -> Option<String> {
    let there = |name: &str| dir.join(name).is_file();
    if !there(CONFIG) {
        return Some(CONFIG.into());
    }
    let Some(weights) = WEIGHTS.into_iter().find(|name| there(name)) else {
        return Some(WEIGHTS[0].into());
    };
    if !is_index(weights) {
        return None;
    }
    match shards(&dir.join(weights)) {
        Ok(shards) => shards.into_iter().find(|shard| !there(shard)),
        Err(_) => Some(weights.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listed(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn the_best_form_of_weights_is_taken() {
        for (names, want) in [
            (vec!["pytorch_model.bin", "model.safetensors", "tf_model.h5"], Some(WEIGHTS[0])),
            (vec!["pytorch_model.bin", "model.safetensors.index.json"], Some(WEIGHTS[1])),
            (vec!["pytorch_model.bin.index.json"], Some(WEIGHTS[3])),
            (vec!["tf_model.h5", "onnx/model.safetensors"], None),
        ] {
            assert_eq!(weights(&listed(&names)), want);
        }
        let names = listed(&["README.md", "vocab.txt", "config.json"]);
        assert_eq!(small(&names), ["config.json", "vocab.txt"]);
    }

    #[test]
    fn a_directory_is_complete_with_config_and_all_shards() {
        let dir = tempfile::tempdir().expect("a directory");
        let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text);
        let missing = || missing(dir.path());
        assert_eq!(missing().as_deref(), Some("config.json"));
        write("config.json", "{}").expect("written");
        assert_eq!(missing().as_deref(), Some("model.safetensors"));
        let index = r#"{"weight_map": {"a": "one.bin", "b": "two.bin", "c": "one.bin"}}"#;
        write("pytorch_model.bin.index.json", index).expect("written");
        assert_eq!(missing().as_deref(), Some("one.bin"));
        write("one.bin", "").expect("written");
        assert_eq!(missing().as_deref(), Some("two.bin"));
        write("two.bin", "").expect("written");
        assert_eq!(missing(), None);
    }

    #[test]
    fn an_index_that_leads_elsewhere_is_refused() {
        let dir = tempfile::tempdir().expect("a directory");
        let index = dir.path().join("model.safetensors.index.json");
        for shard in ["../x.bin", "/etc/passwd", "", "."] {
            let text = format!(r#"{{"weight_map": {{"a": "{shard}"}}}}"#);
            std::fs::write(&index, text).expect("written");
            let error = shards(&index).unwrap_err().to_string();
            assert!(error.contains("not a file beside it"), "{error}");
        }
        std::fs::write(&index, "{}").expect("written");
        assert!(shards(&index).unwrap_err().to_string().contains("no index of weights"));
    }
}
