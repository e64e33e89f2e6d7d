//! What a run will need of memory, without taking it.
//!
//! A run is gone through from loading to saving on a [`ledger`]: every tensor that the real one holds is held
//! there as a number of bytes, taken and given back in the same order. The most there is at once is the peak.
//!
//! | file | owns |
//! |---|---|
//! | this | [`Setting`], its [`Prediction`], the largest batch that fits |
//! | `arena` | where the host's allocator puts blocks, and the holes between them |
//! | [`ledger`] | what is held, for what, and the most there was |
//! | [`kernels`] | what ops hold |
//! | [`layer`] | what layers hold, and keep for backward |
//! | [`network`] | forward and backward of a network |
//! | [`parameters`] | values, gradients and optimizer state; reading and writing them |
//! | [`process`] | what is there whatever the model: measured, or named estimates |
//!
//! Batches are as large as they get: every sequence as long as `data.max_length`, every token another word.

mod arena;
pub mod kernels;
pub mod layer;
pub mod ledger;
pub mod network;
pub mod parameters;
pub mod process;

use allreel_kernels::HOST_KERNELS;

use crate::{
    Result,
    config::{Batch, Config, Weights},
    model::{
        ModelConfig, Training,
        parameters::Group,
        plan::{BlockPlan, Plan},
    },
};
use kernels::{Machine, Ragged};
use ledger::{Component, Held, Ledger, Usage};
use network::{Network, Pass};
use parameters::Parameters;
use process::Texts;

/// Where a run computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// On a CUDA device.
    pub cuda: bool,
    /// Number of ranks.
    pub ranks: usize,
    /// Threads of each.
    pub threads: usize,
}

/// What decides how much memory one rank of a run needs.
#[derive(Clone, Debug)]
pub struct Setting {
    plan: Plan,
    groups: Vec<Group>,
    place: Place,
    pass: Pass,
    /// Tokens of the longest sequence, virtual ones among them.
    length: usize,
    /// Sequences of a rank's share of a batch.
    share: usize,
    micro_tokens: usize,
    texts: Texts,
    adapter: bool,
    pretrained: bool,
}

/// The most memory that one rank holds at once.
#[derive(Clone, Debug)]
pub struct Prediction {
    /// On the host, and in which phase of the run.
    pub host: Peak,
    /// On the device, if there is one.
    pub device: Option<Peak>,
    /// Sequences of a micro-batch.
    pub sequences: usize,
}

/// What is held when it is most.
#[derive(Clone, Copy, Debug)]
pub struct Peak {
    /// By component.
    pub usage: Usage,
    /// When that is.
    pub phase: Phase,
}

/// What a step takes, apart from the process and the data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepUsage {
    /// The most that is held while the model is read.
    pub loading: u64,
    /// What stays: parameters, gradients, optimizer state.
    pub resident: u64,
    /// What forward keeps for backward.
    pub saved: u64,
    /// The most that a step holds beside what stays.
    pub step: u64,
}

/// A part of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Reading the model.
    Loading,
    /// Reading and tokenising the reviews, comparing the start of all ranks.
    Start,
    /// A training step.
    Step,
    /// Evaluation.
    Evaluation,
    /// Writing a checkpoint.
    Saving,
}

impl Phase {
    /// For tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Loading => "while the model is read",
            Self::Start => "while the data is read",
            Self::Step => "in a training step",
            Self::Evaluation => "in evaluation",
            Self::Saving => "while a checkpoint is written",
        }
    }
}

impl Setting {
    /// That of a run of `config` with the network of `model`.
    ///
    /// # Errors
    /// `User` if the adapter or the length does not fit the network.
    pub fn new(config: &Config, mut model: ModelConfig, place: Place) -> Result<Self> {
        config.check_length(model.plan.longest)?;
        let groups = Training::from(config).groups(&mut model)?;
        let prompt = model.plan.prompt.as_ref().map_or(0, |prompt| prompt.rows);
        let length = config.data.max_length + prompt;
        let batch = match config.train.batch() {
            Batch::Samples(samples) => samples,
            Batch::Tokens(tokens) => tokens / length,
        };
        Ok(Self {
            groups,
            place,
            pass: Pass {
                checkpoint: config.model.gradient_checkpointing,
                offload: config.train.offload,
            },
            length,
            share: batch.div_ceil(place.ranks).max(1),
            micro_tokens: config.train.micro_tokens,
            texts: Texts::of(&config.data, model.family),
            adapter: config.adapter.is_some(),
            pretrained: matches!(config.model.weights, Weights::Pretrained(_)),
            plan: model.plan,
        })
    }

