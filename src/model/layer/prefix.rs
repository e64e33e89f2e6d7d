//! Keys and values that learnt rows put before those of every block (Li and Liang 2021).
//!
//! Row j of the table's output is, for each block in turn, a key and a value of the hidden size. Queries see
//! them by content alone: DeBERTa's scores by relative position and the rotation of keys are for tokens. In the
//! terms of a rotary block they stand at position 0.

use allreel_kernels::{
    Dropout, Ragged,
    prefix::{self, Prefix},
};
use candle_core::Tensor;

use super::rows::{self, LearntRows};
use crate::{Error, Result};

/// The prefix of every block in one pass.
pub struct Prefixes {
    /// `[n, H]` keys and values of each block.
    blocks: Vec<[Tensor; 2]>,
    /// Their gradients, once a block has run backward.
    gradients: Vec<Option<[Tensor; 2]>>,
    saved: rows::Saved,
}

/// A block's attention, as the prefix joins it.
#[derive(Clone, Copy)]
pub(super) struct Joined<'a> {
    pub(super) ragged: &'a Ragged,
    pub(super) heads: usize,
    pub(super) scale: f64,
    pub(super) dropout: Option<&'a Dropout>,
    /// Number of the block.
    pub(super) block: usize,
}

impl<'a> Joined<'a> {
    fn op(self) -> Prefix<'a> {
        let Self { ragged, heads, scale, dropout, .. } = self;
        Prefix { ragged, heads, scale, dropout }
    }
}

impl Prefixes {
    /// Cuts the rows of one pass into keys and values of `blocks` blocks.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn new((rows, saved): (Tensor, rows::Saved), blocks: usize) -> Result<Self> {
        let width = rows.dim(1)? / (2 * blocks);
        let cut = |i: usize| rows.narrow(1, i * width, width)?.force_contiguous();
        let pair = |block: usize| Ok([cut(2 * block)?, cut(2 * block + 1)?]);
        let gradients = (0..blocks).map(|_| None).collect();
        Ok(Self { blocks: (0..blocks).map(pair).collect::<Result<_>>()?, gradients, saved })
    }

    /// Attention's output and log-sum-exp with the prefix joined.
    pub(super) fn join(
        &self,
        joined: Joined<'_>,
        q: &Tensor,
        o: &Tensor,
        lse: &Tensor,
    ) -> Result<(Tensor, Tensor)> {
        let [keys, values] = &self.blocks[joined.block];
        Ok(prefix::forward(joined.op(), q, [keys, values], [o, lse])?)
    }

    /// Takes the block's gradient of the prefix, and adds the prefix's part to `dq`.
    pub(super) fn backward(
        &mut self,
        joined: Joined<'_>,
        [q, o, lse]: [&Tensor; 3],
        d_o: &Tensor,
        dq: &Tensor,
    ) -> Result<()> {
        let [keys, values] = &self.blocks[joined.block];
        let saved = prefix::Saved { q, keys, values, o, lse };
        let (d_keys, d_values) = prefix::backward(joined.op(), saved, d_o, Some(dq))?;
        self.gradients[joined.block] = Some([d_keys, d_values]);
        Ok(())
    }

    /// Adds the gradients of the rows, when every block has run backward.
    ///
    /// # Errors
    /// `Bug` if one has not.
    pub fn finish(self, rows: &LearntRows) -> Result<()> {
        let mut all = Vec::with_capacity(2 * self.gradients.len());
        for pair in &self.gradients {
            let pair = pair.as_ref();
            all.extend(pair.ok_or_else(|| Error::Bug("a block without its prefix".into()))?);
        }
        rows.backward(self.saved, &Tensor::cat(&all, 1)?)
    }
}
