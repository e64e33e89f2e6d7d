//! The whole network, as a training step sees it: logits from a batch, gradients from `dlogits`.

use std::path::Path;

use allreel_kernels::{DropoutKey, embedding::SparseRows};
use candle_core::Tensor;
use serde_json::{Map, Value};

use super::{
    bert::{EMBEDDINGS, Embeddings, Layer, PREFIX, SavedEmbeddings, SavedLayer, WORDS, layer_name},
    config::BertConfig,
    head::{HEAD, Head, SavedHead},
    parameters::{Group, Parameters},
    weights::{self, WeightFile},
};
use crate::{Result, batch::Batch, config::Trainable};

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

/// A BERT with a classification head.
pub struct Classifier {
    /// Sizes and rates.
    pub config: BertConfig,
    /// Everything that is learnt.
    pub parameters: Parameters,
    /// The checkpoint's own `config.json`, carried along.
    raw_config: Map<String, Value>,
    embeddings: Embeddings,
    layers: Vec<Layer>,
    head: Head,
    /// The lowest block that trains; `layers.len()` if only the head does.
    lowest: usize,
}

/// What backward of the whole network needs.
pub struct Saved {
    embeddings: Option<SavedEmbeddings>,
    layers: Vec<Kept>,
    head: SavedHead,
}

enum Kept {
    /// Nothing below trains, so nothing is needed.
    Nothing,
    /// The input, from which the block is run again.
    Input(Tensor),
    /// All that the block saved.
    All(Box<SavedLayer>),
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
    /// If the config asks for something that there is no kernel for.
    pub fn new(config: BertConfig, trainable: Trainable, seed: u64) -> Result<Self> {
        let parameters =
            Parameters::new(&groups(&config, trainable), |spec| weights::initial(spec, seed))?;
        Self::assemble(config, Map::new(), parameters, trainable)
    }

    /// Loads a Hugging Face directory; pooler and classifier may be new.
    ///
    /// # Errors
    /// `Data` if a file is missing, damaged or does not fit the config.
    pub fn load(
        dir: &Path,
        adjust: impl FnOnce(&mut BertConfig),
        trainable: Trainable,
        num_labels: usize,
        seed: u64,
    ) -> Result<(Self, LoadReport)> {
        let (mut config, raw) = BertConfig::read(&dir.join("config.json"), num_labels)?;
        adjust(&mut config);
        let mut file = WeightFile::open(dir, PREFIX)?;
        let parameters = Parameters::new(&groups(&config, trainable), |spec| {
            let head = spec.name.starts_with("bert.pooler") || spec.name.starts_with("classifier");
            file.take(spec, head, seed)
        })?;
        let unexpected = file.unexpected().into_iter().map(str::to_owned).collect();
        let report = LoadReport { missing: file.missing, unexpected };
        Ok((Self::assemble(config, raw, parameters, trainable)?, report))
    }

    fn assemble(
        config: BertConfig,
        raw_config: Map<String, Value>,
        parameters: Parameters,
        trainable: Trainable,
    ) -> Result<Self> {
        Ok(Self {
            embeddings: Embeddings::new(&parameters, &config)?,
            layers: (0..config.num_hidden_layers)
                .map(|i| Layer::new(&parameters, &config, i))
                .collect::<Result<_>>()?,
            head: Head::new(&parameters, &config)?,
            lowest: lowest(&config, trainable),
            config,
            parameters,
            raw_config,
        })
    }

    /// The `config.json` to save beside the weights.
    pub fn config_json(&self) -> Value {
        self.config.to_json(&self.raw_config)
    }

    /// Whether the embeddings train, which is to say everything.
    fn embeddings_train(&self) -> bool {
        self.parameters.bucket(EMBEDDINGS).is_some()
    }

