//! `imdb_glove.pickle3`: nine values, pickled one after another or as one list or tuple.
//!
//! They are train_X, train_y, val_X, val_y, test_X, weight, word_to_idx, idx_to_word, vocab; read are
//! `weight`, `[n, d]`, and `word_to_idx`, which gives a word its row there. A row of zeros is that of a word
//! for which no vector was known.

use std::{collections::HashMap, io::BufRead};

use super::{
    Vectors, array,
    pickle::{self, Value},
    source::Source,
};
use crate::Result;

const PARTS: [&str; 9] = [
    "train_X",
    "train_y",
    "val_X",
    "val_y",
    "test_X",
    "weight",
    "word_to_idx",
    "idx_to_word",
    "vocab",
];
const WEIGHT: usize = 5;
const WORD_TO_IDX: usize = 6;

/// Reads the rows whose word is wanted.
pub(super) fn read(source: &mut Source<'_>, wanted: &dyn Fn(&str) -> bool) -> Result<Vectors> {
    let (weight, words) = parts(source)?;
    let matrix = array::matrix(&weight).map_err(|e| source.damaged(format!("weight {e}")))?;
    let Value::Dict(words) = words else {
        return Err(source.damaged("word_to_idx is no dict"));
    };
    let count = matrix.values.len() / matrix.columns;
    let mut rows = HashMap::new();
    for (word, index) in &*words.borrow() {
        let Some(word) = word.as_text() else {
            return Err(
                source.damaged(format!("word_to_idx has the key {word:?}, which is no text"))
            );
        };
        if !wanted(word) {
            continue;
        }
        let Some(row) = index.to_size().filter(|row| *row < count) else {
            let problem = format!("\"{word}\" has the row {index:?}, but weight has {count}");
            return Err(source.damaged(format!("word_to_idx: {problem}")));
        };
        let row = &matrix.values[row * matrix.columns..][..matrix.columns];
        if let Some(value) = row.iter().find(|value| !value.is_finite()) {
            let problem = format!("the vector of \"{word}\" holds {value}");
            return Err(source.damaged(format!("weight: {problem}")));
        }
        if row.iter().any(|value| *value != 0.0) {
            rows.insert(word.to_owned(), row.to_vec());
        }
    }
    Ok(Vectors { dimensions: matrix.columns, rows })
}

/// `weight` and `word_to_idx`. Of the other parts none is kept longer than it must be.
fn parts(source: &mut Source<'_>) -> Result<(Value, Value)> {
    let first = load(source, PARTS[0])?;
    let ended = source.bytes.fill_buf().map(<[u8]>::is_empty);
    if ended.map_err(|e| source.damaged(e))? {
        let items = first.to_items().unwrap_or_default();
        let (Some(weight), Some(words), 9) =
            (items.get(WEIGHT), items.get(WORD_TO_IDX), items.len())
        else {
            let listed = PARTS.join(", ");
            return Err(source.damaged(format!("it holds one value, which is no list of {listed}")));
        };
        return Ok((weight.clone(), words.clone()));
    }
    drop(first);
    for part in &PARTS[1..WEIGHT] {
        load(source, part)?;
    }
    let weight = load(source, PARTS[WEIGHT])?;
    let words = load(source, PARTS[WORD_TO_IDX])?;
    for part in &PARTS[WORD_TO_IDX + 1..] {
        load(source, part)?;
    }
    Ok((weight, words))
}

fn load(source: &mut Source<'_>, part: &str) -> Result<Value> {
    let bytes: &mut dyn BufRead = source.bytes;
    pickle::load(bytes).map_err(|e| {
        source.damaged(format!("value {part} of {} cannot be read ({e})", PARTS.join(", ")))
    })
}
