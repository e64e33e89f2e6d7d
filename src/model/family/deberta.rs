//! DeBERTa-v2 and v3: post-norm blocks with disentangled attention over a shared table of relative
//! positions; v2-xlarge and xxlarge with a convolution beside the first block.

use allreel_kernels::{activation::Activation, pooling::Pool};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::{activation, check, check_dropouts, check_positive};
use crate::model::{
    parameters::Init,
    plan::{
        BlockPlan, ConvolutionPlan, DisentangledPlan, EmbeddingsPlan, HeadPlan, LinearPlan,
        NormPlan, Plan, PoolPlan, PositionProjection, PostNormPlan, RelativePlan, TablePlan,
    },
};

/// The fields of `DebertaV2Config` that change what is computed.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(default)]
pub struct DebertaV2Config {
    vocab_size: usize,
    hidden_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    attention_head_size: Option<usize>,
    intermediate_size: usize,
    max_position_embeddings: usize,
    type_vocab_size: usize,
    embedding_size: Option<usize>,
    hidden_act: String,
    layer_norm_eps: f64,
    initializer_range: f64,
    hidden_dropout_prob: f64,
    attention_probs_dropout_prob: f64,
    pad_token_id: Option<u32>,
    relative_attention: bool,
    position_biased_input: bool,
    max_relative_positions: i64,
    position_buckets: i64,
    pos_att_type: Option<PosAttType>,
    share_att_key: bool,
    norm_rel_ebd: String,
    conv_kernel_size: usize,
    conv_groups: usize,
    conv_act: String,
    pooler_hidden_size: Option<usize>,
    pooler_dropout: f64,
    pooler_hidden_act: String,
    cls_dropout: Option<f64>,
}

/// `["c2p", "p2c"]`, or `"c2p|p2c"` as older files have it.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(untagged)]
enum PosAttType {
    Names(Vec<String>),
    Joined(String),
}

impl Default for DebertaV2Config {
    fn default() -> Self {
        Self {
            vocab_size: 128_100,
            hidden_size: 1536,
            num_hidden_layers: 24,
            num_attention_heads: 24,
            attention_head_size: None,
            intermediate_size: 6144,
            max_position_embeddings: 512,
            type_vocab_size: 0,
            embedding_size: None,
            hidden_act: "gelu".into(),
            layer_norm_eps: 1e-7,
            initializer_range: 0.02,
            hidden_dropout_prob: 0.1,
            attention_probs_dropout_prob: 0.1,
            pad_token_id: Some(0),
            relative_attention: false,
            position_biased_input: true,
            max_relative_positions: -1,
            position_buckets: -1,
            pos_att_type: None,
            share_att_key: false,
            norm_rel_ebd: "none".into(),
            conv_kernel_size: 0,
            conv_groups: 1,
            conv_act: "tanh".into(),
            pooler_hidden_size: None,
            pooler_dropout: 0.0,
            pooler_hidden_act: "gelu".into(),
            cls_dropout: None,
        }
    }
}

/// What sets deberta-v3-base apart from the defaults of `DebertaV2Config`, which has no relative
/// attention at all: the start of a new encoder's config.
pub(super) fn v3_defaults() -> Map<String, Value> {
    let fields = json!({
        "relative_attention": true,
        "position_buckets": 256,
        "pos_att_type": ["p2c", "c2p"],
        "share_att_key": true,
        "norm_rel_ebd": "layer_norm",
        "position_biased_input": false,
    });
    fields.as_object().cloned().unwrap_or_default()
}

