//! `tokenizer.json` written from vocabulary files, the way Hugging Face converts them.
//!
//! Building the JSON rather than the crate's types keeps the result comparable, field by field,
//! with the files on the Hub.

use serde_json::{Map, Value, json};

use super::Inner;
use super::beside::Beside;
use crate::data::words;

/// How a BERT vocabulary treats case, accents and Chinese characters.
pub(super) struct BertCase {
    pub(super) lowercase: bool,
    /// `None`: as `lowercase`.
    pub(super) strip_accents: Option<bool>,
    pub(super) split_chinese: bool,
}

impl Default for BertCase {
    fn default() -> Self {
        Self { lowercase: true, strip_accents: None, split_chinese: true }
    }
}

/// The special tokens of a BERT vocabulary; the first three must be in it.
pub(super) const BERT_SPECIAL: [&str; 5] = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"];

/// BERT's WordPiece: `[CLS] text [SEP]`.
pub(super) fn bert(vocabulary: &Map<String, Value>, case: BertCase, beside: &Beside) -> Value {
    let id = |token: &str| vocabulary.get(token).and_then(Value::as_u64);
    json!({
        "version": "1.0",
        "added_tokens": beside.added_tokens(&BERT_SPECIAL, id),
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": true,
            "handle_chinese_chars": case.split_chinese,
            "strip_accents": case.strip_accents,
            "lowercase": case.lowercase,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": template(("[CLS]", id("[CLS]")), ("[SEP]", id("[SEP]"))),
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true},
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": vocabulary,
        },
    })
}

/// The post-processor `first text last`, and for pairs `first text last text last`.
pub(super) fn template(first: (&str, Option<u64>), last: (&str, Option<u64>)) -> Value {
    let special = |token: &str, kind: u32| json!({"SpecialToken": {"id": token, "type_id": kind}});
    let sequence = |name: &str, kind: u32| json!({"Sequence": {"id": name, "type_id": kind}});
    let ids =
        |(token, id): (&str, Option<u64>)| json!({"id": token, "ids": [id], "tokens": [token]});
    let single = [special(first.0, 0), sequence("A", 0), special(last.0, 0)];
    let pair = [&single[..], &[sequence("B", 1), special(last.0, 1)]].concat();
    json!({
        "type": "TemplateProcessing",
        "single": single,
        "pair": pair,
        "special_tokens": {first.0: ids(first), last.0: ids(last)},
    })
}

/// Byte-level BPE: RoBERTa's `<s> text </s>` if the vocabulary holds both, or what the files beside
/// it name as `cls_token` and `sep_token`; else GPT-2's bare text.
///
/// `<mask>` keeps the space before it unless those files say `lstrip`.
pub(super) fn byte_level(
    vocabulary: &Map<String, Value>,
    merges: &[(String, String)],
    beside: &Beside,
) -> Value {
    let add_prefix_space = beside.flag("add_prefix_space").unwrap_or(false);
    let cls = beside.role("cls_token").unwrap_or("<s>");
    let sep = beside.role("sep_token").unwrap_or("</s>");
    let post_processor = match (vocabulary.get(cls), vocabulary.get(sep)) {
        (Some(cls_id), Some(sep_id)) => json!({
            "type": "RobertaProcessing",
            "sep": [sep, sep_id],
            "cls": [cls, cls_id],
            "trim_offsets": true,
            "add_prefix_space": add_prefix_space,
        }),
        _ => json!({
            "type": "ByteLevel",
            "add_prefix_space": true,
            "trim_offsets": false,
            "use_regex": true,
        }),
    };
    let special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "<|endoftext|>"];
    let id = |token: &str| vocabulary.get(token).and_then(Value::as_u64);
    json!({
        "version": "1.0",
        "added_tokens": beside.added_tokens(&special, id),
        "pre_tokenizer": {
            "type": "ByteLevel",
            "add_prefix_space": add_prefix_space,
            "trim_offsets": true,
            "use_regex": true,
        },
        "post_processor": post_processor,
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": true,
            "trim_offsets": true,
            "use_regex": true,
        },
        "model": {
            "type": "BPE",
            "fuse_unk": false,
            "byte_fallback": false,
            "ignore_merges": false,
            "vocab": vocabulary,
            "merges": merges,
        },
    })
}

/// The special tokens of a vocabulary of words, in the order of their ids.
pub(super) const WORDS_SPECIAL: [&str; 2] = ["[PAD]", "[UNK]"];

/// Words of a vocabulary as [`words::split`] finds them in lower-cased text, bare.
pub(super) fn words(vocabulary: &Map<String, Value>, beside: &Beside) -> Value {
    let id = |token: &str| vocabulary.get(token).and_then(Value::as_u64);
    json!({
        "version": "1.0",
        "added_tokens": beside.added_tokens(&WORDS_SPECIAL, id),
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Replace", "pattern": {"String": "\u{2019}"}, "content": "'"},
                {"type": "Lowercase"},
            ],
        },
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": words::PATTERN},
            "behavior": "Removed",
            "invert": true,
        },
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"},
    })
}

/// The tokenizer a recipe describes.
pub(super) fn build(recipe: &Value) -> Result<Inner, String> {
    Inner::from_bytes(recipe.to_string()).map_err(|e| e.to_string())
}
