//! What a network is, whatever family it comes from: the names, sizes and rates of its parts.
//!
//! A family ([`super::family`]) reads its `config.json` and writes one [`Plan`]; the layers
//! ([`super::layer`]) read nothing else. Names are those of the family's
//! `...ForSequenceClassification` in transformers.

use allreel_kernels::{
    activation::Activation, attention::Span, capsule::Routing, pooling, recurrence::Cell,
};

use super::parameters::Init;
use crate::config::Quantization;

/// A whole network.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Width of the activations.
    pub hidden_size: usize,
    /// Tokens of the longest sequence; `None` where positions are only relative.
    pub longest: Option<usize>,
    /// From ids to activations.
    pub embeddings: EmbeddingsPlan,
    /// DeBERTa's table of relative positions.
    pub relative: Option<RelativePlan>,
    /// The blocks, in order.
    pub blocks: Vec<BlockPlan>,
    /// Norm after the last block of a pre-norm network.
    pub final_norm: Option<NormPlan>,
    /// From activations to logits.
    pub head: HeadPlan,
    /// Learnt rows before every sequence (prompt tuning, P-tuning).
    pub prompt: Option<RowsPlan>,
    /// Learnt keys and values of every block (prefix tuning), two rows of the hidden size for each.
    pub prefix: Option<RowsPlan>,
}

/// Learnt rows, made by a small network where there is one: table -> LSTM -> linear layers.
#[derive(Clone, Debug)]
pub struct RowsPlan {
    /// Number of rows, n.
    pub rows: usize,
    /// Columns of the table.
    pub width: usize,
    /// A bidirectional LSTM over the rows.
    pub lstm: Option<RecurrentPlan>,
    /// Linear layers, each with its activation.
    pub layers: Vec<(LinearPlan, Option<Activation>)>,
}

/// Bidirectional recurrent layers.
#[derive(Clone, Debug)]
pub struct RecurrentPlan {
    /// What a step computes.
    pub cell: Cell,
    /// How new parameters start.
    pub start: RecurrentStart,
    /// Parameters are `name.weight_ih_l0`, `name.weight_hh_l0_reverse` and so on.
    pub name: String,
    /// Columns of what it reads.
    pub inputs: usize,
    /// Columns of each direction.
    pub hidden_size: usize,
    /// Layers.
    pub num_layers: usize,
    /// Dropout between layers.
    pub dropout: f64,
}

/// How new recurrent layers start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RecurrentStart {
    /// As PyTorch's: everything uniform, within one over the root of the hidden size.
    Uniform,
    /// Recurrent weights orthogonal, gate by gate (Saxe et al. 2014), input weights as Glorot and Bengio
    /// 2010, biases zero but one for an LSTM's forget gate (Jozefowicz et al. 2015).
    Orthogonal,
}

/// Convolutions of several widths over words, side by side: activation(conv(x)), `filters` columns each.
#[derive(Clone, Debug)]
pub struct FiltersPlan {
    /// Parameters are `name.0.weight` `[filters, inputs, kernel]`, `name.0.bias`, and so on.
    pub name: String,
    /// Columns of what it reads.
    pub inputs: usize,
    /// Words that each convolution reads, odd.
    pub kernels: Vec<usize>,
    /// Outputs of each.
    pub filters: usize,
    /// Activation of all.
    pub activation: Activation,
    /// Dropout of the result.
    pub dropout: f64,
}

impl FiltersPlan {
    /// Columns of the result.
    pub fn outputs(&self) -> usize {
        self.kernels.len() * self.filters
    }
}

impl Plan {
    /// Tokens of the longest text: virtual tokens take positions too.
    pub fn longest_text(&self) -> Option<usize> {
        let of_prefix = self.prefix.as_ref().filter(|_| self.embeddings.positions.is_some());
        let virtual_tokens = self.prompt.as_ref().or(of_prefix).map_or(0, |rows| rows.rows);
        Some(self.longest?.saturating_sub(virtual_tokens))
    }

