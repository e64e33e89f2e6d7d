//! Settings that make a run fit, each tried on top of those before it, the cheapest first.

use crate::{
    Result,
    config::{Config, Quantization, Trainable},
    memory::{Place, Setting},
    model::ModelConfig,
};

/// What was found.
pub(super) struct Advice {
    /// Settings, as `--set` takes them.
    pub(super) settings: Vec<String>,
    /// Bytes that a rank needs with them.
    pub(super) needs: u64,
    /// Whether that fits.
    pub(super) fits: bool,
}

/// A change to the settings, where it is one: what `--set` would take.
type Change = fn(&mut Config) -> Option<String>;

/// In order. Fewer tokens at a time, which follow quantisation, are found by [`Setting::largest`].
const CHANGES: [Change; 2] = [checkpoint, quantize];

/// Adds settings until a rank needs no more than `limit`.
///
/// # Errors
/// As [`Setting::new`].
pub(super) fn find(
    config: &Config,
    model: &ModelConfig,
    place: Place,
    limit: u64,
) -> Result<Advice> {
    let mut config = config.clone();
    let mut settings = Vec::new();
    let advice = |config: &Config, settings: &[String]| -> Result<Advice> {
        let needs = Setting::new(config, model.clone(), place)?.predict().computing();
        Ok(Advice { settings: settings.to_vec(), needs, fits: needs <= limit })
    };
    for change in CHANGES {
        let Some(text) = change(&mut config) else { continue };
        settings.push(text);
        let found = advice(&config, &settings)?;
        if found.fits {
            return Ok(found);
        }
    }
    for change in [None, Some(offload as Change)] {
        if let Some(change) = change {
            let Some(text) = change(&mut config) else { continue };
            settings.push(text);
        }
        let setting = Setting::new(&config, model.clone(), place)?;
        let sequences = setting.largest(limit).max(1);
        let mut fewer = config.clone();
        fewer.train.micro_tokens = config.train.micro_tokens.min(sequences * setting.length());
        let mut with_fewer = settings.clone();
        if fewer.train.micro_tokens < config.train.micro_tokens {
            with_fewer.push(format!("train.micro_tokens={}", fewer.train.micro_tokens));
        }
        let found = advice(&fewer, &with_fewer)?;
        let last = change.is_some() || !place.cuda;
        if found.fits || last {
            return Ok(found);
        }
    }
    advice(&config, &settings)
}

fn checkpoint(config: &mut Config) -> Option<String> {
    let model = &mut config.model;
    let new = !std::mem::replace(&mut model.gradient_checkpointing, true);
    new.then(|| "model.gradient_checkpointing=true".into())
}

/// Only what is frozen can be quantised.
fn quantize(config: &mut Config) -> Option<String> {
    let model = &mut config.model;
    let frozen = config.adapter.is_some() || model.trainable == Trainable::Head;
    if !frozen || matches!(model.quantization, Some(Quantization::Nf4 | Quantization::Fp4)) {
        return None;
    }
    (model.quantization, model.llm_int8_threshold) = (Some(Quantization::Nf4), None);
    Some("model.quantization=\"nf4\"".into())
}

/// Where a device is, the host's memory takes what blocks keep.
fn offload(config: &mut Config) -> Option<String> {
    let new = !std::mem::replace(&mut config.train.offload, true);
    new.then(|| "train.offload=true".into())
}
