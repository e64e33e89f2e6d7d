//! DistilBERT: BERT's block under other names, without token types and without dropout after the
//! attention, and a head of its own.

use allreel_kernels::{activation::Activation, pooling::Pool};
use serde::{Deserialize, Serialize};

use super::{activation, check, check_dropouts, check_positive};
use crate::model::{
    parameters::Init,
    plan::{
        BlockPlan, EmbeddingsPlan, HeadPlan, LinearPlan, NormPlan, Plan, PoolPlan, PostNormPlan,
        TablePlan,
    },
};

/// Every LayerNorm's epsilon, which is not in the config.
const EPS: f64 = 1e-12;

/// The fields of `DistilBertConfig` that change what is computed.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(default)]
pub struct DistilBertConfig {
    vocab_size: usize,
    dim: usize,
    n_layers: usize,
    n_heads: usize,
    hidden_dim: usize,
    max_position_embeddings: usize,
    activation: String,
    initializer_range: f64,
    dropout: f64,
    attention_dropout: f64,
    seq_classif_dropout: f64,
    pad_token_id: Option<u32>,
}

impl Default for DistilBertConfig {
    fn default() -> Self {
        Self {
            vocab_size: 30522,
            dim: 768,
            n_layers: 6,
            n_heads: 12,
            hidden_dim: 3072,
            max_position_embeddings: 512,
            activation: "gelu".into(),
            initializer_range: 0.02,
            dropout: 0.1,
            attention_dropout: 0.1,
            seq_classif_dropout: 0.2,
            pad_token_id: Some(0),
        }
    }
}

impl DistilBertConfig {
    /// `DistilBertForSequenceClassification`.
    pub(super) fn plan(&self, num_labels: usize) -> Result<Plan, String> {
        let sizes = [
            ("vocab_size", self.vocab_size),
            ("hidden_dim", self.hidden_dim),
            ("max_position_embeddings", self.max_position_embeddings),
        ];
        check(self.dim, self.n_heads, self.n_layers, &sizes)?;
        check_dropouts(&[
            ("dropout", self.dropout),
            ("attention_dropout", self.attention_dropout),
            ("seq_classif_dropout", self.seq_classif_dropout),
        ])?;
        check_positive(&[("initializer_range", self.initializer_range)])?;
        let (h, std) = (self.dim, self.initializer_range);
        let table = |name: &str, rows, padding| TablePlan {
            name: format!("distilbert.embeddings.{name}.weight"),
            rows,
            offset: 0,
            padding,
            init: Init::Normal(std),
            quantization: None,
        };
        let blocks = (0..self.n_layers)
            .map(|i| Ok(BlockPlan::PostNorm(Box::new(self.block(i)?))))
            .collect::<Result<_, String>>()?;
        Ok(Plan {
            hidden_size: h,
            longest: Some(self.max_position_embeddings),
            embeddings: EmbeddingsPlan {
                width: h,
                words: table("word_embeddings", self.vocab_size, self.pad_token_id),
                positions: Some(table("position_embeddings", self.max_position_embeddings, None)),
                types: None,
                projection: None,
                norm: Some(NormPlan::new("distilbert.embeddings.LayerNorm", h, EPS)),
                dropout: self.dropout,
            },
            relative: None,
            blocks,
            final_norm: None,
            head: HeadPlan {
                pool: PoolPlan::Rows(Pool::First),
                skip: 0,
                input_dropout: 0.0,
                dense: Some((LinearPlan::new("pre_classifier", h, h, std), Activation::Relu)),
                norm: None,
                output_dropout: self.seq_classif_dropout,
                classifier: LinearPlan::new("classifier", num_labels, h, std),
            },
            prompt: None,
            prefix: None,
        })
    }

    fn block(&self, i: usize) -> Result<PostNormPlan, String> {
        let (h, inner, std) = (self.dim, self.hidden_dim, self.initializer_range);
        let name = format!("distilbert.transformer.layer.{i}");
        let linear = |part: &str, outputs, inputs| {
            LinearPlan::new(format!("{name}.{part}"), outputs, inputs, std)
        };
        let norm = |part: &str| NormPlan::new(format!("{name}.{part}"), h, EPS);
        Ok(PostNormPlan {
            heads: self.n_heads,
            scale: 1.0 / ((h / self.n_heads) as f64).sqrt(),
            query: linear("attention.q_lin", h, h),
            key: linear("attention.k_lin", h, h),
            value: linear("attention.v_lin", h, h),
            attention_output: linear("attention.out_lin", h, h),
            attention_norm: norm("sa_layer_norm"),
            intermediate: linear("ffn.lin1", inner, h),
            activation: activation("activation", &self.activation)?,
            output: linear("ffn.lin2", h, inner),
            output_norm: norm("output_layer_norm"),
            attention_dropout: self.attention_dropout,
            attention_output_dropout: 0.0,
            output_dropout: self.dropout,
            disentangled: None,
            convolution: None,
            name,
        })
    }
}
