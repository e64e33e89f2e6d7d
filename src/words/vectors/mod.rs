//! Vectors from files, for the words of a vocabulary.
//!
//! | file | owns |
//! |---|---|
//! | this | the table: words that a file lacks, the row of the padding |
//! | `source` | `.gz`, `.zip`, which format a name means |
//! | `text` | a word and its numbers on each line: GloVe, word2vec |
//! | `binary` | word2vec's `.bin` |
//! | `pickle` | Python's pickles, as far as arrays and plain values go; runs nothing of what they contain |
//! | `array` | arrays of NumPy and PyTorch inside them |
//! | `students` | `imdb_glove.pickle3`: nine values, of which two are vectors and their words |
//!
//! A file is read once from its beginning to its end, and no row is kept that nobody wants.

mod array;
mod binary;
mod pickle;
mod source;
mod students;
mod text;

#[cfg(test)]
mod tests;

use std::{
    collections::{HashMap, HashSet},
    path::Path,
};

use candle_core::{Device, Tensor};
use rand_chacha::{ChaCha12Rng, rand_core::SeedableRng};
use rand_distr::{Distribution, Normal};

use crate::{Error, Result, data::Tokenizer};
use source::Format;

/// Rows of a file.
#[derive(Debug)]
pub struct Vectors {
    /// The length of each.
    pub dimensions: usize,
    /// The wanted words that the file has, each with its row. Of a word that stands there twice the
    /// first counts.
    pub rows: HashMap<String, Vec<f32>>,
}

/// Reads the rows of `path` whose word is wanted.
///
/// The name decides the format: `.bin` is word2vec's binary one, `.pickle3`, `.pickle` and `.pkl` the nine
/// values of `imdb_glove.pickle3`, any other is text. Each may be packed: `.gz`, or `.zip` with one file in
/// it, or `archive.zip#file` for one of several.
///
/// # Errors
/// `Data` naming file, line (in `.bin` the number of the word), value and remedy for what is malformed: any
/// line with too few or too many columns, and a number that is none, or not finite, in a row that is wanted.
pub fn read(path: &Path, wanted: impl Fn(&str) -> bool) -> Result<Vectors> {
    source::open(path, |source| match source.format {
        Format::Text => text::read(source, &wanted),
        Format::Binary => binary::read(source, &wanted),
        Format::Pickle => students::read(source, &wanted),
    })
}

/// What an embedding starts from.
#[derive(Debug)]
pub struct Table {
    /// A row for each id of the vocabulary: `[V, E]`, f32, on the CPU.
    pub values: Tensor,
    /// How many tokens of the vocabulary were in the file.
    pub found: usize,
    /// How many there are, padding aside.
    pub words: usize,
}

/// The rows for the vocabulary of `tokenizer`.
///
/// A token that the file lacks is looked up in lower case. One that it lacks then as well starts from a
/// normal distribution with mean and deviation of those found, column by column: a function of the seed
/// and the token alone. The row of the padding is zero.
///
/// # Errors
/// Those of [`read`]; `Data` if the file has none of the tokens.
pub fn table(path: &Path, tokenizer: &Tokenizer, seed: u64) -> Result<Table> {
    let entries = tokenizer.entries();
    let pad = tokenizer.pad_id();
    let words: Vec<(&str, u32)> = entries
        .iter()
        .filter(|(_, id)| Some(*id) != pad)
        .map(|(token, id)| (token.as_str(), *id))
        .collect();
    let mut names: HashSet<String> = words.iter().map(|(token, _)| (*token).to_owned()).collect();
    names.extend(words.iter().map(|(token, _)| token.to_lowercase()));
    let file = read(path, |word| names.contains(word))?;
    let row = |token: &str| file.rows.get(token).or_else(|| file.rows.get(&token.to_lowercase()));

    let width = file.dimensions;
    let mut values = vec![0.0f32; tokenizer.vocab_size() * width];
    let mut absent = Vec::new();
    let mut moments = Moments::new(width);
    for (token, id) in &words {
        let Some(row) = row(token) else {
            absent.push((*token, *id));
            continue;
        };
        moments.add(row);
        values[*id as usize * width..][..width].copy_from_slice(row);
    }
    let found = words.len() - absent.len();
    if found == 0 {
        return Err(Error::Data(format!(
            "{} has a vector for none of the {} words of the vocabulary; use one of the same language, \
             with words in lower case",
            path.display(),
            words.len()
        )));
    }
    let columns = moments.normals()?;
    for (token, id) in absent {
        let mut rng = generator(seed, token);
        for (value, column) in values[id as usize * width..][..width].iter_mut().zip(&columns) {
            *value = column.sample(&mut rng) as f32;
        }
    }
    let shape = (tokenizer.vocab_size(), width);
    Ok(Table { values: Tensor::from_vec(values, shape, &Device::Cpu)?, found, words: words.len() })
}

/// A generator that depends on seed and token alone.
fn generator(seed: u64, token: &str) -> ChaCha12Rng {
    let mut hash = blake3::Hasher::new();
    hash.update(&seed.to_le_bytes()).update(token.as_bytes());
    ChaCha12Rng::from_seed(*hash.finalize().as_bytes())
}

/// Mean and deviation of each column, by Welford's sums.
struct Moments {
    count: f64,
    columns: Vec<(f64, f64)>,
}

impl Moments {
    fn new(width: usize) -> Self {
        Self { count: 0.0, columns: vec![(0.0, 0.0); width] }
    }

    fn add(&mut self, row: &[f32]) {
        self.count += 1.0;
        for ((mean, squares), value) in self.columns.iter_mut().zip(row) {
            let from_mean = f64::from(*value) - *mean;
            *mean += from_mean / self.count;
            *squares += from_mean * (f64::from(*value) - *mean);
        }
    }

    fn normals(&self) -> Result<Vec<Normal<f64>>> {
        let normal = |(mean, squares): &(f64, f64)| {
            Normal::new(*mean, (squares / self.count).sqrt())
                .map_err(|e| Error::Bug(format!("mean {mean}, squares {squares}: {e}")))
        };
        self.columns.iter().map(normal).collect()
    }
}
