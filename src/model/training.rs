//! What of a network trains, what an adapter adds to it, and what is kept in fewer bits.
//!
//! The settings change the network's [`Plan`] (an update beside a linear layer, rows before the tokens) and
//! mark which of the declared parameters train; layers read both and nothing else.

use std::path::PathBuf;

use allreel_kernels::{activation::Activation, recurrence::Cell};

use super::{
    ModelConfig,
    classifier::groups,
    layer::{head::HEAD, rows::ROWS},
    parameters::{Group, Init},
    plan::{LinearPlan, LoraPlan, Plan, Quantized, RecurrentPlan, RecurrentStart, RowsPlan},
};
use crate::{
    Error, Result, adapter,
    config::{
        Adapter, Bias, Config, Lora, Method, PTuning, PoolRow, PrefixTuning, Quantization,
        Reparameterization, Trainable,
    },
};

/// The first dropout site of low-rank updates; one for each linear layer follows.
const LORA_SITES: u16 = 1 << 15;

/// What trains, and in how many bits the rest is kept.
#[derive(Clone, Debug, Default)]
pub struct Training {
    /// Which parts train, where there is no adapter.
    pub trainable: Trainable,
    /// Whether the word table stays as it starts all the same.
    pub freeze_embeddings: bool,
    /// What trains in their place.
    pub adapter: Option<Adapter>,
    /// How frozen linear layers of the blocks are kept.
    pub quantization: Option<Quantized>,
    /// Whether a frozen word table is kept in 8 bits, a scale for each row.
    pub quantize_embeddings: bool,
    /// Token ids of the text that virtual tokens start as.
    pub prompt: Option<Vec<u32>>,
    /// The model beneath, as an adapter's files call it.
    pub base: Option<BaseName>,
    /// The file that the adapter was read from, where it is not a run's own.
    pub file: Option<PathBuf>,
}

/// The name of a model beneath an adapter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BaseName {
    /// A directory, or `org/name` of a model on the Hub.
    pub name: String,
    /// Branch, tag or commit on the Hub.
    pub revision: Option<String>,
}

impl From<&Config> for Training {
    /// What the settings say, which is all but the words of a prompt and the name of the model.
    fn from(config: &Config) -> Self {
        let model = &config.model;
        let threshold = model.llm_int8_threshold.map(|threshold| threshold as f32);
        let quantized = |quantization| Quantized { quantization, threshold };
        Self {
            trainable: model.trainable,
            freeze_embeddings: model.freeze_embeddings,
            adapter: config.adapter.clone(),
            quantization: model.quantization.map(quantized),
            quantize_embeddings: model.quantize_embeddings,
            ..Self::default()
        }
    }
}

impl From<Trainable> for Training {
    fn from(trainable: Trainable) -> Self {
        Self { trainable, ..Self::default() }
    }
}

impl From<Adapter> for Training {
    fn from(adapter: Adapter) -> Self {
        Self { adapter: Some(adapter), ..Self::default() }
    }
}

impl Training {
    /// Puts the adapter into the plan, and declares the parameters with what trains marked.
    ///
    /// # Errors
    /// `User` if the adapter does not fit the network.
    pub(crate) fn groups(&self, config: &mut ModelConfig) -> Result<Vec<Group>> {
        config.plan.embeddings.words.quantization =
            self.quantize_embeddings.then_some(Quantization::Int8);
        for linear in config.plan.block_linears() {
            linear.quantization = self.quantization;
        }
        let Some(adapter) = &self.adapter else {
            let mut groups = groups(&config.plan);
            self.mark(&mut groups, &config.plan);
            return Ok(groups);
        };
        match &adapter.method {
            Method::Lora(lora) => self.update(config, adapter, lora)?,
            Method::PromptTuning(prompt) => {
                let table = rows(prompt.num_virtual_tokens, config.plan.embeddings.width);
                put_before(&mut config.plan, table, adapter.pool);
            }
            Method::PTuning(tuning) => {
                let made = made_rows(tuning, config.plan.embeddings.width);
                put_before(&mut config.plan, made, adapter.pool);
            }
            Method::PrefixTuning(prefix) => self.give_prefix(&mut config.plan, prefix)?,
        }
        let mut groups = groups(&config.plan);
        if self.file.is_none() {
            let specs = groups.iter().flat_map(|group| &group.specs);
            let names: Vec<&str> = specs.map(|spec| spec.name.as_str()).collect();
            adapter::check_saved(adapter, &names)?;
        }
        let whole = adapter::saved_modules(adapter, config.family);
        for spec in groups.iter_mut().flat_map(|group| &mut group.specs) {
            spec.trains |= adapter::saves(&whole, &spec.name);
        }
        if let Method::Lora(lora) = &adapter.method {
            mark_biases(&mut groups, lora.bias);
        }
        Ok(groups)
    }