impl DebertaV2Config {
    /// `DebertaV2ForSequenceClassification`.
    pub(super) fn plan(&self, num_labels: usize) -> Result<Plan, String> {
        let h = self.hidden_size;
        let sizes = [
            ("vocab_size", self.vocab_size),
            ("intermediate_size", self.intermediate_size),
            ("max_position_embeddings", self.max_position_embeddings),
        ];
        check(h, self.num_attention_heads, self.num_hidden_layers, &sizes)?;
        check_dropouts(&[
            ("hidden_dropout_prob", self.hidden_dropout_prob),
            ("attention_probs_dropout_prob", self.attention_probs_dropout_prob),
            ("pooler_dropout", self.pooler_dropout),
            ("cls_dropout", self.cls_dropout.unwrap_or(0.0)),
        ])?;
        check_positive(&[
            ("initializer_range", self.initializer_range),
            ("layer_norm_eps", self.layer_norm_eps),
        ])?;
        if self.attention_head_size.is_some_and(|d| d * self.num_attention_heads != h) {
            return Err("attention_head_size x num_attention_heads is not hidden_size".into());
        }
        let relative = self.relative_attention.then(|| self.relative()).transpose()?;
        let convolution = (self.conv_kernel_size > 0).then(|| self.convolution()).transpose()?;
        let blocks = (0..self.num_hidden_layers)
            .map(|i| {
                let convolution = convolution.clone().filter(|_| i == 0);
                Ok(BlockPlan::PostNorm(Box::new(PostNormPlan { convolution, ..self.block(i)? })))
            })
            .collect::<Result<_, String>>()?;
        // The positions are relative, so that any length can be read, unless there are absolute ones.
        let longest = self.position_biased_input.then_some(self.max_position_embeddings);
        let (embeddings, head) = (self.embeddings(), self.head(num_labels)?);
        Ok(Plan {
            hidden_size: h,
            longest,
            embeddings,
            relative,
            blocks,
            final_norm: None,
            head,
            prompt: None,
            prefix: None,
        })
    }

    fn embeddings(&self) -> EmbeddingsPlan {
        let (h, std) = (self.hidden_size, self.initializer_range);
        let width = self.embedding_size.unwrap_or(h);
        let table = |name: &str, rows, padding| TablePlan {
            name: format!("deberta.embeddings.{name}.weight"),
            rows,
            offset: 0,
            padding,
            init: Init::Normal(std),
            quantization: None,
        };
        let positions = self.max_position_embeddings;
        let projection = LinearPlan::new("deberta.embeddings.embed_proj", h, width, std);
        EmbeddingsPlan {
            width,
            words: table("word_embeddings", self.vocab_size, self.pad_token_id),
            positions: self
                .position_biased_input
                .then(|| table("position_embeddings", positions, None)),
            types: (self.type_vocab_size > 0)
                .then(|| table("token_type_embeddings", self.type_vocab_size, None)),
            projection: (width != h).then_some(LinearPlan { bias: false, ..projection }),
            norm: Some(NormPlan::new("deberta.embeddings.LayerNorm", h, self.layer_norm_eps)),
            dropout: self.hidden_dropout_prob,
        }
    }

    fn relative(&self) -> Result<RelativePlan, String> {
        let norm = match self.norm_rel_ebd.to_lowercase().as_str() {
            "none" => None,
            "layer_norm" => {
                let (width, eps) = (self.hidden_size, self.layer_norm_eps);
                Some(NormPlan::new("deberta.encoder.LayerNorm", width, eps))
            }
            other => {
                return Err(format!("norm_rel_ebd {other:?} is unknown; use none or layer_norm"));
            }
        };
        let positive = |n: i64| usize::try_from(n).ok().filter(|n| *n > 0);
        let buckets = positive(self.position_buckets);
        let max_relative =
            positive(self.max_relative_positions).unwrap_or(self.max_position_embeddings);
        if buckets.is_some_and(|buckets| buckets < 2 || max_relative <= buckets / 2 + 1) {
            return Err(format!(
                "position_buckets {} does not go with a largest distance of {max_relative}; it must \
                 be at least 2 and its half less than that",
                self.position_buckets
            ));
        }
        Ok(RelativePlan {
            name: "deberta.encoder.rel_embeddings.weight".into(),
            buckets,
            max_relative,
            norm,
            dropout: self.hidden_dropout_prob,
            init: Init::Normal(self.initializer_range),
        })
    }

