//! The commands and the files they leave, as the README promises them to scripts.

mod adapters;
mod answers;
mod bench;
mod check;
mod embed;
mod linear;
mod plan;
mod ranks;

use std::{collections::BTreeSet, fs, time::SystemTime};

use allreel::config::Config;
use serde_json::Value;

use super::run::{Workdir, easy};

fn names(dir: &Workdir, folder: &str) -> Vec<String> {
    let entries = fs::read_dir(dir.path(folder)).unwrap_or_else(|e| panic!("{folder}: {e}"));
    let name = |entry: std::io::Result<fs::DirEntry>| entry.expect("an entry").file_name();
    let mut names: Vec<String> =
        entries.map(|entry| name(entry).into_string().expect("UTF-8")).collect();
    names.sort();
    names
}

fn number(object: &Value, key: &str) -> f64 {
    object[key].as_f64().unwrap_or_else(|| panic!("{key} is no number in {object}"))
}

fn keys(object: &Value) -> BTreeSet<&str> {
    let object = object.as_object().expect("an object");
    object.keys().map(String::as_str).collect()
}

#[test]
fn a_run_directory_holds_the_promised_files_and_no_others() {
    let dir = Workdir::prepared();
    let shown = dir.allreel("train first.toml --set checkpoint.every_steps=4").ok();
    let mut found = names(&dir, "first");
    found.retain(|name| name != ".lock");
    let promised = ["best", "checkpoints", "config.toml", "metrics.jsonl", "summary.json"];
    assert_eq!(found, promised);
    let model = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"];
    assert_eq!(names(&dir, "first/best"), model);
    // 20 steps, of which the last two saves stay.
    let kept = ["step-00000016", "step-00000020"];
    assert_eq!(names(&dir, "first/checkpoints"), kept);
    let state = ["MANIFEST.json", "optimizer.safetensors", "state.json"];
    let mut whole = [&model[..], &state[..]].concat();
    whole.sort_unstable();
    for step in kept {
        assert_eq!(names(&dir, &format!("first/checkpoints/{step}")), whole);
    }
    let written = dir.read("first/config.toml");
    let config = Config::load(&dir.path("first/config.toml"), &[]).expect("a config");
    assert_eq!(config.to_toml().expect("TOML"), written);
    assert!(written.contains("every_steps = 4"), "{written}");
    assert!(shown.out.contains("val acc"), "no table: {}", shown.out);
    assert!(shown.out.contains("first/best"), "{}", shown.out);
    assert!(shown.err.contains("step 20/20"), "{}", shown.err);
}

#[test]
fn metrics_and_summary_agree() {
    let dir = Workdir::prepared();
    let args = "train first.toml --set train.warmup_steps=4 --set train.eval_steps=3";
    dir.allreel(args).ok();
    let (steps, evals, epochs) =
        (dir.records("first", "step"), dir.records("first", "eval"), dir.records("first", "epoch"));
    let all = dir.read("first/metrics.jsonl").lines().count();
    assert_eq!((steps.len(), evals.len(), epochs.len()), (20, 6, 2));
    assert_eq!(all, 28, "an unknown event");
    let step_keys = "event step epoch loss learning_rate grad_norm samples tokens seconds";
    for (i, step) in steps.iter().enumerate() {
        assert_eq!(keys(step), step_keys.split(' ').collect());
        assert_eq!((&step["step"], &step["epoch"]), (&(i + 1).into(), &(1 + i / 10).into()));
        let rate = if i < 4 { i as f64 / 4.0 } else { (20 - i) as f64 / 16.0 };
        assert!((number(step, "learning_rate") - 1e-2 * rate).abs() < 1e-12, "{step}");
        assert_eq!(step["samples"], 16);
        for key in ["loss", "grad_norm", "tokens", "seconds"] {
            assert!(number(step, key) > 0.0, "{step}");
        }
    }
    let epoch_keys = "event step epoch train_accuracy train_loss val_accuracy val_loss \
                      learning_rate samples_per_second tokens_per_second seconds";
    for (i, epoch) in epochs.iter().enumerate() {
        assert_eq!(keys(epoch), epoch_keys.split(' ').collect());
        let own = &steps[10 * i..10 * i + 10];
        let sum = |key| own.iter().map(|step| number(step, key)).sum::<f64>();
        assert_eq!(epoch["step"], 10 * (i + 1));
        // All batches have the same size, so their mean loss is the epoch's.
        assert!((number(epoch, "train_loss") - sum("loss") / 10.0).abs() < 1e-9);
        let close = |key, value: f64| (number(epoch, key) / value - 1.0).abs() < 1e-6;
        assert!(close("seconds", sum("seconds")), "{epoch}");
        assert!(close("samples_per_second", 160.0 / sum("seconds")), "{epoch}");
        assert!(close("tokens_per_second", sum("tokens") / sum("seconds")), "{epoch}");
    }
    let at: Vec<u64> = evals.iter().filter_map(|eval| eval["step"].as_u64()).collect();
    assert_eq!(at, [3, 6, 9, 12, 15, 18]);
    let summary = dir.summary("first");
    let mut times: Vec<f64> = evals.iter().map(|eval| number(eval, "seconds")).collect();
    times.push(number(&summary, "seconds"));
    assert!(times.is_sorted(), "since the start of the run: {times:?}");
    let summary_keys = "version model world_size threads_per_rank parameters trainable_parameters \
                        steps epochs train_accuracy val_accuracy best_val_accuracy best_epoch \
                        samples_per_second tokens_per_second padding_share peak_host_bytes seconds";
    assert_eq!(keys(&summary), summary_keys.split_whitespace().collect());
    for (key, value) in [("world_size", 1), ("steps", 20), ("epochs", 2)] {
        assert_eq!(summary[key], value, "{key}");
    }
    for key in ["train_accuracy", "val_accuracy"] {
        assert_eq!(summary[key], epochs[1][key], "{key}");
    }
    let best = evals
        .iter()
        .chain(&epochs)
        .map(|record| number(record, "val_accuracy"))
        .fold(0.0, f64::max);
    assert_eq!(number(&summary, "best_val_accuracy"), best);
    assert!(best > 0.8, "it has learnt nothing: {best}");
    assert!(evals.iter().chain(&epochs).any(|record| {
        record["epoch"] == summary["best_epoch"] && number(record, "val_accuracy") == best
    }));
    assert_eq!(summary["parameters"], summary["trainable_parameters"]);
    for key in ["samples_per_second", "tokens_per_second", "peak_host_bytes", "parameters"] {
        assert!(number(&summary, key) > 0.0, "{key}");
    }
}

