//! Training a vocabulary, the same one every time: of words, or of WordPiece.
//!
//! WordPiece's merging is the `tokenizers` crate's. Two things in it depend on the order of a hash map
//! with a random seed, and are pinned down here: the numbers given to the "##x" pieces, which
//! break ties between equally frequent merges, and with them the order of the vocabulary.

use std::collections::BTreeSet;

use rayon::prelude::*;
use serde_json::{Map, Value};
use tokenizers::models::wordpiece::{WordPiece, WordPieceTrainer};
use tokenizers::normalizers::BertNormalizer;
use tokenizers::pre_tokenizers::bert::BertPreTokenizer;
use tokenizers::{
    AddedToken, Model, NormalizedString, Normalizer, OffsetReferential, OffsetType,
    PreTokenizedString, PreTokenizer, Trainer,
};

use super::recipe::WORDS_SPECIAL;
use crate::data::words;
use crate::{Error, Result};

/// In the order of their ids, from 0.
const SPECIAL: [&str; 5] = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"];

/// A vocabulary of `vocab_size` entries (fewer if the texts run out of pairs seen twice) with
/// their ids: the special tokens, the characters, then the longer pieces, each in text order.
pub(super) fn wordpiece(texts: &[String], vocab_size: usize) -> Result<Map<String, Value>> {
    let alphabet = alphabet(texts)?;
    let needed = SPECIAL.len() + alphabet.len();
    if vocab_size < needed {
        return Err(Error::User(format!(
            "a vocabulary of {vocab_size} cannot hold the {needed} special tokens and single \
             characters of these texts; use at least {needed}, better several times that"
        )));
    }
    let pinned = SPECIAL.iter().copied().chain(alphabet.iter().map(String::as_str));
    let mut trainer = WordPieceTrainer::builder()
        .show_progress(false)
        .vocab_size(vocab_size)
        .min_frequency(2)
        .special_tokens(pinned.clone().map(|token| AddedToken::from(token, true)).collect())
        .build();
    let mut model = WordPiece::default();
    trainer
        .feed(texts.iter(), split)
        .and_then(|()| trainer.train(&mut model))
        .map_err(|e| Error::Bug(format!("training a tokenizer: {e}")))?;
    let pinned: Vec<String> = pinned.map(str::to_owned).collect();
    let mut learned: BTreeSet<String> = model.get_vocab().into_keys().collect();
    for token in &pinned {
        learned.remove(token);
    }
    let tokens = pinned.into_iter().chain(learned);
    Ok(tokens.enumerate().map(|(id, token)| (token, Value::from(id))).collect())
}

/// The words that occur at least `min_count` times, with their ids: the special tokens, then the
/// most frequent first, at most `vocab_size` entries in all.
pub(super) fn words(
    texts: &[String],
    min_count: usize,
    vocab_size: Option<usize>,
) -> Result<Map<String, Value>> {
    let special = WORDS_SPECIAL.len();
    if let Some(size) = vocab_size.filter(|size| *size <= special) {
        return Err(Error::User(format!(
            "model.vocab_size = {size} leaves no room for words: {} come first; use more, or leave it \
             out to have an id for every word that occurs data.min_count times",
            WORDS_SPECIAL.join(" and ")
        )));
    }
    let ranked = words::ranked(words::count(texts), min_count as u64);
    if ranked.is_empty() {
        return Err(Error::User(format!(
            "data.min_count = {min_count}: no word of the training reviews occurs so often; use less"
        )));
    }
    let known = ranked.into_iter().map(|(word, _)| word);
    let tokens = WORDS_SPECIAL.into_iter().map(str::to_owned).chain(known);
    let kept = tokens.take(vocab_size.unwrap_or(usize::MAX)).enumerate();
    Ok(kept.map(|(id, token)| (token, Value::from(id))).collect())
}

/// Every character of the texts, as the beginning of a word ("x") and as its continuation
/// ("##x"): the trainer wants both for each.
fn alphabet(texts: &[String]) -> Result<BTreeSet<String>> {
    let characters: BTreeSet<char> = texts
        .par_iter()
        .map(|text| Ok(split(text)?.iter().flat_map(|word| word.chars()).collect()))
        .try_reduce(BTreeSet::new, |mut a, b| {
            a.extend(b);
            Ok(a)
        })
        .map_err(|e: tokenizers::Error| Error::Bug(format!("training a tokenizer: {e}")))?;
    Ok(characters.iter().flat_map(|c| [c.to_string(), format!("##{c}")]).collect())
}

/// The words of a text as BERT's normalizer and pre-tokenizer see them.
fn split(text: &str) -> tokenizers::Result<Vec<String>> {
    let mut normalized = NormalizedString::from(text);
    BertNormalizer::default().normalize(&mut normalized)?;
    let mut words = PreTokenizedString::from(normalized);
    BertPreTokenizer.pre_tokenize(&mut words)?;
    let splits = words.get_splits(OffsetReferential::Original, OffsetType::None);
    Ok(splits.into_iter().map(|(word, ..)| word.to_owned()).collect())
}
