//! ModernBERT: pre-norm blocks without biases, rotary positions, gated feed-forward parts, and
//! attention that is local in all but every n-th block.
//!
//! Read in both spellings: the Hub's (`global_attn_every_n_layers`, `global_rope_theta`,
//! `local_rope_theta`) and that of transformers 5 (`layer_types`, `rope_parameters`).

use allreel_kernels::{attention::Span, pooling::Pool};
use serde::{Deserialize, Serialize};

use super::{activation, check, check_dropouts, check_positive};
use crate::model::{
    parameters::Init,
    plan::{
        BlockPlan, EmbeddingsPlan, HeadPlan, LinearPlan, NormPlan, Plan, PoolPlan, PreNormPlan,
        TablePlan,
    },
};

/// The fields of `ModernBertConfig` that change what is computed.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(default)]
pub struct ModernBertConfig {
    vocab_size: usize,
    hidden_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    intermediate_size: usize,
    max_position_embeddings: usize,
    hidden_activation: String,
    norm_eps: f64,
    norm_bias: bool,
    attention_bias: bool,
    mlp_bias: bool,
    initializer_range: f64,
    initializer_cutoff_factor: f64,
    embedding_dropout: f64,
    attention_dropout: f64,
    mlp_dropout: f64,
    pad_token_id: Option<u32>,
    local_attention: usize,
    global_attn_every_n_layers: usize,
    layer_types: Option<Vec<LayerType>>,
    rope_parameters: Option<RopeParameters>,
    global_rope_theta: f64,
    local_rope_theta: Option<f64>,
    classifier_pooling: Pooling,
    classifier_dropout: f64,
    classifier_bias: bool,
    classifier_activation: String,
}

/// What a block attends to.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
enum LayerType {
    FullAttention,
    SlidingAttention,
}

/// What makes a sequence of its tokens.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
enum Pooling {
    Cls,
    Mean,
}

#[derive(Clone, Debug, Deserialize, Serialize)]
struct RopeParameters {
    full_attention: Rope,
    sliding_attention: Rope,
}

#[derive(Clone, Debug, Deserialize, Serialize)]
struct Rope {
    rope_theta: f64,
    #[serde(default = "default_rope")]
    rope_type: String,
}

fn default_rope() -> String {
    "default".into()
}

impl Default for ModernBertConfig {
    fn default() -> Self {
        Self {
            vocab_size: 50368,
            hidden_size: 768,
            num_hidden_layers: 22,
            num_attention_heads: 12,
            intermediate_size: 1152,
            max_position_embeddings: 8192,
            hidden_activation: "gelu".into(),
            norm_eps: 1e-5,
            norm_bias: false,
            attention_bias: false,
            mlp_bias: false,
            initializer_range: 0.02,
            initializer_cutoff_factor: 2.0,
            embedding_dropout: 0.0,
            attention_dropout: 0.0,
            mlp_dropout: 0.0,
            pad_token_id: Some(50283),
            local_attention: 128,
            global_attn_every_n_layers: 3,
            layer_types: None,
            rope_parameters: None,
            global_rope_theta: 160_000.0,
            local_rope_theta: Some(10_000.0),
            classifier_pooling: Pooling::Cls,
            classifier_dropout: 0.0,
            classifier_bias: false,
            classifier_activation: "gelu".into(),
        }
    }
}

impl ModernBertConfig {
    /// `ModernBertForSequenceClassification`.
    pub(super) fn plan(&self, num_labels: usize) -> Result<Plan, String> {
        let h = self.hidden_size;
        let sizes = [
            ("vocab_size", self.vocab_size),
            ("intermediate_size", self.intermediate_size),
            ("max_position_embeddings", self.max_position_embeddings),
            ("global_attn_every_n_layers", self.global_attn_every_n_layers),
        ];
        check(h, self.num_attention_heads, self.num_hidden_layers, &sizes)?;
        check_dropouts(&[
            ("embedding_dropout", self.embedding_dropout),
            ("attention_dropout", self.attention_dropout),
            ("mlp_dropout", self.mlp_dropout),
            ("classifier_dropout", self.classifier_dropout),
        ])?;
        check_positive(&[
            ("initializer_range", self.initializer_range),
            ("initializer_cutoff_factor", self.initializer_cutoff_factor),
            ("norm_eps", self.norm_eps),
        ])?;
        let blocks = (0..self.num_hidden_layers)
            .map(|i| Ok(BlockPlan::PreNorm(Box::new(self.block(i)?))))
            .collect::<Result<_, String>>()?;
        Ok(Plan {
            hidden_size: h,
            longest: Some(self.max_position_embeddings),
            embeddings: EmbeddingsPlan {
                width: h,
                words: TablePlan {
                    name: "model.embeddings.tok_embeddings.weight".into(),
                    rows: self.vocab_size,
                    offset: 0,
                    padding: self.pad_token_id,
                    init: self.init(self.initializer_range),
                    quantization: None,
                },
                positions: None,
                types: None,
                projection: None,
                norm: Some(self.norm("model.embeddings.norm")),
                dropout: self.embedding_dropout,
            },
            relative: None,
            blocks,
            final_norm: Some(self.norm("model.final_norm")),
            head: self.head(num_labels)?,
            prompt: None,
            prefix: None,
        })
    }