#[test]
fn the_best_model_is_kept_and_not_the_last() {
    let dir = Workdir::prepared();
    let mut wrong = easy(50, 2);
    for review in &mut wrong {
        review.label = review.label.map(|label| 1 - label);
    }
    dir.reviews("validation.csv", &wrong);
    dir.allreel("train first.toml --set train.eval_steps=1").ok();
    let summary = dir.summary("first");
    let (best, last) = (number(&summary, "best_val_accuracy"), number(&summary, "val_accuracy"));
    assert!(best > 0.4 && last < 0.2, "best {best}, last {last}");
    let found = answers::eval(&dir, "first", "validation.csv");
    assert!(found.starts_with(&format!("accuracy {best:.4} ")), "{found}, not {best}");
}

#[test]
fn every_format_trains_alike() {
    let dir = Workdir::prepared();
    let reviews = easy(160, 1);
    for (run, file) in [("csv", "train.csv"), ("tsv", "t.tsv"), ("jsonl", "t.jsonl"), ("tree", "t")]
    {
        dir.reviews(file, &reviews);
        let args = format!(
            "train first.toml --set run.dir={run} --set data.train={file} --set train.max_steps=3"
        );
        dir.allreel(&args).ok();
    }
    // A tree is read in the order of its ids, which is the order of the others.
    let losses = dir.losses("csv");
    assert_eq!(losses.len(), 3);
    for run in ["tsv", "jsonl", "tree"] {
        assert_eq!(dir.losses(run), losses, "{run}");
    }
}

#[test]
fn set_replaces_settings_and_the_last_one_wins() {
    let dir = Workdir::prepared();
    let args = "train first.toml --set run.dir=second --set train.epochs=9 --set train.epochs=1 \
                --set data.limit=40 --set data.validation=0.25 --set train.schedule=constant";
    dir.allreel(args).ok();
    assert!(!dir.path("first").exists());
    let written = dir.read("second/config.toml");
    for line in ["epochs = 1", "limit = 40", "validation = 0.25", "schedule = \"constant\""] {
        assert!(written.lines().any(|l| l == line), "no {line} in\n{written}");
    }
    let steps = dir.records("second", "step");
    let samples: f64 = steps.iter().map(|step| number(step, "samples")).sum();
    assert_eq!(samples, 30.0, "40 reviews but for a quarter");
    assert!(steps.iter().all(|step| number(step, "learning_rate") == 1e-2));
    // The resolved config makes the same run.
    dir.allreel("train second/config.toml --set run.dir=third").ok();
    assert_eq!(dir.losses("second"), dir.losses("third"));
    assert!(dir.weights("second/best") == dir.weights("third/best"));
}

#[test]
fn early_stopping_ends_a_run_that_does_not_get_better() {
    let dir = Workdir::prepared();
    // So small a rate changes no bit of a weight, so no evaluation is better than the first.
    let args = "train first.toml --set train.epochs=9 --set train.learning_rate=1e-30 \
                --set train.early_stopping_patience=2";
    let shown = dir.allreel(args).ok();
    assert!(shown.err.contains("stopping early: 2 evaluations"), "{}", shown.err);
    let summary = dir.summary("first");
    assert_eq!((&summary["epochs"], &summary["steps"]), (&3.into(), &30.into()));
    assert_eq!(summary["best_epoch"], 1);
    let metrics = dir.read("first/metrics.jsonl");
    dir.allreel(&format!("{args} --resume")).ok();
    assert_eq!(dir.read("first/metrics.jsonl"), metrics, "resumed after its end");
}

