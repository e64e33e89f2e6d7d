//! What of a network trains, what an adapter adds to it, and what is kept in fewer bits.
//!
//! The settings change the network's [`Plan`] (an update beside a linear layer, rows before the tokens) and
//! mark which of the declared parameters train; layers read both and nothing else.

use allreel_kernels::activation::Activation;

use super::{
    Family, ModelConfig,
    classifier::{groups, head_group},
    layer::{head::HEAD, rows::ROWS},
    parameters::{Group, Init},
    plan::{LinearPlan, LoraPlan, LstmPlan, Plan, Quantized, RowsPlan},
};
use crate::{
    Result,
    config::{
        Adapter, Bias, Lora, Method, PTuning, PoolRow, PrefixTuning, Quantization,
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
    /// What trains in their place.
    pub adapter: Option<Adapter>,
    /// How frozen linear layers of the blocks are kept.
    pub quantization: Option<Quantized>,
    /// Whether a frozen word table is kept in 8 bits, a scale for each row.
    pub quantize_embeddings: bool,
    /// Token ids of the text that virtual tokens start as.
    pub prompt: Option<Vec<u32>>,
    /// What an adapter's files call the model beneath it.
    pub base: Option<String>,
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
    pub(super) fn groups(&self, config: &mut ModelConfig) -> Result<Vec<Group>> {
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
            Method::Lora(lora) => update(config, adapter, lora)?,
            Method::PromptTuning(prompt) => {
                let table = rows(prompt.num_virtual_tokens, config.plan.embeddings.width);
                put_before(&mut config.plan, table, adapter.pool);
            }
            Method::PTuning(tuning) => {
                let made = made_rows(tuning, config.plan.embeddings.width);
                put_before(&mut config.plan, made, adapter.pool);
            }
            Method::PrefixTuning(prefix) => give_prefix(&mut config.plan, prefix),
        }
        let whole = Whole::new(adapter, &config.plan);
        let mut groups = groups(&config.plan);
        for spec in groups.iter_mut().flat_map(|group| &mut group.specs) {
            spec.trains |= whole.has(&spec.name);
        }
        if let Method::Lora(lora) = &adapter.method {
            mark_biases(&mut groups, lora.bias);
        }
        Ok(groups)
    }

    /// Marks what trains without an adapter.
    fn mark(&self, groups: &mut [Group], plan: &Plan) {
        let last = plan.blocks.last().map(|block| block.name());
        for group in groups {
            // The final norm trains whenever the head does: as in Raschka's book, and it costs nothing.
            let trains = match self.trainable {
                Trainable::All => true,
                Trainable::LastBlock => group.name == HEAD || Some(group.name.as_str()) == last,
                Trainable::Head => group.name == HEAD,
            };
            for spec in &mut group.specs {
                spec.trains = trains;
            }
        }
    }
}

/// Which modules train whole beside an adapter.
struct Whole {
    /// The head's own parameters, where the settings say nothing.
    head: Vec<String>,
    modules: Option<Vec<String>>,
}

impl Whole {
    fn new(adapter: &Adapter, plan: &Plan) -> Self {
        let head = head_group(plan).specs.into_iter().map(|spec| spec.name).collect();
        Self { head, modules: adapter.modules_to_save.clone() }
    }

    /// Whether the parameter called `name` is of one.
    fn has(&self, name: &str) -> bool {
        match &self.modules {
            None => self.head.iter().any(|own| own == name),
            Some(modules) => saves(modules, name),
        }
    }
}

/// Puts the low-rank update beside the layers that it is for; what trains whole takes none.
fn update(config: &mut ModelConfig, adapter: &Adapter, lora: &Lora) -> Result<()> {
    let whole = Whole::new(adapter, &config.plan);
    let linears: Vec<(String, usize, usize)> = config
        .plan
        .linears()
        .map(|linear| (linear.name.clone(), linear.outputs, linear.inputs))
        .collect();
    let targets = targets(lora, config.family, &linears)?;
    for (i, linear) in config.plan.linears().enumerate() {
        if targets.contains(&i) && !whole.has(&format!("{}.weight", linear.name)) {
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

/// A table of `count` rows.
fn rows(count: usize, width: usize) -> RowsPlan {
    RowsPlan { rows: count, width, lstm: None, layers: Vec::new() }
}

/// A linear layer of the network that makes rows, started as PyTorch does.
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
            lstm: Some(LstmPlan {
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

/// Gives every block learnt keys and values, as PEFT's `PrefixEncoder`: texts begin behind their positions.
fn give_prefix(plan: &mut Plan, prefix: &PrefixTuning) {
    let (hidden, count) = (plan.hidden_size, prefix.num_virtual_tokens);
    let outputs = 2 * plan.blocks.len() * hidden;
    if let Some(positions) = &mut plan.embeddings.positions {
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

fn saves(modules: &[String], name: &str) -> bool {
    let module = name.rsplit_once('.').map_or(name, |(module, _)| module);
    let always = ["classifier".to_owned(), "score".to_owned()];
    modules.iter().chain(&always).any(|saved| {
        let mut path = module;
        loop {
            if path.ends_with(saved.as_str()) {
                return true;
            }
            match path.rsplit_once('.') {
                Some((parent, _)) => path = parent,
                None => return false,
            }
        }
    })
}

fn targets(lora: &Lora, family: Family, linears: &[(String, usize, usize)]) -> Result<Vec<usize>> {
    use crate::config::TargetModules;
    let defaults = |family| match family {
        Family::Bert | Family::Roberta => vec!["query", "value"],
        Family::DistilBert => vec!["q_lin", "v_lin"],
        Family::DebertaV2 => vec!["query_proj", "value_proj"],
        Family::ModernBert => vec!["Wqkv"],
        Family::Gpt2 => vec!["c_attn"],
    };
    let names: Vec<String> = match &lora.target_modules {
        None => defaults(family).into_iter().map(str::to_owned).collect(),
        Some(TargetModules::Names(names)) => names.clone(),
        Some(TargetModules::Pattern(_)) => {
            return Ok((0..linears.len() - 1).collect());
        }
    };
    Ok(linears
        .iter()
        .enumerate()
        .filter(|(_, (l, ..))| names.iter().any(|n| l == n || l.ends_with(&format!(".{n}"))))
        .map(|(i, _)| i)
        .collect())
}
