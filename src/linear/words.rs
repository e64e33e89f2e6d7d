//! The words of a review, and its n-grams by key.
//!
//! What a word is [`crate::data::words`] says; without punctuation only those of letters and digits count. An
//! n-gram is `n` words in a row, and its key is the XXH3 hash (64 bits, seed 0) of these words with single spaces
//! between them.

use std::ops::RangeInclusive;

use twox_hash::XxHash3_64;

use crate::data::words::{lower, split};

/// The words of one review.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Words {
    /// All words, each followed by one space.
    text: String,
    /// Where each word begins and ends in `text`.
    spans: Vec<(u32, u32)>,
}

impl Words {
    /// The words of a text that was cleaned already.
    pub fn of(text: &str, punctuation: bool) -> Self {
        let mut words = Self { text: String::with_capacity(text.len() + 16), spans: Vec::new() };
        for word in split(&lower(text)) {
            if punctuation || word.starts_with(char::is_alphanumeric) {
                let begin = words.text.len();
                words.text.push_str(word);
                words.spans.push((begin as u32, words.text.len() as u32));
                words.text.push(' ');
            }
        }
        words
    }

    /// Every n-gram of a length in `lengths`, the shorter ones first, each as often as it occurs.
    pub fn grams(&self, lengths: RangeInclusive<usize>) -> impl Iterator<Item = &str> {
        lengths.flat_map(move |n| {
            self.spans
                .windows(n)
                .map(|words| &self.text[words[0].0 as usize..words[words.len() - 1].1 as usize])
        })
    }
}

/// The key of an n-gram.
pub fn key(gram: &str) -> u64 {
    XxHash3_64::oneshot(gram.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str, punctuation: bool) -> Vec<String> {
        Words::of(text, punctuation).grams(1..=1).map(str::to_owned).collect()
    }

    #[test]
    fn words_are_letters_digits_and_inner_apostrophes() {
        let text = "Don\u{2019}t! 'Great' FILM, 10/10 -- café\u{301} it's' ";
        assert_eq!(words(text, false), ["don't", "great", "film", "10", "10", "café", "it's"]);
        assert_eq!(words("Don't!! a,b", true), ["don't", "!", "!", "a", ",", "b"]);
        assert!(words(" \t\n", true).is_empty());
        assert!(words("?!", false).is_empty());
    }

    #[test]
    fn grams_are_words_in_a_row() {
        let words = Words::of("a b, c", false);
        let grams: Vec<&str> = words.grams(1..=3).collect();
        assert_eq!(grams, ["a", "b", "c", "a b", "b c", "a b c"]);
        assert_eq!(words.grams(2..=2).collect::<Vec<_>>(), ["a b", "b c"]);
        assert_eq!(words.grams(4..=5).count(), 0);
    }

    /// Models on disk are keyed by it.
    #[test]
    fn keys_stay_what_they_are() {
        assert_eq!(key("not good"), XxHash3_64::oneshot(b"not good"));
        assert_eq!(key(""), 0x2d06_8005_38d3_94c2);
    }
}
