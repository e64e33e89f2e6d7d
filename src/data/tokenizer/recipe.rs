//! `tokenizer.json` written from vocabulary files, the way Hugging Face converts them.
//!
//! Building the JSON rather than the crate's types keeps the result comparable, field by field,
//! with the files on the Hub.

use serde_json::{Map, Value, json};

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
pub(super) fn bert(vocabulary: &Map<String, Value>, case: BertCase) -> Value {
    let special = |token: &str| json!({"SpecialToken": {"id": token, "type_id": 0}});
    let second = json!({"SpecialToken": {"id": "[SEP]", "type_id": 1}});
    let sequence = |name: &str, kind: u32| json!({"Sequence": {"id": name, "type_id": kind}});
    let (cls, sep) = (special("[CLS]"), special("[SEP]"));
    let ids = |token: &str| json!({"id": token, "ids": [vocabulary[token]], "tokens": [token]});
    json!({
        "version": "1.0",
        "added_tokens": added(vocabulary, &BERT_SPECIAL),
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": true,
            "handle_chinese_chars": case.split_chinese,
            "strip_accents": case.strip_accents,
            "lowercase": case.lowercase,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [cls, sequence("A", 0), sep],
            "pair": [cls, sequence("A", 0), sep, sequence("B", 1), second],
            "special_tokens": {"[CLS]": ids("[CLS]"), "[SEP]": ids("[SEP]")},
        },
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

/// Byte-level BPE: RoBERTa's `<s> text </s>` if the vocabulary holds both, else GPT-2's bare text.
///
/// `<mask>` keeps the space before it, as in a `tokenizer.json` saved without `lstrip`.
pub(super) fn byte_level(vocabulary: &Map<String, Value>, merges: &[(String, String)]) -> Value {
    let post_processor = match (vocabulary.get("<s>"), vocabulary.get("</s>")) {
        (Some(cls), Some(sep)) => json!({
            "type": "RobertaProcessing",
            "sep": ["</s>", sep],
            "cls": ["<s>", cls],
            "trim_offsets": true,
            "add_prefix_space": false,
        }),
        _ => json!({
            "type": "ByteLevel",
            "add_prefix_space": true,
            "trim_offsets": false,
            "use_regex": true,
        }),
    };
    let special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "<|endoftext|>"];
    json!({
        "version": "1.0",
        "added_tokens": added(vocabulary, &special),
        "pre_tokenizer": {
            "type": "ByteLevel",
            "add_prefix_space": false,
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

/// Those of `tokens` that are in the vocabulary, recognised as a whole inside texts.
fn added(vocabulary: &Map<String, Value>, tokens: &[&str]) -> Value {
    let mut found: Vec<(&Value, &str)> =
        tokens.iter().filter_map(|token| Some((vocabulary.get(*token)?, *token))).collect();
    found.sort_by_key(|(id, _)| id.as_u64());
    let entry = |(id, token): (&Value, &str)| {
        json!({
            "id": id,
            "content": token,
            "single_word": false,
            "lstrip": false,
            "rstrip": false,
            "normalized": false,
            "special": true,
        })
    };
    found.into_iter().map(entry).collect()
}

/// The tokenizer a recipe describes.
pub(super) fn build(recipe: Value) -> Result<tokenizers::Tokenizer, String> {
    tokenizers::Tokenizer::from_bytes(recipe.to_string()).map_err(|e| e.to_string())
}

/// A `tokenizer_config.json` for a tokenizer that came without one: a class that takes
/// `tokenizer.json` as it is, and the roles of its special tokens.
pub(super) fn config(inner: &tokenizers::Tokenizer) -> Map<String, Value> {
    let mut config = Map::new();
    config.insert("tokenizer_class".into(), "PreTrainedTokenizerFast".into());
    let added = inner.get_added_tokens_decoder();
    for (role, names) in [
        ("bos_token", &["<s>", "<|endoftext|>"][..]),
        ("eos_token", &["</s>", "<|endoftext|>"]),
        ("unk_token", &["[UNK]", "<unk>", "<|endoftext|>"]),
        ("cls_token", &["[CLS]", "<s>"]),
        ("sep_token", &["[SEP]", "</s>"]),
        ("pad_token", &["[PAD]", "<pad>"]),
        ("mask_token", &["[MASK]", "<mask>"]),
    ] {
        let known = |name: &&&str| added.values().any(|t| t.special && t.content == **name);
        if let Some(name) = names.iter().find(known) {
            config.insert(role.into(), (*name).into());
        }
    }
    config
}
