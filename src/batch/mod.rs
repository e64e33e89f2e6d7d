//! Ragged batches: which samples go together, on which rank, and the batch as a model reads it.
//!
//! | file | owns |
//! |---|---|
//! | this | [`Batch`] |
//! | [`plan`] | the order of an epoch, shards of a batch, micro-batches |

pub mod plan;

use allreel_kernels::{Mirror, Ragged};

use crate::{Error, Result, data::tokens::TokenSet};

/// Sequences end to end; nothing is padded.
#[derive(Clone, Debug)]
pub struct Batch {
    /// Token ids of all sequences, `[T]`.
    pub tokens: Mirror<u32>,
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
            ragged: Ragged::new(&lengths, ids).map_err(|e| Error::Bug(e.to_string()))?,
            labels: ids.iter().filter_map(|id| set.labels[*id as usize]).collect::<Vec<_>>().into(),
        })
    }
}
