//! Networks on word vectors: a table of words, at most two kinds of layers over them, a pooling, a classifier.
//!
//! | family | layers | pooling |
//! |---|---|---|
//! | `cnn` | convolutions of several widths | maximum over time |
//! | `lstm`, `gru` | bidirectional recurrent layers | both final states |
//! | `cnnlstm` | convolutions, and an LSTM that reads what they say of each word | maximum over time |
//! | `attention_lstm` | bidirectional LSTM | a mean with learnt weights |
//! | `capsule_lstm` | bidirectional LSTM | capsules |
//! | `transformer` | blocks of attention, over words and positions | mean over time |
//!
//! All of it is ragged: nothing sees a word of another text, or a place where there is none, but a convolution
//! the zeros beyond a text's ends.

use allreel_kernels::{activation::Activation, capsule::Routing, pooling::Pool, recurrence::Cell};
use serde::{Deserialize, Serialize};

use super::{Family, activation, check, check_dropouts, check_positive};
use crate::model::{
    parameters::Init,
    plan::{
        BlockPlan, EmbeddingsPlan, FiltersPlan, HeadPlan, LinearPlan, NormPlan, Plan, PoolPlan,
        PostNormPlan, RecurrentPlan, RecurrentStart, TablePlan,
    },
};

/// Deviation of the word table where no file of vectors says another: that of GloVe's vectors.
const WORDS: f64 = 0.4;
/// Deviation of the transformer's weights, as BERT's.
const STD: f64 = 0.02;

/// Fields of all the families; each reads those that it has.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(default)]
pub struct WordsConfig {
    vocab_size: usize,
    embedding_size: usize,
    hidden_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    intermediate_size: usize,
    max_position_embeddings: usize,
    hidden_act: String,
    layer_norm_eps: f64,
    kernel_sizes: Vec<usize>,
    num_filters: usize,
    attention_size: usize,
    num_capsules: usize,
    capsule_size: usize,
    num_routings: usize,
    hidden_dropout_prob: f64,
    attention_probs_dropout_prob: f64,
    classifier_dropout: f64,
    pad_token_id: Option<u32>,
}

impl Default for WordsConfig {
    fn default() -> Self {
        Self {
            vocab_size: 30_000,
            embedding_size: 100,
            hidden_size: 128,
            num_hidden_layers: 1,
            num_attention_heads: 4,
            intermediate_size: 256,
            max_position_embeddings: 512,
            hidden_act: "gelu".into(),
            layer_norm_eps: 1e-5,
            kernel_sizes: vec![3, 5, 7],
            num_filters: 100,
            attention_size: 128,
            num_capsules: 10,
            capsule_size: 16,
            num_routings: 3,
            hidden_dropout_prob: 0.5,
            attention_probs_dropout_prob: 0.0,
            classifier_dropout: 0.5,
            pad_token_id: Some(0),
        }
    }
}

impl WordsConfig {
    /// The network of `family`.
    pub(super) fn plan(&self, family: Family, num_labels: usize) -> Result<Plan, String> {
        let transformer = family == Family::Transformer;
        self.check(if transformer { self.num_attention_heads } else { 1 })?;
        let blocks = match family {
            Family::Cnn => vec![BlockPlan::Filters(self.filters(0.0))],
            Family::CnnLstm => {
                let filters = self.filters(self.hidden_dropout_prob);
                let width = filters.outputs();
                vec![BlockPlan::Filters(filters), self.recurrent("lstm", Cell::Lstm, width)]
            }
            Family::Gru => vec![self.recurrent("gru", Cell::Gru, self.embedding_size)],
            Family::Transformer => (0..self.num_hidden_layers)
                .map(|i| Ok(BlockPlan::PostNorm(Box::new(self.block(i)?))))
                .collect::<Result<_, String>>()?,
            _ => vec![self.recurrent("lstm", Cell::Lstm, self.embedding_size)],
        };
        let width = match family {
            Family::Cnn => self.filters(0.0).outputs(),
            Family::Transformer => self.hidden_size,
            _ => 2 * self.hidden_size,
        };
        let (pool, pooled) = self.pool(family, width);
        let h = self.hidden_size;
        let projected = transformer && h != self.embedding_size;
        let projection = LinearPlan::new("embedding.projection", h, self.embedding_size, STD);
        Ok(Plan {
            hidden_size: width,
            longest: transformer.then_some(self.max_position_embeddings),
            embeddings: EmbeddingsPlan {
                width: self.embedding_size,
                words: table("embedding.weight", self.vocab_size, self.pad_token_id, WORDS),
                positions: transformer
                    .then(|| table("position.weight", self.max_position_embeddings, None, STD)),
                types: None,
                projection: projected.then_some(projection),
                norm: transformer.then(|| NormPlan::new("embedding.norm", h, self.layer_norm_eps)),
                dropout: self.hidden_dropout_prob,
            },
            relative: None,
            blocks,
            final_norm: None,
            head: HeadPlan {
                pool,
                skip: 0,
                input_dropout: 0.0,
                dense: None,
                norm: None,
                output_dropout: self.classifier_dropout,
                classifier: LinearPlan {
                    init: Init::Uniform((pooled as f64).recip().sqrt()),
                    ..LinearPlan::new("classifier", num_labels, pooled, 0.0)
                },
            },
            prompt: None,
            prefix: None,
        })
    }

