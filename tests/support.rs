//! What the integration tests share.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};

use allreel::{
    batch::Batch,
    config::Trainable,
    device::Placement,
    model::{Classifier, Dropouts, Family, ModelConfig},
};
use allreel_kernels::{
    Ragged,
    common::Mirror,
    cross_entropy::{Totals, cross_entropy},
    embedding::SparseRows,
};
use candle_core::{DType, Device, Tensor};

/// A folder of reference data named by an environment variable, or `None` where a user has none.
pub fn reference(variable: &str) -> Option<PathBuf> {
    match std::env::var_os(variable) {
        Some(path) => Some(path.into()),
        None if std::env::var_os("CI").is_some() => panic!("{variable} is not set, and this is CI"),
        None => {
            eprintln!("SKIPPED: {variable} is not set; this test compared nothing");
            None
        }
    }
}

/// The folder of reference outputs.
pub fn golden() -> Option<PathBuf> {
    reference("ALLREEL_GOLDEN")
}

/// Tensors of one safetensors file.
pub struct Case(HashMap<String, Tensor>);

impl Case {
    pub fn load(path: &Path) -> Self {
        Self(candle_core::safetensors::load(path, &Device::Cpu).expect("a reference file"))
    }

    pub fn get(&self, name: &str) -> &Tensor {
        self.0.get(name).unwrap_or_else(|| panic!("no {name} in the reference file"))
    }

    pub fn find(&self, name: &str) -> Option<&Tensor> {
        self.0.get(name)
    }

    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }

    pub fn numbers(&self, name: &str) -> Vec<f64> {
        numbers(self.get(name))
    }

    /// The padded batch whose tensors start with `prefix`, as a ragged one, and the rows of the
    /// padded `[B·L]` layout that its tokens stand in.
    pub fn batch(&self, prefix: &str) -> (Batch, Vec<u32>) {
        let rows = |name: &str| {
            let tensor = self.find(&format!("{prefix}{name}"))?;
            Some(tensor.to_dtype(DType::I64).and_then(|t| t.to_vec2::<i64>()).expect("[B, L]"))
        };
        let (ids, mask) = (rows("input_ids").expect("ids"), rows("attention_mask").expect("mask"));
        let types = rows("token_type_ids");
        let (mut tokens, mut token_types, mut places, mut lengths) =
            (vec![], vec![], vec![], vec![]);
        for (b, mask) in mask.iter().enumerate() {
            let real: Vec<usize> = (0..mask.len()).filter(|i| mask[*i] == 1).collect();
            lengths.push(real.len());
            for i in real {
                tokens.push(ids[b][i] as u32);
                token_types.push(types.as_ref().map_or(0, |t| t[b][i] as u32));
                places.push((b * mask.len() + i) as u32);
            }
        }
        let samples: Vec<u32> = (0..lengths.len() as u32).collect();
        let labels: Vec<u32> =
            self.numbers(&format!("{prefix}labels")).iter().map(|l| *l as u32).collect();
        let ragged = Ragged::new(&lengths, &samples).expect("lengths");
        let (tokens, token_types) = (tokens.into(), token_types.into());
        (Batch { tokens, prompt: None, token_types, ragged, labels: labels.into() }, places)
    }
}

/// Sum of the samples' losses, and its gradient.
pub fn loss(logits: &Tensor, labels: &Mirror<u32>, smoothing: f64) -> (f64, Tensor) {
    let totals = Totals::default();
    let d_logits = cross_entropy(logits, labels, smoothing, &totals).expect("a loss");
    (totals.read().expect("a loss").0, d_logits)
}

/// Any tensor as f64s.
pub fn numbers(tensor: &Tensor) -> Vec<f64> {
    tensor
        .to_dtype(DType::F64)
        .and_then(|t| t.flatten_all())
        .and_then(|t| t.to_vec1())
        .expect("numbers")
}

/// `|got - want| <= relative * scale + absolute` everywhere, where `scale` is the largest magnitude
/// in `want`, or 1 if that is larger and `at_least_one`. NaN fails.
pub struct Tolerance {
    pub relative: f64,
    pub absolute: f64,
    pub at_least_one: bool,
}

/// The golden set's tolerance for logits, losses and hidden states.
pub const VALUES: Tolerance = Tolerance { relative: 1e-4, absolute: 0.0, at_least_one: true };
/// The golden set's tolerance for gradients.
pub const GRADIENTS: Tolerance = Tolerance { relative: 1e-4, absolute: 1e-6, at_least_one: false };

impl Tolerance {
    /// Holds `got` to `want`; returns the worst error as a share of what is allowed.
    pub fn check(&self, what: &str, got: &[f64], want: &[f64]) -> f64 {
        assert_eq!(got.len(), want.len(), "{what}: number of elements");
        let largest = want.iter().fold(0.0f64, |m, x| m.max(x.abs()));
        let scale = if self.at_least_one { largest.max(1.0) } else { largest };
        let allowed = self.relative * scale + self.absolute;
        let mut worst = 0.0f64;
        for (i, (got, want)) in got.iter().zip(want).enumerate() {
            let error = (got - want).abs();
            assert!(error <= allowed, "{what}[{i}]: {got}, expected {want} within {allowed:e}");
            worst = worst.max(error / allowed);
        }
        worst
    }
}

/// The classifier saved in a reference folder, without dropout.
pub fn classifier(dir: &Path, labels: usize) -> Classifier {
    let (classifier, report) =
        Classifier::load(&Placement::CPU, dir, Dropouts::OFF, Trainable::All, labels, 0)
            .expect("a checkpoint");
    assert_eq!(report, Default::default(), "missing or unexpected tensors");
    classifier
}

/// The gradient of a table of `count` rows.
pub fn dense(rows: &SparseRows, count: usize) -> Tensor {
    let ids: Vec<u32> = (0..count as u32).collect();
    let all = rows.spread(&ids).expect("a table").values;
    all.reshape((count, rows.width)).expect("a table")
}

/// A small network of each family that uses everything the family has, with its usual dropout.
pub fn small(family: Family) -> ModelConfig {
    let mut fields = serde_json::json!({
        "vocab_size": 300, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3,
        "intermediate_size": 96, "max_position_embeddings": 600,
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
        _ if family.is_on_words() => {
            for (key, value) in
                [("embedding_size", 20), ("num_filters", 24), ("attention_size", 16)]
            {
                fields[key] = value.into();
            }
            fields["kernel_sizes"] = serde_json::json!([1, 3, 5]);
            if family == Family::CnnLstm {
                // Each of them has a kink, which differences of slopes must not meet.
                fields["num_filters"] = 3.into();
            }
            fields["num_capsules"] = 4.into();
            fields["capsule_size"] = 6.into();
            // Of recurrent layers; blocks there are as many as of an encoder.
            fields["num_hidden_layers"] = if family == Family::Transformer { 3 } else { 2 }.into();
        }
        _ => {}
    }
    let fields = fields.as_object().expect("an object");
    let dropouts = Dropouts { hidden: Some(0.1), attention: Some(0.1), classifier: Some(0.1) };
    ModelConfig::fresh(family, fields, 2, dropouts.into()).expect("a config")
}
