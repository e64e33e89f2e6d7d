//! Classifiers on n-grams and the majority: the same commands, the same run directory.

use std::fs;

use allreel::linear::{model::Model, words::key};

use super::{answers::eval, names, number};
use crate::run::{Workdir, easy};

const NGRAM: &str = r#"[data]
train = "train.csv"
validation = "validation.csv"
[model]
kind = "ngram"
[run]
dir = "first"
"#;

fn prepared() -> Workdir {
    let dir = Workdir::prepared();
    dir.write("first.toml", NGRAM);
    dir
}

/// Accuracy of the submission `file` on the reviews of `validation.csv`.
fn accuracy(dir: &Workdir, file: &str) -> f64 {
    let reviews = easy(50, 2);
    let rows = dir.read(file);
    let labels: Vec<&str> =
        rows.lines().skip(1).filter_map(|row| Some(row.rsplit_once(',')?.1)).collect();
    assert_eq!(labels.len(), reviews.len());
    let right = reviews.iter().zip(labels).filter(|(review, label)| {
        review.label.is_some_and(|expected| expected.to_string() == label.trim_matches('"'))
    });
    right.count() as f64 / 50.0
}

#[test]
fn what_was_trained_evaluates_and_predicts_as_its_run_said() {
    for setting in ["features=binary", "features=tfidf", "features=count", "vocabulary=true"] {
        let dir = prepared();
        let args = format!("train first.toml --set data.test=validation.csv --set model.{setting}");
        let shown = dir.allreel(&args).ok();
        assert!(shown.out.contains("val acc") && shown.out.contains("test accuracy"), "{shown:?}");
        let summary = dir.summary("first");
        assert_eq!(summary["model"], "ngram");
        let best = number(&summary, "best_val_accuracy");
        assert!(best >= 0.9, "{setting}: {summary}");
        assert_eq!(number(&summary, "test_accuracy"), best);
        let mut files = vec!["config.json", "model.safetensors"];
        files.extend(setting.starts_with("vocabulary").then_some("vocabulary.txt"));
        assert_eq!(names(&dir, "first/best"), files);
        let found = eval(&dir, "first", "validation.csv");
        assert!(found.starts_with(&format!("accuracy {best:.4}  loss ")), "{found}");
        assert_eq!(eval(&dir, "first/best", "validation.csv"), found);
        dir.allreel("predict first --data validation.csv --out labels.csv").ok();
        assert!((accuracy(&dir, "labels.csv") - best).abs() < 1e-9, "{setting}");
        let (steps, epochs) = (dir.records("first", "step"), dir.records("first", "epoch"));
        assert!(!epochs.is_empty() && steps.len() >= epochs.len(), "{steps:?}");
        assert_eq!(summary["steps"], steps.len());
    }
}

#[test]
fn a_vocabulary_names_every_column() {
    let dir = prepared();
    dir.allreel("train first.toml --set model.vocabulary=true").ok();
    let text = dir.read("first/best/vocabulary.txt");
    let model = Model::load(&dir.path("first/best")).expect("a model");
    let keys: Vec<u64> = text.lines().map(key).collect();
    assert_eq!(keys, model.keys);
}

/// The sums of ranks differ in their last bits, and so may where the solver stops, within its tolerance of the
/// one minimum: eight steps from the start they are still together.
#[test]
fn tcp_ranks_find_the_same_weights() {
    let dir = prepared();
    let train = "train first.toml --set train.max_steps=8 --set train.eval_steps=100";
    dir.allreel(train).ok();
    let one = Model::load(&dir.path("first/best")).expect("a model");
    let found = eval(&dir, "first", "validation.csv");
    for ranks in [2, 4] {
        let launch = format!("launch -n {ranks} --backend processes --");
        dir.allreel(&format!("{launch} {train} --set run.dir=ranks{ranks}")).ok();
        let several = Model::load(&dir.path(&format!("ranks{ranks}/best"))).expect("a model");
        assert_eq!(several.keys, one.keys);
        let largest = one.weights.iter().fold(0.0_f32, |most, w| most.max(w.abs()));
        for (one, several) in one.weights.iter().zip(&several.weights) {
            assert!((one - several).abs() <= 1e-6 * largest, "{ranks} ranks: {one} {several}");
        }
        let shown = dir.allreel(&format!("{launch} eval first --data validation.csv")).ok();
        assert_eq!(shown.out, format!("[rank 0] {found}"));
    }
}

#[test]
fn going_on_from_a_checkpoint_changes_no_bit() {
    let dir = prepared();
    let train = "train first.toml --set checkpoint.every_steps=3 --set checkpoint.keep=100";
    dir.allreel(train).ok();
    let model = || fs::read(dir.path("first/best/model.safetensors")).expect("a model");
    let (losses, whole) = (dir.losses("first"), model());
    let kept = names(&dir, "first/checkpoints");
    assert!(kept.len() > 2, "{kept:?}");
    for name in &kept[1..] {
        fs::remove_dir_all(dir.path(&format!("first/checkpoints/{name}"))).expect("removed");
    }
    fs::remove_dir_all(dir.path("first/best")).expect("removed");
    let shown = dir.allreel(&format!("{train} --resume")).ok();
    assert!(shown.err.contains("resuming after step 3"), "{}", shown.err);
    assert_eq!(dir.losses("first"), losses);
    assert_eq!(names(&dir, "first/checkpoints"), kept);
    assert!(model() == whole);
    // Nothing is left to do now, and nothing is done.
    let summary = dir.read("first/summary.json");
    dir.allreel(&format!("{train} --resume")).ok();
    assert_eq!(dir.read("first/summary.json"), summary);
}

#[test]
fn the_majority_is_what_most_reviews_are() {
    let dir = prepared();
    let mut reviews = easy(40, 7);
    let mut sour = 0;
    reviews.retain(|review| {
        sour += usize::from(review.label == Some(0));
        review.label == Some(1) || sour <= 3
    });
    dir.reviews("train.csv", &reviews);
    dir.allreel("train first.toml --set model.kind=majority").ok();
    dir.allreel("predict first --data validation.csv --out labels.csv").ok();
    let labels = dir.read("labels.csv");
    assert!(labels.lines().skip(1).all(|row| row.trim_matches('"').ends_with('1')), "{labels}");
    let share = number(&dir.summary("first"), "val_accuracy");
    assert!((accuracy(&dir, "labels.csv") - share).abs() < 1e-9);
    let shown = dir.allreel_with(&["predict", "first", "--text", "dreadful"]).ok();
    assert!(shown.out.starts_with("positive 0."), "{}", shown.out);
}