    /// The linear layers of the blocks, in order.
    pub fn block_linears(&mut self) -> impl Iterator<Item = &mut LinearPlan> {
        self.blocks.iter_mut().flat_map(BlockPlan::linears)
    }

    /// All linear layers: that of the embeddings, those of the blocks, those of the head.
    pub fn linears(&mut self) -> impl Iterator<Item = &mut LinearPlan> {
        let head = self.head.dense.as_mut().map(|(dense, _)| dense);
        self.embeddings
            .projection
            .iter_mut()
            .chain(self.blocks.iter_mut().flat_map(BlockPlan::linears))
            .chain(head)
            .chain([&mut self.head.classifier])
    }
}

/// A linear layer.
#[derive(Clone, Debug)]
pub struct LinearPlan {
    /// Parameters are `name.weight` and `name.bias`.
    pub name: String,
    /// N.
    pub outputs: usize,
    /// K.
    pub inputs: usize,
    /// Whether it has a bias.
    pub bias: bool,
    /// Start of a new weight.
    pub init: Init,
    /// Whether the checkpoint stores the weight as `[K, N]` (GPT-2's `Conv1D`).
    pub transposed: bool,
    /// What the weight is kept in.
    pub quantization: Option<Quantized>,
    /// A low-rank update beside it.
    pub lora: Option<LoraPlan>,
}

/// How a weight is quantised and multiplied by.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Quantized {
    /// What it is kept in.
    pub quantization: Quantization,
    /// LLM.int8(): activations are in 8 bits too, but for columns with one of at least this (0: for none).
    pub threshold: Option<f32>,
}

/// A low-rank update `scaling·B·A` of a linear layer: `name.lora_A.weight` `[r, K]`, `name.lora_B.weight`
/// `[N, r]`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LoraPlan {
    /// r.
    pub rank: usize,
    /// Factor on the update.
    pub scaling: f64,
    /// Dropout of what A reads.
    pub dropout: f64,
    /// Site of that dropout.
    pub site: u16,
}

impl LinearPlan {
    /// With a bias and a normal start.
    pub fn new(name: impl Into<String>, outputs: usize, inputs: usize, deviation: f64) -> Self {
        let init = Init::Normal(deviation);
        Self {
            name: name.into(),
            outputs,
            inputs,
            bias: true,
            init,
            transposed: false,
            quantization: None,
            lora: None,
        }
    }
}

/// A LayerNorm.
#[derive(Clone, Debug)]
pub struct NormPlan {
    /// Parameters are `name.weight` and `name.bias`.
    pub name: String,
    /// Columns.
    pub width: usize,
    /// Whether it shifts.
    pub bias: bool,
    /// Added to the variance.
    pub eps: f64,
}

impl NormPlan {
    /// With a bias.
    pub fn new(name: impl Into<String>, width: usize, eps: f64) -> Self {
        Self { name: name.into(), width, bias: true, eps }
    }
}

/// A table with a row per id.
#[derive(Clone, Debug)]
pub struct TablePlan {
    /// Name of the parameter.
    pub name: String,
    /// Rows in the checkpoint.
    pub rows: usize,
    /// Row of id 0 (RoBERTa's positions begin at row 2).
    pub offset: usize,
    /// Row that never gets a gradient.
    pub padding: Option<u32>,
    /// Start of a new table.
    pub init: Init,
    /// What it is kept in.
    pub quantization: Option<Quantization>,
}

/// The embeddings: tables -> projection -> norm -> dropout.
#[derive(Clone, Debug)]
pub struct EmbeddingsPlan {
    /// Columns of the tables.
    pub width: usize,
    /// Row per token id; its gradient is sparse.
    pub words: TablePlan,
    /// Row per position.
    pub positions: Option<TablePlan>,
    /// Row per token type.
    pub types: Option<TablePlan>,
    /// From `width` to the hidden size, where they differ.
    pub projection: Option<LinearPlan>,
    /// LayerNorm of the sum.
    pub norm: Option<NormPlan>,
    /// Dropout of the result.
    pub dropout: f64,
}

