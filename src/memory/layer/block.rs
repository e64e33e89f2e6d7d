//! A block of any kind, and what makes its layers.

use super::{
    attention::Shared,
    linear::{Linear, Norm, Trained},
    post_norm::{PostNorm, PostSaved},
    pre_norm::{PreNorm, PreSaved},
    words::{Filters, Recurrent, SavedLayer},
};
use crate::{
    memory::{
        kernels::{Heads, Machine, Ragged},
        ledger::Held,
    },
    model::plan::{BlockPlan, LinearPlan, NormPlan},
};

/// A block of any kind: [`Post`](Self::Post) mirrors `post_norm`, [`Pre`](Self::Pre) `pre_norm`, the others
/// what they are called.
#[derive(Clone, Debug)]
pub enum Block {
    /// Norm after each sub-layer.
    Post(Box<PostNorm>),
    /// Norm before each sub-layer.
    Pre(Box<PreNorm>),
    /// Recurrent layers over words.
    Recurrent(Recurrent),
    /// Convolutions over words.
    Filters(Filters),
}

/// What a block's backward needs.
#[derive(Debug)]
pub enum SavedBlock {
    /// `post_norm::Saved`.
    Post(Box<PostSaved>),
    /// `pre_norm::Saved`.
    Pre(Box<PreSaved>),
    /// `recurrent::Saved`.
    Recurrent(Vec<SavedLayer>),
    /// `filters::Saved`.
    Filters(Vec<Held>),
}

impl Block {
    /// The block of `plan`; in evaluation nothing `drops`.
    pub fn new(plan: &BlockPlan, width: usize, trained: &Trained, drops: bool) -> Self {
        let make = Make { width, trained, drops };
        match plan {
            BlockPlan::PostNorm(plan) => Self::Post(Box::new(PostNorm::new(plan, &make))),
            BlockPlan::PreNorm(plan) => Self::Pre(Box::new(PreNorm::new(plan, &make))),
            BlockPlan::Recurrent(plan) => Self::Recurrent(Recurrent::new(plan, drops)),
            BlockPlan::Filters(plan) => Self::Filters(Filters::new(plan, drops)),
        }
    }

    /// Its norms.
    pub fn norms(&self) -> Vec<Norm> {
        match self {
            Self::Post(block) => block.norms(),
            Self::Pre(block) => block.norms(),
            Self::Recurrent(_) | Self::Filters(_) => Vec::new(),
        }
    }

    /// `y` and what backward needs.
    pub fn forward(
        &self,
        machine: &Machine,
        x: &Held,
        ragged: Ragged,
        shared: &Shared,
    ) -> (Held, SavedBlock) {
        match self {
            Self::Post(block) => {
                let (y, saved) = block.forward(machine, x, ragged, shared);
                (y, SavedBlock::Post(Box::new(saved)))
            }
            Self::Pre(block) => {
                let (y, saved) = block.forward(machine, x, ragged, shared);
                (y, SavedBlock::Pre(Box::new(saved)))
            }
            Self::Recurrent(layers) => {
                let (y, saved) = layers.forward(machine, x, ragged.tokens());
                (y, SavedBlock::Recurrent(saved))
            }
            Self::Filters(filters) => {
                let (y, saved) = filters.forward(machine, x, ragged.tokens());
                (y, SavedBlock::Filters(saved))
            }
        }
    }

    /// The gradient of its input, unless nothing below trains.
    pub fn backward(
        &self,
        machine: &Machine,
        saved: SavedBlock,
        dy: &Held,
        ragged: Ragged,
        shared: &mut Shared,
        input_trains: bool,
    ) -> Option<Held> {
        match (self, saved) {
            (Self::Post(block), SavedBlock::Post(_saved)) => {
                block.backward(machine, dy, ragged, shared, input_trains)
            }
            (Self::Pre(block), SavedBlock::Pre(_saved)) => {
                block.backward(machine, dy, ragged, shared, input_trains)
            }
            (Self::Recurrent(layers), SavedBlock::Recurrent(saved)) => {
                layers.backward(machine, saved, dy, ragged.tokens(), input_trains)
            }
            (Self::Filters(filters), SavedBlock::Filters(_saved)) => {
                filters.backward(machine, dy, ragged.tokens(), input_trains)
            }
            _ => unreachable!("a block is given what its own forward saved"),
        }
    }
}

/// What makes layers of plans.
pub(super) struct Make<'a> {
    pub(super) width: usize,
    pub(super) trained: &'a Trained,
    pub(super) drops: bool,
}

impl Make<'_> {
    pub(super) fn linear(&self, plan: &LinearPlan) -> Linear {
        Linear::new(plan, self.trained, self.drops)
    }

    pub(super) fn norm(&self, plan: &NormPlan) -> Norm {
        Norm::new(plan, self.trained)
    }

    pub(super) fn drops(&self, p: f64) -> bool {
        self.drops && p > 0.0
    }

    pub(super) fn heads(&self, count: usize) -> Heads {
        Heads { count, size: self.width / count }
    }
}