    fn convolution(&self) -> Result<ConvolutionPlan, String> {
        let (h, kernel, groups) = (self.hidden_size, self.conv_kernel_size, self.conv_groups);
        if kernel % 2 == 0 || groups == 0 || !h.is_multiple_of(groups) {
            return Err(format!(
                "conv_kernel_size {kernel} must be odd, and conv_groups {groups} divide hidden_size"
            ));
        }
        Ok(ConvolutionPlan {
            name: "deberta.encoder.conv.conv".into(),
            kernel,
            groups,
            activation: activation("conv_act", &self.conv_act)?,
            norm: NormPlan::new("deberta.encoder.conv.LayerNorm", h, self.layer_norm_eps),
            dropout: self.hidden_dropout_prob,
            init: Init::Normal(self.initializer_range),
        })
    }

    /// Whether content-to-position and position-to-content scores are asked for.
    fn scores(&self) -> Result<[bool; 2], String> {
        let names: Vec<&str> = match &self.pos_att_type {
            None => Vec::new(),
            Some(PosAttType::Names(names)) => names.iter().map(String::as_str).collect(),
            Some(PosAttType::Joined(names)) => {
                names.split('|').map(str::trim).filter(|name| !name.is_empty()).collect()
            }
        };
        if let Some(name) = names.iter().find(|name| !["c2p", "p2c"].contains(name)) {
            return Err(format!("pos_att_type {name:?} is unknown; use c2p and p2c"));
        }
        Ok([names.contains(&"c2p"), names.contains(&"p2c")])
    }

    fn block(&self, i: usize) -> Result<PostNormPlan, String> {
        let (h, inner, std) = (self.hidden_size, self.intermediate_size, self.initializer_range);
        let name = format!("deberta.encoder.layer.{i}");
        let linear = |part: &str, outputs, inputs| {
            LinearPlan::new(format!("{name}.{part}"), outputs, inputs, std)
        };
        let norm = |part: &str| NormPlan::new(format!("{name}.{part}"), h, self.layer_norm_eps);
        let scores = self.scores()?;
        let project = |has: bool, part: &str| {
            has.then(|| match self.share_att_key {
                true => PositionProjection::Shared,
                false => PositionProjection::Own(linear(part, h, h)),
            })
        };
        let head = (h / self.num_attention_heads) as f64;
        // The terms count even where relative attention is off, as in transformers.
        let terms = 1.0 + f64::from(u8::from(scores[0])) + f64::from(u8::from(scores[1]));
        Ok(PostNormPlan {
            heads: self.num_attention_heads,
            scale: 1.0 / (head * terms).sqrt(),
            query: linear("attention.self.query_proj", h, h),
            key: linear("attention.self.key_proj", h, h),
            value: linear("attention.self.value_proj", h, h),
            attention_output: linear("attention.output.dense", h, h),
            attention_norm: norm("attention.output.LayerNorm"),
            intermediate: linear("intermediate.dense", inner, h),
            activation: activation("hidden_act", &self.hidden_act)?,
            output: linear("output.dense", h, inner),
            output_norm: norm("output.LayerNorm"),
            attention_dropout: self.attention_probs_dropout_prob,
            attention_output_dropout: self.hidden_dropout_prob,
            output_dropout: self.hidden_dropout_prob,
            disentangled: (self.relative_attention && scores != [false; 2]).then(|| {
                DisentangledPlan {
                    content_to_position: project(scores[0], "attention.self.pos_key_proj"),
                    position_to_content: project(scores[1], "attention.self.pos_query_proj"),
                }
            }),
            convolution: None,
            name,
        })
    }

    fn head(&self, num_labels: usize) -> Result<HeadPlan, String> {
        let (h, std) = (self.hidden_size, self.initializer_range);
        if self.pooler_hidden_size.is_some_and(|width| width != h) {
            return Err("pooler_hidden_size is not hidden_size".into());
        }
        let act: Activation = activation("pooler_hidden_act", &self.pooler_hidden_act)?;
        Ok(HeadPlan {
            pool: PoolPlan::Rows(Pool::First),
            skip: 0,
            input_dropout: self.pooler_dropout,
            dense: Some((LinearPlan::new("pooler.dense", h, h, std), act)),
            norm: None,
            output_dropout: self.cls_dropout.unwrap_or(self.hidden_dropout_prob),
            classifier: LinearPlan::new("classifier", num_labels, h, std),
        })
    }
}
