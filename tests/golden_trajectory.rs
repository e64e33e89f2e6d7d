//! Eight steps of training (AdamW, clipping, warm-up) whose losses, norms, logits and final
//! parameters are PyTorch's.

use allreel::{
    collective::{Traffic, solo::Solo},
    config::{self, Config, Warmup},
    data::TokenSet,
    step::{Trainer, schedule::Schedule},
};
use std::path::Path;

use crate::support::{Case, VALUES, classifier, golden, numbers};

#[test]
fn golden_trajectory_bert() {
    check("bert");
}

#[test]
fn golden_trajectory_deberta_v3() {
    check("deberta_v3_log");
}

#[test]
fn golden_trajectory_modernbert() {
    check("modernbert_mean");
}

/// Trains the network in folder `name` as the trajectory of that name was.
fn check(name: &str) {
    let Some(golden) = golden() else { return };
    let case = Case::load(&golden.join(format!("trajectory/{name}.safetensors")));
    let model = classifier(&golden.join(name), 2);
    let steps = case.get("loss").elem_count();
    let settings = settings();
    let mut solo = Solo::new(1).expect("alone");
    for step in 0..steps {
        let (batch, _) = case.batch(&format!("step{step}."));
        let logits = model.logits(&batch).expect("logits");
        VALUES.check("logits", &numbers(&logits), &case.numbers(&format!("step{step}.logits")));
        let set = TokenSet {
            tokens: batch.tokens.to_vec(),
            offsets: batch.ragged.cu_seqlens().iter().map(|o| *o as u64).collect(),
            labels: batch.labels.iter().map(|l| Some(*l)).collect(),
            ids: vec![String::new(); batch.labels.len()],
        };
        let samples: Vec<u32> = (0..batch.labels.len() as u32).collect();
        let mut trainer = Trainer {
            classifier: &model,
            collective: &mut solo,
            settings: &settings,
            schedule: Schedule::new(config::Schedule::Linear, Warmup::Steps(2), steps as u64)
                .expect("a schedule"),
            checkpoint: false,
            traffic: Traffic::default(),
            before: None,
        };
        let outcome =
            trainer.step(&set, &set.lengths(), &samples, step as u64 + 1, false).expect("a step");
        VALUES.check("loss", &[outcome.loss()], &case.numbers("loss")[step..=step]);
        VALUES.check("norm", &[outcome.gradient_norm], &case.numbers("grad_norm")[step..=step]);
        VALUES.check("lr", &[outcome.learning_rate], &case.numbers("lr")[step..=step]);
    }
    for name in model.parameters.names() {
        // The key bias cannot change a softmax: its gradient is rounding noise, which Adam turns
        // into steps of full size in an arbitrary direction.
        if name.ends_with("key.bias") {
            continue;
        }
        let value = model.parameters.value(name).expect("a value");
        let worst = VALUES.check(name, &numbers(&value), &case.numbers(&format!("final.{name}")));
        println!("{name}: {worst:.4} of the tolerance");
    }
}

/// The recipe of the reference run, without dropout.
fn settings() -> config::Train {
    let text = "[data]\ntrain = \"none.tsv\"\nmax_length = 64\n[model]\npath = \"none\"\n[train]\n\
                learning_rate = 2e-3\nadam_epsilon = 1e-6\nweight_decay = 0.01\nmax_grad_norm = 1.0\n";
    Config::from_toml_str(text, Path::new("recipe.toml")).expect("a config").train
}
