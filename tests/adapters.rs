//! Adapters on every family: gradients where PEFT has none to compare with, files that come back as they went,
//! updates folded in, over weights in fewer bits.

use std::path::Path;

use allreel::{
    checkpoint::{
        adapter::{load_adapter, save_adapter},
        files::save_model,
    },
    config::{
        ALL_LINEAR, Adapter, Bias, Lora, Method, PTuning, PoolRow, PrefixTuning, PromptTuning,
        Quantization, Reparameterization, TargetModules,
    },
    data::{TokenSet, Tokenizer},
    device::Placement,
    model::{
        Classifier, Dropouts, Family, Pass, Training, classifier::Ready, parameters::Parameters,
        plan::Quantized,
    },
};
use allreel_kernels::DropoutKey;

use crate::support::{Tolerance, dense, loss, numbers, small};

/// Of the gradient's length: f32 in the two losses that a difference is taken of, and the curvature.
const SLOPE: f64 = 5e-4;

/// Sums in another order: folded updates, another shape of the same product.
const SUMS: Tolerance = Tolerance { relative: 2e-6, absolute: 0.0, at_least_one: true };

/// Every method in every form.
pub fn adapters() -> Vec<(&'static str, Adapter)> {
    let with = |method| Adapter { method, modules_to_save: None, pool: PoolRow::FirstToken };
    let lora = Lora { r: 4, lora_alpha: 8.0, lora_dropout: 0.1, ..Lora::default() };
    let all = Some(TargetModules::Pattern(ALL_LINEAR.to_owned()));
    let tuning = |network| PTuning {
        encoder_hidden_size: Some(24),
        encoder_dropout: if network == Reparameterization::Lstm { 0.1 } else { 0.0 },
        ..PTuning::new(5, network)
    };
    let prompt = PromptTuning { num_virtual_tokens: 5, prompt_tuning_init_text: None };
    let prefix = |projection| PrefixTuning { num_virtual_tokens: 5, projection };
    vec![
        ("LoRA", with(Method::Lora(lora.clone()))),
        ("LoRA of all", with(Method::Lora(Lora { target_modules: all, bias: Bias::All, ..lora }))),
        ("prompt tuning", with(Method::PromptTuning(prompt))),
        ("P-tuning, MLP", with(Method::PTuning(tuning(Reparameterization::Mlp)))),
        ("P-tuning, LSTM", with(Method::PTuning(tuning(Reparameterization::Lstm)))),
        ("prefix tuning", with(Method::PrefixTuning(prefix(None)))),
        ("prefix tuning, projected", with(Method::PrefixTuning(prefix(Some(24))))),
    ]
}

/// A network with an adapter that is no longer as it started: LoRA starts as nothing at all.
fn network(family: Family, training: impl Into<Training>) -> Classifier {
    network_of(family, training, 3)
}

fn network_of(family: Family, training: impl Into<Training>, seed: u64) -> Classifier {
    let model =
        Classifier::new(&Placement::CPU, small(family), training, seed).expect("a classifier");
    shift(&model.parameters, |i| 0.05 * ((i * 7919 % 1000) as f32 / 500.0 - 1.0));
    model
}

/// Adds `by(i)` to element i of everything that trains.
fn shift(parameters: &Parameters, by: impl Fn(usize) -> f32) {
    let mut i = 0;
    for bucket in &parameters.buckets {
        allreel_kernels::common::host::write::<f32, _>(&bucket.state.values, |values| {
            for value in values {
                *value += by(i);
                i += 1;
            }
            Ok(())
        })
        .expect("written");
    }
}

/// Three sequences with labels.
fn set() -> TokenSet {
    TokenSet {
        tokens: (0..44).map(|i| 5 + i * i % 290).collect(),
        offsets: vec![0, 13, 14, 44],
        labels: vec![Some(0), Some(1), Some(1)],
        ids: vec![String::new(); 3],
    }
}

