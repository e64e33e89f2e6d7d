//! One layer of each family, forward and backward of one batch with dropout, beside the same on the CPU in
//! f32 with the same weights. The CPU itself is held to what it gets when backward runs the layer again.

use allreel_kernels::{
    DropoutKey, Ragged,
    common::{check::Finding, host},
};
use candle_core::{DType, Device, Tensor};
use serde_json::json;

use crate::{
    Error, Result,
    batch::Batch,
    config::Trainable,
    device::Placement,
    model::{
        Classifier, Dropouts, Family, ModelConfig, Pass, classifier::Ready, parameters::Bucket,
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
/// A gradient is compared relative to its largest element, but to no less than this share of the largest of
/// all: some are zero but for rounding, like that of the keys' bias.
const SMALLEST: f64 = 0.02;

/// Every family; a failure to run is a finding.
pub(super) fn check(placement: &Placement, say: impl Fn(&str)) -> Vec<Finding> {
    let mut findings = Vec::new();
    for family in Family::ALL {
        let room = name(family);
        say(room);
        findings.extend(compare(placement, family).unwrap_or_else(|error| {
            vec![Finding { room, what: error.to_string(), worst: f64::NAN, allowed: 0.0 }]
        }));
    }
    findings
}

fn name(family: Family) -> &'static str {
    match family {
        Family::Bert => "a layer of BERT",
        Family::DistilBert => "a layer of DistilBERT",
        Family::Roberta => "a layer of RoBERTa",
        Family::DebertaV2 => "a layer of DeBERTa",
        Family::ModernBert => "a layer of ModernBERT",
        Family::Gpt2 => "a layer of GPT-2",
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
        Family::Bert | Family::DistilBert | Family::Roberta | Family::Gpt2 => {}
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
    let pass = Pass { dropout: Some(key), checkpoint };
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
        let value = from.parameters.get(name)?.value.to_device(&Device::Cpu)?;
        let value = value.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        host::write::<f32, _>(&to.parameters.get(name)?.value, |to| {
            to.copy_from_slice(&value);
            Ok(())
        })?;
    }
    Ok(())
}

fn compare(placement: &Placement, family: Family) -> Result<Vec<Finding>> {
    // Large enough for scores that differ: 1/√128.
    let new = |placement: &Placement| -> Result<Classifier> {
        Classifier::new(placement, small(family, 1, 0.09)?, Trainable::All, 5)
    };
    let (here, there) = (new(&Placement::CPU)?, new(placement)?);
    copy_values(&there, &here)?;
    let batch = batch()?;
    let in_f32 = placement.dtype == DType::F32;
    let (logits, gradients) = run(&here, &batch, false)?;
    let (got_logits, got) = run(&there, &batch, in_f32)?;
    let tolerance = if in_f32 { IN_F32 } else { IN_BF16 };
    let finding = |what: &str, got: &[f64], want: &[f64], smallest: f64| Finding {
        room: name(family),
        what: what.to_owned(),
        worst: furthest(got, want, largest(want).max(smallest)),
        allowed: tolerance,
    };
    let all =
        gradients.iter().filter(|(name, _)| !name.starts_with("ids")).map(|(_, x)| largest(x));
    let smallest = SMALLEST * all.fold(0.0, f64::max);
    let mut findings = vec![finding("logits", &got_logits, &logits, f64::MIN_POSITIVE)];
    for ((name, want), (_, got)) in gradients.iter().zip(&got) {
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