    /// Logits `[B, C]`, and what backward needs.
    ///
    /// # Errors
    /// If the batch does not fit the network.
    pub fn forward(&self, batch: &Batch, pass: Pass) -> Result<(Tensor, Saved)> {
        let (mut x, embeddings) = self.embeddings.forward(batch, pass.dropout)?;
        let mut layers = Vec::with_capacity(self.layers.len());
        for (i, layer) in self.layers.iter().enumerate() {
            let (y, saved) = layer.forward(&x, &batch.ragged, pass.dropout)?;
            layers.push(match (i < self.lowest, pass.checkpoint) {
                (true, _) => Kept::Nothing,
                (false, true) => Kept::Input(x),
                (false, false) => Kept::All(Box::new(saved)),
            });
            x = y;
        }
        let (logits, head) = self.head.forward(&x, &batch.ragged, pass.dropout)?;
        let embeddings = self.embeddings_train().then_some(embeddings);
        Ok((logits, Saved { embeddings, layers, head }))
    }

    /// Logits alone, without dropout and without keeping anything.
    ///
    /// # Errors
    /// If the batch does not fit the network.
    pub fn logits(&self, batch: &Batch) -> Result<Tensor> {
        let hidden = self.hidden_states(batch, |_| ())?;
        Ok(self.head.forward(&hidden, &batch.ragged, None)?.0)
    }

    /// Runs the encoder in evaluation mode, shows `each` hidden state (the embeddings' output first)
    /// and returns the last, `[T, H]`.
    ///
    /// # Errors
    /// If the batch does not fit the network.
    pub fn hidden_states(&self, batch: &Batch, mut each: impl FnMut(&Tensor)) -> Result<Tensor> {
        let (mut x, _) = self.embeddings.forward(batch, None)?;
        each(&x);
        for layer in &self.layers {
            x = layer.forward(&x, &batch.ragged, None)?.0;
            each(&x);
        }
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
        let ragged = &batch.ragged;
        let below = |i: usize| i > self.lowest || self.embeddings_train();
        let mut bucket_ready = |group: &str| match self.parameters.bucket(group) {
            Some(bucket) => ready(Ready::Bucket(bucket)),
            None => Ok(()),
        };
        let top = self.layers.len();
        let mut dx = self.head.backward(&saved.head, d_logits, ragged, pass.dropout, below(top))?;
        bucket_ready(HEAD)?;
        for (i, kept) in saved.layers.into_iter().enumerate().rev() {
            let layer = &self.layers[i];
            let Some(dy) = dx.take() else { return Ok(()) };
            let saved = match kept {
                Kept::All(saved) => *saved,
                Kept::Input(x) => layer.forward(&x, ragged, pass.dropout)?.1,
                Kept::Nothing => return Ok(()),
            };
            dx = layer.backward(saved, &dy, ragged, pass.dropout, below(i))?;
            bucket_ready(&layer_name(i))?;
        }
        if let (Some(dy), Some(saved)) = (dx, saved.embeddings) {
            let words = self.embeddings.backward(batch, &saved, &dy, pass.dropout)?;
            bucket_ready(EMBEDDINGS)?;
            ready(Ready::Words(words))?;
        }
        Ok(())
    }

    /// Number of the word table's bucket, if it trains.
    pub fn words_bucket(&self) -> Option<usize> {
        self.parameters.bucket(WORDS)
    }
}

/// The lowest block that trains.
fn lowest(config: &BertConfig, trainable: Trainable) -> usize {
    match trainable {
        Trainable::All => 0,
        Trainable::LastBlock => config.num_hidden_layers.saturating_sub(1),
        Trainable::Head => config.num_hidden_layers,
    }
}

/// Everything that the network learns, in the order of forward.
fn groups(config: &BertConfig, trainable: Trainable) -> Vec<Group> {
    let lowest = lowest(config, trainable);
    let mut groups = Embeddings::declare(config, trainable == Trainable::All).to_vec();
    groups.extend((0..config.num_hidden_layers).map(|i| Layer::declare(config, i, i >= lowest)));
    groups.push(Head::declare(config));
    groups
}