    /// Puts the low-rank update beside the layers that it is for; what trains whole takes none.
    fn update(&self, config: &mut ModelConfig, adapter: &Adapter, lora: &Lora) -> Result<()> {
        let linears: Vec<(String, usize, usize)> = config
            .plan
            .linears()
            .map(|linear| (linear.name.clone(), linear.outputs, linear.inputs))
            .collect();
        let targets = match &self.file {
            Some(file) => adapter::targets_of_file(adapter, config.family, &linears, file)?,
            None => adapter::targets(adapter, config.family, &linears)?,
        };
        for (i, linear) in config.plan.linears().enumerate() {
            if targets.contains(&i) {
                linear.lora = Some(LoraPlan {
                    rank: lora.r,
                    scaling: lora.scaling(),
                    dropout: lora.lora_dropout,
                    site: LORA_SITES + i as u16,
                });
            }
        }
        Ok(())
    }

    /// Gives every block learnt keys and values, as PEFT's `PrefixEncoder`: texts begin behind their positions.
    fn give_prefix(&self, plan: &mut Plan, prefix: &PrefixTuning) -> Result<()> {
        let (hidden, count) = (plan.hidden_size, prefix.num_virtual_tokens);
        let outputs = 2 * plan.blocks.len() * hidden;
        if let Some(positions) = &mut plan.embeddings.positions {
            let room = positions.rows.saturating_sub(positions.offset);
            if count >= room {
                let message = format!(
                    "num_virtual_tokens = {count}: the model has {room} positions, and a text needs one at least"
                );
                return Err(match &self.file {
                    Some(file) => Error::Data(format!("{}: {message}", file.display())),
                    None => Error::User(format!("adapter.{message}; use fewer")),
                });
            }
            positions.offset += count;
        }
        plan.prefix = Some(match prefix.projection {
            None => rows(count, outputs),
            Some(width) => RowsPlan {
                layers: vec![
                    (layer("transform.0", width, hidden), Some(Activation::Tanh)),
                    (layer("transform.2", outputs, width), None),
                ],
                ..rows(count, hidden)
            },
        });
        Ok(())
    }

    /// Marks what trains without an adapter.
    fn mark(&self, groups: &mut [Group], plan: &Plan) {
        let last = plan.blocks.last().map(|block| block.name());
        for group in groups {
            // The final norm trains whenever the head does: as in Raschka's book, and it costs nothing.
            let trains = match self.trainable {
                Trainable::All => !(group.table && self.freeze_embeddings),
                Trainable::LastBlock => group.name == HEAD || Some(group.name.as_str()) == last,
                Trainable::Head => group.name == HEAD,
            };
            for spec in &mut group.specs {
                spec.trains = trains;
            }
        }
    }
}

/// A table of `count` rows.
fn rows(count: usize, width: usize) -> RowsPlan {
    RowsPlan { rows: count, width, lstm: None, layers: Vec::new() }
}

/// A linear layer of the network that makes rows, its weight started as PyTorch does.
fn layer(part: &str, outputs: usize, inputs: usize) -> LinearPlan {
    let init = Init::Uniform((inputs as f64).recip().sqrt());
    LinearPlan { init, ..LinearPlan::new(format!("{ROWS}.{part}"), outputs, inputs, 0.0) }
}

/// P-tuning's rows of `width` columns and what makes them, as in PEFT's `PromptEncoder`.
fn made_rows(tuning: &PTuning, width: usize) -> RowsPlan {
    let hidden = tuning.encoder_hidden_size.unwrap_or(width);
    let relu = Some(Activation::Relu);
    let table = rows(tuning.num_virtual_tokens, width);
    match tuning.encoder_reparameterization_type {
        Reparameterization::Mlp => RowsPlan {
            layers: vec![
                (layer("mlp_head.0", hidden, width), relu),
                (layer("mlp_head.2", hidden, hidden), relu),
                (layer("mlp_head.4", width, hidden), None),
            ],
            ..table
        },
        Reparameterization::Lstm => RowsPlan {
            lstm: Some(RecurrentPlan {
                cell: Cell::Lstm,
                start: RecurrentStart::Uniform,
                name: format!("{ROWS}.lstm_head"),
                inputs: width,
                hidden_size: hidden,
                num_layers: tuning.encoder_num_layers,
                dropout: tuning.encoder_dropout,
            }),
            layers: vec![
                (layer("mlp_head.0", 2 * hidden, 2 * hidden), relu),
                (layer("mlp_head.2", width, 2 * hidden), None),
            ],
            ..table
        },
    }
}

/// Puts virtual tokens before every sequence.
fn put_before(plan: &mut Plan, rows: RowsPlan, pool: PoolRow) {
    if pool == PoolRow::FirstToken {
        plan.head.skip = rows.rows;
    }
    plan.prompt = Some(rows);
}

/// Marks the biases that train beside a low-rank update.
fn mark_biases(groups: &mut [Group], bias: Bias) {
    for group in groups {
        let updated: Vec<String> = group
            .specs
            .iter()
            .filter_map(|spec| Some(format!("{}.bias", spec.name.strip_suffix(".lora_A.weight")?)))
            .collect();
        for spec in group.specs.iter_mut().filter(|spec| spec.name.ends_with(".bias")) {
            spec.trains |= match bias {
                Bias::None => false,
                Bias::All => true,
                Bias::LoraOnly => updated.contains(&spec.name),
            };
        }
    }
}
