//! Tokenised reviews, end to end in one array: what training reads.

use std::ops::Range;

use rayon::prelude::*;

use super::{Cleaning, Limit, Review, Tokenizer};
use crate::{Error, Result};

/// Token ids of many reviews without padding, in the order of the source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenSet {
    /// All sequences, end to end.
    pub tokens: Vec<u32>,
    /// Where each sequence begins, and where the last ends: `len() + 1` entries.
    pub offsets: Vec<u64>,
    /// The label of each sequence; all present or all absent.
    pub labels: Vec<Option<u32>>,
    /// The id of each sequence in its source.
    pub ids: Vec<String>,
}

impl TokenSet {
    /// Cleans and tokenises reviews, in parallel.
    ///
    /// A review that comes to nothing still is one, and a run must not stop for it: it becomes
    /// the tokenizer's special tokens, or where there are none its [`Tokenizer::filler`].
    ///
    /// # Errors
    /// `Data` for such a review where there is no filler either.
    pub fn build(
        reviews: &[Review],
        cleaning: Cleaning,
        tokenizer: &Tokenizer,
        limit: &Limit,
    ) -> Result<Self> {
        let texts: Vec<_> = reviews.par_iter().map(|r| cleaning.clean(&r.text)).collect();
        let mut sequences = tokenizer.encode_all(&texts, limit)?;
        for (review, sequence) in reviews.iter().zip(&mut sequences) {
            if sequence.is_empty() {
                sequence.push(tokenizer.filler().ok_or_else(|| empty(review))?);
            }
        }
        let mut offsets = Vec::with_capacity(sequences.len() + 1);
        offsets.push(0);
        let mut end = 0;
        for sequence in &sequences {
            end += sequence.len() as u64;
            offsets.push(end);
        }
        Ok(Self {
            tokens: sequences.concat(),
            offsets,
            labels: reviews.iter().map(|r| r.label).collect(),
            ids: reviews.iter().map(|r| r.id.clone()).collect(),
        })
    }

    /// How many sequences there are.
    pub fn len(&self) -> usize {
        self.labels.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.labels.is_empty()
    }

    /// The token ids of sequence `i`.
    pub fn sequence(&self, i: usize) -> &[u32] {
        &self.tokens[self.range(i)]
    }

    /// How many tokens sequence `i` has.
    pub fn length(&self, i: usize) -> usize {
        self.range(i).len()
    }

    /// How many tokens each sequence has, in order.
    pub fn lengths(&self) -> Vec<usize> {
        (0..self.len()).map(|i| self.length(i)).collect()
    }

    fn range(&self, i: usize) -> Range<usize> {
        self.offsets[i] as usize..self.offsets[i + 1] as usize
    }
}

fn empty(review: &Review) -> Error {
    Error::Data(format!(
        "review {} has no tokens: it is empty, and this tokenizer adds no special ones; remove it",
        review.id
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{Truncation, synthetic};

    #[test]
    fn sequences_follow_their_reviews() {
        let mut reviews = synthetic::reviews(30, 2);
        reviews[3].text = String::new();
        let texts: Vec<String> = reviews.iter().map(|r| r.text.clone()).collect();
        let tokenizer = Tokenizer::train_wordpiece(&texts, 200).unwrap();
        let limit = Limit { max_length: 20, truncation: Truncation::Head };
        let set = TokenSet::build(&reviews, Cleaning::None, &tokenizer, &limit).unwrap();
        let expected = tokenizer.encode_all(&texts, &limit).unwrap();
        assert_eq!((set.len(), set.is_empty()), (30, false));
        for (i, sequence) in expected.iter().enumerate() {
            assert_eq!(set.sequence(i), sequence);
            assert_eq!((&set.ids[i], set.labels[i]), (&reviews[i].id, reviews[i].label));
        }
        assert_eq!(set.sequence(3), [2, 3], "an empty text is its special tokens");
        assert_eq!(set.lengths(), expected.iter().map(Vec::len).collect::<Vec<_>>());
        assert_eq!(set.tokens.len() as u64, *set.offsets.last().unwrap());
    }

    #[test]
    fn an_empty_review_is_the_token_that_ends_texts() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("merges.txt"), "").unwrap();
        let review =
            |id: &str, text: &str| Review { id: id.into(), text: text.into(), label: None };
        let reviews = [review("7", "a"), review("8", ""), review("9", " <br /> ")];
        let limit = Limit { max_length: 8, truncation: Truncation::Head };
        let build = |vocabulary: &str| {
            std::fs::write(dir.path().join("vocab.json"), vocabulary).unwrap();
            let tokenizer = Tokenizer::load(dir.path()).unwrap();
            TokenSet::build(&reviews, Cleaning::Html, &tokenizer, &limit)
        };
        let set = build(r#"{"a": 0, "<|endoftext|>": 1}"#).unwrap();
        assert_eq!((set.tokens, set.offsets), (vec![0, 1, 1], vec![0, 1, 2, 3]));
        let error = build(r#"{"a": 0}"#).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains("review 8 has no tokens"), "{error}");
    }

    #[test]
    fn cleaning_happens_before_tokenising() {
        let review = Review { id: "1".into(), text: "good<br />film".into(), label: None };
        let texts = ["good film br < / >".to_owned()];
        let tokenizer = Tokenizer::train_wordpiece(&texts, 60).unwrap();
        let limit = Limit { max_length: 64, truncation: Truncation::Head };
        let build = |cleaning| {
            TokenSet::build(std::slice::from_ref(&review), cleaning, &tokenizer, &limit).unwrap()
        };
        let plain = tokenizer.encode_all(&["good film"], &limit).unwrap();
        assert_eq!(build(Cleaning::Html).sequence(0), plain[0]);
        assert_ne!(build(Cleaning::None).sequence(0), plain[0]);
    }
}