/// The loss with dropout, and the gradient of everything that trains, in the order of the buckets.
fn gradient(model: &Classifier) -> (f64, Vec<f64>) {
    let batch = model.gather(&set(), &[0, 1, 2]).expect("a batch");
    let key = DropoutKey { seed: 1, step: 2, stream: 0 };
    let pass = Pass { dropout: Some(key), ..Pass::default() };
    let (logits, saved) = model.forward(&batch, pass).expect("forward");
    let (loss, d_logits) = loss(&logits, &batch.labels, 0.0);
    let mut words = None;
    let ready = &mut |ready| {
        if let Ready::Words(rows) = ready {
            words = Some(rows);
        }
        Ok(())
    };
    model.backward(&batch, saved, &d_logits, pass, ready).expect("backward");
    let gradients = model.parameters.buckets.iter().flat_map(|bucket| match &bucket.gradients {
        Some(gradients) => numbers(gradients),
        None => {
            let rows = words.as_ref().expect("a gradient of the word table");
            numbers(&dense(rows, bucket.entries[0].shape[0]))
        }
    });
    (loss, gradients.collect())
}

/// Central differences along fixed directions, against the gradient's part in each: one that is missing
/// anywhere shows. DistilBERT's head, P-tuning's network and convolutions on words have a ReLU, and a unit that a
/// step takes across zero (or that becomes the largest) spoils the differences of its network: there one of a few
/// has to do.
pub fn check_slope(what: &str, family: Family, training: &Training) {
    let kinks = matches!(family, Family::DistilBert | Family::Cnn | Family::CnnLstm)
        || what.starts_with("P-tuning");
    let seeds = match family {
        Family::CnnLstm => 3..19,
        _ if kinks => 3..7,
        _ => 3..4,
    };
    let worst = seeds.map(|seed| {
        let worst = slopes_differ(&network_of(family, training.clone(), seed));
        println!("{family:?}, {what}, network {seed}: off by {worst:.1e}");
        worst
    });
    let best = worst.fold(f64::INFINITY, f64::min);
    assert!(best < SLOPE, "{family:?}, {what}: off by {best:e} of the gradient's length");
}

/// The largest difference of slopes along three directions, as a share of the gradient's length.
fn slopes_differ(model: &Classifier) -> f64 {
    let (_, gradient_at) = gradient(model);
    let length = gradient_at.iter().map(|g| g * g).sum::<f64>().sqrt();
    assert!(length > 1e-3, "nothing to compare ({length})");
    let step = 1e-4;
    let differs = [1usize, 2, 3].map(|seed| {
        // Signs without a pattern.
        let sign = |i: usize| {
            let mixed = (i + 1).wrapping_mul(0x9e37_79b9 + 2 * seed) ^ (i >> 3).wrapping_mul(seed);
            if (mixed >> 13) & 1 == 0 { 1.0 } else { -1.0 }
        };
        let along = |by: f64| {
            shift(&model.parameters, |i| (by * step * sign(i)) as f32);
            let loss = gradient(model).0;
            shift(&model.parameters, |i| (-by * step * sign(i)) as f32);
            loss
        };
        let slope = (along(1.0) - along(-1.0)) / (2.0 * step);
        let want: f64 = gradient_at.iter().enumerate().map(|(i, g)| g * sign(i)).sum();
        (slope - want).abs() / length
    });
    differs.into_iter().fold(0.0, |worst, d| if d.is_nan() { f64::INFINITY } else { d.max(worst) })
}

#[test]
fn gradients_of_every_method_on_every_family_match_finite_differences() {
    for family in Family::ENCODERS {
        for (what, adapter) in adapters() {
            check_slope(what, family, &adapter.into());
        }
    }
}

/// What else may train beside LoRA: biases of what it updates, modules of a block, tables.
#[test]
fn gradients_of_modules_that_train_whole_match_finite_differences() {
    for family in Family::ENCODERS {
        let (module, words) = match family {
            Family::Bert | Family::Roberta => ("layer.0.intermediate", "word_embeddings"),
            Family::DebertaV2 => ("layer.0.intermediate", "word_embeddings"),
            Family::DistilBert => ("layer.0.ffn", "word_embeddings"),
            Family::ModernBert => ("layers.0.mlp", "tok_embeddings"),
            Family::Gpt2 => ("h.0.mlp", "wte"),
            _ => continue,
        };
        let lora = Lora { r: 4, bias: Bias::LoraOnly, ..Lora::default() };
        let mut modules = vec![module.to_owned(), words.to_owned()];
        if family == Family::DebertaV2 {
            modules.push("rel_embeddings".to_owned());
        }
        let adapter = Adapter {
            method: Method::Lora(lora),
            modules_to_save: Some(modules),
            pool: PoolRow::FirstToken,
        };
        check_slope("LoRA beside whole modules", family, &adapter.into());
    }
}

