//! GPT-2 as a classifier: causal pre-norm blocks whose weights are stored `[inputs, outputs]`, and
//! a linear layer on the last token.

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

/// The fields of `GPT2Config` that change what is computed, and two of ours.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(default)]
pub struct Gpt2Config {
    vocab_size: usize,
    n_positions: usize,
    n_embd: usize,
    n_layer: usize,
    n_head: usize,
    n_inner: Option<usize>,
    activation_function: String,
    layer_norm_epsilon: f64,
    initializer_range: f64,
    embd_pdrop: f64,
    attn_pdrop: f64,
    resid_pdrop: f64,
    scale_attn_weights: bool,
    scale_attn_by_inverse_layer_idx: bool,
    /// Whether the classifier has a bias: not in transformers, but in Raschka's book (ch. 6).
    score_bias: bool,
    /// Dropout before the classifier: not in transformers.
    score_dropout: f64,
}

impl Default for Gpt2Config {
    fn default() -> Self {
        Self {
            vocab_size: 50257,
            n_positions: 1024,
            n_embd: 768,
            n_layer: 12,
            n_head: 12,
            n_inner: None,
            activation_function: "gelu_new".into(),
            layer_norm_epsilon: 1e-5,
            initializer_range: 0.02,
            embd_pdrop: 0.1,
            attn_pdrop: 0.1,
            resid_pdrop: 0.1,
            scale_attn_weights: true,
            scale_attn_by_inverse_layer_idx: false,
            score_bias: false,
            score_dropout: 0.0,
        }
    }
}

impl Gpt2Config {
    /// `GPT2ForSequenceClassification`. A ragged sequence ends with its last token, so that no
    /// search for padding is needed.
    pub(super) fn plan(&self, num_labels: usize) -> Result<Plan, String> {
        let h = self.n_embd;
        let sizes = [
            ("vocab_size", self.vocab_size),
            ("n_positions", self.n_positions),
            ("n_inner", self.inner()),
        ];
        check(h, self.n_head, self.n_layer, &sizes)?;
        check_dropouts(&[
            ("embd_pdrop", self.embd_pdrop),
            ("attn_pdrop", self.attn_pdrop),
            ("resid_pdrop", self.resid_pdrop),
            ("score_dropout", self.score_dropout),
        ])?;
        check_positive(&[
            ("initializer_range", self.initializer_range),
            ("layer_norm_epsilon", self.layer_norm_epsilon),
        ])?;
        let table = |name: &str, rows| TablePlan {
            name: format!("transformer.{name}.weight"),
            rows,
            offset: 0,
            padding: None,
            init: Init::Normal(self.initializer_range),
            quantization: None,
        };
        let blocks = (0..self.n_layer)
            .map(|i| Ok(BlockPlan::PreNorm(Box::new(self.block(i)?))))
            .collect::<Result<_, String>>()?;
        let score = LinearPlan::new("score", num_labels, h, self.initializer_range);
        Ok(Plan {
            hidden_size: h,
            longest: Some(self.n_positions),
            embeddings: EmbeddingsPlan {
                width: h,
                words: table("wte", self.vocab_size),
                positions: Some(table("wpe", self.n_positions)),
                types: None,
                projection: None,
                norm: None,
                dropout: self.embd_pdrop,
            },
            relative: None,
            blocks,
            final_norm: Some(NormPlan::new("transformer.ln_f", h, self.layer_norm_epsilon)),
            head: HeadPlan {
                pool: PoolPlan::Rows(Pool::Last),
                skip: 0,
                input_dropout: 0.0,
                dense: None,
                norm: None,
                output_dropout: self.score_dropout,
                classifier: LinearPlan { bias: self.score_bias, ..score },
            },
            prompt: None,
            prefix: None,
        })
    }

    fn inner(&self) -> usize {
        self.n_inner.unwrap_or(4 * self.n_embd)
    }

    fn block(&self, i: usize) -> Result<PreNormPlan, String> {
        let (h, inner, std) = (self.n_embd, self.inner(), self.initializer_range);
        let name = format!("transformer.h.{i}");
        let linear = |part: &str, outputs, inputs, deviation| LinearPlan {
            transposed: true,
            ..LinearPlan::new(format!("{name}.{part}"), outputs, inputs, deviation)
        };
        let norm = |part: &str| NormPlan::new(format!("{name}.{part}"), h, self.layer_norm_epsilon);
        // What writes into the residual stream starts smaller the more blocks there are.
        let output_std = std / (2.0 * self.n_layer as f64).sqrt();
        let mut scale =
            if self.scale_attn_weights { ((h / self.n_head) as f64).powf(-0.5) } else { 1.0 };
        if self.scale_attn_by_inverse_layer_idx {
            scale /= (i + 1) as f64;
        }
        Ok(PreNormPlan {
            heads: self.n_head,
            scale,
            span: Span { causal: true, window: None },
            rotary_theta: None,
            attention_norm: Some(norm("ln_1")),
            qkv: linear("attn.c_attn", 3 * h, h, std),
            attention_output: linear("attn.c_proj", h, h, output_std),
            mlp_norm: norm("ln_2"),
            mlp_input: linear("mlp.c_fc", inner, h, std),
            activation: activation("activation_function", &self.activation_function)?,
            gated: false,
            mlp_output: linear("mlp.c_proj", h, inner, output_std),
            attention_dropout: self.attn_pdrop,
            attention_output_dropout: self.resid_pdrop,
            mlp_dropout: 0.0,
            output_dropout: self.resid_pdrop,
            name,
        })
    }
}
