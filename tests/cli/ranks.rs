//! The same commands through `allreel launch`.

use super::{answers::eval, cached, number};
use crate::run::{Workdir, mpirun};

#[test]
fn mpi_two_ranks_do_the_same_as_one() {
    if !mpirun() {
        return;
    }
    let dir = Workdir::trained();
    let before = cached(&dir);
    let args = "train first.toml --set run.dir=second --set data.test=validation.csv";
    let shown = dir.allreel(&format!("launch -n 2 -- {args}")).ok();
    assert_eq!(cached(&dir), before, "tokenised again");
    assert_eq!(shown.out.matches("val acc").count(), 1, "{}", shown.out);
    assert!(shown.out.lines().all(|line| line.starts_with("[rank 0] ")));
    let (one, two) = (dir.losses("first"), dir.losses("second"));
    assert_eq!((one.len(), two.len()), (20, 20));
    for (step, (one, two)) in one.iter().zip(&two).enumerate() {
        let error = (one - two).abs() / one;
        assert!(error < 1e-4, "step {step}: {one} alone, {two} with two ranks");
    }
    let (one, two) = (dir.summary("first"), dir.summary("second"));
    assert_eq!(two["world_size"], 2);
    for key in ["best_val_accuracy", "train_accuracy"] {
        assert_eq!(one[key], two[key], "{key}");
    }
    assert_eq!(two["test_accuracy"], two["best_val_accuracy"]);
    let exchanged = &two["allreduce"];
    assert!(number(exchanged, "bytes") > 0.0, "{exchanged}");
    assert!((0.0..=1.0).contains(&number(exchanged, "hidden_share")), "{exchanged}");
    // Two ranks evaluate what one trained, and the other way round.
    let found = eval(&dir, "second", "validation.csv");
    let ranks = dir.allreel("launch -n 2 -- eval second --data validation.csv").ok();
    assert_eq!(ranks.out, format!("[rank 0] {found}"));
    let args = "predict second --data validation.csv --out";
    dir.allreel(&format!("{args} one.csv")).ok();
    dir.allreel(&format!("launch -n 2 -- {args} two.csv")).ok();
    assert_eq!(dir.read("one.csv"), dir.read("two.csv"));
}

#[test]
fn mpi_ranks_tokenise_once_from_an_empty_cache() {
    if !mpirun() {
        return;
    }
    let dir = Workdir::prepared();
    dir.allreel("launch -n 3 -- train first.toml").ok();
    let before = cached(&dir);
    assert_eq!(before.len(), 3, "training, validation, tokenizer: {before:?}");
    dir.allreel("launch -n 3 -- train first.toml --set run.dir=second").ok();
    assert_eq!(cached(&dir), before);
    assert_eq!(dir.losses("first"), dir.losses("second"));
    assert!(dir.weights("first/best") == dir.weights("second/best"));
}

#[test]
fn launch_asks_once_for_help_and_version() {
    let dir = Workdir::new();
    let shown = dir.allreel("launch -n 2 -- --version").ok();
    assert_eq!(shown.out, dir.allreel("--version").ok().out);
    let shown = dir.allreel("launch -n 2 -- train --help").ok();
    assert_eq!(shown.out, dir.allreel("train --help").ok().out);
}
