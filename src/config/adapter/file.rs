//! `[adapter]` as it is written: one key beside another, whatever the method.

use serde::{Deserialize, Serialize};

use super::super::{Fault, ensure, ensure_kind, fields};
use super::{
    Adapter, Bias, Lora, Method, PTuning, PoolRow, PrefixTuning, PromptTuning, Reparameterization,
    TargetModules,
};

/// The methods, by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Kind {
    Lora,
    PromptTuning,
    PTuning,
    PrefixTuning,
}

/// What prompt tuning's rows start as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
enum PromptInit {
    Random,
    Text,
}

/// The section as it is written.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct AdapterFile {
    method: Option<Kind>,
    modules_to_save: Option<Vec<String>>,
    pool: Option<PoolRow>,
    r: Option<usize>,
    lora_alpha: Option<f64>,
    lora_dropout: Option<f64>,
    target_modules: Option<TargetModules>,
    bias: Option<Bias>,
    use_rslora: Option<bool>,
    num_virtual_tokens: Option<usize>,
    prompt_tuning_init: Option<PromptInit>,
    prompt_tuning_init_text: Option<String>,
    encoder_reparameterization_type: Option<Reparameterization>,
    encoder_hidden_size: Option<usize>,
    encoder_num_layers: Option<usize>,
    encoder_dropout: Option<f64>,
    prefix_projection: Option<bool>,
}

/// Keys that only some methods have.
const SPECIAL: [(&[Kind], &[&str]); 7] = [
    (&[Kind::Lora], &["r", "lora_alpha", "lora_dropout", "target_modules", "bias", "use_rslora"]),
    (&[Kind::PromptTuning, Kind::PTuning, Kind::PrefixTuning], &["num_virtual_tokens"]),
    (&[Kind::PromptTuning, Kind::PTuning], &["pool"]),
    (&[Kind::PTuning, Kind::PrefixTuning], &["encoder_hidden_size"]),
    (&[Kind::PromptTuning], &["prompt_tuning_init", "prompt_tuning_init_text"]),
    (
        &[Kind::PTuning],
        &["encoder_reparameterization_type", "encoder_num_layers", "encoder_dropout"],
    ),
    (&[Kind::PrefixTuning], &["prefix_projection"]),
];

/// Rows before the tokens where nothing is said; PEFT asks for a number.
const VIRTUAL_TOKENS: usize = 20;

impl AdapterFile {
    /// Fills in the method's defaults, and refuses what the method does not read.
    pub(in crate::config) fn resolve(self) -> Result<Adapter, Fault> {
        let Some(kind) = self.method else {
            let message = "missing: write method = \"lora\", \"prompt_tuning\", \"p_tuning\" or \
                           \"prefix_tuning\"";
            return Err(Fault { key: "adapter.method".into(), message: message.into() });
        };
        ensure_kind(&fields(&self), &SPECIAL, kind, "adapter", "method")?;
        Ok(Adapter {
            method: match kind {
                Kind::Lora => Method::Lora(self.lora()),
                Kind::PromptTuning => Method::PromptTuning(self.prompt_tuning()?),
                Kind::PTuning => Method::PTuning(self.p_tuning()?),
                Kind::PrefixTuning => Method::PrefixTuning(self.prefix_tuning()?),
            },
            modules_to_save: self.modules_to_save,
            pool: self.pool.unwrap_or_default(),
        })
    }

    fn lora(&self) -> Lora {
        let usual = Lora::default();
        Lora {
            r: self.r.unwrap_or(usual.r),
            lora_alpha: self.lora_alpha.unwrap_or(usual.lora_alpha),
            lora_dropout: self.lora_dropout.unwrap_or(usual.lora_dropout),
            target_modules: self.target_modules.clone(),
            bias: self.bias.unwrap_or(usual.bias),
            use_rslora: self.use_rslora.unwrap_or(usual.use_rslora),
        }
    }

    fn virtual_tokens(&self) -> usize {
        self.num_virtual_tokens.unwrap_or(VIRTUAL_TOKENS)
    }

