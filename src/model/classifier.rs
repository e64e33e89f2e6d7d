//! The whole network, as a training step sees it: logits from a batch, gradients from `dlogits`.

use std::{collections::HashMap, path::Path};

use allreel_kernels::{DropoutKey, Parked, Ragged, embedding::SparseRows, norm};
use candle_core::{DType, Tensor};

use super::{
    config::{ModelConfig, Overrides},
    layer::{
        block::{Block, RotaryTables, SavedBlock, Shared},
        embeddings::{self, EMBEDDINGS, Embeddings},
        head::{self, HEAD, Head},
        norm::Norm,
        prefix::Prefixes,
        relative::{RELATIVE, RelativeTable},
        rows::{self, LearntRows, ROWS},
    },
    parameters::{Group, Parameters, Spec},
    plan::{BlockPlan, Plan, RowsPlan},
    training::Training,
    weights::{self, WeightFile},
};
use crate::{
    Error, Result,
    batch::Batch,
    data::TokenSet,
    device::{Placement, to_host},
};

/// How a forward pass runs.
#[derive(Clone, Copy, Debug, Default)]
pub struct Pass {
    /// Key of this step's dropout; `None` in evaluation.
    pub dropout: Option<DropoutKey>,
    /// Whether blocks keep their input only and run again in backward.
    pub checkpoint: bool,
    /// Whether those inputs wait in the host's memory.
    pub offload: bool,
}

impl Pass {
    /// A block's input, where it waits for backward.
    fn keep(self, x: &Tensor) -> Result<Kept> {
        Ok(match self.offload {
            true => Kept::Parked(Parked::of(x)?),
            false => Kept::Input(x.clone()),
        })
    }
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
    /// What of it trains.
    pub training: Training,
    /// Linear layers with a low-rank update, and the factor on it.
    updates: HashMap<String, f64>,
    embeddings: Embeddings,
    /// Rows of virtual tokens.
    prompt: Option<LearntRows>,
    /// Keys and values of every block.
    prefix: Option<LearntRows>,
    relative: Option<RelativeTable>,
    blocks: Vec<Block>,
    final_norm: Option<Norm>,
    head: Head,
    /// The lowest block of which something trains; `blocks.len()` if only the head does.
    lowest: usize,
}

/// What backward of the whole network needs.
pub struct Saved {
    prompt: Option<(Tensor, rows::Saved)>,
    embeddings: Option<embeddings::Saved>,
    shared: Shared,
    blocks: Vec<Kept>,
    final_norm: Option<norm::Saved>,
    head: head::Saved,
}

enum Kept {
    /// Nothing below trains, so nothing is needed.
    Nothing,
    /// The input, from which the block is run again.
    Input(Tensor),
    /// The same, in the host's memory.
    Parked(Parked),
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
    /// Of a network on word vectors: how many words the file of vectors had, and of how many.
    pub vectors: Option<(usize, usize)>,
}

impl Classifier {
    /// A new network; every parameter is a function of `seed` and its name.
    ///
    /// # Errors
    /// `User` if the adapter does not fit the network; if memory runs out.
    pub fn new(
        placement: &Placement,
        config: ModelConfig,
        training: impl Into<Training>,
        seed: u64,
    ) -> Result<Self> {
        Self::with_words(placement, config, training, seed, None)
    }

    /// The same with a word table that starts as `table`, `[V, E]` in f32 on the host.
    ///
    /// # Errors
    /// As [`new`](Self::new); `Bug` if the table's shape is another.
    pub fn with_words(
        placement: &Placement,
        mut config: ModelConfig,
        training: impl Into<Training>,
        seed: u64,
        table: Option<Tensor>,
    ) -> Result<Self> {
        let training = training.into();
        let groups = training.groups(&mut config)?;
        let words = config.plan.embeddings.words.name.clone();
        let parameters = Parameters::new(placement, &groups, |spec| match &table {
            Some(table) if spec.name == words && table.dims() == spec.shape => Ok(table.clone()),
            Some(table) if spec.name == words => {
                let dims = table.dims();
                Err(Error::Bug(format!("a word table {dims:?} in place of {:?}", spec.shape)))
            }
            _ => weights::initial(spec, seed),
        })?;
        Self::assemble(config, parameters, training)
    }

