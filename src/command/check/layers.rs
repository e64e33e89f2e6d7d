//! One layer of each family of encoders and one network of each on word vectors, whole and with adapters over weights in fewer bits, forward and backward of one
//! batch with dropout, beside the same on the CPU in f32 with the same weights. The CPU itself is held to what it gets when backward runs the layer again.

use allreel_kernels::{
    DropoutKey, Ragged,
    common::{check::Finding, host},
};
use candle_core::{DType, Device, Tensor};
use serde_json::json;

use crate::{
    Error, Result,
    batch::Batch,
    config::{
        ALL_LINEAR, Adapter, Lora, Method, PTuning, PoolRow, PrefixTuning, Quantization,
        Reparameterization, TargetModules, Trainable,
    },
    device::Placement,
    model::{
        Classifier, Dropouts, Family, ModelConfig, Pass, Training,
        classifier::Ready,
        parameters::{Bucket, Weight},
        plan::Quantized,
    },
};

/// Rows of the word table.
const WORDS: u32 = 300;
const LENGTHS: [usize; 4] = [13, 1, 30, 7];
/// In f32: sums of at most 256 terms, several of them in a row.
const IN_F32: f64 = 1e-4;
/// In bf16: twice the 0.019 that the kernels were off by where they run on the host (in the gradient of a
/// LayerNorm of BERT; most are within 0.01).
const IN_BF16: f64 = 0.04;
/// Likewise of adapters, twice 0.0255 (LoRA's A of DeBERTa's queries).
const IN_BF16_OF_ADAPTERS: f64 = 0.051;
/// Likewise with P-tuning, twice 0.072: a unit behind a ReLU that is rounding away from zero has a gradient or none.
const IN_BF16_WITH_RELU: f64 = 0.15;
/// A gradient is compared relative to its largest element, but to no less than this share of the largest of
/// all: some are zero but for rounding, like that of the keys' bias.
const SMALLEST: f64 = 0.02;

/// The form with a ReLU.
const P_TUNING: &str = ", P-tuning";

/// Every family; a failure to run is a finding.
pub(super) fn check(placement: &Placement, say: impl Fn(&str)) -> Vec<Finding> {
    let mut findings = Vec::new();
    for family in Family::ENCODERS.into_iter().chain(Family::ON_WORDS) {
        for (form, training) in forms(family) {
            let room = name(family);
            say(&format!("{room}{form}"));
            let found = compare(placement, family, form, &training);
            findings.extend(found.unwrap_or_else(|error| {
                let what = format!("{error}{form}");
                vec![Finding { room, what, worst: f64::NAN, allowed: 0.0 }]
            }));
        }
    }
    findings
}

/// What trains: everything, and, on one family of each kind of block, one adapter of each kind that runs kernels
/// of its own.
fn forms(family: Family) -> Vec<(&'static str, Training)> {
    let mut forms = vec![("", Trainable::All.into())];
    if !matches!(family, Family::DistilBert | Family::Roberta) && !family.is_on_words() {
        forms.extend(adapters());
    }
    forms
}

fn adapters() -> Vec<(&'static str, Training)> {
    let adapter = |method| Adapter { method, modules_to_save: None, pool: PoolRow::FirstToken };
    let target_modules = Some(TargetModules::Pattern(ALL_LINEAR.into()));
    let lora = Lora { lora_dropout: 0.1, target_modules, ..Lora::default() };
    let over = |quantization| Training {
        quantization: Some(Quantized { quantization, threshold: None }),
        quantize_embeddings: true,
        ..adapter(Method::Lora(lora.clone())).into()
    };
    let prefix = PrefixTuning { num_virtual_tokens: 20, projection: Some(32) };
    let prompt =
        PTuning { encoder_hidden_size: Some(32), ..PTuning::new(20, Reparameterization::Lstm) };
    vec![
        (", LoRA over int8", over(Quantization::Int8)),
        (", LoRA over nf4", over(Quantization::Nf4)),
        (", prefix tuning", adapter(Method::PrefixTuning(prefix)).into()),
        (P_TUNING, adapter(Method::PTuning(prompt)).into()),
    ]
}