    fn check(&self, heads: usize) -> Result<(), String> {
        let sizes = [
            ("vocab_size", self.vocab_size),
            ("embedding_size", self.embedding_size),
            ("intermediate_size", self.intermediate_size),
            ("max_position_embeddings", self.max_position_embeddings),
            ("num_filters", self.num_filters),
            ("attention_size", self.attention_size),
            ("num_capsules", self.num_capsules),
            ("capsule_size", self.capsule_size),
            ("num_routings", self.num_routings),
        ];
        check(self.hidden_size, heads, self.num_hidden_layers, &sizes)?;
        if self.num_hidden_layers > 14 {
            return Err("num_hidden_layers must be at most 14 (dropout keys end there)".into());
        }
        if self.kernel_sizes.is_empty() || self.kernel_sizes.iter().any(|size| size % 2 == 0) {
            return Err("kernel_sizes must be odd numbers, one at least".into());
        }
        check_dropouts(&[
            ("hidden_dropout_prob", self.hidden_dropout_prob),
            ("attention_probs_dropout_prob", self.attention_probs_dropout_prob),
            ("classifier_dropout", self.classifier_dropout),
        ])?;
        check_positive(&[("layer_norm_eps", self.layer_norm_eps)])
    }

    fn filters(&self, dropout: f64) -> FiltersPlan {
        FiltersPlan {
            name: "convolutions".into(),
            inputs: self.embedding_size,
            kernels: self.kernel_sizes.clone(),
            filters: self.num_filters,
            activation: Activation::Relu,
            dropout,
        }
    }

    fn recurrent(&self, name: &str, cell: Cell, inputs: usize) -> BlockPlan {
        BlockPlan::Recurrent(RecurrentPlan {
            cell,
            start: RecurrentStart::Orthogonal,
            name: name.into(),
            inputs,
            hidden_size: self.hidden_size,
            num_layers: self.num_hidden_layers,
            dropout: self.hidden_dropout_prob,
        })
    }

    /// The pooling of rows of `width` columns, and the columns of what it makes.
    fn pool(&self, family: Family, width: usize) -> (PoolPlan, usize) {
        let glorot = |outputs: usize| Init::Uniform((6.0 / (outputs + width) as f64).sqrt());
        match family {
            Family::Lstm | Family::Gru => (PoolPlan::Rows(Pool::Ends), width),
            Family::AttentionLstm => {
                let outputs = self.attention_size;
                let dense = LinearPlan::new("attention", outputs, width, 0.0);
                let dense = LinearPlan { init: glorot(outputs), ..dense };
                (PoolPlan::Attention { dense, context: "attention.context".into() }, width)
            }
            Family::CapsuleLstm => {
                let outputs = self.num_capsules * self.capsule_size;
                let predictions = LinearPlan {
                    bias: false,
                    // A capsule sums hundreds of rows, and its length is lost where they make it long.
                    init: Init::Normal(0.01),
                    ..LinearPlan::new("capsules", outputs, width, 0.0)
                };
                let routing = Routing {
                    capsules: self.num_capsules,
                    size: self.capsule_size,
                    iterations: self.num_routings,
                };
                (PoolPlan::Capsules { predictions, routing }, outputs)
            }
            Family::Transformer => (PoolPlan::Rows(Pool::Mean), width),
            _ => (PoolPlan::Rows(Pool::Max), width),
        }
    }

    /// A block of the transformer, with BERT's order of layers.
    fn block(&self, i: usize) -> Result<PostNormPlan, String> {
        let (h, inner, name) = (self.hidden_size, self.intermediate_size, format!("layers.{i}"));
        let linear = |part: &str, outputs, inputs| {
            LinearPlan::new(format!("{name}.{part}"), outputs, inputs, STD)
        };
        let norm = |part: &str| NormPlan::new(format!("{name}.{part}"), h, self.layer_norm_eps);
        Ok(PostNormPlan {
            heads: self.num_attention_heads,
            scale: 1.0 / ((h / self.num_attention_heads) as f64).sqrt(),
            query: linear("query", h, h),
            key: linear("key", h, h),
            value: linear("value", h, h),
            attention_output: linear("attention_output", h, h),
            attention_norm: norm("attention_norm"),
            intermediate: linear("intermediate", inner, h),
            activation: activation("hidden_act", &self.hidden_act)?,
            output: linear("output", h, inner),
            output_norm: norm("output_norm"),
            attention_dropout: self.attention_probs_dropout_prob,
            attention_output_dropout: self.hidden_dropout_prob,
            output_dropout: self.hidden_dropout_prob,
            disentangled: None,
            convolution: None,
            name,
        })
    }
}

fn table(name: &str, rows: usize, padding: Option<u32>, deviation: f64) -> TablePlan {
    let init = Init::Normal(deviation);
    TablePlan { name: name.into(), rows, offset: 0, padding, init, quantization: None }
}