    fn prompt_tuning(&self) -> Result<PromptTuning, Fault> {
        let wanted = self.prompt_tuning_init == Some(PromptInit::Text);
        let text = self.prompt_tuning_init_text.clone();
        ensure(
            wanted || text.is_none(),
            "adapter.prompt_tuning_init_text",
            "is only read with adapter.prompt_tuning_init = \"TEXT\"; write that too, or remove this",
        )?;
        ensure(
            !wanted || text.is_some(),
            "adapter.prompt_tuning_init_text",
            "missing: adapter.prompt_tuning_init = \"TEXT\" starts from it",
        )?;
        let num_virtual_tokens = self.virtual_tokens();
        Ok(PromptTuning { num_virtual_tokens, prompt_tuning_init_text: text })
    }

    fn p_tuning(&self) -> Result<PTuning, Fault> {
        let network = self.encoder_reparameterization_type.unwrap_or_default();
        for (given, key) in [
            (self.encoder_num_layers.is_some(), "adapter.encoder_num_layers"),
            (self.encoder_dropout.is_some(), "adapter.encoder_dropout"),
        ] {
            ensure(
                !given || network == Reparameterization::Lstm,
                key,
                "is only for adapter.encoder_reparameterization_type = \"LSTM\"; remove it",
            )?;
        }
        let usual = PTuning::new(self.virtual_tokens(), network);
        Ok(PTuning {
            encoder_hidden_size: self.encoder_hidden_size,
            encoder_num_layers: self.encoder_num_layers.unwrap_or(usual.encoder_num_layers),
            encoder_dropout: self.encoder_dropout.unwrap_or(usual.encoder_dropout),
            ..usual
        })
    }

    fn prefix_tuning(&self) -> Result<PrefixTuning, Fault> {
        let projects = self.prefix_projection == Some(true);
        ensure(
            projects || self.encoder_hidden_size.is_none(),
            "adapter.encoder_hidden_size",
            "is only read with adapter.prefix_projection = true; write that too, or remove this",
        )?;
        ensure(
            !projects || self.encoder_hidden_size.is_some(),
            "adapter.encoder_hidden_size",
            "missing: adapter.prefix_projection = true needs the width of its network; the model's \
             hidden size is usual",
        )?;
        let num_virtual_tokens = self.virtual_tokens();
        Ok(PrefixTuning { num_virtual_tokens, projection: self.encoder_hidden_size })
    }
}

impl From<Adapter> for AdapterFile {
    fn from(adapter: Adapter) -> Self {
        let Adapter { method, modules_to_save, pool } = adapter;
        let file = Self { modules_to_save, ..Self::default() };
        match method {
            Method::Lora(lora) => Self {
                method: Some(Kind::Lora),
                r: Some(lora.r),
                lora_alpha: Some(lora.lora_alpha),
                lora_dropout: Some(lora.lora_dropout),
                target_modules: lora.target_modules,
                bias: Some(lora.bias),
                use_rslora: Some(lora.use_rslora),
                ..file
            },
            Method::PromptTuning(prompt) => Self {
                method: Some(Kind::PromptTuning),
                pool: Some(pool),
                num_virtual_tokens: Some(prompt.num_virtual_tokens),
                prompt_tuning_init: Some(match prompt.prompt_tuning_init_text {
                    Some(_) => PromptInit::Text,
                    None => PromptInit::Random,
                }),
                prompt_tuning_init_text: prompt.prompt_tuning_init_text,
                ..file
            },
            Method::PTuning(prompt) => {
                let network = prompt.encoder_reparameterization_type;
                let lstm = network == Reparameterization::Lstm;
                Self {
                    method: Some(Kind::PTuning),
                    pool: Some(pool),
                    num_virtual_tokens: Some(prompt.num_virtual_tokens),
                    encoder_reparameterization_type: Some(network),
                    encoder_hidden_size: prompt.encoder_hidden_size,
                    encoder_num_layers: lstm.then_some(prompt.encoder_num_layers),
                    encoder_dropout: lstm.then_some(prompt.encoder_dropout),
                    ..file
                }
            }
            Method::PrefixTuning(prefix) => Self {
                method: Some(Kind::PrefixTuning),
                num_virtual_tokens: Some(prefix.num_virtual_tokens),
                encoder_hidden_size: prefix.projection,
                prefix_projection: Some(prefix.projection.is_some()),
                ..file
            },
        }
    }
}
