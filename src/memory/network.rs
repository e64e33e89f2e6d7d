//! A whole network's forward and backward, holding what `model/classifier.rs` holds.

use super::{
    kernels::{Machine, Ragged},
    layer::{
        attention::{Prefixes, RelativeTable, Shared},
        block::{Block, SavedBlock},
        ends::{Embeddings, Head, Rows, SavedEmbeddings, SavedHead, SavedRows},
        linear::{Norm, SavedNorm, Trained},
    },
    ledger::{Component, Held},
};
use crate::model::{parameters::Group, plan::Plan};

/// How a step runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pass {
    /// Blocks keep their input only.
    pub checkpoint: bool,
    /// On the host, at that.
    pub offload: bool,
}

/// `classifier::Classifier`.
#[derive(Clone, Debug)]
pub struct Network {
    width: usize,
    embeddings: Embeddings,
    prompt: Option<Rows>,
    prefix: Option<Rows>,
    relative: Option<RelativeTable>,
    blocks: Vec<Block>,
    final_norm: Option<Norm>,
    head: Head,
    lowest: usize,
}

/// `classifier::Saved`.
pub struct Saved {
    _prompt: Option<(Held, SavedRows)>,
    embeddings: Option<SavedEmbeddings>,
    shared: Shared,
    blocks: Vec<Kept>,
    _final_norm: Option<SavedNorm>,
    _head: SavedHead,
}

enum Kept {
    Nothing,
    Input(Held),
    All(SavedBlock),
}

impl Network {
    /// The network of `plan`, whose parameters are declared in `groups`; in evaluation nothing `drops`.
    pub fn new(plan: &Plan, groups: &[Group], drops: bool) -> Self {
        let specs = groups.iter().flat_map(|group| &group.specs);
        let names = specs.filter(|spec| spec.trains).map(|spec| spec.name.clone());
        let trained: Trained = names.collect();
        let (trained, width) = (&trained, plan.hidden_size);
        let group_trains =
            |name: &str| groups.iter().any(|group| group.name == name && group.trains());
        let mut network = Self {
            width,
            embeddings: Embeddings::new(&plan.embeddings, trained, drops),
            prompt: plan.prompt.as_ref().map(|plan| Rows::new(plan, trained, drops)),
            prefix: plan.prefix.as_ref().map(|plan| Rows::new(plan, trained, drops)),
            relative: plan
                .relative
                .as_ref()
                .map(|plan| RelativeTable::new(plan, width, trained, drops)),
            blocks: plan
                .blocks
                .iter()
                .map(|plan| Block::new(plan, width, trained, drops))
                .collect(),
            final_norm: plan.final_norm.as_ref().map(|plan| Norm::new(plan, trained)),
            head: Head::new(&plan.head, width, trained, drops),
            lowest: 0,
        };
        // The word table alone does not count, as there.
        let shared_trains = network.relative.as_ref().is_some_and(RelativeTable::trains)
            || network.embeddings.rest_trains()
            || network.prompt.is_some()
            || network.prefix.is_some();
        if !shared_trains {
            let lowest = plan.blocks.iter().position(|block| group_trains(block.name()));
            network.lowest = lowest.unwrap_or(plan.blocks.len());
        }
        network
    }

    /// What its frozen norms hold.
    pub fn unread(&self, machine: &Machine) -> Vec<Held> {
        let blocks = self.blocks.iter().flat_map(Block::norms);
        let relative = self.relative.as_ref().and_then(RelativeTable::norm);
        let ends = [self.embeddings.norm(), relative, self.final_norm, self.head.norm()];
        ends.into_iter().flatten().chain(blocks).map(|norm| norm.unread(machine)).collect()
    }

    /// The embeddings.
    pub fn embeddings(&self) -> &Embeddings {
        &self.embeddings
    }

    fn embeddings_train(&self) -> bool {
        self.embeddings.words_train() || self.embeddings.rest_trains() || self.prompt.is_some()
    }

    fn shared(&self, machine: &Machine, ragged: Ragged) -> Shared {
        let relative = self.relative.as_ref().map(|table| table.forward(machine, ragged.length));
        let shape = (self.blocks.len(), self.width);
        let prefix = self.prefix.as_ref().map(|rows| Prefixes::new(machine, rows, shape));
        Shared { relative, prefix }
    }

