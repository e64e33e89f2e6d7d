//! Ragged batches: which samples go together, on which rank, and the batch as a model reads it.
//!
//! | file | owns |
//! |---|---|
//! | this | [`Batch`] |
//! | [`plan`] | the order of an epoch, shards of a batch, micro-batches |

pub mod plan;

use allreel_kernels::{Mirror, Ragged, embedding::NOTHING};

use crate::{Error, Result, data::tokens::TokenSet};

/// Sequences end to end; nothing is padded.
#[derive(Clone, Debug)]
pub struct Batch {
    /// Token ids of all sequences, `[T]`; [`NOTHING`] at virtual tokens.
    pub tokens: Mirror<u32>,
    /// Where there are virtual tokens, the number of each, and [`NOTHING`] at the others, `[T]`.
    pub prompt: Option<Mirror<u32>>,
    /// Token types, `[T]`; zero for single texts.
    pub token_types: Mirror<u32>,
    /// Where each sequence is, and its sample id.
    pub ragged: Ragged,
    /// Labels, `[B]`; empty when the samples have none.
    pub labels: Mirror<u32>,
}

impl Batch {
    /// The samples called `ids` of a set, in that order.
    ///
    /// # Errors
    /// `Bug` if a sample has no tokens.
    pub fn gather(set: &TokenSet, ids: &[u32]) -> Result<Self> {
        let sequences = || ids.iter().map(|id| set.sequence(*id as usize));
        let lengths: Vec<usize> = sequences().map(<[u32]>::len).collect();
        let tokens: Vec<u32> = sequences().flatten().copied().collect();
        Ok(Self {
            token_types: vec![0; tokens.len()].into(),
            tokens: tokens.into(),
            prompt: None,
            ragged: Ragged::new(&lengths, ids).map_err(|e| Error::Bug(e.to_string()))?,
            labels: ids.iter().filter_map(|id| set.labels[*id as usize]).collect::<Vec<_>>().into(),
        })
    }

    /// The batch with `count` virtual tokens before every sequence.
    ///
    /// # Errors
    /// `Bug` if there are more tokens than can be counted.
    pub fn with_prompt(self, count: usize) -> Result<Self> {
        if count == 0 {
            return Ok(self);
        }
        let ragged = &self.ragged;
        let (mut tokens, mut types, mut prompt) = (Vec::new(), Vec::new(), Vec::new());
        let (mut lengths, mut samples) = (Vec::new(), Vec::new());
        for i in 0..ragged.sequences() {
            let own = ragged.range(i);
            tokens.extend(std::iter::repeat_n(NOTHING, count));
            tokens.extend(&self.tokens[own.clone()]);
            types.extend(std::iter::repeat_n(0, count));
            types.extend(&self.token_types[own.clone()]);
            prompt.extend(0..count as u32);
            prompt.extend(std::iter::repeat_n(NOTHING, own.len()));
            lengths.push(count + own.len());
            samples.push(ragged.sample(i));
        }
        Ok(Self {
            tokens: tokens.into(),
            token_types: types.into(),
            prompt: Some(prompt.into()),
            ragged: Ragged::new(&lengths, &samples).map_err(|e| Error::Bug(e.to_string()))?,
            labels: self.labels,
        })
    }
}
