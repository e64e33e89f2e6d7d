//! What is saved, transformers and PEFT load: a new network of each family, written to a directory,
//! gives the same logits there, and adapters are exchanged in both directions. Needs a Python with
//! transformers and PyTorch, and PEFT for adapters (`ALLREEL_PYTHON`, or `python3`); without one the
//! tests say so and compare nothing.

use std::process::Command;

use allreel::{
    batch::Batch,
    checkpoint::files::save_model,
    config::Trainable,
    data::Tokenizer,
    device::Placement,
    model::{Classifier, Dropouts, Family},
};
use allreel_kernels::Ragged;

use crate::support::{VALUES, numbers, small};

/// A Python that has what a script imports.
fn python(imports: &str) -> Option<String> {
    let python = std::env::var("ALLREEL_PYTHON").unwrap_or_else(|_| "python3".into());
    let probe = Command::new(&python).args(["-c", &format!("import {imports}")]).output();
    if probe.is_ok_and(|output| output.status.success()) {
        return Some(python);
    }
    eprintln!("SKIPPED: {python} cannot import {imports}; this test compared nothing");
    None
}

/// Runs those cases of the script whose names begin with `start`.
fn exchange(start: &str) {
    let Some(python) = python("torch, transformers, peft") else { return };
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/exchange_with_peft.py");
    let arguments = [script, env!("CARGO_BIN_EXE_allreel"), start];
    let output = Command::new(python).args(arguments).output().expect("Python");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    println!("{}", String::from_utf8_lossy(&output.stdout));
}

macro_rules! exchanges {
    ($($test:ident $start:literal),* $(,)?) => {
        $(#[test]
        fn $test() {
            exchange($start);
        })*
    };
}

exchanges!(
    adapters_of_bert_are_exchanged_with_peft "bert/",
    adapters_of_roberta_are_exchanged_with_peft "roberta/",
    adapters_of_distilbert_are_exchanged_with_peft "distilbert/",
    adapters_of_deberta_are_exchanged_with_peft "deberta-v2/",
    adapters_of_modernbert_are_exchanged_with_peft "modernbert/",
    adapters_of_gpt2_are_exchanged_with_peft "gpt2/",
    adapters_of_peft_that_do_not_fit_are_refused "refused",
);

#[test]
fn a_saved_model_of_each_family_loads_in_transformers() {
    let Some(python) = python("torch, transformers") else { return };
    let sequences: Vec<Vec<u32>> =
        [9usize, 1, 40].map(|n| (0..n as u32).map(|i| 5 + i * i % 200).collect()).to_vec();
    let texts = ["a small vocabulary is enough here".to_owned()];
    let tokenizer = Tokenizer::train_wordpiece(&texts, 60).expect("a tokenizer");
    let root = tempfile::tempdir().expect("temporary directory");
    let mut expected = Vec::new();
    for family in Family::ENCODERS {
        let dir = root.path().join(family.model_type());
        let model = Classifier::new(&Placement::CPU, small(family), Trainable::All, 11)
            .expect("a classifier");
        std::fs::create_dir(&dir).expect("a directory");
        save_model(&dir, &model, &tokenizer).expect("saved");
        let probe = serde_json::to_string(&sequences).expect("JSON");
        std::fs::write(dir.join("probe.json"), probe).expect("written");
        // Loaded again here too: the layout on disk is not that in memory for every family.
        let (loaded, report) =
            Classifier::load(&Placement::CPU, &dir, Dropouts::OFF, Trainable::Head, 2, 0)
                .expect("loaded");
        assert_eq!(report, Default::default());
        for model in [&model, &loaded] {
            expected
                .push((dir.clone(), numbers(&model.logits(&batch(&sequences)).expect("logits"))));
        }
    }
    let directories = expected.iter().step_by(2).map(|(dir, _)| dir);
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/load_in_transformers.py");
    let output = Command::new(python).arg(script).args(directories).output().expect("Python");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let result: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    println!("transformers and torch {}", result["versions"]);
    for (dir, own) in expected {
        let theirs = &result["logits"][dir.to_string_lossy().as_ref()];
        let theirs: Vec<Vec<f64>> = serde_json::from_value(theirs.clone()).expect("logits");
        let worst = VALUES.check(&dir.display().to_string(), &own, &theirs.concat());
        println!("{}: {worst:.4} of the tolerance", dir.display());
    }
}

fn batch(sequences: &[Vec<u32>]) -> Batch {
    let lengths: Vec<usize> = sequences.iter().map(Vec::len).collect();
    let samples: Vec<u32> = (0..lengths.len() as u32).collect();
    let tokens = sequences.concat();
    Batch {
        prompt: None,
        token_types: vec![0; tokens.len()].into(),
        tokens: tokens.into(),
        ragged: Ragged::new(&lengths, &samples).expect("lengths"),
        labels: vec![0; lengths.len()].into(),
    }
}
