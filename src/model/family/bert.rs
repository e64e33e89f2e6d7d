//! BERT, and RoBERTa: the same encoder under another prefix, positions that begin at row 2, and a
//! head of its own instead of BERT's pooler.

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

/// The fields of `BertConfig` and `RobertaConfig` that change what is computed.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(default)]
pub struct BertConfig {
    vocab_size: usize,
    hidden_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    intermediate_size: usize,
    max_position_embeddings: usize,
    type_vocab_size: usize,
    hidden_act: String,
    layer_norm_eps: f64,
    initializer_range: f64,
    hidden_dropout_prob: f64,
    attention_probs_dropout_prob: f64,
    classifier_dropout: Option<f64>,
    pad_token_id: Option<u32>,
    position_embedding_type: String,
}

impl Default for BertConfig {
    fn default() -> Self {
        Self {
            vocab_size: 30522,
            hidden_size: 768,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            intermediate_size: 3072,
            max_position_embeddings: 512,
            type_vocab_size: 2,
            hidden_act: "gelu".into(),
            layer_norm_eps: 1e-12,
            initializer_range: 0.02,
            hidden_dropout_prob: 0.1,
            attention_probs_dropout_prob: 0.1,
            classifier_dropout: None,
            pad_token_id: Some(0),
            position_embedding_type: "absolute".into(),
        }
    }
}

impl BertConfig {
    /// `BertForSequenceClassification`.
    pub(super) fn bert(&self, num_labels: usize) -> Result<Plan, String> {
        let (h, std) = (self.hidden_size, self.initializer_range);
        let head = HeadPlan {
            pool: PoolPlan::Rows(Pool::First),
            skip: 0,
            input_dropout: 0.0,
            dense: Some((LinearPlan::new("bert.pooler.dense", h, h, std), Activation::Tanh)),
            norm: None,
            output_dropout: self.classifier_dropout.unwrap_or(self.hidden_dropout_prob),
            classifier: LinearPlan::new("classifier", num_labels, h, std),
        };
        self.plan("bert", 0, head)
    }

    /// `RobertaForSequenceClassification`. Position ids begin after that of padding.
    pub(super) fn roberta(&self, num_labels: usize) -> Result<Plan, String> {
        let (h, std) = (self.hidden_size, self.initializer_range);
        let dropout = self.classifier_dropout.unwrap_or(self.hidden_dropout_prob);
        let head = HeadPlan {
            pool: PoolPlan::Rows(Pool::First),
            skip: 0,
            input_dropout: dropout,
            dense: Some((LinearPlan::new("classifier.dense", h, h, std), Activation::Tanh)),
            norm: None,
            output_dropout: dropout,
            classifier: LinearPlan::new("classifier.out_proj", num_labels, h, std),
        };
        let first = self.pad_token_id.unwrap_or(1) as usize + 1;
        if self.max_position_embeddings <= first {
            let rows = self.max_position_embeddings;
            return Err(format!("max_position_embeddings {rows} leaves no position after padding"));
        }
        self.plan("roberta", first, head)
    }

    fn plan(&self, prefix: &str, first_position: usize, head: HeadPlan) -> Result<Plan, String> {
        let sizes = [
            ("vocab_size", self.vocab_size),
            ("intermediate_size", self.intermediate_size),
            ("max_position_embeddings", self.max_position_embeddings),
            ("type_vocab_size", self.type_vocab_size),
        ];
        check(self.hidden_size, self.num_attention_heads, self.num_hidden_layers, &sizes)?;
        check_dropouts(&[
            ("hidden_dropout_prob", self.hidden_dropout_prob),
            ("attention_probs_dropout_prob", self.attention_probs_dropout_prob),
            ("classifier_dropout", self.classifier_dropout.unwrap_or(0.0)),
        ])?;
        check_positive(&[
            ("initializer_range", self.initializer_range),
            ("layer_norm_eps", self.layer_norm_eps),
        ])?;
        if self.position_embedding_type != "absolute" {
            return Err(format!(
                "position_embedding_type {:?} is not supported (use a checkpoint with \"absolute\")",
                self.position_embedding_type
            ));
        }
        let init = Init::Normal(self.initializer_range);
        let table = |name: &str, rows, offset, padding| TablePlan {
            name: format!("{prefix}.embeddings.{name}.weight"),
            rows,
            offset,
            padding,
            init,
            quantization: None,
        };
        let norm = format!("{prefix}.embeddings.LayerNorm");
        let blocks = (0..self.num_hidden_layers)
            .map(|i| {
                Ok(BlockPlan::PostNorm(Box::new(
                    self.block(&format!("{prefix}.encoder.layer.{i}"))?,
                )))
            })
            .collect::<Result<_, String>>()?;
        Ok(Plan {
            hidden_size: self.hidden_size,
            longest: Some(self.max_position_embeddings - first_position),
            embeddings: EmbeddingsPlan {
                width: self.hidden_size,
                words: table("word_embeddings", self.vocab_size, 0, self.pad_token_id),
                positions: Some(table(
                    "position_embeddings",
                    self.max_position_embeddings,
                    first_position,
                    None,
                )),
                types: Some(table("token_type_embeddings", self.type_vocab_size, 0, None)),
                projection: None,
                norm: Some(NormPlan::new(norm, self.hidden_size, self.layer_norm_eps)),
                dropout: self.hidden_dropout_prob,
            },
            relative: None,
            blocks,
            final_norm: None,
            head,
            prompt: None,
            prefix: None,
        })
    }

    fn block(&self, name: &str) -> Result<PostNormPlan, String> {
        let (h, inner, std) = (self.hidden_size, self.intermediate_size, self.initializer_range);
        let linear = |part: &str, outputs, inputs| {
            LinearPlan::new(format!("{name}.{part}"), outputs, inputs, std)
        };
        let norm = |part: &str| NormPlan::new(format!("{name}.{part}"), h, self.layer_norm_eps);
        Ok(PostNormPlan {
            heads: self.num_attention_heads,
            scale: 1.0 / ((h / self.num_attention_heads) as f64).sqrt(),
            query: linear("attention.self.query", h, h),
            key: linear("attention.self.key", h, h),
            value: linear("attention.self.value", h, h),
            attention_output: linear("attention.output.dense", h, h),
            attention_norm: norm("attention.output.LayerNorm"),
            intermediate: linear("intermediate.dense", inner, h),
            activation: activation("hidden_act", &self.hidden_act)?,
            output: linear("output.dense", h, inner),
            output_norm: norm("output.LayerNorm"),
            attention_dropout: self.attention_probs_dropout_prob,
            attention_output_dropout: self.hidden_dropout_prob,
            output_dropout: self.hidden_dropout_prob,
            disentangled: None,
            convolution: None,
            name: name.into(),
        })
    }
}