    /// Loads a Hugging Face directory; only the head and what an adapter adds may be new.
    ///
    /// # Errors
    /// `Data` if a file is missing, damaged or does not fit the config; `User` if the adapter does not
    /// fit the network.
    pub fn load(
        placement: &Placement,
        dir: &Path,
        overrides: impl Into<Overrides>,
        training: impl Into<Training>,
        num_labels: usize,
        seed: u64,
    ) -> Result<(Self, LoadReport)> {
        let path = dir.join("config.json");
        let mut config = ModelConfig::read(&path, num_labels, overrides.into())?;
        let mut file = WeightFile::open(dir, config.family)?;
        let head = head_group(&config.plan);
        let training = training.into();
        let groups = training.groups(&mut config)?;
        let may_be_new =
            |spec: &Spec| spec.added || head.specs.iter().any(|new| new.name == spec.name);
        file.require(groups.iter().flat_map(|group| &group.specs).filter(|s| !may_be_new(s)))?;
        let parameters = Parameters::new(placement, &groups, |spec| match spec.added {
            true => weights::initial(spec, seed),
            false => file.take(spec, seed),
        })?;
        let unexpected = file.unexpected().into_iter().map(str::to_owned).collect();
        let report = LoadReport { missing: file.missing, unexpected, vectors: None };
        Ok((Self::assemble(config, parameters, training)?, report))
    }

    fn assemble(
        mut config: ModelConfig,
        parameters: Parameters,
        training: Training,
    ) -> Result<Self> {
        let updates = config
            .plan
            .linears()
            .filter_map(|linear| linear.lora.map(|lora| (linear.name.clone(), lora.scaling)));
        let updates = updates.collect();
        let plan = &config.plan;
        let mut tables = RotaryTables::default();
        let relative = plan.relative.as_ref();
        let trains = |block: &BlockPlan| parameters.bucket(block.name()).is_some();
        // What every block reads, and what lies below all of them.
        let below = [RELATIVE, EMBEDDINGS, ROWS, &plan.embeddings.words.name];
        let lowest = match below.iter().any(|group| parameters.bucket(group).is_some()) {
            true => 0,
            false => plan.blocks.iter().position(trains).unwrap_or(plan.blocks.len()),
        };
        let rows = |plan: &Option<RowsPlan>| {
            plan.as_ref().map(|plan| LearntRows::new(&parameters, plan)).transpose()
        };
        let classifier = Self {
            embeddings: Embeddings::new(&parameters, &plan.embeddings)?,
            prompt: rows(&plan.prompt)?,
            prefix: rows(&plan.prefix)?,
            relative: relative.map(|plan| RelativeTable::new(&parameters, plan)).transpose()?,
            blocks: (0..plan.blocks.len())
                .map(|i| Block::new(&parameters, plan, i, &mut tables))
                .collect::<Result<_>>()?,
            final_norm: match &plan.final_norm {
                Some(norm) => Some(Norm::new(&parameters, norm)?),
                None => None,
            },
            head: Head::new(&parameters, &plan.head)?,
            lowest,
            parameters,
            config,
            training,
            updates,
        };
        classifier.start_prompt()?;
        Ok(classifier)
    }

    /// Starts virtual tokens as the words that were asked for, again from the first if there are too few.
    fn start_prompt(&self) -> Result<()> {
        let Some(ids) = &self.training.prompt else { return Ok(()) };
        let ids: Vec<u32> = ids.iter().copied().cycle().take(self.virtual_tokens()).collect();
        let table = self.parameters.master(&LearntRows::table_name())?;
        table.slice_set(&self.embeddings.words(&ids.into())?.to_dtype(table.dtype())?, 0, 0)?;
        self.parameters.refresh()
    }