/// DeBERTa's table of relative positions, shared by all blocks.
#[derive(Clone, Debug)]
pub struct RelativePlan {
    /// Name of the table `[2·span, H]`.
    pub name: String,
    /// Buckets of the distances; `None` for one row per distance.
    pub buckets: Option<usize>,
    /// Largest distance that is told apart.
    pub max_relative: usize,
    /// Norm of the table's rows.
    pub norm: Option<NormPlan>,
    /// Dropout of the rows, anew in every block.
    pub dropout: f64,
    /// Start of a new table.
    pub init: Init,
}

impl RelativePlan {
    /// Rows of the table: one per bucket on either side.
    pub fn rows(&self) -> usize {
        2 * self.buckets.unwrap_or(self.max_relative)
    }
}

/// One block.
#[derive(Clone, Debug)]
pub enum BlockPlan {
    /// Norm after each sub-layer.
    PostNorm(Box<PostNormPlan>),
    /// Norm before each sub-layer.
    PreNorm(Box<PreNormPlan>),
    /// Recurrent layers over words.
    Recurrent(RecurrentPlan),
    /// Convolutions over words.
    Filters(FiltersPlan),
}

impl BlockPlan {
    /// The group of its parameters.
    pub fn name(&self) -> &str {
        match self {
            Self::PostNorm(plan) => &plan.name,
            Self::PreNorm(plan) => &plan.name,
            Self::Recurrent(plan) => &plan.name,
            Self::Filters(plan) => &plan.name,
        }
    }

    /// Heads of its attention; none where there is no attention.
    pub fn heads(&self) -> usize {
        match self {
            Self::PostNorm(plan) => plan.heads,
            Self::PreNorm(plan) => plan.heads,
            Self::Recurrent(_) | Self::Filters(_) => 0,
        }
    }

    fn linears(&mut self) -> Vec<&mut LinearPlan> {
        match self {
            Self::PostNorm(plan) => {
                let positions = plan.disentangled.iter_mut().flat_map(|plan| {
                    [&mut plan.content_to_position, &mut plan.position_to_content]
                });
                let own = positions.filter_map(|projection| match projection {
                    Some(PositionProjection::Own(linear)) => Some(linear),
                    _ => None,
                });
                [&mut plan.query, &mut plan.key, &mut plan.value]
                    .into_iter()
                    .chain(own)
                    .chain([&mut plan.attention_output, &mut plan.intermediate, &mut plan.output])
                    .collect()
            }
            Self::PreNorm(plan) => vec![
                &mut plan.qkv,
                &mut plan.attention_output,
                &mut plan.mlp_input,
                &mut plan.mlp_output,
            ],
            Self::Recurrent(_) | Self::Filters(_) => Vec::new(),
        }
    }
}

/// A block of BERT, DistilBERT, RoBERTa or DeBERTa.
#[derive(Clone, Debug)]
pub struct PostNormPlan {
    /// The group of its parameters.
    pub name: String,
    /// Heads of the attention.
    pub heads: usize,
    /// Factor on the attention scores.
    pub scale: f64,
    /// To the queries.
    pub query: LinearPlan,
    /// To the keys.
    pub key: LinearPlan,
    /// To the values.
    pub value: LinearPlan,
    /// After the attention.
    pub attention_output: LinearPlan,
    /// Norm after the attention.
    pub attention_norm: NormPlan,
    /// Into the feed-forward part.
    pub intermediate: LinearPlan,
    /// Its activation.
    pub activation: Activation,
    /// Out of it.
    pub output: LinearPlan,
    /// Norm after it.
    pub output_norm: NormPlan,
    /// Dropout of the attention probabilities.
    pub attention_dropout: f64,
    /// Dropout after the attention's output.
    pub attention_output_dropout: f64,
    /// Dropout after the feed-forward part.
    pub output_dropout: f64,
    /// Scores by relative position.
    pub disentangled: Option<DisentangledPlan>,
    /// DeBERTa-v2-xlarge's branch beside the first block.
    pub convolution: Option<ConvolutionPlan>,
}

