//! The whole network, as a training step sees it: logits from a batch, gradients from `dlogits`.

use std::path::Path;

use allreel_kernels::{DropoutKey, Ragged, embedding::SparseRows, norm};
use candle_core::Tensor;

use super::{
    config::{ModelConfig, Overrides},
    layer::{
        block::{Block, RotaryTables, SavedBlock},
        embeddings::{self, EMBEDDINGS, Embeddings},
        head::{self, HEAD, Head},
        norm::Norm,
        relative::{RELATIVE, Relative, RelativeTable},
    },
    parameters::{Group, Parameters, Spec},
    plan::Plan,
    weights::{self, WeightFile},
};
use crate::{Result, batch::Batch, config::Trainable, device::Placement};

/// How a forward pass runs.
#[derive(Clone, Copy, Debug, Default)]
pub struct Pass {
    /// Key of this step's dropout; `None` in evaluation.
    pub dropout: Option<DropoutKey>,
    /// Whether blocks keep their input only and run again in backward.
    pub checkpoint: bool,
}

/// What backward hands out as it goes down.
pub enum Ready {
    /// All gradients of this bucket have been added.
    Bucket(usize),
    /// The gradient of the word table.
    Words(SparseRows),
}

/// An encoder with a classification head.
pub struct Classifier {
    /// Family, sizes and rates.
    pub config: ModelConfig,
    /// Everything that is learnt.
    pub parameters: Parameters,
    embeddings: Embeddings,
    relative: Option<RelativeTable>,
    blocks: Vec<Block>,
    final_norm: Option<Norm>,
    head: Head,
    /// The lowest block that trains; `blocks.len()` if only the head does.
    lowest: usize,
}

/// What backward of the whole network needs.
pub struct Saved {
    embeddings: Option<embeddings::Saved>,
    relative: Option<Relative>,
    blocks: Vec<Kept>,
    final_norm: Option<norm::Saved>,
    head: head::Saved,
}

enum Kept {
    /// Nothing below trains, so nothing is needed.
    Nothing,
    /// The input, from which the block is run again.
    Input(Tensor),
    /// All that the block saved.
    All(SavedBlock),
}

/// What a weight file did not have, and what it had too much.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LoadReport {
    /// Parameters that start new.
    pub missing: Vec<String>,
    /// Tensors in the file that no parameter took.
    pub unexpected: Vec<String>,
}

impl Classifier {
    /// A new network; every parameter is a function of `seed` and its name.
    ///
    /// # Errors
    /// If memory runs out.
    pub fn new(
        placement: &Placement,
        config: ModelConfig,
        trainable: Trainable,
        seed: u64,
    ) -> Result<Self> {
        let groups = groups(&config.plan, trainable);
        let parameters = Parameters::new(placement, &groups, |spec| weights::initial(spec, seed))?;
        Self::assemble(config, parameters, trainable)
    }

    /// Loads a Hugging Face directory; only the head may be new.
    ///
    /// # Errors
    /// `Data` if a file is missing, damaged or does not fit the config.
    pub fn load(
        placement: &Placement,
        dir: &Path,
        overrides: impl Into<Overrides>,
        trainable: Trainable,
        num_labels: usize,
        seed: u64,
    ) -> Result<(Self, LoadReport)> {
        let config = ModelConfig::read(&dir.join("config.json"), num_labels, overrides.into())?;
        let mut file = WeightFile::open(dir, config.family)?;
        let groups = groups(&config.plan, trainable);
        let head = head_group(&config.plan);
        let may_be_new = |spec: &Spec| head.specs.iter().any(|new| new.name == spec.name);
        file.require(groups.iter().flat_map(|group| &group.specs).filter(|s| !may_be_new(s)))?;
        let parameters = Parameters::new(placement, &groups, |spec| file.take(spec, seed))?;
        let unexpected = file.unexpected().into_iter().map(str::to_owned).collect();
        let report = LoadReport { missing: file.missing, unexpected };
        Ok((Self::assemble(config, parameters, trainable)?, report))
    }

