//! Tokenizers: from text to the ids a model was trained on.
//!
//! The algorithms are the `tokenizers` crate's, so ids equal Hugging Face's. Owned here: which
//! files make a tokenizer, truncation, and the refusal of any padding or truncation saved inside
//! a `tokenizer.json`: batches are ragged, and the run's own limit is the only one.

mod beside;
mod load;
mod normalize;
mod recipe;
mod sentencepiece;
mod train;

use std::fs;
use std::path::Path;

use rayon::prelude::*;
use serde_json::{Map, Value};
use tokenizers::{
    DecoderWrapper, Encoding, ModelWrapper, PostProcessorWrapper, PreTokenizerWrapper, Token,
    TokenizerImpl,
};

use self::beside::Beside;
use self::normalize::Normalize;

use crate::atomic::write_atomic;
use crate::{Error, Result};

pub use crate::config::Truncation;

/// How long a sequence may be, special tokens included, and how it is shortened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Limit {
    /// The most tokens a sequence may have.
    pub max_length: usize,
    /// Which tokens go.
    pub truncation: Truncation,
}

/// The crate's tokenizer, with normalizers of ours among its own.
type Inner = TokenizerImpl<
    ModelWrapper,
    Normalize,
    PreTokenizerWrapper,
    PostProcessorWrapper,
    DecoderWrapper,
>;

/// A tokenizer and the special tokens it puts around every text.
#[derive(Debug)]
pub struct Tokenizer {
    inner: Inner,
    /// `tokenizer_config.json`, as `save` writes it.
    config: Map<String, Value>,
    prefix: Vec<u32>,
    suffix: Vec<u32>,
    filler: Option<u32>,
    /// What every text is filled up with to the limit, if it is.
    padding: Option<u32>,
    fingerprint: [u8; 32],
}

impl Tokenizer {
    /// Loads `tokenizer.json`, `vocab.txt` (BERT), `vocab.json` with `merges.txt` beside it
    /// (byte-level BPE) or `spm.model` (DeBERTa's sentencepiece); or from a directory the first of
    /// these it holds.
    ///
    /// `tokenizer_config.json`, `special_tokens_map.json` and `added_tokens.json` beside a vocabulary
    /// are followed. `vocab.txt` lower-cases unless they say `"do_lower_case": false`, `spm.model`
    /// only if they say `true`. Byte-level BPE is RoBERTa's if the vocabulary holds `<s>` and
    /// `</s>`, else GPT-2's, which adds no special tokens.
    ///
    /// The ids of `spm.model` are sentencepiece's, but for three things: special tokens are
    /// recognised inside a text, as Hugging Face does; where two segmentations are equally likely,
    /// sentencepiece decides by rounding in f32; and a text that spells a byte's piece ("<0x41>")
    /// gets that piece.
    pub fn load(path: &Path) -> Result<Self> {
        let (inner, beside) = load::load(path)?;
        Self::new(inner, &beside).map_err(|e| Error::Data(format!("{}: {e}", path.display())))
    }

    /// Trains a lower-casing BERT-style WordPiece tokenizer with exactly `vocab_size` entries, or
    /// fewer if the texts have no more to give. The same texts always give the same tokenizer.
    pub fn train_wordpiece(texts: &[String], vocab_size: usize) -> Result<Self> {
        let vocabulary = train::wordpiece(texts, vocab_size)?;
        let beside = Beside::default();
        let recipe = recipe::bert(&vocabulary, recipe::BertCase::default(), &beside);
        let inner = recipe::build(&recipe).map_err(Error::Bug)?;
        Self::new(inner, &beside).map_err(Error::Bug)
    }

