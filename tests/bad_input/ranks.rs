//! Several ranks complain as one.

use std::fs;

use super::{fails, holds_all, table};
use crate::run::{Workdir, easy, mpirun};

/// Runs `args` through `allreel launch`: rank 0 refuses for all, in one line that holds all of
/// `says`; launch adds one of its own about how the job ended.
#[track_caller]
fn refused_by_ranks(dir: &Workdir, ranks: usize, args: &str, says: &[&str]) {
    let lines = fails(dir, &format!("launch -n {ranks} -- {args}"));
    assert_eq!(lines.len(), 2, "{args}: {lines:#?}");
    let (error, verdict) = (&lines[0], &lines[1]);
    assert!(error.starts_with("[rank 0] error (rank 0): "), "{error}");
    assert!(verdict.ends_with("code 2"), "{verdict}");
    holds_all(args, error, says);
}

#[test]
fn mpi_more_ranks_than_reviews_are_refused() {
    if !mpirun() {
        return;
    }
    let dir = Workdir::prepared();
    dir.reviews("three.csv", &easy(3, 3));
    let args = "train first.toml --set data.train=three.csv --set train.batch_size=8";
    let says = ["3 training reviews for 4 ranks; use at most 3 ranks"];
    refused_by_ranks(&dir, 4, args, &says);
}

#[test]
fn mpi_a_batch_smaller_than_the_ranks_is_refused() {
    if !mpirun() {
        return;
    }
    let dir = Workdir::prepared();
    let args = "train first.toml --set train.batch_size=2";
    let says = ["train.batch_size = 2", "there are 3", "use at least 3"];
    refused_by_ranks(&dir, 3, args, &says);
}

#[test]
fn mpi_ranks_say_what_is_wrong_once() {
    if !mpirun() {
        return;
    }
    let dir = Workdir::trained();
    table(&dir, "seven.csv", b"4_9,good,7\n");
    let seven = ["seven.csv, line 5: label \"7\""];
    let new = "train first.toml --set run.dir=second";
    for (args, says) in [
        (format!("{new} --set data.train=seven.csv"), &seven[..]),
        (format!("{new} --set data.test=seven.csv"), &seven),
        ("eval first --data seven.csv".into(), &seven),
        ("predict first --data seven.csv --out labels.csv".into(), &seven),
        ("train gone.toml".into(), &["cannot read gone.toml: No such file"]),
        (format!("{new} --set train.sed=1"), &["unknown key train.sed", "train.seed"]),
        (format!("{new} --set train.warmup_steps=99"), &["run of 20", "Use at most 19"]),
        ("train first.toml".into(), &["first already holds a run", "--resume"]),
        (
            "train first.toml --resume --set train.seed=1".into(),
            &["cannot resume first: train.seed is 1, not 42"],
        ),
        ("predict absent --text good".into(), &["absent is neither a run directory"]),
    ] {
        refused_by_ranks(&dir, 2, &args, says);
    }
    let weights = dir.path("first/best/model.safetensors");
    let half = fs::read(&weights).expect("weights");
    fs::write(weights, &half[..half.len() / 2]).expect("written");
    let args = "eval first --data train.csv";
    let says = ["first/best/model.safetensors is damaged"];
    refused_by_ranks(&dir, 2, args, &says);
}