    fn assemble(config: ModelConfig, parameters: Parameters, trainable: Trainable) -> Result<Self> {
        let plan = &config.plan;
        let mut tables = RotaryTables::default();
        let relative = plan.relative.as_ref();
        Ok(Self {
            embeddings: Embeddings::new(&parameters, &plan.embeddings)?,
            relative: relative.map(|plan| RelativeTable::new(&parameters, plan)).transpose()?,
            blocks: (0..plan.blocks.len())
                .map(|i| Block::new(&parameters, plan, i, &mut tables))
                .collect::<Result<_>>()?,
            final_norm: match &plan.final_norm {
                Some(norm) => Some(Norm::new(&parameters, norm)?),
                None => None,
            },
            head: Head::new(&parameters, &plan.head)?,
            lowest: lowest(plan, trainable),
            parameters,
            config,
        })
    }

    /// The `config.json` to save beside the weights.
    pub fn config_json(&self) -> serde_json::Value {
        self.config.to_json()
    }

    /// Whether the embeddings train, which is to say everything.
    fn embeddings_train(&self) -> bool {
        self.words_bucket().is_some()
    }

    /// Logits `[B, C]`, and what backward needs.
    ///
    /// # Errors
    /// If the batch does not fit the network.
    pub fn forward(&self, batch: &Batch, pass: Pass) -> Result<(Tensor, Saved)> {
        let ragged = &batch.ragged;
        let (mut x, embeddings) = self.embeddings.forward(batch, pass.dropout)?;
        let relative = self.relative(ragged)?;
        let mut blocks = Vec::with_capacity(self.blocks.len());
        for (i, block) in self.blocks.iter().enumerate() {
            let (y, saved) = block.forward(&x, ragged, pass.dropout, relative.as_ref())?;
            blocks.push(match (i < self.lowest, pass.checkpoint) {
                (true, _) => Kept::Nothing,
                (false, true) => Kept::Input(x),
                (false, false) => Kept::All(saved),
            });
            x = y;
        }
        let (x, final_norm) = self.final_norm(x)?;
        let (logits, head) = self.head.forward(&x, ragged, pass.dropout)?;
        let embeddings = self.embeddings_train().then_some(embeddings);
        Ok((logits, Saved { embeddings, relative, blocks, final_norm, head }))
    }

    fn relative(&self, ragged: &Ragged) -> Result<Option<Relative>> {
        self.relative.as_ref().map(|table| table.forward(ragged)).transpose()
    }

    fn final_norm(&self, x: Tensor) -> Result<(Tensor, Option<norm::Saved>)> {
        let Some(norm) = &self.final_norm else { return Ok((x, None)) };
        let (y, saved) = norm.forward(&x)?;
        Ok((y, Some(saved)))
    }

    /// Logits alone, without dropout and without keeping anything.
    ///
    /// # Errors
    /// If the batch does not fit the network.
    pub fn logits(&self, batch: &Batch) -> Result<Tensor> {
        let hidden = self.hidden_states(batch, |_| ())?;
        Ok(self.head.forward(&hidden, &batch.ragged, None)?.0)
    }

    /// Runs the encoder in evaluation mode, shows `each` hidden state (the embeddings' output
    /// first; the last one after the final norm, if there is one) and returns the last, `[T, H]`.
    ///
    /// # Errors
    /// If the batch does not fit the network.
    pub fn hidden_states(&self, batch: &Batch, mut each: impl FnMut(&Tensor)) -> Result<Tensor> {
        let ragged = &batch.ragged;
        let (mut x, _) = self.embeddings.forward(batch, None)?;
        let relative = self.relative(ragged)?;
        for block in &self.blocks {
            each(&x);
            x = block.forward(&x, ragged, None, relative.as_ref())?.0;
        }
        let (x, _) = self.final_norm(x)?;
        each(&x);
        Ok(x)
    }

