//! Runs with adapters: what they leave, `predict`, `eval` and `merge` on it, and going on.

use std::fs;

use super::{answers::eval, names, number};
use crate::run::Workdir;

/// A config like `first.toml` over the model that `first` trained, with an `[adapter]` section.
fn over_first(dir: &Workdir, name: &str, adapter: &str) {
    let first = dir.read("first.toml");
    let (data, rest) = first.split_once("[model]").expect("a section");
    let (_, train) = rest.split_once("[train]").expect("a section");
    let data = data.replace("tokenizer = \"wordpiece\"\n", "");
    let train = train.replace("\"first\"", &format!("{name:?}"));
    let text =
        format!("{data}[model]\npath = \"first/best\"\n[adapter]\n{adapter}\n[train]{train}");
    dir.write(&format!("{name}.toml"), text);
}

const FILES: [&str; 4] =
    ["adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json"];

#[test]
fn a_run_with_lora_leaves_an_adapter_that_is_read_and_merged() {
    let dir = Workdir::trained();
    over_first(&dir, "lora", "method = \"lora\"\nr = 4\ntarget_modules = \"all-linear\"");
    dir.allreel("train lora.toml").ok();
    assert_eq!(names(&dir, "lora/best"), FILES);
    let summary = dir.summary("lora");
    assert!(number(&summary, "trainable_parameters") < number(&summary, "parameters") / 2.0);
    // The run, its adapter alone, and the merged model answer alike.
    let found = eval(&dir, "lora", "validation.csv");
    assert!(found.starts_with(&format!("accuracy {:.4}", number(&summary, "best_val_accuracy"))));
    assert_eq!(eval(&dir, "lora/best", "validation.csv"), found);
    dir.allreel("merge lora --out merged").ok();
    assert!(names(&dir, "merged").contains(&"model.safetensors".to_owned()));
    assert_eq!(eval(&dir, "merged", "validation.csv"), found);
    let text = ["--text", "a wonderful film"];
    let answer =
        |model: &str| dir.allreel_with(&[&["predict", model][..], &text].concat()).ok().out;
    assert_eq!(answer("lora"), answer("merged"));
    let again = dir.allreel("merge lora --out merged");
    assert_eq!(
        (again.code, again.err.contains("merged exists already")),
        (2, true),
        "{}",
        again.err
    );
    let whole = dir.allreel("merge first --out other");
    assert_eq!(
        (whole.code, whole.err.contains("a whole model already")),
        (2, true),
        "{}",
        whole.err
    );
}

#[test]
fn rows_are_read_and_cannot_be_merged() {
    let dir = Workdir::trained();
    for (name, adapter) in [
        (
            "text",
            "method = \"prompt_tuning\"\nnum_virtual_tokens = 4\nprompt_tuning_init = \"TEXT\"\n\
             prompt_tuning_init_text = \"good or bad\"",
        ),
        (
            "lstm",
            "method = \"p_tuning\"\nnum_virtual_tokens = 4\nencoder_hidden_size = 16\n\
             encoder_reparameterization_type = \"LSTM\"",
        ),
        (
            "prefix",
            "method = \"prefix_tuning\"\nnum_virtual_tokens = 4\nprefix_projection = true\n\
             encoder_hidden_size = 16",
        ),
    ] {
        over_first(&dir, name, adapter);
        dir.allreel(&format!("train {name}.toml")).ok();
        assert_eq!(names(&dir, &format!("{name}/best")), FILES);
        let found = eval(&dir, name, "validation.csv");
        assert_eq!(eval(&dir, &format!("{name}/best"), "validation.csv"), found);
        let merged = dir.allreel(&format!("merge {name} --out merged"));
        assert_eq!(merged.code, 2, "{}", merged.err);
        assert!(merged.err.contains("nothing to merge"), "{}", merged.err);
    }
}

/// Quantised weights come from the same file again; the adapter and its moments from the checkpoint.
#[test]
fn a_run_with_an_adapter_goes_on_to_the_same_files() {
    let dir = Workdir::trained();
    let adapter = "method = \"p_tuning\"\nnum_virtual_tokens = 4\nencoder_hidden_size = 16\n\
                   encoder_reparameterization_type = \"LSTM\"\nencoder_dropout = 0.1";
    over_first(&dir, "p", adapter);
    let settings = "--set checkpoint.every_steps=5 --set checkpoint.keep=9 \
                    --set model.quantization=int8 --set model.quantize_embeddings=true";
    dir.allreel(&format!("train p.toml {settings}")).ok();
    let all = names(&dir, "p/checkpoints");
    assert!(all.len() >= 3, "{all:?}");
    let weights = || {
        ["best/adapter_model.safetensors", "summary.json"]
            .map(|file| fs::read(dir.path("p").join(file)).expect("a file"))
    };
    let [unbroken, _] = weights();
    let moments = |step: &str| {
        let path = dir.path("p/checkpoints").join(step).join("optimizer.safetensors");
        fs::read(path).expect("moments")
    };
    let last = all.last().expect("a checkpoint").clone();
    let before = moments(&last);
    // As if it had been killed after the first checkpoint.
    for step in &all[1..] {
        fs::remove_dir_all(dir.path("p/checkpoints").join(step)).expect("removed");
    }
    fs::remove_file(dir.path("p/summary.json")).expect("removed");
    dir.allreel(&format!("train p.toml {settings} --resume")).ok();
    assert_eq!(weights()[0], unbroken);
    assert_eq!(moments(&last), before);
}
