//! One block of a network, of any kind.

use std::{
    collections::{HashMap, hash_map::Entry},
    sync::Arc,
};

use allreel_kernels::{DropoutKey, Ragged, rotary};
use candle_core::Tensor;

use super::{
    filters::{self, Filters},
    linear::Rows,
    post_norm::{self, PostNorm},
    pre_norm::{self, PreNorm},
    prefix::Prefixes,
    recurrent::{self, Recurrent},
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

/// A block of any kind.
pub enum Block {
    /// Norm after each sub-layer.
    PostNorm(Box<PostNorm>),
    /// Norm before each sub-layer.
    PreNorm(Box<PreNorm>),
    /// Recurrent layers over words.
    Recurrent(Recurrent),
    /// Convolutions over words.
    Filters(Filters),
}

/// What a block's backward needs.
pub enum SavedBlock {
    /// Of a post-norm block.
    PostNorm(Box<post_norm::Saved>),
    /// Of a pre-norm block.
    PreNorm(Box<pre_norm::Saved>),
    /// Of recurrent layers.
    Recurrent(recurrent::Saved),
    /// Of convolutions.
    Filters(filters::Saved),
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
            BlockPlan::Recurrent(layers) => Self::Recurrent(Recurrent::new(parameters, layers)?),
            BlockPlan::Filters(filters) => Self::Filters(Filters::new(parameters, filters, i)?),
        })
    }

    /// The group of the block's parameters.
    pub fn declare(plan: &BlockPlan) -> Group {
        match plan {
            BlockPlan::PostNorm(plan) => PostNorm::declare(plan),
            BlockPlan::PreNorm(plan) => PreNorm::declare(plan),
            BlockPlan::Recurrent(plan) => {
                let mut group = Group::new(&plan.name);
                Recurrent::declare(&mut group, plan);
                group
            }
            BlockPlan::Filters(plan) => Filters::declare(plan),
        }
    }

    /// `[T, H]`, H being the block's, and what backward needs.
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
            Self::Recurrent(layers) => {
                let rows = Rows { ids: ragged.token_rows(), key };
                let (y, saved) = layers.forward(x, ragged, rows)?;
                (y, SavedBlock::Recurrent(saved))
            }
            Self::Filters(filters) => {
                let (y, saved) = filters.forward(x, ragged, key)?;
                (y, SavedBlock::Filters(saved))
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
            (Self::Recurrent(layers), SavedBlock::Recurrent(saved)) => {
                let rows = Rows { ids: ragged.token_rows(), key };
                layers.backward(saved, dy, ragged, rows, input_trains)
            }
            (Self::Filters(filters), SavedBlock::Filters(saved)) => {
                filters.backward(&saved, dy, ragged, key, input_trains)
            }
            _ => Err(Error::Bug("a block's backward got another block's forward".into())),
        }
    }
}
