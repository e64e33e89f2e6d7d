//! `[adapter]`: what trains beside a frozen encoder, under PEFT's names.

use serde::{Deserialize, Serialize};

/// The `[adapter]` section.
#[derive(Debug, Clone, PartialEq)]
pub struct Adapter {
    /// What is added to the encoder.
    pub method: Method,
    /// Modules that train whole and are saved with the adapter, by the last parts of their names; the
    /// classifier always does. Default: the whole head.
    pub modules_to_save: Option<Vec<String>>,
    /// Where a sequence with virtual tokens is pooled. Default `"first_token"`.
    pub pool: PoolRow,
}

/// What is added to the encoder.
#[derive(Debug, Clone, PartialEq)]
pub enum Method {
    /// Low-rank updates of linear layers (Hu et al. 2021, arXiv:2106.09685).
    Lora(Lora),
    /// Learnt rows before the tokens (Lester et al. 2021, arXiv:2104.08691).
    PromptTuning(PromptTuning),
    /// The same, made by a small network (Liu et al. 2021, arXiv:2103.10385).
    PTuning(PTuning),
    /// Learnt keys and values in every layer (Li and Liang 2021, arXiv:2101.00190).
    PrefixTuning(PrefixTuning),
}

/// Settings of LoRA.
#[derive(Debug, Clone, PartialEq)]
pub struct Lora {
    /// Rank of the update. Default 8.
    pub r: usize,
    /// The update is scaled by `lora_alpha / r`. Default 8.
    pub lora_alpha: f64,
    /// Dropout of the update's input. Default 0.
    pub lora_dropout: f64,
    /// Which linear layers. Default: PEFT's for the family.
    pub target_modules: Option<TargetModules>,
    /// Which biases train. Default `"none"`.
    pub bias: Bias,
    /// Scale by `lora_alpha / √r` instead (Kalajdzievski 2023, arXiv:2312.03732). Default false.
    pub use_rslora: bool,
}

impl Lora {
    /// Factor on the update.
    pub fn scaling(&self) -> f64 {
        let r = self.r as f64;
        self.lora_alpha / if self.use_rslora { r.sqrt() } else { r }
    }
}

/// Which linear layers LoRA updates.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum TargetModules {
    /// `"all-linear"`: all but the classifier.
    Pattern(String),
    /// Whole names, or their last parts.
    Names(Vec<String>),
}

/// Which biases train beside LoRA.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Bias {
    /// None.
    #[default]
    None,
    /// All of the model.
    All,
    /// Those of the layers that LoRA updates.
    LoraOnly,
}

/// Settings of prompt tuning.
#[derive(Debug, Clone, PartialEq)]
pub struct PromptTuning {
    /// Rows before the tokens. Default 20.
    pub num_virtual_tokens: usize,
    /// Text whose words' embeddings they start as (`prompt_tuning_init = "TEXT"`); random without.
    pub prompt_tuning_init_text: Option<String>,
}

/// Settings of P-tuning.
#[derive(Debug, Clone, PartialEq)]
pub struct PTuning {
    /// Rows before the tokens. Default 20.
    pub num_virtual_tokens: usize,
    /// What makes them. Default `"MLP"`.
    pub encoder_reparameterization_type: Reparameterization,
    /// Width inside it. Default: the embeddings'.
    pub encoder_hidden_size: Option<usize>,
    /// Layers of the LSTM. Default 2.
    pub encoder_num_layers: usize,
    /// Dropout between layers of the LSTM. Default 0.
    pub encoder_dropout: f64,
}

/// What makes P-tuning's rows from learnt ones.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reparameterization {
    /// Three linear layers with ReLU between.
    #[default]
    #[serde(rename = "MLP")]
    Mlp,
    /// A bidirectional LSTM and two linear layers with ReLU between.
    #[serde(rename = "LSTM")]
    Lstm,
}

/// Settings of prefix tuning.
#[derive(Debug, Clone, PartialEq)]
pub struct PrefixTuning {
    /// Keys and values in every layer. Default 20.
    pub num_virtual_tokens: usize,
    /// Width of the network that makes them (`prefix_projection = true`); they are learnt themselves without.
    pub projection: Option<usize>,
}

/// Where a sequence with virtual tokens is pooled.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PoolRow {
    /// At its own tokens, as without virtual ones.
    #[default]
    FirstToken,
    /// As if virtual tokens were its own, which is what PEFT does.
    FirstPosition,
}
