//! word2vec's binary format: a line with the numbers of words and of dimensions, then for each word the
//! word, a space, and its vector in f32, little-endian. word2vec itself ends each with a line break,
//! gensim does not.

use std::{
    collections::HashMap,
    io::{BufRead, Read},
};

use super::{Vectors, source::Source, text};
use crate::Result;

/// The longest word in bytes; a file in which a longer one seems to stand is something else.
const LONGEST: u64 = 10_000;

/// Reads the rows whose word is wanted.
pub(super) fn read(source: &mut Source<'_>, wanted: &dyn Fn(&str) -> bool) -> Result<Vectors> {
    let (count, dimensions) = header(source)?;
    let mut rows = HashMap::new();
    let mut bytes = vec![0; 4 * dimensions];
    for i in 1..=count {
        let word = word(source, i)?;
        if let Err(e) = source.bytes.read_exact(&mut bytes) {
            let problem = format!("its vector (\"{word}\") breaks off ({e}); fetch the file again");
            return Err(source.wrong(format!("word {i} of {count}"), &problem));
        }
        if !wanted(&word) || rows.contains_key(&word) {
            continue;
        }
        let (numbers, _) = bytes.as_chunks::<4>();
        let row: Vec<f32> = numbers.iter().map(|number| f32::from_le_bytes(*number)).collect();
        if let Some(at) = row.iter().position(|value| !value.is_finite()) {
            let problem = format!(
                "number {} of \"{word}\" is {}, which is not finite; fetch the file again",
                at + 1,
                row[at]
            );
            return Err(source.wrong(format!("word {i} of {count}"), &problem));
        }
        rows.insert(word, row);
    }
    let mut rest = Vec::new();
    Read::take(&mut *source.bytes, 2).read_to_end(&mut rest).map_err(|e| source.damaged(e))?;
    if !rest.trim_ascii().is_empty() {
        return Err(source.damaged(format!("more follows the {count} words that line 1 promises")));
    }
    Ok(Vectors { dimensions, rows })
}

fn header(source: &mut Source<'_>) -> Result<(usize, usize)> {
    let mut line = Vec::new();
    Read::take(&mut *source.bytes, LONGEST)
        .read_until(b'\n', &mut line)
        .map_err(|e| source.damaged(e))?;
    text::header(&line).filter(|(words, _)| *words > 0).ok_or_else(|| {
        let shown: String = String::from_utf8_lossy(&line).trim_end().chars().take(40).collect();
        let problem = format!(
            "\"{shown}\" is not two numbers, of words and of dimensions; use word2vec's binary format, \
             or another ending than .bin"
        );
        source.wrong("line 1", &problem)
    })
}

/// The next word, without a line break that ended the one before it.
fn word(source: &mut Source<'_>, i: usize) -> Result<String> {
    let mut word = Vec::new();
    Read::take(&mut *source.bytes, LONGEST)
        .read_until(b' ', &mut word)
        .map_err(|e| source.damaged(e))?;
    if word.pop() != Some(b' ') {
        let problem = "there is no word with a space behind it; fetch the file again";
        return Err(source.wrong(format!("word {i}"), problem));
    }
    let word = word.strip_prefix(b"\n").unwrap_or(&word);
    Ok(String::from_utf8_lossy(word).into_owned())
}
