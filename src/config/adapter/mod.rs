//! `[adapter]`: what trains beside a frozen encoder, under PEFT's names.

mod file;

use std::path::Path;

use serde::{Deserialize, Serialize};

pub(super) use file::AdapterFile;

use super::{Fault, ensure, fields};
use crate::Error;

/// The `[adapter]` section.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(into = "AdapterFile")]
pub struct Adapter {
    /// What is added to the encoder.
    pub method: Method,
    /// Modules that train whole and are saved with the adapter, by the last parts of their names; the
    /// classifier always does. Default: the whole head.
    pub modules_to_save: Option<Vec<String>>,
    /// Where a sequence with virtual tokens before it is pooled (prompt tuning, P-tuning). Default
    /// `"first_token"`.
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

impl Adapter {
    /// The adapter as its files are read: of a network that made rows, they keep the rows.
    #[must_use]
    pub fn without_network(&self) -> Self {
        let method = match &self.method {
            Method::PTuning(tuning) => Method::PromptTuning(PromptTuning {
                num_virtual_tokens: tuning.num_virtual_tokens,
                prompt_tuning_init_text: None,
            }),
            Method::PromptTuning(prompt) => Method::PromptTuning(PromptTuning {
                prompt_tuning_init_text: None,
                ..prompt.clone()
            }),
            Method::PrefixTuning(prefix) => {
                Method::PrefixTuning(PrefixTuning { projection: None, ..prefix.clone() })
            }
            lora @ Method::Lora(_) => lora.clone(),
        };
        Self { method, ..self.clone() }
    }
}

impl Default for Lora {
    fn default() -> Self {
        Self {
            r: 8,
            lora_alpha: 8.0,
            lora_dropout: 0.0,
            target_modules: None,
            bias: Bias::None,
            use_rslora: false,
        }
    }
}

impl Lora {
    /// Factor on the update.
    pub fn scaling(&self) -> f64 {
        let r = self.r as f64;
        self.lora_alpha / if self.use_rslora { r.sqrt() } else { r }
    }
}

/// The pattern there is for [`TargetModules`].
pub const ALL_LINEAR: &str = "all-linear";

/// Which linear layers LoRA updates.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, expecting = "a list of names, or \"all-linear\"")]
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

impl Adapter {
    /// Rows that stand before the tokens of every sequence; 0 for LoRA.
    pub fn virtual_tokens(&self) -> usize {
        match &self.method {
            Method::Lora(_) => 0,
            Method::PromptTuning(prompt) => prompt.num_virtual_tokens,
            Method::PTuning(prompt) => prompt.num_virtual_tokens,
            Method::PrefixTuning(prefix) => prefix.num_virtual_tokens,
        }
    }

    /// Those of them that are rows of the batch: a prefix is none.
    pub fn prompt_rows(&self) -> usize {
        match &self.method {
            Method::Lora(_) | Method::PrefixTuning(_) => 0,
            Method::PromptTuning(_) | Method::PTuning(_) => self.virtual_tokens(),
        }
    }

    /// Checks the values of an adapter that was read from `file`, whose keys have the same names.
    ///
    /// # Errors
    /// `Data` naming the file, the key, its value and what it may be.
    pub fn check_in(&self, file: &Path) -> crate::Result<()> {
        self.check().map_err(|Fault { key, message }| {
            let key = key.trim_start_matches("adapter.");
            let value = fields(self).get(key).map_or("unset".to_owned(), ToString::to_string);
            Error::Data(format!("{}: {key} = {value}: {message}", file.display()))
        })
    }

    pub(super) fn check(&self) -> Result<(), Fault> {
        let named = |names: &[String]| names.iter().all(|name| !name.trim().is_empty());
        ensure(
            self.modules_to_save.as_deref().is_none_or(named),
            "adapter.modules_to_save",
            "must hold names of modules; [] trains the classifier alone",
        )?;
        if let Method::Lora(lora) = &self.method {
            return lora.check();
        }
        ensure(
            self.virtual_tokens() > 0,
            "adapter.num_virtual_tokens",
            "must be at least 1; 20 is usual",
        )?;
        let width = match &self.method {
            Method::PTuning(prompt) => {
                prompt.check_lstm()?;
                prompt.encoder_hidden_size
            }
            Method::PrefixTuning(prefix) => prefix.projection,
            Method::Lora(_) | Method::PromptTuning(_) => None,
        };
        ensure(width != Some(0), "adapter.encoder_hidden_size", "must be at least 1")?;
        if let Method::PromptTuning(prompt) = &self.method {
            let text = prompt.prompt_tuning_init_text.as_deref();
            ensure(
                text.is_none_or(|text| !text.trim().is_empty()),
                "adapter.prompt_tuning_init_text",
                "must hold words, whose embeddings the rows start as",
            )?;
        }
        Ok(())
    }
}

impl Lora {
    fn check(&self) -> Result<(), Fault> {
        ensure(self.r > 0, "adapter.r", "must be at least 1; 8 is usual")?;
        ensure(
            self.lora_alpha > 0.0 && self.lora_alpha.is_finite(),
            "adapter.lora_alpha",
            "must be greater than 0 and finite; once or twice adapter.r is usual",
        )?;
        ensure(
            (0.0..1.0).contains(&self.lora_dropout),
            "adapter.lora_dropout",
            "must lie in [0, 1); 0.1 is usual, 0 is none",
        )?;
        let usable = match &self.target_modules {
            None => true,
            Some(TargetModules::Pattern(pattern)) => pattern == ALL_LINEAR,
            Some(TargetModules::Names(names)) => {
                !names.is_empty() && names.iter().all(|name| !name.trim().is_empty())
            }
        };
        ensure(
            usable,
            "adapter.target_modules",
            "must be a list of names such as [\"query_proj\", \"value_proj\"], or \"all-linear\"; \
             leave it out for the family's usual ones",
        )
    }
}

impl PTuning {
    /// With the defaults of all but these.
    pub fn new(num_virtual_tokens: usize, network: Reparameterization) -> Self {
        Self {
            num_virtual_tokens,
            encoder_reparameterization_type: network,
            encoder_hidden_size: None,
            encoder_num_layers: 2,
            encoder_dropout: 0.0,
        }
    }

    fn check_lstm(&self) -> Result<(), Fault> {
        ensure(self.encoder_num_layers > 0, "adapter.encoder_num_layers", "must be at least 1")?;
        ensure(
            (0.0..1.0).contains(&self.encoder_dropout),
            "adapter.encoder_dropout",
            "must lie in [0, 1); 0 is usual",
        )
    }
}
