//! Which files make a tokenizer, and what is wrong with them if they do not.

use std::fs;
use std::path::Path;

use serde_json::{Map, Value};

use super::beside::{Beside, content};
use super::{Inner, read_object, recipe, sentencepiece};
use crate::{Error, Result};

pub(super) fn load(path: &Path) -> Result<(Inner, Beside)> {
    if path.is_dir() {
        return directory(path);
    }
    if !path.exists() {
        return Err(Error::Data(format!("{} does not exist; check the path", path.display())));
    }
    let folder = path.parent().unwrap_or(Path::new(""));
    let beside = Beside::read(folder)?;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let recipe = match name.as_ref() {
        "vocab.json" | "merges.txt" => {
            byte_level(&folder.join("vocab.json"), &folder.join("merges.txt"), &beside)?
        }
        name if name.ends_with(".txt") => bert(path, &beside)?,
        name if name.ends_with(".json") => Value::Object(read_object(path)?),
        name if name.ends_with(".model") => sentencepiece::recipe(path, &beside)?,
        _ => {
            return Err(Error::Data(format!(
                "{} is no tokenizer file; name tokenizer.json, vocab.txt, vocab.json or spm.model",
                path.display()
            )));
        }
    };
    let inner = recipe::build(&recipe)
        .map_err(|e| Error::Data(format!("{} holds no tokenizer: {e}", path.display())))?;
    if !name.ends_with("tokenizer.json") {
        check_added(path, &recipe, &inner)?;
    }
    Ok((inner, beside))
}

/// The crate numbers added tokens by itself: on from the vocabulary's last id.
fn check_added(path: &Path, recipe: &Value, inner: &Inner) -> Result<()> {
    for added in recipe["added_tokens"].as_array().into_iter().flatten() {
        let token = content(added).unwrap_or_default();
        let found = inner.token_to_id(token).map(Value::from);
        if found.as_ref() != Some(&added["id"]) {
            return Err(Error::Data(format!(
                "{}: the files beside it give \"{token}\" the id {}, but it comes out as {}; use \
                 files of one model",
                path.display(),
                added["id"],
                found.unwrap_or_default()
            )));
        }
    }
    Ok(())
}

fn directory(folder: &Path) -> Result<(Inner, Beside)> {
    for name in ["tokenizer.json", "vocab.txt", "vocab.json", "spm.model"] {
        let path = folder.join(name);
        if path.exists() {
            return load(&path);
        }
    }
    let others = ["spiece.model", "sentencepiece.bpe.model"];
    Err(Error::Data(match others.iter().find(|name| folder.join(name).exists()) {
        Some(name) => format!(
            "{} holds only {name}, which is not read; save a tokenizer.json beside it \
             (AutoTokenizer.from_pretrained(...).save_pretrained(...) in transformers)",
            folder.display()
        ),
        None => format!(
            "{} holds no tokenizer; it needs tokenizer.json, vocab.txt, spm.model, or vocab.json \
             with merges.txt",
            folder.display()
        ),
    }))
}

fn bert(path: &Path, beside: &Beside) -> Result<Value> {
    let text = fs::read_to_string(path).map_err(|e| Error::reading(path, e))?;
    let mut vocabulary = Map::new();
    for (id, token) in text.lines().enumerate() {
        vocabulary.insert(token.to_owned(), id.into());
    }
    for token in &recipe::BERT_SPECIAL[..3] {
        if !vocabulary.contains_key(*token) {
            return Err(Error::Data(format!(
                "{} has no line {token}; a BERT vocabulary holds one token a line, {token} among \
                 them",
                path.display()
            )));
        }
    }
    let case = recipe::BertCase {
        lowercase: beside.flag("do_lower_case").unwrap_or(true),
        strip_accents: beside.flag("strip_accents"),
        split_chinese: beside.flag("tokenize_chinese_chars").unwrap_or(true),
    };
    Ok(recipe::bert(&vocabulary, case, beside))
}

fn byte_level(vocab_path: &Path, merges_path: &Path, beside: &Beside) -> Result<Value> {
    let vocabulary = read_object(vocab_path)?;
    if let Some((token, id)) =
        vocabulary.iter().find(|(_, id)| u32::try_from(id.as_u64().unwrap_or(u64::MAX)).is_err())
    {
        let path = vocab_path.display();
        return Err(Error::Data(format!(
            "{path}: token \"{token}\" has the id {id}; use 0, 1, ..."
        )));
    }
    let text = fs::read_to_string(merges_path).map_err(|e| Error::reading(merges_path, e))?;
    let mut merges = Vec::new();
    for (i, line) in text.lines().enumerate() {
        if line.starts_with("#version") || line.is_empty() {
            continue;
        }
        let wrong = |problem: &str| {
            let (path, line_number) = (merges_path.display(), i + 1);
            Error::Data(format!("{path}, line {line_number}: \"{line}\" {problem}"))
        };
        let Some((left, right)) = line.split_once(' ').filter(|(_, r)| !r.contains(' ')) else {
            return Err(wrong("is not two tokens with a space between them"));
        };
        // Checked here because the crate's own complaint names no line, and for some it panics.
        let merged = format!("{left}{right}");
        if let Some(absent) =
            [left, right, &merged].into_iter().find(|token| !vocabulary.contains_key(*token))
        {
            let problem = format!("needs \"{absent}\", which vocab.json does not hold");
            return Err(wrong(&format!("{problem}; use files of one model")));
        }
        merges.push((left.to_owned(), right.to_owned()));
    }
    Ok(recipe::byte_level(&vocabulary, &merges, beside))
}
