//! One block of a network, of either kind.

use std::{
    collections::{HashMap, hash_map::Entry},
    sync::Arc,
};

use allreel_kernels::{DropoutKey, Ragged, rotary};
use candle_core::Tensor;

use super::{
    post_norm::{self, PostNorm},
    pre_norm::{self, PreNorm},
    prefix::Prefixes,
    relative::Relative,
};
use crate::{
    Error, Result,
    model::{
        parameters::{Group, Parameters},
        plan::{BlockPlan, Plan},
    },
};

/// What all blocks of a pass share.
#[derive(Default)]
pub struct Shared {
    /// DeBERTa's relative positions.
    pub relative: Option<Relative>,
    /// Learnt keys and values.
    pub prefix: Option<Prefixes>,
}

impl Shared {
    /// Whether any of it trains.
    pub(super) fn train(&self) -> bool {
        self.prefix.is_some() || self.relative.as_ref().is_some_and(|relative| relative.trains)
    }
}

/// A block of either kind.
pub enum Block {
    /// Norm after each sub-layer.
    PostNorm(Box<PostNorm>),
    /// Norm before each sub-layer.
    PreNorm(Box<PreNorm>),
}

/// What a block's backward needs.
pub enum SavedBlock {
    /// Of a post-norm block.
    PostNorm(Box<post_norm::Saved>),
    /// Of a pre-norm block.
    PreNorm(Box<pre_norm::Saved>),
}

/// Rotary tables by the bits of their base: blocks of one base share one.
#[derive(Default)]
pub struct RotaryTables(HashMap<u64, Arc<rotary::Table>>);

impl RotaryTables {
    fn get(&mut self, theta: f64, head: usize, longest: usize) -> Result<Arc<rotary::Table>> {
        Ok(match self.0.entry(theta.to_bits()) {
            Entry::Occupied(table) => table.get().clone(),
            Entry::Vacant(place) => {
                place.insert(Arc::new(rotary::Table::new(theta, head, longest)?)).clone()
            }
        })
    }
}

impl Block {
    /// Takes the parameters of block `i`.
    ///
    /// # Errors
    /// If they were not declared, or a rotary table cannot be made.
    pub fn new(
        parameters: &Parameters,
        plan: &Plan,
        i: usize,
        tables: &mut RotaryTables,
    ) -> Result<Self> {
        Ok(match &plan.blocks[i] {
            BlockPlan::PostNorm(block) => {
                Self::PostNorm(Box::new(PostNorm::new(parameters, block, i)?))
            }
            BlockPlan::PreNorm(block) => {
                let head = plan.hidden_size / block.heads;
                let longest = plan.longest.unwrap_or(0);
                let rotary =
                    block.rotary_theta.map(|theta| tables.get(theta, head, longest)).transpose()?;
                Self::PreNorm(Box::new(PreNorm::new(parameters, block, i, rotary)?))
            }
        })
    }

    /// The group of the block's parameters.
    pub fn declare(plan: &BlockPlan) -> Group {
        match plan {
            BlockPlan::PostNorm(plan) => PostNorm::declare(plan),
            BlockPlan::PreNorm(plan) => PreNorm::declare(plan),
        }
    }

    /// `[T, H]` and what backward needs.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn forward(
        &self,
        x: &Tensor,
        ragged: &Ragged,
        key: Option<DropoutKey>,
        shared: &Shared,
    ) -> Result<(Tensor, SavedBlock)> {
        Ok(match self {
            Self::PostNorm(block) => {
                let (y, saved) = block.forward(x, ragged, key, shared)?;
                (y, SavedBlock::PostNorm(Box::new(saved)))
            }
            Self::PreNorm(block) => {
                let (y, saved) = block.forward(x, ragged, key, shared)?;
                (y, SavedBlock::PreNorm(Box::new(saved)))
            }
        })
    }

    /// Adds the block's gradients; returns that of its input unless nothing below trains.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn backward(
        &self,
        saved: SavedBlock,
        dy: &Tensor,
        ragged: &Ragged,
        key: Option<DropoutKey>,
        shared: &mut Shared,
        input_trains: bool,
    ) -> Result<Option<Tensor>> {
        match (self, saved) {
            (Self::PostNorm(block), SavedBlock::PostNorm(saved)) => {
                block.backward(&saved, dy, ragged, key, shared, input_trains)
            }
            (Self::PreNorm(block), SavedBlock::PreNorm(saved)) => {
                block.backward(&saved, dy, ragged, key, shared, input_trains)
            }
            _ => Err(Error::Bug("a block's backward got another block's forward".into())),
        }
    }
}