fn name(family: Family) -> &'static str {
    match family {
        Family::Bert => "a layer of BERT",
        Family::DistilBert => "a layer of DistilBERT",
        Family::Roberta => "a layer of RoBERTa",
        Family::DebertaV2 => "a layer of DeBERTa",
        Family::ModernBert => "a layer of ModernBERT",
        Family::Gpt2 => "a layer of GPT-2",
        Family::Cnn => "a network of convolutions on words",
        Family::Lstm => "an LSTM on words",
        Family::Gru => "a GRU on words",
        Family::CnnLstm => "convolutions and an LSTM on words",
        Family::AttentionLstm => "an LSTM with attention on words",
        Family::CapsuleLstm => "an LSTM with capsules on words",
        Family::Transformer => "a transformer on words",
    }
}

/// A network of `layers` layers that uses what its family has, in heads of 64, the kernels' size.
pub(super) fn small(family: Family, layers: usize, initializer: f64) -> Result<ModelConfig> {
    let mut fields = json!({
        "vocab_size": WORDS, "hidden_size": 128, "num_hidden_layers": layers,
        "num_attention_heads": 2, "intermediate_size": 256, "max_position_embeddings": 600,
        "initializer_range": initializer,
    });
    match family {
        Family::DebertaV2 => {
            fields["position_buckets"] = 16.into();
            fields["conv_kernel_size"] = 3.into();
        }
        Family::ModernBert => {
            fields["local_attention"] = 8.into();
            fields["classifier_pooling"] = "mean".into();
        }
        _ => {}
    }
    let fields = fields.as_object().cloned().unwrap_or_default();
    let dropouts = Dropouts { hidden: Some(0.1), attention: Some(0.1), classifier: Some(0.1) };
    ModelConfig::fresh(family, &fields, 2, dropouts.into()).map_err(Error::Bug)
}

fn batch() -> Result<Batch> {
    let n = LENGTHS.iter().sum::<usize>() as u32;
    Ok(Batch {
        tokens: (0..n).map(|i| 5 + i * i % (WORDS - 10)).collect::<Vec<_>>().into(),
        prompt: None,
        token_types: vec![0; n as usize].into(),
        ragged: Ragged::new(&LENGTHS, &[31, 4, 15, 9])?,
        labels: vec![0, 1, 0, 1].into(),
    })
}

/// Values by name, on the CPU.
type Values = Vec<(String, Vec<f64>)>;

/// The logits, and the gradients of all parameters, those of the words as the rows that occur.
fn run(classifier: &Classifier, batch: &Batch, checkpoint: bool) -> Result<(Vec<f64>, Values)> {
    let key = DropoutKey { seed: 3, step: 2, stream: 0 };
    let pass = Pass { dropout: Some(key), checkpoint, offload: checkpoint };
    let (logits, saved) = classifier.forward(batch, pass)?;
    let weights: Vec<f32> = (0..logits.elem_count()).map(|i| i as f32 - 3.0).collect();
    let d_logits = Tensor::from_vec(weights, logits.dims(), &Device::Cpu)?;
    let d_logits = d_logits.to_dtype(logits.dtype())?.to_device(logits.device())?;
    let mut gradients = Values::new();
    classifier.backward(batch, saved, &d_logits, pass, &mut |ready| {
        if let Ready::Words(rows) = ready {
            let ids = rows.ids.iter().map(|id| f64::from(*id)).collect();
            gradients.push(("ids of the words' rows".into(), ids));
            gradients.push(("words".into(), numbers(&rows.values)?));
        }
        Ok(())
    })?;
    for bucket in &classifier.parameters.buckets {
        for entry in bucket.entries.iter().filter(|_| bucket.gradients.is_some()) {
            if let Some(all) = &bucket.gradients {
                gradients.push((entry.name.clone(), numbers(&Bucket::view(all, entry)?)?));
            }
        }
    }
    Ok((numbers(&logits)?, gradients))
}