    /// Where it is computed.
    pub fn place(&self) -> Place {
        self.place
    }

    /// The same with `sequences` in a rank's one micro-batch.
    #[must_use]
    pub fn with_sequences(&self, sequences: usize) -> Self {
        Self { share: sequences, micro_tokens: sequences * self.length, ..self.clone() }
    }

    /// Tokens of the longest sequence, virtual ones among them.
    pub fn length(&self) -> usize {
        self.length
    }

    /// Whether all files of reviews were there to be measured.
    pub fn knows_data(&self) -> bool {
        self.texts.complete
    }

    /// Sequences of a micro-batch.
    fn sequences(&self) -> usize {
        self.evaluated().min(self.share)
    }

    /// Sequences of a batch of evaluation.
    fn evaluated(&self) -> usize {
        (self.micro_tokens / self.length).max(1)
    }

    /// The most memory that one rank holds.
    pub fn predict(&self) -> Prediction {
        let machine = self.machine();
        let mut run = Run { setting: self, machine, peaks: Vec::new(), held: Vec::new() };
        run.load_to_save();
        let [host, device] = [0, 1].map(|place| run.peak(place));
        let host = Peak { usage: run.machine.host.with_holes(host.usage), ..host };
        let device = self.place.cuda.then_some(device);
        Prediction { host, device, sequences: self.sequences() }
    }

    /// What a step takes where it is computed.
    pub fn step(&self) -> StepUsage {
        let machine = self.machine();
        let ledger = &machine.ledger;
        let _parameters = Parameters::load(&machine, &self.groups, self.pretrained);
        let network = Network::new(&self.plan, &self.groups, true);
        let _unread = network.unread(&machine);
        let _rotary = machine.host.hold(Component::Weights, rotary_bytes(&self.plan));
        let (loading, resident) = (ledger.peak().total(), ledger.now().total());
        let ragged = Ragged { sequences: self.sequences(), length: self.length };
        let saved = network.forward(&machine, ragged, self.pass);
        let kept = ledger.now().total() - resident;
        drop(saved);
        ledger.forget_peak();
        step(&machine, &network, self, 0);
        let most = ledger.peak().total() - resident;
        StepUsage { loading, resident, saved: kept, step: most }
    }

    fn machine(&self) -> Machine {
        let host = Ledger::of_process(process::huge_pages());
        let ledger = if self.place.cuda { Ledger::default() } else { host.clone() };
        Machine { ledger, host, cuda: self.place.cuda, threads: self.place.threads }
    }

    /// The most sequences of a micro-batch with which a rank needs no more than `limit` bytes where it
    /// computes; 0 if not even one fits.
    pub fn largest(&self, limit: u64) -> usize {
        let fits = |sequences| self.with_sequences(sequences).predict().computing() <= limit;
        let mut above = 1;
        while fits(above) {
            above *= 2;
        }
        let mut below = above / 2;
        while above - below > 1 {
            let middle = below.midpoint(above);
            *if fits(middle) { &mut below } else { &mut above } = middle;
        }
        below
    }
}

impl Prediction {
    /// Bytes where the rank computes: on the device, or else the host.
    pub fn computing(&self) -> u64 {
        self.device.unwrap_or(self.host).usage.total()
    }
}

/// A run that is gone through.
struct Run<'a> {
    setting: &'a Setting,
    machine: Machine,
    /// The most of each phase, on host and device.
    peaks: Vec<(Phase, [Usage; 2])>,
    /// What stays to the end.
    held: Vec<Held>,
}