    /// A normal cut off at a few deviations.
    fn init(&self, deviation: f64) -> Init {
        Init::TruncatedNormal { deviation, cutoff: self.initializer_cutoff_factor }
    }

    /// The start of what writes into the residual stream.
    fn output_init(&self) -> Init {
        self.init(self.initializer_range / (2.0 * self.num_hidden_layers as f64).sqrt())
    }

    fn norm(&self, name: &str) -> NormPlan {
        let norm = NormPlan::new(name, self.hidden_size, self.norm_eps);
        NormPlan { bias: self.norm_bias, ..norm }
    }

    /// Whether block `i` sees only its neighbourhood.
    fn is_local(&self, i: usize) -> Result<bool, String> {
        match &self.layer_types {
            None => Ok(!i.is_multiple_of(self.global_attn_every_n_layers)),
            Some(types) => types
                .get(i)
                .map(|kind| *kind == LayerType::SlidingAttention)
                .ok_or_else(|| format!("layer_types has no entry for layer {i}")),
        }
    }

    fn rope_theta(&self, local: bool) -> Result<f64, String> {
        let Some(ropes) = &self.rope_parameters else {
            let theta = self.local_rope_theta.filter(|_| local).unwrap_or(self.global_rope_theta);
            check_positive(&[(
                if local { "local_rope_theta" } else { "global_rope_theta" },
                theta,
            )])?;
            return Ok(theta);
        };
        let rope = if local { &ropes.sliding_attention } else { &ropes.full_attention };
        if rope.rope_type != "default" {
            return Err(format!("rope_type {:?} is not supported; use default", rope.rope_type));
        }
        check_positive(&[("rope_theta", rope.rope_theta)])?;
        Ok(rope.rope_theta)
    }

    fn block(&self, i: usize) -> Result<PreNormPlan, String> {
        let (h, inner) = (self.hidden_size, self.intermediate_size);
        let name = format!("model.layers.{i}");
        let linear = |part: &str, outputs, inputs, bias, init| LinearPlan {
            bias,
            init,
            ..LinearPlan::new(format!("{name}.{part}"), outputs, inputs, 0.0)
        };
        let (input, output) = (self.init(self.initializer_range), self.output_init());
        let local = self.is_local(i)?;
        let head = h / self.num_attention_heads;
        if !head.is_multiple_of(2) {
            return Err(format!("a head of {head} columns cannot be rotated; it must be even"));
        }
        Ok(PreNormPlan {
            heads: self.num_attention_heads,
            scale: 1.0 / (head as f64).sqrt(),
            span: Span { causal: false, window: local.then_some(self.local_attention / 2) },
            rotary_theta: Some(self.rope_theta(local)?),
            // The embeddings' norm is the first block's.
            attention_norm: (i > 0).then(|| self.norm(&format!("{name}.attn_norm"))),
            qkv: linear("attn.Wqkv", 3 * h, h, self.attention_bias, input),
            attention_output: linear("attn.Wo", h, h, self.attention_bias, output),
            mlp_norm: self.norm(&format!("{name}.mlp_norm")),
            mlp_input: linear("mlp.Wi", 2 * inner, h, self.mlp_bias, input),
            activation: activation("hidden_activation", &self.hidden_activation)?,
            gated: true,
            mlp_output: linear("mlp.Wo", h, inner, self.mlp_bias, output),
            attention_dropout: self.attention_dropout,
            attention_output_dropout: self.attention_dropout,
            mlp_dropout: self.mlp_dropout,
            output_dropout: 0.0,
            name,
        })
    }

    fn head(&self, num_labels: usize) -> Result<HeadPlan, String> {
        let h = self.hidden_size;
        let dense = LinearPlan {
            bias: self.classifier_bias,
            init: self.output_init(),
            ..LinearPlan::new("head.dense", h, h, 0.0)
        };
        let act = activation("classifier_activation", &self.classifier_activation)?;
        let classifier = LinearPlan::new("classifier", num_labels, h, 0.0);
        Ok(HeadPlan {
            skip: 0,
            pool: PoolPlan::Rows(match self.classifier_pooling {
                Pooling::Cls => Pool::First,
                Pooling::Mean => Pool::Mean,
            }),
            input_dropout: 0.0,
            dense: Some((dense, act)),
            norm: Some(self.norm("head.norm")),
            output_dropout: self.classifier_dropout,
            classifier: LinearPlan { init: self.init((h as f64).powf(-0.5)), ..classifier },
        })
    }
}