/// The elements of any tensor.
fn numbers(tensor: &Tensor) -> Result<Vec<f64>> {
    let here = tensor.to_device(&Device::Cpu)?.to_dtype(DType::F64)?;
    Ok(here.flatten_all()?.to_vec1()?)
}

/// Gives the CPU's network the values that the device's computes with.
fn copy_values(from: &Classifier, to: &Classifier) -> Result<()> {
    for name in from.parameters.names() {
        // What is quantised is so from the same numbers, to the same codes.
        let Weight::Dense(from) = from.parameters.weight(name)? else { continue };
        let value = from.value.to_device(&Device::Cpu)?;
        let value = value.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        host::write::<f32, _>(&to.parameters.get(name)?.value, |to| {
            to.copy_from_slice(&value);
            Ok(())
        })?;
    }
    Ok(())
}

/// Makes an update of LoRA's B, which starts as nothing.
fn shift(classifier: &Classifier) -> Result<()> {
    let parameters = &classifier.parameters;
    for name in parameters.trained().filter(|name| name.ends_with("lora_B.weight")) {
        let master = parameters.master(name)?;
        let at = |i: usize| ((i * 7919 % 1000) as f32 / 500.0 - 1.0) * 0.05;
        let values: Vec<f32> = (0..master.elem_count()).map(at).collect();
        let values = Tensor::from_vec(values, master.dims(), &Device::Cpu)?;
        master.slice_set(&values.to_device(master.device())?, 0, 0)?;
    }
    parameters.refresh()
}

fn compare(
    placement: &Placement,
    family: Family,
    form: &str,
    training: &Training,
) -> Result<Vec<Finding>> {
    // Large enough for scores that differ: 1/√128.
    let new = |placement: &Placement| -> Result<Classifier> {
        Classifier::new(placement, small(family, 1, 0.09)?, training.clone(), 5)
    };
    let (here, there) = (new(&Placement::CPU)?, new(placement)?);
    shift(&there)?;
    copy_values(&there, &here)?;
    let batch = batch()?.with_prompt(here.virtual_tokens())?;
    let in_f32 = placement.dtype == DType::F32;
    let (logits, gradients) = run(&here, &batch, false)?;
    let (got_logits, got) = run(&there, &batch, in_f32)?;
    let tolerance = match form {
        _ if in_f32 => IN_F32,
        "" => IN_BF16,
        P_TUNING => IN_BF16_WITH_RELU,
        _ => IN_BF16_OF_ADAPTERS,
    };
    let finding = |what: &str, got: &[f64], want: &[f64], smallest: f64| Finding {
        room: name(family),
        what: format!("{what}{form}"),
        worst: furthest(got, want, largest(want).max(smallest)),
        allowed: tolerance,
    };
    let all =
        gradients.iter().filter(|(name, _)| !name.starts_with("ids")).map(|(_, x)| largest(x));
    let smallest = SMALLEST * all.fold(0.0, f64::max);
    let mut findings = vec![finding("logits", &got_logits, &logits, f64::MIN_POSITIVE)];
    // Below a maximum over time, rounding to bf16 decides which of two nearly equal words gets a gradient: what
    // the op does with it is its own room's to check.
    let smooth = in_f32 || !matches!(family, Family::Cnn | Family::CnnLstm);
    let compared = |name: &str| smooth || name.starts_with("classifier");
    for ((name, want), (_, got)) in
        gradients.iter().zip(&got).filter(|((name, _), _)| compared(name))
    {
        findings.push(finding(&format!("gradient of {name}"), got, want, smallest));
    }
    Ok(findings)
}

fn largest(x: &[f64]) -> f64 {
    x.iter().fold(0.0, |m, x| m.max(x.abs()))
}

/// The largest difference as a share of `scale`; NaN if one is not a number, or the lengths differ.
fn furthest(got: &[f64], want: &[f64], scale: f64) -> f64 {
    if got.len() != want.len() {
        return f64::NAN;
    }
    let larger = |m: f64, e: f64| if m.is_nan() || e <= m { m } else { e };
    got.iter().zip(want).map(|(got, want)| (got - want).abs() / scale).fold(0.0, larger)
}