    /// The `config.json` to save beside the weights.
    pub fn config_json(&self) -> serde_json::Value {
        self.config.to_json()
    }

    /// Whether anything below the blocks trains.
    fn embeddings_train(&self) -> bool {
        self.words_bucket().or(self.parameters.bucket(EMBEDDINGS)).is_some()
            || self.prompt.is_some()
    }

    /// How many virtual tokens stand before every sequence.
    pub fn virtual_tokens(&self) -> usize {
        self.config.plan.prompt.as_ref().map_or(0, |prompt| prompt.rows)
    }

    /// The samples called `ids` of a set, as the network reads them.
    ///
    /// # Errors
    /// `Bug` if a sample has no tokens.
    pub fn gather(&self, set: &TokenSet, ids: &[u32]) -> Result<Batch> {
        Batch::gather(set, ids)?.with_prompt(self.virtual_tokens())
    }

    /// Rows that each sample of a set takes: its tokens, and the virtual ones.
    pub fn lengths(&self, set: &TokenSet) -> Vec<usize> {
        set.lengths().into_iter().map(|tokens| tokens + self.virtual_tokens()).collect()
    }

    /// Logits `[B, C]`, and what backward needs.
    ///
    /// # Errors
    /// If the batch does not fit the network.
    pub fn forward(&self, batch: &Batch, pass: Pass) -> Result<(Tensor, Saved)> {
        let ragged = &batch.ragged;
        let prompt = self.prompt(pass.dropout)?;
        let rows = prompt.as_ref().map(|(rows, _)| rows);
        let (mut x, embeddings) = self.embeddings.forward(batch, rows, pass.dropout)?;
        let shared = self.shared(ragged, pass.dropout)?;
        let mut blocks = Vec::with_capacity(self.blocks.len());
        for (i, block) in self.blocks.iter().enumerate() {
            let (y, saved) = block.forward(&x, ragged, pass.dropout, &shared)?;
            blocks.push(match (i < self.lowest, pass.checkpoint) {
                (true, _) => Kept::Nothing,
                (false, true) => pass.keep(&x)?,
                (false, false) => Kept::All(saved),
            });
            x = y;
        }
        let (x, final_norm) = self.final_norm(x)?;
        let (logits, head) = self.head.forward(&x, ragged, pass.dropout)?;
        let embeddings = self.embeddings_train().then_some(embeddings);
        Ok((logits, Saved { prompt, embeddings, shared, blocks, final_norm, head }))
    }

    /// What all blocks see beside their input.
    fn shared(&self, ragged: &Ragged, key: Option<DropoutKey>) -> Result<Shared> {
        let relative = self.relative.as_ref().map(|table| table.forward(ragged)).transpose()?;
        let cut = |rows: &LearntRows| Prefixes::new(rows.forward(key)?, self.blocks.len());
        Ok(Shared { relative, prefix: self.prefix.as_ref().map(cut).transpose()? })
    }