    /// The tokenizer whose ids are those of whole words: `[PAD]` 0, `[UNK]` 1, then the words that
    /// occur at least `min_count` times in `texts`, the most frequent first and equally frequent ones
    /// in alphabetical order; at most `vocab_size` ids in all. [`super::words`] says what a word is.
    /// It puts nothing around a text, and makes `[UNK]` of one without words.
    ///
    /// # Errors
    /// `User` if no word is that frequent, or `vocab_size` has no room for one.
    pub fn train_words(
        texts: &[String],
        min_count: usize,
        vocab_size: Option<usize>,
    ) -> Result<Self> {
        let vocabulary = train::words(texts, min_count, vocab_size)?;
        let beside = Beside::default();
        let inner = recipe::build(&recipe::words(&vocabulary, &beside)).map_err(Error::Bug)?;
        Self::new(inner, &beside).map_err(Error::Bug)
    }

    fn new(mut inner: Inner, beside: &Beside) -> Result<Self, String> {
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|e| e.to_string())?;
        let (prefix, suffix) = surroundings(&inner)?;
        let json = inner.to_string(false).map_err(|e| e.to_string())?;
        let added = inner.get_added_tokens_decoder();
        let config = beside.config(|name| added.values().any(|t| t.special && t.content == name));
        let roles: &[&str] = match inner.get_model() {
            // Its padding is no word, and has no vector.
            ModelWrapper::WordLevel(_) => &["unk_token"],
            _ => &["eos_token", "pad_token"],
        };
        let filler = roles
            .iter()
            .filter_map(|role| inner.token_to_id(beside::content(config.get(*role)?)?))
            .next()
            .filter(|_| prefix.is_empty() && suffix.is_empty());
        let mut hasher = blake3::Hasher::new();
        hasher.update(json.as_bytes()).update(&filler.map_or([0xff; 4], u32::to_le_bytes));
        let fingerprint = *hasher.finalize().as_bytes();
        Ok(Self { inner, config, prefix, suffix, filler, padding: None, fingerprint })
    }

    /// The ids of every text, special tokens included, none longer than the limit; in parallel.
    pub fn encode_all<T: AsRef<str> + Sync>(
        &self,
        texts: &[T],
        limit: &Limit,
    ) -> Result<Vec<Vec<u32>>> {
        let special = self.prefix.len() + self.suffix.len();
        if limit.max_length <= special {
            return Err(Error::User(format!(
                "data.max_length = {} leaves no room for text: this tokenizer adds {special} \
                 special tokens; use at least {}",
                limit.max_length,
                special + 1
            )));
        }
        let room = limit.max_length - special;
        let encode = |text: &T| -> Result<Vec<u32>> {
            let mut ids = self.encode(text.as_ref(), room, limit.truncation)?;
            if let Some(padding) = self.padding {
                ids.resize(limit.max_length, padding);
            }
            Ok(ids)
        };
        texts.par_iter().map(encode).collect()
    }

    fn encode(&self, text: &str, room: usize, truncation: Truncation) -> Result<Vec<u32>> {
        let encoding = self.inner.encode_fast(text, false).map_err(|e| {
            let start: String = text.chars().take(40).collect();
            Error::Data(format!("the tokenizer cannot encode \"{start}...\": {e}"))
        })?;
        let (head, tail) = kept(encoding.get_ids(), room, truncation);
        Ok([&self.prefix, head, tail, &self.suffix].concat())
    }

    /// The tokenizer that fills every text up to the limit with its padding token, or that which
    /// ends texts: tokens like any other, to which a model attends.
    ///
    /// # Errors
    /// `User` if it has neither.
    pub fn padded(mut self) -> Result<Self> {
        let id = |role: &&str| self.inner.token_to_id(beside::content(self.config.get(*role)?)?);
        let padding = ["pad_token", "eos_token"].iter().find_map(id).ok_or_else(|| {
            Error::User(
                "data.pad_to_max_length = true, but the tokenizer has no pad_token and no eos_token; \
                 leave it out"
                    .into(),
            )
        })?;
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.fingerprint).update(b"padded").update(&padding.to_le_bytes());
        self.fingerprint = *hasher.finalize().as_bytes();
        self.padding = Some(padding);
        Ok(self)
    }

    /// What stands for a text without tokens, where the tokenizer puts none around it: the one
    /// that ends texts, or pads them (GPT-2's `<|endoftext|>`); with whole words the unknown one.
    pub fn filler(&self) -> Option<u32> {
        self.filler
    }

    /// The rows an embedding needs: the largest id plus one, added tokens included.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab(true).into_values().max().map_or(0, |top| top as usize + 1)
    }

    /// Every token with its id, added ones included, by id.
    pub fn entries(&self) -> Vec<(String, u32)> {
        let mut entries: Vec<_> = self.inner.get_vocab(true).into_iter().collect();
        entries.sort_unstable_by_key(|(_, id)| *id);
        entries
    }

    /// The id of the token that pads, if it has one.
    pub fn pad_id(&self) -> Option<u32> {
        self.inner.token_to_id(beside::content(self.config.get("pad_token")?)?)
    }

    /// Writes `tokenizer.json` and `tokenizer_config.json`, which is what Hugging Face's
    /// `AutoTokenizer` loads a directory by. No vocabulary file stands beside them, not `spm.model`
    /// either: `tokenizer.json` alone says which ids there are. Hugging Face gets other ones than we do
    /// from a converted `spm.model` only for rare sequences of combining marks.
    pub fn save(&self, dir: &Path) -> Result<()> {
        let config = serde_json::to_vec_pretty(&self.config)
            .map_err(|e| Error::Bug(format!("tokenizer_config.json: {e}")))?;
        let tokenizer = self.to_json()?;
        fs::create_dir_all(dir).map_err(|e| Error::writing(dir, e))?;
        write_atomic(&dir.join("tokenizer.json"), tokenizer.as_bytes())?;
        write_atomic(&dir.join("tokenizer_config.json"), &config)
    }

    /// `tokenizer.json`'s text.
    ///
    /// # Errors
    /// `Bug` if the crate cannot write what it read.
    pub fn to_json(&self) -> Result<String> {
        self.inner.to_string(true).map_err(|e| Error::Bug(format!("tokenizer.json: {e}")))
    }

    /// A BLAKE3 hash of the tokenizer's JSON and its filler: equal for tokenizers that encode alike.
    pub fn fingerprint(&self) -> [u8; 32] {
        self.fingerprint
    }
}