#[test]
fn max_steps_ends_a_run_within_an_epoch() {
    let dir = Workdir::prepared();
    dir.allreel("train first.toml --set train.max_steps=13").ok();
    let steps = dir.records("first", "step");
    let rates: Vec<f64> = steps.iter().map(|step| number(step, "learning_rate")).collect();
    assert_eq!(rates.len(), 13);
    // The schedule spans the steps that are made.
    assert!((rates[12] - 1e-2 / 13.0).abs() < 1e-12, "{rates:?}");
    let epochs = dir.records("first", "epoch");
    let at: Vec<_> = epochs.iter().map(|epoch| epoch["step"].clone()).collect();
    assert_eq!(at, [10, 13]);
    assert_eq!(dir.summary("first")["steps"], 13);
}

#[test]
fn batch_tokens_fills_batches_up_to_a_budget() {
    let dir = Workdir::prepared();
    replace_batch(&dir, "batch_tokens = 300");
    dir.allreel("train first.toml").ok();
    let steps = dir.records("first", "step");
    for epoch in 1..=2 {
        let own: Vec<_> = steps.iter().filter(|step| step["epoch"] == epoch).collect();
        let sum = |key| own.iter().map(|step| number(step, key)).sum::<f64>();
        assert_eq!(sum("samples"), 160.0);
        assert!(own.iter().all(|step| number(step, "tokens") <= 300.0));
        // Well filled: without its longest review (48), no batch could take one more.
        assert!(sum("tokens") / own.len() as f64 > 200.0, "{}", own.len());
    }
}

fn replace_batch(dir: &Workdir, with: &str) {
    let text = dir.read("first.toml").replace("batch_size = 16", with);
    dir.write("first.toml", text);
}

#[test]
fn gradient_checkpointing_changes_nothing() {
    let dir = Workdir::trained();
    let args = "train first.toml --set run.dir=second --set model.gradient_checkpointing=true";
    dir.allreel(args).ok();
    assert_eq!(dir.losses("first").len(), 20);
    assert_eq!(dir.losses("first"), dir.losses("second"));
    assert!(dir.weights("first/best") == dir.weights("second/best"));
}

#[test]
fn a_saved_model_starts_a_new_run_and_only_its_head_trains() {
    let dir = Workdir::trained();
    let text = r#"[data]
train = "train.csv"
validation = "validation.csv"
max_length = 48

[model]
path = "first/best"
trainable = "head"

[train]
epochs = 1
learning_rate = 1e-3
"#;
    dir.write("second.toml", text);
    let shown = dir.allreel("train second.toml").ok();
    assert!(!shown.err.contains("checkpoint"), "new or unused weights: {}", shown.err);
    let (before, after) = (dir.weights("first/best"), dir.weights("runs/second/best"));
    assert!(before.keys().eq(after.keys()));
    for (name, old) in &before {
        let head = name.starts_with("bert.pooler.") || name.starts_with("classifier.");
        assert_eq!(after[name] != *old, head, "{name}");
    }
    let summary = dir.summary("runs/second");
    assert!(number(&summary, "trainable_parameters") < number(&summary, "parameters"));
    // It goes on where the first run ended, so it is good from its first step.
    let (old, new) = (dir.losses("first"), dir.losses("runs/second"));
    assert!(new[0] < 0.8 * old[0], "{} after {}", new[0], old[0]);
}

#[test]
fn resume_starts_what_has_not_begun_and_leaves_what_is_done() {
    let dir = Workdir::prepared();
    dir.allreel("train first.toml --resume").ok();
    let (metrics, weights) = (dir.read("first/metrics.jsonl"), dir.weights("first/best"));
    let shown = dir.allreel("train first.toml --resume").ok();
    assert!(shown.out.contains("val acc"), "no table: {}", shown.out);
    assert_eq!(dir.read("first/metrics.jsonl"), metrics);
    assert!(dir.weights("first/best") == weights);
}

/// When each file of the token cache was written.
fn cached(dir: &Workdir) -> Vec<(String, SystemTime)> {
    let time = |name: &String| {
        let metadata = dir.path("cache").join(name).metadata();
        metadata.and_then(|m| m.modified()).expect("a time")
    };
    let names = names(dir, "cache");
    names.into_iter().map(|name| (name.clone(), time(&name))).collect()
}

#[test]
fn tokens_are_cached_by_content() {
    let dir = Workdir::trained();
    let before = cached(&dir);
    assert_eq!(before.len(), 3, "training, validation, tokenizer: {before:?}");
    fs::rename(dir.path("train.csv"), dir.path("renamed.csv")).expect("moved");
    let args = "train first.toml --set run.dir=second --set data.train=renamed.csv";
    dir.allreel(args).ok();
    assert_eq!(cached(&dir), before);
    assert_eq!(dir.losses("first"), dir.losses("second"));
    dir.reviews("renamed.csv", &easy(160, 9));
    dir.allreel(&args.replace("second", "third")).ok();
    assert!(cached(&dir).len() > before.len());
    assert_ne!(dir.losses("first"), dir.losses("third"));
}
