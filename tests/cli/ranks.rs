//! The same commands through `allreel launch`.

use super::{answers::eval, cached, number};
use crate::run::Workdir;
#[cfg(feature = "mpi")]
use crate::run::mpirun;

/// Two ranks, started by `launch`.
fn two_ranks_do_the_same_as_one(launch: &str) {
    let dir = Workdir::trained();
    let before = cached(&dir);
    let args = "train first.toml --set run.dir=second --set data.test=validation.csv";
    let shown = dir.allreel(&format!("{launch} {args}")).ok();
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
    let ranks = dir.allreel(&format!("{launch} eval second --data validation.csv")).ok();
    assert_eq!(ranks.out, format!("[rank 0] {found}"));
    let args = "predict second --data validation.csv --out";
    dir.allreel(&format!("{args} one.csv")).ok();
    dir.allreel(&format!("{launch} {args} two.csv")).ok();
    assert_eq!(dir.read("one.csv"), dir.read("two.csv"));
}

#[cfg(feature = "mpi")]
#[test]
fn mpi_two_ranks_do_the_same() {
    if mpirun() {
        two_ranks_do_the_same_as_one("launch -n 2 --backend mpirun --");
    }
}

#[test]
fn tcp_two_ranks_do_the_same() {
    two_ranks_do_the_same_as_one("launch -n 2 --backend processes --");
}

fn ranks_tokenise_once_from_an_empty_cache(launch: &str) {
    let dir = Workdir::prepared();
    dir.allreel(&format!("{launch} train first.toml")).ok();
    let before = cached(&dir);
    assert_eq!(before.len(), 3, "training, validation, tokenizer: {before:?}");
    dir.allreel(&format!("{launch} train first.toml --set run.dir=second")).ok();
    assert_eq!(cached(&dir), before);
    assert_eq!(dir.losses("first"), dir.losses("second"));
    assert!(dir.weights("first/best") == dir.weights("second/best"));
}

#[cfg(feature = "mpi")]
#[test]
fn mpi_ranks_tokenise_once() {
    if mpirun() {
        ranks_tokenise_once_from_an_empty_cache("launch -n 3 --backend mpirun --");
    }
}

#[test]
fn tcp_ranks_tokenise_once() {
    ranks_tokenise_once_from_an_empty_cache("launch -n 3 --backend processes --");
}

/// As torchrun starts them, with a port of the test's own.
#[test]
fn tcp_ranks_that_no_launcher_of_ours_started_train_together() {
    let dir = Workdir::prepared();
    let port = crate::tcp::port().to_string();
    let run = |rank: &str, setting: &str| {
        let variables = [
            ("RANK", rank),
            ("WORLD_SIZE", "2"),
            ("LOCAL_RANK", rank),
            ("LOCAL_WORLD_SIZE", "2"),
            ("MASTER_ADDR", "localhost"),
            ("MASTER_PORT", &port),
        ];
        dir.allreel_in(&variables, &["train", "first.toml", "--set", setting])
    };
    std::thread::scope(|scope| {
        let one = scope.spawn(|| run("1", "run.dir=first").ok());
        let zero = run("0", "run.dir=first").ok();
        assert!(zero.out.contains("val acc"), "{zero:?}");
        assert_eq!(one.join().expect("no panic").out, "");
    });
    assert_eq!(dir.summary("first")["world_size"], 2);
    // Both of them notice that they would not train the same, and one says it.
    std::thread::scope(|scope| {
        let one = scope.spawn(|| run("1", "train.seed=1"));
        let (zero, one) = (run("0", "train.seed=2"), one.join().expect("no panic"));
        assert_eq!((zero.code, one.code), (4, 4), "{zero:?} {one:?}");
        assert_eq!(one.err, "");
        assert!(zero.err.contains("rank 1: runs another config"), "{}", zero.err);
    });
}

#[test]
fn tcp_ranks_that_are_not_told_where_to_meet_are_refused() {
    let dir = Workdir::prepared();
    let alone = |more: &[(&str, &str)]| {
        let variables = [&[("RANK", "1"), ("WORLD_SIZE", "2")], more].concat();
        let shown = dir.allreel_in(&variables, &["train", "first.toml"]);
        assert_eq!((shown.code, shown.err.lines().count()), (2, 1), "{}", shown.err);
        shown.err
    };
    let said = alone(&[]);
    assert!(said.contains("rank 1 of 2") && said.contains("set MASTER_ADDR"), "{said}");
    let said = alone(&[("MASTER_ADDR", "localhost")]);
    assert!(said.contains("MASTER_PORT is not"), "{said}");
    let port = crate::tcp::port().to_string();
    let place = [("MASTER_ADDR", "localhost"), ("MASTER_PORT", &port)];
    let said = alone(&[place[0], place[1], ("ALLREEL_RENDEZVOUS_TIMEOUT", "1")]);
    assert!(said.contains(&format!("localhost:{port}")), "{said}");
    assert!(said.contains("no rank 0 there within 1 s"), "{said}");
}

/// The tests' own binary has MPI where it can; what counts is that there is no mpirun.
#[test]
fn tcp_ranks_are_launched_where_there_is_no_mpirun() {
    let dir = Workdir::trained();
    let args = ["launch", "-n", "2", "--", "eval", "first", "--data", "validation.csv"];
    let nowhere = [("PATH", "/nonexistent")];
    let shown = dir.allreel_in(&nowhere, &args).ok();
    assert_eq!(shown.out, format!("[rank 0] {}", eval(&dir, "first", "validation.csv")));
}

#[test]
fn launch_asks_once_for_help_and_version() {
    let dir = Workdir::new();
    let shown = dir.allreel("launch -n 2 -- --version").ok();
    assert_eq!(shown.out, dir.allreel("--version").ok().out);
    let shown = dir.allreel("launch -n 2 -- train --help").ok();
    assert_eq!(shown.out, dir.allreel("train --help").ok().out);
}
