//! Tokens sorted by id, and where sums over them are cut: at every id, and each id's run into pieces of
//! fixed size, so that a long one (token type 0) is work for many.

use std::ops::Range;

use super::NOTHING;

/// The tokens of a batch by the rows that they name.
pub(super) struct Segments {
    /// Tokens sorted by id.
    pub(super) tokens: Vec<u32>,
    /// Each piece's id and tokens (a range of the sorted ones).
    pub(super) pieces: Vec<(u32, Range<usize>)>,
}

impl Segments {
    /// Of the tokens whose id is neither `padding` nor [`NOTHING`], in pieces of at most `longest`.
    pub(super) fn new(ids: &[u32], padding: Option<u32>, longest: usize) -> Self {
        let counts = |id: u32| Some(id) != padding && id != NOTHING;
        let mut tokens: Vec<u32> =
            (0..ids.len() as u32).filter(|t| counts(ids[*t as usize])).collect();
        tokens.sort_by_key(|t| ids[*t as usize]);
        let mut pieces: Vec<(u32, Range<usize>)> = Vec::new();
        for (at, token) in tokens.iter().enumerate() {
            let id = ids[*token as usize];
            match pieces.last_mut() {
                Some((last, range)) if *last == id && range.len() < longest => range.end = at + 1,
                _ => pieces.push((id, at..at + 1)),
            }
        }
        Self { tokens, pieces }
    }

    /// The ids that occur, ascending.
    pub(super) fn ids(&self) -> Vec<u32> {
        let mut ids: Vec<u32> = self.pieces.iter().map(|(id, _)| *id).collect();
        ids.dedup();
        ids
    }
}
