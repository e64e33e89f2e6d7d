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
    pub fn build(
        reviews: &[Review],
        cleaning: Cleaning,
        tokenizer: &Tokenizer,
        limit: &Limit,
    ) -> Result<Self> {
        let texts: Vec<_> = reviews.par_iter().map(|r| cleaning.clean(&r.text)).collect();
        let sequences = tokenizer.encode_all(&texts, limit)?;
        if let Some(empty) = sequences.iter().position(Vec::is_empty) {
            return Err(Error::Data(format!(
                "review {} has no tokens: it is empty, and this tokenizer adds no special ones; \
                 remove it",
                reviews[empty].id
            )));
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