/// Weights in 8 and 4 bits below LoRA: 48 columns make no whole blocks of 64, so only 8 bits here.
#[test]
fn gradients_over_weights_in_eight_bits_match_finite_differences() {
    let quantization = Quantized { quantization: Quantization::Int8, threshold: None };
    for family in Family::ENCODERS {
        let (_, adapter) = adapters().swap_remove(0);
        let quantize = Training {
            quantization: Some(quantization),
            quantize_embeddings: true,
            ..adapter.into()
        };
        check_slope("LoRA over int8", family, &quantize);
    }
}

fn logits(model: &Classifier) -> Vec<f64> {
    let batch = model.gather(&set(), &[0, 1, 2]).expect("a batch");
    numbers(&model.logits(&batch).expect("logits"))
}

fn tokenizer() -> Tokenizer {
    Tokenizer::train_wordpiece(&["some text".to_owned()], 40).expect("trained")
}

#[test]
fn an_adapter_comes_back_from_its_files_to_the_same_bits() {
    let dir = tempfile::tempdir().expect("temporary directory");
    for family in Family::ENCODERS {
        for (what, adapter) in adapters() {
            let place = dir.path().join(family.model_type()).join(what);
            std::fs::create_dir_all(&place).expect("a directory");
            let model = network(family, adapter.clone());
            save_adapter(&place, &model, &adapter, &tokenizer()).expect("saved");
            let read = adapter.without_network();
            let again =
                Classifier::new(&Placement::CPU, small(family), read, 3).expect("a classifier");
            load_adapter(&place, &again, &adapter).expect("loaded");
            assert_eq!(logits(&again), logits(&model), "{family:?}, {what}");
        }
    }
}

#[test]
fn a_folded_update_is_the_update() {
    let dir = tempfile::tempdir().expect("temporary directory");
    for family in Family::ENCODERS {
        for (what, adapter) in adapters().into_iter().take(2) {
            let place = dir.path().join(family.model_type()).join(what);
            std::fs::create_dir_all(&place).expect("a directory");
            let model = network(family, adapter);
            save_model(&place, &model, &tokenizer()).expect("saved");
            let merged = whole(&place);
            SUMS.check(&format!("{family:?}, {what}"), &logits(&merged), &logits(&model));
        }
    }
}

fn whole(dir: &Path) -> Classifier {
    let training = Training::default();
    let (model, report) =
        Classifier::load(&Placement::CPU, dir, Dropouts::OFF, training, 2, 0).expect("a model");
    assert_eq!(report, Default::default(), "a plain model, whole");
    model
}

/// Over weights in fewer bits the network is that of the weights that these stand for.
#[test]
fn quantised_weights_compute_what_they_stand_for() {
    let dir = tempfile::tempdir().expect("temporary directory");
    for family in Family::ENCODERS {
        let (_, adapter) = adapters().swap_remove(0);
        let quantization = Some(Quantized { quantization: Quantization::Int8, threshold: None });
        let training =
            Training { quantization, quantize_embeddings: true, ..Training::from(adapter) };
        let model = network(family, training);
        let dense = network(family, adapters().swap_remove(0).1);
        assert_ne!(logits(&model), logits(&dense), "{family:?}: nothing is quantised");
        assert!(model.parameters.bytes() < dense.parameters.bytes() * 3 / 4, "{family:?}");
        let place = dir.path().join(family.model_type());
        std::fs::create_dir(&place).expect("a directory");
        save_model(&place, &model, &tokenizer()).expect("saved");
        SUMS.check(&format!("{family:?}"), &logits(&whole(&place)), &logits(&model));
    }
}