impl Run<'_> {
    fn load_to_save(&mut self) {
        let Setting { plan, groups, place, texts, adapter, pretrained, .. } = self.setting;
        let machine = self.machine.clone();
        let vocabulary = plan.embeddings.words.rows;
        self.held.extend(process::held(&machine, *place, texts, vocabulary));
        let parameters = Parameters::load(&machine, groups, *pretrained);
        let network = Network::new(plan, groups, true);
        self.held.extend(network.unread(&machine));
        self.held.push(machine.host.hold(Component::Weights, rotary_bytes(plan)));
        self.end(Phase::Loading);
        self.held.push(texts.read(&machine.host));
        parameters.compare(&machine);
        self.end(Phase::Start);
        // From the second step on, blocks lie where those of a step before were.
        for _ in 0..2 {
            step(&machine, &network, self.setting, parameters.trained());
        }
        self.end(Phase::Step);
        let ragged = self.ragged(self.setting.evaluated());
        Network::new(plan, groups, false).evaluate(&machine, ragged);
        self.end(Phase::Evaluation);
        parameters.save(&machine, *adapter);
        self.end(Phase::Saving);
    }

    fn ragged(&self, sequences: usize) -> Ragged {
        Ragged { sequences, length: self.setting.length }
    }

    /// The highest peak of the host (0) or of where it is computed (1).
    fn peak(&self, place: usize) -> Peak {
        let peaks =
            self.peaks.iter().map(|(phase, usage)| Peak { usage: usage[place], phase: *phase });
        let none = Peak { usage: Usage::default(), phase: Phase::Loading };
        peaks.max_by_key(|peak| peak.usage.total()).unwrap_or(none)
    }

    fn end(&mut self, phase: Phase) {
        let Machine { host, ledger, .. } = &self.machine;
        self.peaks.push((phase, [host.peak(), ledger.peak()]));
        host.forget_peak();
        ledger.forget_peak();
    }
}

/// One training step, as `step/mod.rs` makes it: the last micro-batch, then the update.
fn step(machine: &Machine, network: &Network, setting: &Setting, trained: usize) {
    let ragged = Ragged { sequences: setting.sequences(), length: setting.length };
    let tokens = ragged.tokens();
    let passes = setting.share.div_ceil(ragged.sequences);
    let embeddings = network.embeddings();
    let rows = |tokens: usize| embeddings.named(tokens) * embeddings.width() * 4;
    let before = match embeddings.words_train() && passes > 1 {
        true => rows((passes - 1) * tokens),
        false => 0,
    };
    let before = machine.ledger.hold(Component::Gradients, before);
    // Ids, types, samples and positions; all of them on a device too.
    let batch = [&machine.host, &machine.ledger].map(|l| l.hold(Component::Data, tokens * 16));
    let saved = network.forward(machine, ragged, setting.pass);
    let words = network.backward(machine, saved, ragged, setting.pass);
    drop(batch);
    let words = words.map(|own| match passes {
        1 => own,
        _ => machine.ledger.hold(Component::Gradients, rows(passes * tokens)),
    });
    drop(before);
    if words.is_some() && setting.place.ranks > 1 {
        // The rows of all ranks.
        let union = rows(setting.place.ranks * passes * tokens);
        drop(machine.ledger.hold(Component::Communication, union));
    }
    if machine.cuda {
        // A list of pieces of the buckets, and sums of their squares (`adamw/device.rs`).
        machine.ledger.touch(trained.div_ceil(4096) * 16);
    }
}

/// Cosines and sines of every base that the blocks have, in f64 in vectors that grew, and rounded where kernels of
/// a device may read them (`rotary/mod.rs`).
fn rotary_bytes(plan: &Plan) -> usize {
    let rounded = if cfg!(feature = "cuda") || HOST_KERNELS { 4 } else { 0 };
    let mut bases: Vec<u64> = Vec::new();
    let mut bytes = 0;
    for block in &plan.blocks {
        let BlockPlan::PreNorm(block) = block else { continue };
        let Some(base) = block.rotary_theta.map(f64::to_bits) else { continue };
        if !bases.contains(&base) {
            bases.push(base);
            let pairs = plan.longest.unwrap_or(0) * plan.hidden_size / block.heads / 2;
            bytes += 2 * (pairs.next_power_of_two() * 8 + pairs * rounded);
        }
    }
    bytes
}