/// What of `ids` stays when there is room for `room` of them.
fn kept(ids: &[u32], room: usize, truncation: Truncation) -> (&[u32], &[u32]) {
    if ids.len() <= room {
        return (ids, &[]);
    }
    match truncation {
        Truncation::Head => (&ids[..room], &[]),
        Truncation::HeadTail => {
            // A quarter to the nearest, which makes the paper's 128 of 510.
            let head = (room + 2) / 4;
            (&ids[..head], &ids[ids.len() - (room - head)..])
        }
    }
}

/// The ids a tokenizer puts before and after a text. Found by sending one impossible token
/// through its post-processor, whatever kind that is, and looking where it comes out.
fn surroundings(inner: &Inner) -> Result<(Vec<u32>, Vec<u32>), String> {
    const PROBE: u32 = u32::MAX;
    let probe = Encoding::from_tokens(vec![Token::new(PROBE, "x".to_owned(), (0, 1))], 0);
    let ids = inner.post_process(probe, None, true).map_err(|e| e.to_string())?;
    let ids = ids.get_ids();
    let mut found = ids.iter().enumerate().filter(|(_, id)| **id == PROBE).map(|(i, _)| i);
    match (found.next(), found.next()) {
        (Some(at), None) => Ok((ids[..at].to_vec(), ids[at + 1..].to_vec())),
        _ => Err("its post-processor does not keep a text as one piece; use one that only puts \
                  special tokens around it"
            .to_owned()),
    }
}

/// Reads a JSON object from a file.
fn read_object(path: &Path) -> Result<Map<String, Value>> {
    let text = fs::read_to_string(path).map_err(|e| Error::reading(path, e))?;
    serde_json::from_str(&text)
        .map_err(|e| Error::Data(format!("{} is not a JSON object: {e}", path.display())))
}

#[cfg(test)]
mod tests;