    /// Adds the gradients of everything that trains, and reports what is final as it goes.
    ///
    /// # Errors
    /// If shapes do not fit, and those of `ready`.
    pub fn backward(
        &self,
        batch: &Batch,
        saved: Saved,
        d_logits: &Tensor,
        pass: Pass,
        ready: &mut dyn FnMut(Ready) -> Result<()>,
    ) -> Result<()> {
        let (ragged, key) = (&batch.ragged, pass.dropout);
        let Saved { embeddings, mut relative, blocks, final_norm, head } = saved;
        let below = |i: usize| i > self.lowest || self.embeddings_train();
        let mut bucket_ready = |group: &str| match self.parameters.bucket(group) {
            Some(bucket) => ready(Ready::Bucket(bucket)),
            None => Ok(()),
        };
        let norm_trains = self.final_norm.is_some();
        let top = below(self.blocks.len());
        let dx = self.head.backward(&head, d_logits, ragged, key, top || norm_trains)?;
        let mut dx = self.final_norm_backward(dx, final_norm.as_ref())?.filter(|_| top);
        bucket_ready(HEAD)?;
        for (i, kept) in blocks.into_iter().enumerate().rev() {
            let block = &self.blocks[i];
            let Some(dy) = dx.take() else { return Ok(()) };
            let saved = match kept {
                Kept::All(saved) => saved,
                Kept::Input(x) => block.forward(&x, ragged, key, relative.as_ref())?.1,
                Kept::Nothing => return Ok(()),
            };
            dx = block.backward(saved, &dy, ragged, key, relative.as_mut(), below(i))?;
            bucket_ready(self.config.plan.blocks[i].name())?;
        }
        if let (Some(table), Some(relative)) = (&self.relative, &relative) {
            table.backward(relative)?;
            bucket_ready(RELATIVE)?;
        }
        if let (Some(dy), Some(saved)) = (dx, embeddings) {
            let words = self.embeddings.backward(batch, &saved, &dy, key)?;
            bucket_ready(EMBEDDINGS)?;
            ready(Ready::Words(words))?;
        }
        Ok(())
    }

    fn final_norm_backward(
        &self,
        dy: Option<Tensor>,
        saved: Option<&norm::Saved>,
    ) -> Result<Option<Tensor>> {
        let (Some(norm), Some(saved), Some(dy)) = (&self.final_norm, saved, &dy) else {
            return Ok(dy);
        };
        Ok(Some(norm.backward(dy, saved, None)?))
    }

    /// Number of the word table's bucket, if it trains.
    pub fn words_bucket(&self) -> Option<usize> {
        self.parameters.bucket(&self.config.plan.embeddings.words.name)
    }
}

/// The lowest block that trains.
fn lowest(plan: &Plan, trainable: Trainable) -> usize {
    match trainable {
        Trainable::All => 0,
        Trainable::LastBlock => plan.blocks.len().saturating_sub(1),
        Trainable::Head => plan.blocks.len(),
    }
}

/// Everything that the network learns, in the order of forward.
pub(super) fn groups(plan: &Plan, trainable: Trainable) -> Vec<Group> {
    let (lowest, all) = (lowest(plan, trainable), trainable == Trainable::All);
    let mut groups: Vec<Group> = Embeddings::declare(&plan.embeddings, all)
        .into_iter()
        .chain(
            plan.relative.iter().map(|table| RelativeTable::declare(table, plan.hidden_size, all)),
        )
        .chain(plan.blocks.iter().enumerate().map(|(i, block)| Block::declare(block, i >= lowest)))
        .collect();
    // The final norm trains whenever the head does: as in Raschka's book, and it costs nothing.
    let mut last = head_group(plan);
    if let Some(norm) = &plan.final_norm {
        Norm::declare(&mut last, norm);
    }
    groups.push(last);
    // A family may have nothing but words in its embeddings.
    groups.retain(|group| !group.specs.is_empty());
    groups
}

/// The parameters of the head alone.
fn head_group(plan: &Plan) -> Group {
    let mut group = Group::new(HEAD, true);
    Head::declare(&mut group, &plan.head);
    group
}
