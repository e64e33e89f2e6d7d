//! A word and its numbers on each line, with spaces or tabs between them.
//!
//! word2vec writes how many words and numbers there are in a line before them, GloVe does not. GloVe's
//! words (840B) may contain spaces: of a line the last numbers are the vector, as many as line 1 says.

use std::collections::HashMap;

use super::{Vectors, source::Source};
use crate::Result;

/// Reads the rows whose word is wanted.
pub(super) fn read(source: &mut Source<'_>, wanted: &dyn Fn(&str) -> bool) -> Result<Vectors> {
    let mut rows = HashMap::new();
    let mut promised = None;
    let mut dimensions = None;
    let (mut line, mut number, mut count) = (Vec::new(), 0, 0);
    loop {
        line.clear();
        number += 1;
        if source.bytes.read_until(b'\n', &mut line).map_err(|e| source.damaged(e))? == 0 {
            break;
        }
        let text = line.trim_ascii_end();
        if text.is_empty() {
            continue;
        }
        if number == 1
            && let Some((words, width)) = header(text)
        {
            (promised, dimensions) = (Some(words), Some(width));
            continue;
        }
        count += 1;
        let width = *dimensions.get_or_insert_with(|| text.split(is_space).count() - 1);
        let (word, numbers) = split(text, width)
            .map_err(|problem| source.wrong(format!("line {number}"), &problem))?;
        let word = String::from_utf8_lossy(word);
        if wanted(&word) && !rows.contains_key(&*word) {
            let row = parse(numbers, width)
                .map_err(|problem| source.wrong(format!("line {number}"), &problem))?;
            rows.insert(word.into_owned(), row);
        }
    }
    match (dimensions, promised) {
        (Some(_), Some(promised)) if promised != count => {
            let problem = format!("line 1 promises {promised} words, but {count} follow");
            Err(source.damaged(problem))
        }
        (Some(dimensions), _) => Ok(Vectors { dimensions, rows }),
        (None, _) => Err(source.damaged("it is empty")),
    }
}

fn is_space(byte: &u8) -> bool {
    matches!(byte, b' ' | b'\t')
}

/// The numbers of words and of dimensions, if that is what the line says.
pub(super) fn header(line: &[u8]) -> Option<(usize, usize)> {
    let mut parts =
        line.trim_ascii_end().split(is_space).map(|part| str::from_utf8(part).ok()?.parse().ok());
    match (parts.next()??, parts.next()??, parts.next()) {
        (words, width, None) if width > 0 => Some((words, width)),
        _ => None,
    }
}

/// The word, and the `width` numbers behind it.
fn split(line: &[u8], width: usize) -> Result<(&[u8], &[u8]), String> {
    let few = || {
        let found = line.split(is_space).count() - 1;
        format!("{found} numbers behind the word where {width} are expected; fetch the file again")
    };
    if width == 0 {
        return Err("there is no number behind the word; write a word and its vector".into());
    }
    let mut at = line.len();
    for _ in 0..width {
        at = line[..at].iter().rposition(is_space).ok_or_else(few)?;
    }
    let (word, numbers) = (&line[..at], &line[at + 1..]);
    // A number before the last ones is no part of a word.
    let last = word.iter().rposition(is_space).map(|space| &word[space + 1..]);
    match last.map(number) {
        Some(Ok(_)) => Err(few()),
        _ => Ok((word, numbers)),
    }
}

fn parse(numbers: &[u8], width: usize) -> Result<Vec<f32>, String> {
    let mut row = Vec::with_capacity(width);
    for part in numbers.split(is_space) {
        row.push(number(part).map_err(|shown| {
            format!("\"{shown}\" (number {}) is not a finite number; correct it", row.len() + 1)
        })?);
    }
    Ok(row)
}

/// A finite number, or what stands there instead.
fn number(part: &[u8]) -> Result<f32, String> {
    let shown = String::from_utf8_lossy(part);
    match shown.parse() {
        Ok(value) if f32::is_finite(value) => Ok(value),
        _ => Err(shown.chars().take(40).collect()),
    }
}
