//! Reviews as bags of n-grams: which keys each has, and how often. Text goes in, and is not kept.

use std::ops::RangeInclusive;

use rayon::prelude::*;
use rustc_hash::FxHashMap;
use serde::{Deserialize, Serialize};

use super::words::{Words, key};
use crate::data::{Cleaning, Review};

/// How a text becomes n-grams.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reading {
    /// What is taken out of the text first.
    pub cleaning: Cleaning,
    /// Whether punctuation marks are words.
    pub punctuation: bool,
    /// Fewest and most words of an n-gram.
    pub ngrams: RangeInclusive<usize>,
    /// Keys are taken modulo this; `None` keeps all their 64 bits.
    pub buckets: Option<u64>,
}

/// The bags of many reviews.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Bags {
    /// Where the bag of each review begins, and where the last ends.
    pub offsets: Vec<usize>,
    /// The keys in each bag, ascending.
    pub keys: Vec<u64>,
    /// How often each occurs there.
    pub counts: Vec<u32>,
}

impl Reading {
    /// The n-grams of a review: key and how often, by key.
    pub fn bag(&self, text: &str) -> Vec<(u64, u32)> {
        let words = Words::of(&self.cleaning.clean(text), self.punctuation);
        let mut keys: Vec<u64> =
            words.grams(self.ngrams.clone()).map(|gram| self.key(gram)).collect();
        keys.sort_unstable();
        keys.chunk_by(|a, b| a == b).map(|run| (run[0], run.len() as u32)).collect()
    }

    /// The n-gram of every key in `index`, as the first of `reviews` that has it writes it.
    pub fn names(&self, reviews: &[Review], index: &FxHashMap<u64, u32>) -> Vec<String> {
        let mut names = vec![String::new(); index.len()];
        for review in reviews {
            let words = Words::of(&self.cleaning.clean(&review.text), self.punctuation);
            for gram in words.grams(self.ngrams.clone()) {
                if let Some(column) = index.get(&self.key(gram))
                    && names[*column as usize].is_empty()
                {
                    names[*column as usize] = gram.to_owned();
                }
            }
        }
        names
    }

    fn key(&self, gram: &str) -> u64 {
        let key = key(gram);
        self.buckets.map_or(key, |buckets| key % buckets)
    }

    /// The bags of texts, in their order.
    pub fn bags<'t>(&self, texts: impl IndexedParallelIterator<Item = &'t str>) -> Bags {
        let bags: Vec<_> = texts.map(|text| self.bag(text)).collect();
        let mut offsets = vec![0];
        offsets.extend(bags.iter().scan(0, |end, bag| {
            *end += bag.len();
            Some(*end)
        }));
        let (keys, counts) = bags.into_iter().flatten().unzip();
        Bags { offsets, keys, counts }
    }
}

impl Bags {
    /// How many reviews there are.
    pub fn len(&self) -> usize {
        self.offsets.len().saturating_sub(1)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The entries of review `i` in `keys` and `counts`.
    pub fn range(&self, i: usize) -> std::ops::Range<usize> {
        self.offsets[i]..self.offsets[i + 1]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reading(buckets: Option<u64>) -> Reading {
        Reading { cleaning: Cleaning::Html, punctuation: false, ngrams: 1..=2, buckets }
    }

    #[test]
    fn a_bag_counts_every_gram_once_and_is_sorted() {
        let bag = reading(None).bag("Good, good<br />film");
        let mut expected =
            vec![(key("good"), 2), (key("film"), 1), (key("good good"), 1), (key("good film"), 1)];
        expected.sort_unstable();
        assert_eq!(bag, expected);
        let folded = reading(Some(1)).bag("good good film");
        assert_eq!(folded, [(0, 5)]);
    }

    #[test]
    fn bags_follow_their_reviews() {
        let bags = reading(Some(1 << 20)).bags(["a b", " ", "b"].into_par_iter());
        assert_eq!((bags.len(), &bags.offsets[..]), (3, &[0, 3, 3, 4][..]));
        assert_eq!(bags.keys[bags.range(2)], [key("b") % (1 << 20)]);
    }

    #[test]
    fn names_are_the_grams_of_the_keys() {
        let review = Review { id: "0".into(), text: "Good plot, good".into(), label: None };
        let keys = [key("good"), key("plot good")];
        let index = crate::linear::columns::index(&keys);
        assert_eq!(reading(None).names(&[review], &index), ["good", "plot good"]);
    }
}
