//! Vectors of words trained on reviews: skip-gram with negative sampling (Mikolov et al. 2013, "Distributed
//! Representations of Words and Phrases and their Compositionality").
//!
//! For each word a window around it, of a width drawn up to the largest; the vector of each word in the
//! window learns to tell the word in the middle from `negative` words drawn by frequency^0.75. Frequent
//! words are left out now and then. The rate falls to zero over all epochs.
//!
//! | file | owns |
//! |---|---|
//! | this | settings, threads, the order of the reviews, the rate, the file |
//! | `corpus` | reviews as ids, how often to leave a word out, which to draw |
//! | `shared` | the two matrices that all threads read and write at once |
//! | `walk` | one review: windows, drawn words, rows on their way to and from the matrices |
//! | `window` | the arithmetic of one window |
//!
//! Other than in word2vec, the words of one window share their drawn words and learn at once (Ji et al.
//! 2016): five times fewer rows are read. With one thread the result is a function of the seed and of the
//! texts, to the last bit on one kind of processor; with several (Niu et al. 2011, Hogwild) an update may
//! be lost to another of the same row, so it is not.

mod corpus;
mod shared;
mod walk;
mod window;

#[cfg(test)]
mod tests;

use std::{
    fmt::Write,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};

use rand::seq::SliceRandom;
use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};

use crate::{Error, Result};
use corpus::Corpus;
use shared::Shared;
use walk::Walk;

/// Reviews that a thread takes at a time.
const CHUNK: usize = 32;
/// The rate ends at this share of where it began, as in word2vec.
const LAST: f64 = 1e-4;

/// How vectors are trained.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// Length of a vector.
    pub dimensions: usize,
    /// How often every review is read.
    pub epochs: usize,
    /// Words on either side that a word may learn from.
    pub window: usize,
    /// Words drawn for each window.
    pub negative: usize,
    /// How often a word must occur to have a vector.
    pub min_count: u64,
    /// Above which share of all words one is left out now and then; 0 never leaves any out.
    pub subsample: f64,
    /// The rate at the beginning.
    pub learning_rate: f64,
    /// Seed of everything drawn.
    pub seed: u64,
}

/// Vectors, by descending frequency of their words.
#[derive(Debug, Clone, PartialEq)]
pub struct Trained {
    /// The words.
    pub words: Vec<String>,
    /// Length of a vector.
    pub dimensions: usize,
    /// `[V, E]` by rows.
    pub values: Vec<f32>,
}

impl Trained {
    /// word2vec's text: how many words and numbers there are, then a word and its numbers on each line.
    pub fn to_text(&self) -> String {
        let mut text = format!("{} {}\n", self.words.len(), self.dimensions);
        for (word, row) in self.words.iter().zip(self.values.chunks_exact(self.dimensions)) {
            text.push_str(word);
            for value in row {
                // Writing to a string cannot fail.
                let _ = write!(text, " {value}");
            }
            text.push('\n');
        }
        text
    }
}

/// Reviews ready to train on.
pub struct Prepared(Corpus);

impl Prepared {
    /// Counts the words of cleaned texts and gives them ids.
    ///
    /// # Errors
    /// `Data` if there are not two different words that occur `min_count` times.
    pub fn new<T: AsRef<str> + Sync>(texts: &[T], settings: &Settings) -> Result<Self> {
        Corpus::new(texts, settings).map(Self)
    }

    /// Words that have a vector.
    pub fn vocabulary(&self) -> usize {
        self.0.words.len()
    }

    /// Words of all reviews that have one, which one epoch goes through.
    pub fn words(&self) -> u64 {
        self.0.ids.len() as u64
    }

    /// Trains on all threads of the current rayon pool; tells `progress` now and then how many words, of
    /// [`Self::words`] times the epochs, were gone through.
    ///
    /// # Errors
    /// `Data` if the vectors are not finite in the end.
    pub fn train(self, settings: &Settings, progress: impl Fn(u64) + Sync) -> Result<Trained> {
        let Corpus { words, .. } = &self.0;
        let inputs = Shared::random(words.len(), settings.dimensions, settings.seed);
        let outputs = Shared::zeros(words.len(), settings.dimensions);
        let orders = orders(self.0.reviews(), settings);
        let chunks: Vec<&[u32]> = orders.iter().flat_map(|order| order.chunks(CHUNK)).collect();
        let total = self.words() * settings.epochs as u64;
        let (next, done) = (AtomicU64::new(0), AtomicU64::new(0));
        rayon::broadcast(|_| {
            let mut walk = Walk::new(&self.0, settings, &inputs, &outputs);
            loop {
                let at = next.fetch_add(1, Relaxed);
                let Some(chunk) = chunks.get(at as usize) else { break };
                let mut rng = ChaCha8Rng::seed_from_u64(settings.seed);
                // 0 is that of the beginning.
                rng.set_stream(at + 1);
                for review in *chunk {
                    let ids = self.0.review(*review as usize);
                    let before = done.fetch_add(ids.len() as u64, Relaxed);
                    let left = 1.0 - before as f64 / total as f64;
                    walk.review(ids, (settings.learning_rate * left.max(LAST)) as f32, &mut rng);
                }
                progress(done.load(Relaxed));
            }
        });
        let values = inputs.values();
        if values.iter().any(|value| !value.is_finite()) {
            return Err(Error::User(format!(
                "--learning-rate {}: the vectors have grown beyond all bounds; use less, 0.025 is usual",
                settings.learning_rate
            )));
        }
        Ok(Trained { words: self.0.words, dimensions: settings.dimensions, values })
    }
}

/// The order of the reviews in each epoch: files may have all of one label first.
fn orders(reviews: usize, settings: &Settings) -> Vec<Vec<u32>> {
    let mut rng = ChaCha8Rng::seed_from_u64(settings.seed);
    let mut order: Vec<u32> = (0..reviews as u32).collect();
    (0..settings.epochs)
        .map(|_| {
            order.shuffle(&mut rng);
            order.clone()
        })
        .collect()
}
