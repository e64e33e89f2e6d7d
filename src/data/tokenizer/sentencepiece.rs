//! DeBERTa's `spm.model`: sentencepiece's file as a recipe for the `tokenizers` crate.
//!
//! Refused by name: what no DeBERTa has, such as BPE or user-defined pieces. The ids inside other
//! families' files are not their models' ids anyway (XLM-RoBERTa's are off by one).

use std::fs;
use std::path::Path;

use prost::Message;
use serde_json::{Value, json};

use super::beside::Beside;
use super::normalize::{self, Charsmap};
use super::recipe::template;
use crate::{Error, Result};

/// What is read of sentencepiece's `sentencepiece_model.proto`; the numbers are that file's.
#[derive(Clone, PartialEq, Message)]
struct ModelProto {
    #[prost(message, repeated, tag = "1")]
    pieces: Vec<Piece>,
    #[prost(message, optional, tag = "2")]
    trainer: Option<Trainer>,
    #[prost(message, optional, tag = "3")]
    normalizer: Option<Normalizer>,
}

#[derive(Clone, PartialEq, Message)]
struct Piece {
    #[prost(string, optional, tag = "1")]
    piece: Option<String>,
    #[prost(float, optional, tag = "2")]
    score: Option<f32>,
    #[prost(enumeration = "Kind", optional, tag = "3", default = "Normal")]
    kind: Option<i32>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, prost::Enumeration)]
enum Kind {
    Normal = 1,
    Unknown = 2,
    Control = 3,
    UserDefined = 4,
    Unused = 5,
    Byte = 6,
}

#[derive(Clone, PartialEq, Message)]
struct Trainer {
    #[prost(enumeration = "Algorithm", optional, tag = "3", default = "Unigram")]
    algorithm: Option<i32>,
    #[prost(bool, optional, tag = "24")]
    whitespace_as_suffix: Option<bool>,
    #[prost(bool, optional, tag = "35")]
    byte_fallback: Option<bool>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, prost::Enumeration)]
enum Algorithm {
    Unigram = 1,
    Bpe = 2,
    Word = 3,
    Char = 4,
}

#[derive(Clone, PartialEq, Message)]
struct Normalizer {
    #[prost(bytes = "vec", optional, tag = "2")]
    charsmap: Option<Vec<u8>>,
    #[prost(bool, optional, tag = "3", default = "true")]
    add_dummy_prefix: Option<bool>,
    #[prost(bool, optional, tag = "4", default = "true")]
    remove_extra_whitespaces: Option<bool>,
    #[prost(bool, optional, tag = "5", default = "true")]
    escape_whitespaces: Option<bool>,
}

/// The tokenizer in the file at `path`: `[CLS] text [SEP]`, and `[MASK]` as one more piece.
pub(super) fn recipe(path: &Path, beside: &Beside) -> Result<Value> {
    let (pieces, trainer, normalizer) = read(path)?;
    let id = |token: &str| match pieces.iter().position(|piece| piece.piece() == token) {
        None if token == "[MASK]" => Some(pieces.len() as u64),
        id => id.map(|id| id as u64),
    };
    let lowercase = beside.flag("do_lower_case").unwrap_or(false);
    let tidy = normalizer.remove_extra_whitespaces();
    let prefix = if normalizer.add_dummy_prefix() { "always" } else { "never" };
    let metaspace =
        json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": prefix, "split": true});
    let mut splits = vec![metaspace.clone()];
    if beside.flag("split_by_punct").unwrap_or(false) {
        splits.insert(0, json!({"type": "Punctuation", "behavior": "Isolated"}));
    }
    let vocabulary: Vec<(&str, f64)> =
        pieces.iter().map(|piece| (piece.piece(), piece.score().into())).collect();
    Ok(json!({
        "version": "1.0",
        "added_tokens": beside.added_tokens(&["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"], id),
        "normalizer": normalize::steps(normalizer.charsmap(), lowercase, tidy),
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": splits},
        "post_processor": template(("[CLS]", id("[CLS]")), ("[SEP]", id("[SEP]"))),
        "decoder": metaspace,
        "model": {
            "type": "Unigram",
            "unk_id": pieces.iter().position(|piece| piece.kind() == Kind::Unknown),
            "vocab": vocabulary,
            "byte_fallback": trainer.byte_fallback(),
        },
    }))
}

/// The parts of the file at `path`, if it is whole and like DeBERTa's.
fn read(path: &Path) -> Result<(Vec<Piece>, Trainer, Normalizer)> {
    let bytes = fs::read(path).map_err(|e| Error::reading(path, e))?;
    let (pieces, trainer, normalizer) = decode(&bytes).map_err(|problem| {
        Error::Data(format!(
            "{} is damaged or no sentencepiece model ({problem}); fetch it again, the file itself \
             and not a Git LFS pointer",
            path.display()
        ))
    })?;
    if let Some(setting) = foreign(&pieces, &trainer, &normalizer) {
        return Err(Error::Data(format!(
            "{} {setting}; only DeBERTa's are read: save a tokenizer.json beside it \
             (AutoTokenizer.from_pretrained(...).save_pretrained(...) in transformers)",
            path.display()
        )));
    }
    Ok((pieces, trainer, normalizer))
}

fn decode(bytes: &[u8]) -> Result<(Vec<Piece>, Trainer, Normalizer), String> {
    let model = ModelProto::decode(bytes).map_err(|e| e.to_string())?;
    // Sentencepiece writes both behind the pieces, whatever they hold.
    let specs = model.trainer.zip(model.normalizer).ok_or("it ends too early")?;
    if !specs.1.charsmap().is_empty() {
        Charsmap::parse(specs.1.charsmap().to_vec())?;
    }
    Ok((model.pieces, specs.0, specs.1))
}

/// What in a file is not as in DeBERTa's, if anything.
fn foreign(pieces: &[Piece], trainer: &Trainer, normalizer: &Normalizer) -> Option<String> {
    if trainer.algorithm() != Algorithm::Unigram {
        return Some(format!("is a {:?} model", trainer.algorithm()));
    }
    if trainer.whitespace_as_suffix() || !normalizer.escape_whitespaces() {
        return Some("marks spaces in another way than \"▁\" before a word".to_owned());
    }
    for piece in pieces {
        if matches!(piece.kind(), Kind::UserDefined | Kind::Unused) {
            return Some(format!("has the {:?} piece \"{}\"", piece.kind(), piece.piece()));
        }
        if !piece.score().is_finite() {
            return Some(format!("gives \"{}\" the score {}", piece.piece(), piece.score()));
        }
    }
    let needed = ["[CLS]", "[SEP]"].into_iter().find(|n| !pieces.iter().any(|p| p.piece() == *n));
    if let Some(token) = needed {
        return Some(format!("has no piece {token}"));
    }
    let unknown = pieces.iter().filter(|piece| piece.kind() == Kind::Unknown).count();
    (unknown != 1).then(|| format!("has {unknown} pieces for the unknown, not one"))
}

#[cfg(test)]
mod tests;
