//! Reviews as the ids of their words, and what follows from how frequent a word is.

use std::collections::HashMap;

use rand_distr::weighted::WeightedAliasIndex;
use rayon::prelude::*;

use super::Settings;
use crate::{Error, Result, data::words};

/// The power of its frequency by which a word is drawn.
const FLATTENED: f32 = 0.75;

/// Reviews end to end, of words that are frequent enough.
pub(super) struct Corpus {
    /// The words by their ids, the most frequent first.
    pub(super) words: Vec<String>,
    /// All reviews, end to end.
    pub(super) ids: Vec<u32>,
    /// Where each begins, and where the last ends.
    offsets: Vec<usize>,
    /// The share of its occurrences in which a word is there.
    pub(super) kept: Vec<f32>,
    /// Draws a word.
    pub(super) noise: WeightedAliasIndex<f32>,
}

impl Corpus {
    pub(super) fn new<T: AsRef<str> + Sync>(texts: &[T], settings: &Settings) -> Result<Self> {
        let ranked = words::ranked(words::count(texts), settings.min_count);
        if ranked.len() < 2 {
            return Err(Error::Data(format!(
                "--min-count {}: {} of the reviews' words occur so often, and it takes two; use less, or \
                 more reviews",
                settings.min_count,
                ranked.len()
            )));
        }
        let id: HashMap<&str, u32> =
            ranked.iter().enumerate().map(|(id, (word, _))| (word.as_str(), id as u32)).collect();
        let reviews: Vec<Vec<u32>> = texts
            .par_iter()
            .map(|text| {
                let lower = words::lower(text.as_ref());
                words::split(&lower).filter_map(|word| id.get(word).copied()).collect()
            })
            .collect();
        let mut offsets = vec![0];
        offsets.extend(reviews.iter().scan(0, |end, review| {
            *end += review.len();
            Some(*end)
        }));
        let total: u64 = ranked.iter().map(|(_, count)| count).sum();
        let kept = ranked.iter().map(|(_, n)| kept(*n, total, settings.subsample)).collect();
        let weights = ranked.iter().map(|(_, n)| (*n as f32).powf(FLATTENED)).collect();
        let noise = WeightedAliasIndex::new(weights)
            .map_err(|e| Error::Bug(format!("{} words: {e}", ranked.len())))?;
        let words = ranked.into_iter().map(|(word, _)| word).collect();
        Ok(Self { words, ids: reviews.concat(), offsets, kept, noise })
    }

    /// How many reviews there are.
    pub(super) fn reviews(&self) -> usize {
        self.offsets.len() - 1
    }

    pub(super) fn review(&self, i: usize) -> &[u32] {
        &self.ids[self.offsets[i]..self.offsets[i + 1]]
    }
}

/// word2vec's share: sqrt(t/f) + t/f of a word whose share of all words is f.
fn kept(count: u64, total: u64, threshold: f64) -> f32 {
    if threshold <= 0.0 {
        return 1.0;
    }
    let ratio = threshold * total as f64 / count as f64;
    (ratio.sqrt() + ratio).min(1.0) as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frequent_words_are_left_out_now_and_then() {
        assert_eq!(kept(5, 100_000, 1e-3), 1.0);
        // A tenth of all words, a hundred times the threshold: 0.1 + 0.01.
        assert!((kept(10_000, 100_000, 1e-3) - 0.11).abs() < 1e-6);
        assert_eq!(kept(10_000, 100_000, 0.0), 1.0);
    }
}
