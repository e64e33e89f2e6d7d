//! What every family must do beside computing right: train only what it is told to, and go on from
//! a checkpoint as if nothing had happened.

use std::path::Path;

use allreel::{
    batch::Batch,
    checkpoint::files::{restore, save_model, save_optimizer},
    collective::{Traffic, solo::Solo},
    config::{self, Config, Trainable, Warmup},
    data::{TokenSet, Tokenizer},
    device::Placement,
    model::{Classifier, Family, Overrides, Pass, classifier::Ready},
    step::{Trainer, schedule::Schedule},
};
use allreel_kernels::{DropoutKey, Ragged};
use candle_core::{Device, Tensor};

use crate::support::{numbers, small};

fn new(family: Family, trainable: Trainable, seed: u64) -> Classifier {
    Classifier::new(&Placement::CPU, small(family), trainable, seed).expect("a classifier")
}

/// Four sequences with labels.
fn set() -> TokenSet {
    let lengths = [13u64, 1, 30, 7];
    let tokens = (0..51).map(|i| 5 + i * i % 290).collect();
    let offsets = [0, 13, 14, 44, 51].to_vec();
    let n = lengths.len();
    TokenSet {
        tokens,
        offsets,
        labels: (0..n as u32).map(|i| Some(i % 2)).collect(),
        ids: vec![String::new(); n],
    }
}

/// Names of the buckets that became ready, and all gradients by name.
fn gradients(model: &Classifier) -> (Vec<String>, Vec<(String, Vec<f64>)>) {
    let set = set();
    let ids: Vec<u32> = (0..set.len() as u32).collect();
    let lengths = set.lengths();
    let batch = Batch {
        prompt: None,
        token_types: vec![0; set.tokens.len()].into(),
        tokens: set.tokens.into(),
        ragged: Ragged::new(&lengths, &ids).expect("lengths"),
        labels: vec![0, 1, 0, 1].into(),
    };
    let key = DropoutKey { seed: 1, step: 2, stream: 0 };
    let pass = Pass { dropout: Some(key), ..Pass::default() };
    let (_, saved) = model.forward(&batch, pass).expect("forward");
    let d_logits: Vec<f32> = (0..8).map(|i| i as f32 - 3.0).collect();
    let d_logits = Tensor::from_vec(d_logits, (4, 2), &Device::Cpu).expect("a gradient");
    let mut ready = Vec::new();
    model
        .backward(&batch, saved, &d_logits, pass, &mut |what| {
            ready.push(match what {
                Ready::Bucket(bucket) => model.parameters.buckets[bucket].name.clone(),
                Ready::Words(_) => "words".to_owned(),
            });
            Ok(())
        })
        .expect("backward");
    let of_bucket = |bucket: &allreel::model::parameters::Bucket| {
        Some((bucket.name.clone(), numbers(bucket.gradients.as_ref()?)))
    };
    (ready, model.parameters.buckets.iter().filter_map(of_bucket).collect())
}

#[test]
fn what_does_not_train_gets_no_gradient_and_changes_none() {
    for family in Family::ENCODERS.into_iter().chain(Family::ON_WORDS) {
        let (_, all) = gradients(&new(family, Trainable::All, 3));
        let last_block = small(family).plan.blocks.last().expect("a block").name().to_owned();
        for (trainable, want) in [
            (Trainable::Head, vec!["head".to_owned()]),
            (Trainable::LastBlock, vec!["head".to_owned(), last_block]),
        ] {
            let (ready, some) = gradients(&new(family, trainable, 3));
            assert_eq!(ready, want, "{family:?}: buckets in the order of backward");
            let names: Vec<String> = some.iter().map(|(name, _)| name.clone()).collect();
            assert_eq!(names, want, "{family:?}");
            for (name, gradient) in some {
                let (_, full) = all.iter().find(|(other, _)| *other == name).expect("a bucket");
                assert_eq!(gradient, *full, "{family:?} {name}");
                assert!(gradient.iter().any(|x| *x != 0.0), "{family:?} {name}");
            }
        }
    }
}

#[test]
fn a_checkpoint_of_each_family_goes_on_to_the_same_bits() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let tokenizer = Tokenizer::train_wordpiece(&["some text".to_owned()], 40).expect("trained");
    for family in Family::ENCODERS.into_iter().chain(Family::ON_WORDS) {
        let (first, second) = (new(family, Trainable::All, 3), new(family, Trainable::All, 4));
        let place = dir.path().join(family.model_type());
        std::fs::create_dir(&place).expect("a directory");
        let before = [train(&first, 1), train(&first, 2)];
        assert!(before[0] != before[1] && before[1].is_finite(), "{before:?}");
        save_model(&place, &first, &tokenizer).expect("saved");
        save_optimizer(&place, &first).expect("saved");
        restore(&place, &second).expect("restored");
        assert_eq!(train(&first, 3), train(&second, 3), "{family:?}");
        let values = |model: &Classifier| -> Vec<Vec<f64>> {
            let value = |name| model.parameters.value(name).expect("a value");
            model.parameters.names().map(|name| numbers(&value(name))).collect()
        };
        assert_eq!(values(&first), values(&second), "{family:?}");
    }
}

/// One step on all sequences; its loss.
fn train(model: &Classifier, step: u64) -> f64 {
    let text = "[data]\ntrain = \"none.tsv\"\nmax_length = 64\n[model]\npath = \"none\"\n[train]\n\
                learning_rate = 1e-3\nseed = 5\n";
    let settings = Config::from_toml_str(text, Path::new("test.toml")).expect("a config").train;
    let set = set();
    let mut trainer = Trainer {
        classifier: model,
        collective: &mut Solo::new(1).expect("alone"),
        settings: &settings,
        schedule: Schedule::new(config::Schedule::Constant, Warmup::Steps(0), 9).expect("constant"),
        checkpoint: false,
        traffic: Traffic::default(),
        before: None,
    };
    trainer.step(&set, &set.lengths(), &[0, 1, 2, 3], step, false).expect("a step").loss()
}

#[test]
fn a_pretrained_gpt2_can_get_a_bias_in_its_classifier_and_others_cannot() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let tokenizer = Tokenizer::train_wordpiece(&["some text".to_owned()], 40).expect("trained");
    let overrides = Overrides { score_bias: Some(true), ..Overrides::default() };
    for family in Family::ENCODERS {
        let place = dir.path().join(family.model_type());
        std::fs::create_dir(&place).expect("a directory");
        save_model(&place, &new(family, Trainable::All, 3), &tokenizer).expect("saved");
        let loaded = Classifier::load(&Placement::CPU, &place, overrides, Trainable::All, 2, 0);
        match (family, loaded) {
            (Family::Gpt2, Ok((_, report))) => assert_eq!(report.missing, ["score.bias"]),
            (Family::Gpt2, Err(error)) => panic!("{error}"),
            (_, loaded) => {
                let error = loaded.err().expect("refused");
                assert!(error.to_string().contains("score_bias is only for GPT-2"), "{error}");
            }
        }
    }
}
