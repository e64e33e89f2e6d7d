//! Layers as pairs of functions: forward returns what backward needs, backward consumes it.
//!
//! | file | owns |
//! |---|---|
//! | [`linear`] | a linear layer, and one cut out of a wider one |
//! | [`norm`] | a LayerNorm's parameters |
//! | [`embeddings`] | token ids to activations |
//! | [`recurrent`] | bidirectional LSTM or GRU layers |
//! | [`filters`] | convolutions of several widths over words |
//! | [`rows`] | learnt rows, and the small network that makes them: prompts and prefixes |
//! | [`prefix`] | keys and values that learnt rows put before those of every block |
//! | [`relative`] | DeBERTa's table of relative positions |
//! | [`disentangled`] | the attention of a DeBERTa block |
//! | [`convolution`] | DeBERTa-v2-xlarge's convolution branch |
//! | [`post_norm`] | the block of BERT, DistilBERT, RoBERTa, DeBERTa |
//! | [`pre_norm`] | the block of ModernBERT and GPT-2 |
//! | [`block`] | a block of any kind |
//! | [`pool`] | how the rows of a sequence become one |
//! | [`head`] | pooling and classifier |

pub mod block;
pub mod convolution;
pub mod disentangled;
pub mod embeddings;
pub mod filters;
pub mod head;
pub mod linear;
pub mod norm;
pub mod pool;
pub mod post_norm;
pub mod pre_norm;
pub mod prefix;
pub mod recurrent;
pub mod relative;
pub mod rows;

use allreel_kernels::{Dropout, DropoutKey};

/// Dropout sites: one number per place in the network, part of the random key (and therefore of
/// what a resumed run reproduces: do not renumber).
mod site {
    pub const EMBEDDINGS: u16 = 0;
    pub const HEAD: u16 = 1;
    pub const HEAD_INPUT: u16 = 2;
    /// Of recurrent layers, for every one but the first: at most 13.
    pub const RECURRENT: u16 = 3;
    const FIRST_BLOCK: u16 = 16;
    const SITES_PER_BLOCK: u16 = 8;
    /// Sites of a block, from its first one.
    pub const PROBABILITIES: u16 = 0;
    pub const ATTENTION: u16 = 1;
    pub const OUTPUT: u16 = 2;
    pub const RELATIVE: u16 = 3;
    pub const CONVOLUTION: u16 = 4;
    pub const MLP: u16 = 5;
    pub const PREFIX: u16 = 6;

    /// First site of block `i`.
    pub fn block(i: usize) -> u16 {
        FIRST_BLOCK + SITES_PER_BLOCK * i as u16
    }
}

/// The dropouts of one block in one pass.
#[derive(Clone, Copy)]
struct Sites {
    first: u16,
    key: Option<DropoutKey>,
}

impl Sites {
    /// Dropout with probability `p` at a site of the block; `None` in evaluation or for `p` 0.
    fn dropout(self, p: f64, site: u16) -> Option<Dropout> {
        Dropout::new(p, self.key?, self.first + site)
    }
}