/// Which relative-position scores a block has, and what projects the table.
#[derive(Clone, Debug)]
pub struct DisentangledPlan {
    /// Content to position: the projection of the table to keys.
    pub content_to_position: Option<PositionProjection>,
    /// Position to content: the projection of the table to queries.
    pub position_to_content: Option<PositionProjection>,
}

/// What projects the relative table.
#[derive(Clone, Debug)]
pub enum PositionProjection {
    /// The block's own key (or query) projection, `share_att_key`.
    Shared,
    /// A projection for positions.
    Own(LinearPlan),
}

/// A convolution over tokens, added to the first block's output.
#[derive(Clone, Debug)]
pub struct ConvolutionPlan {
    /// Parameters are `name.weight` `[H, H / groups, kernel]` and `name.bias`.
    pub name: String,
    /// Tokens that it reads, odd.
    pub kernel: usize,
    /// Groups of channels.
    pub groups: usize,
    /// Its activation.
    pub activation: Activation,
    /// Norm of the sum with the block's output.
    pub norm: NormPlan,
    /// Dropout before the activation.
    pub dropout: f64,
    /// Start of a new weight.
    pub init: Init,
}

/// A block of ModernBERT or GPT-2.
#[derive(Clone, Debug)]
pub struct PreNormPlan {
    /// The group of its parameters.
    pub name: String,
    /// Heads of the attention.
    pub heads: usize,
    /// Factor on the attention scores.
    pub scale: f64,
    /// Which keys a query sees.
    pub span: Span,
    /// Base of the rotary embedding's wave lengths, if there is one.
    pub rotary_theta: Option<f64>,
    /// Norm before the attention; `None` where the input is normed already.
    pub attention_norm: Option<NormPlan>,
    /// To queries, keys and values, one below the other.
    pub qkv: LinearPlan,
    /// After the attention.
    pub attention_output: LinearPlan,
    /// Norm before the feed-forward part.
    pub mlp_norm: NormPlan,
    /// Into the feed-forward part; twice as wide where it is gated.
    pub mlp_input: LinearPlan,
    /// Its activation.
    pub activation: Activation,
    /// Whether the second half of `mlp_input` multiplies the activated first.
    pub gated: bool,
    /// Out of it.
    pub mlp_output: LinearPlan,
    /// Dropout of the attention probabilities.
    pub attention_dropout: f64,
    /// Dropout after the attention's output.
    pub attention_output_dropout: f64,
    /// Dropout after the activation.
    pub mlp_dropout: f64,
    /// Dropout after the feed-forward part.
    pub output_dropout: f64,
}

/// The head: pool -> dropout -> dense -> norm -> dropout -> classifier.
#[derive(Clone, Debug)]
pub struct HeadPlan {
    /// How a sequence's rows make one.
    pub pool: PoolPlan,
    /// Rows of virtual tokens before its own, which are not pooled.
    pub skip: usize,
    /// Dropout of the pooled row.
    pub input_dropout: f64,
    /// A layer in between, and its activation.
    pub dense: Option<(LinearPlan, Activation)>,
    /// Norm of what it makes.
    pub norm: Option<NormPlan>,
    /// Dropout before the classifier.
    pub output_dropout: f64,
    /// To the logits.
    pub classifier: LinearPlan,
}

/// How the rows of a sequence become one.
#[derive(Clone, Debug)]
pub enum PoolPlan {
    /// Some of them, or a mean or maximum.
    Rows(pooling::Pool),
    /// A mean with learnt weights: softmax over the sequence of tanh(x·Wᵀ + b)·v (Yang et al. 2016).
    Attention {
        /// W and b.
        dense: LinearPlan,
        /// Name of v `[A]`.
        context: String,
    },
    /// Capsules, whose predictions a linear layer makes of each row (Sabour et al. 2017).
    Capsules {
        /// To the predictions, `[J·D, H]`.
        predictions: LinearPlan,
        /// How many, how large, how often.
        routing: Routing,
    },
}