    /// Rows of virtual tokens, and what their backward needs.
    fn prompt(&self, key: Option<DropoutKey>) -> Result<Option<(Tensor, rows::Saved)>> {
        self.prompt.as_ref().map(|rows| rows.forward(key)).transpose()
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
        let prompt = self.prompt(None)?;
        let rows = prompt.as_ref().map(|(rows, _)| rows);
        let (mut x, _) = self.embeddings.forward(batch, rows, None)?;
        let shared = self.shared(ragged, None)?;
        for block in &self.blocks {
            each(&x);
            x = block.forward(&x, ragged, None, &shared)?.0;
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
        let Saved { prompt, embeddings, mut shared, blocks, final_norm, head } = saved;
        let below = |i: usize| i > self.lowest || self.embeddings_train();
        let mut bucket_ready = |group: &str| match self.parameters.bucket(group) {
            Some(bucket) => ready(Ready::Bucket(bucket)),
            None => Ok(()),
        };
        let norm_trains = self.final_norm.as_ref().is_some_and(Norm::trains);
        let top = below(self.blocks.len());
        let dx = self.head.backward(&head, d_logits, ragged, key, top || norm_trains)?;
        let mut dx = self.final_norm_backward(dx, final_norm.as_ref())?.filter(|_| top);
        bucket_ready(HEAD)?;
        for (i, kept) in blocks.into_iter().enumerate().rev() {
            let block = &self.blocks[i];
            let Some(dy) = dx.take() else { return Ok(()) };
            let saved = match kept {
                Kept::All(saved) => saved,
                Kept::Input(x) => block.forward(&x, ragged, key, &shared)?.1,
                Kept::Parked(x) => block.forward(&x.back()?, ragged, key, &shared)?.1,
                Kept::Nothing => {
                    return Err(Error::Bug("a gradient went below everything that trains".into()));
                }
            };
            dx = block.backward(saved, &dy, ragged, key, &mut shared, below(i))?;
            bucket_ready(self.config.plan.blocks[i].name())?;
        }
        if let (Some(table), Some(relative)) = (&self.relative, &shared.relative) {
            table.backward(relative)?;
            bucket_ready(RELATIVE)?;
        }
        if let (Some(rows), Some(prefix)) = (&self.prefix, shared.prefix.take()) {
            prefix.finish(rows)?;
            bucket_ready(ROWS)?;
        }
        let (Some(dy), Some(saved)) = (dx, embeddings) else { return Ok(()) };
        let (rows, saved_rows) = prompt.unzip();
        let gradients = self.embeddings.backward(batch, rows.as_ref(), &saved, &dy, key)?;
        if let (Some(table), Some(saved), Some(dy)) = (&self.prompt, saved_rows, &gradients.prompt)
        {
            table.backward(saved, dy)?;
            bucket_ready(ROWS)?;
        }
        bucket_ready(EMBEDDINGS)?;
        if let Some(words) = gradients.words {
            ready(Ready::Words(words))?;
        }
        Ok(())
    }

    /// Modules with a low-rank update, in the order of the network.
    pub fn updated(&self) -> impl Iterator<Item = &str> {
        self.parameters.names().filter_map(|name| name.strip_suffix(".lora_A.weight"))
    }

    /// Value of a parameter in f32, with the low-rank update of its layer folded in.
    ///
    /// # Errors
    /// If memory runs out.
    pub fn merged(&self, name: &str) -> Result<Tensor> {
        let value = to_host(&self.parameters.value(name)?)?.to_dtype(DType::F32)?;
        let module = name.strip_suffix(".weight").unwrap_or_default();
        let Some(scaling) = self.updates.get(module) else { return Ok(value) };
        let part =
            |leaf: &str| to_host(&self.parameters.value(&format!("{module}.{leaf}.weight"))?);
        Ok((value + (part("lora_B")?.matmul(&part("lora_A")?)? * *scaling)?)?)
    }

    /// The rows of virtual tokens, or of the prefix, as an adapter's file holds them: `[n, …]`.
    ///
    /// # Errors
    /// If memory runs out.
    pub fn learnt_rows(&self) -> Result<Option<Tensor>> {
        let Some(rows) = self.prompt.as_ref().or(self.prefix.as_ref()) else { return Ok(None) };
        match rows.is_table() {
            true => self.parameters.value(&LearntRows::table_name()).map(Some),
            false => Ok(Some(rows.forward(None)?.0)),
        }
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

/// Everything that a network holds, in the order of forward; nothing trains yet but what is added.
pub(super) fn groups(plan: &Plan) -> Vec<Group> {
    let mut groups: Vec<Group> = Embeddings::declare(&plan.embeddings)
        .into_iter()
        .chain(plan.prompt.iter().chain(&plan.prefix).map(LearntRows::declare))
        .chain(plan.relative.iter().map(|table| RelativeTable::declare(table, plan.hidden_size)))
        .chain(plan.blocks.iter().map(Block::declare))
        .collect();
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
pub(super) fn head_group(plan: &Plan) -> Group {
    let mut group = Group::new(HEAD);
    Head::declare(&mut group, &plan.head);
    group
}