    /// `forward`: what backward needs.
    pub fn forward(&self, machine: &Machine, ragged: Ragged, pass: Pass) -> Saved {
        let prompt = self.prompt.as_ref().map(|rows| rows.forward(machine));
        let (mut x, embeddings) = self.embeddings.forward(machine, ragged);
        let shared = self.shared(machine, ragged);
        let mut blocks = Vec::with_capacity(self.blocks.len());
        for (i, block) in self.blocks.iter().enumerate() {
            let (y, saved) = block.forward(machine, &x, ragged, &shared);
            blocks.push(match (i < self.lowest, pass.checkpoint) {
                (true, _) => Kept::Nothing,
                (false, true) => Kept::Input(self.input(machine, x, ragged, pass)),
                (false, false) => Kept::All(saved),
            });
            x = y;
        }
        let (x, final_norm) = match self.final_norm {
            Some(norm) => {
                let (y, saved) = norm.forward(machine, ragged.tokens());
                drop(x);
                (y, Some(saved))
            }
            None => (x, None),
        };
        let (_logits, head) = self.head.forward(machine, &x, ragged);
        let embeddings = self.embeddings_train().then_some(embeddings);
        let prompt = prompt.map(|(rows, saved)| (rows.saved(), saved));
        Saved { _prompt: prompt, embeddings, shared, blocks, _final_norm: final_norm, _head: head }
    }

    /// The input of a block that runs again: pinned on the host where it is offloaded.
    fn input(&self, machine: &Machine, x: Held, ragged: Ragged, pass: Pass) -> Held {
        if !pass.offload || !machine.cuda {
            return x.saved();
        }
        let bytes = ragged.tokens() * self.width * machine.element();
        machine.host.hold(Component::Activations, bytes)
    }

    /// `logits`: a pass of evaluation.
    pub fn evaluate(&self, machine: &Machine, ragged: Ragged) {
        let _prompt = self.prompt.as_ref().map(|rows| rows.forward(machine));
        let (mut x, _) = self.embeddings.forward(machine, ragged);
        let shared = self.shared(machine, ragged);
        for block in &self.blocks {
            x = block.forward(machine, &x, ragged, &shared).0;
        }
        if let Some(norm) = self.final_norm {
            x = norm.forward(machine, ragged.tokens()).0;
        }
        self.head.forward(machine, &x, ragged);
    }

    /// `backward`: the gradient of the word table, if it trains.
    pub fn backward(
        &self,
        machine: &Machine,
        saved: Saved,
        ragged: Ragged,
        pass: Pass,
    ) -> Option<Held> {
        let Saved { _prompt, embeddings, mut shared, blocks, _final_norm, _head } = saved;
        let below = |i: usize| i > self.lowest || self.embeddings_train();
        let top = below(self.blocks.len());
        let trains = top || self.final_norm.is_some();
        let mut dx = self.head.backward(machine, ragged, trains);
        if let (Some(norm), Some(_dy)) = (self.final_norm, &dx) {
            let (d_normed, _) = norm.backward(machine, ragged.tokens(), false, false);
            dx = Some(d_normed);
        }
        dx = dx.filter(|_| top);
        for (i, kept) in blocks.into_iter().enumerate().rev() {
            let block = &self.blocks[i];
            let dy = dx.take()?;
            let saved = match kept {
                Kept::All(saved) => saved,
                Kept::Input(x) => {
                    let offloaded = pass.offload && machine.cuda;
                    let _again = offloaded.then(|| machine.tensor(ragged.tokens(), self.width));
                    block.forward(machine, &x, ragged, &shared).1
                }
                Kept::Nothing => return None,
            };
            dx = block.backward(machine, saved, &dy, ragged, &mut shared, below(i));
        }
        if let (Some(table), Some(relative)) = (&self.relative, &shared.relative) {
            table.backward(machine, relative);
        }
        if let (Some(rows), Some(prefix)) = (&self.prefix, &shared.prefix) {
            prefix.finish(machine, rows);
        }
        let (dy, _saved) = (dx?, embeddings?);
        let prompt = self.prompt.as_ref().map(Rows::count);
        let gradients = self.embeddings.backward(machine, &dy, ragged, prompt);
        if let (Some(rows), Some(_dy)) = (&self.prompt, gradients.prompt) {
            rows.backward(machine);
        }
        gradients.words
    }
}
