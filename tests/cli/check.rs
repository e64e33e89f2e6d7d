//! `allreel check`: all is well on this machine's CPU, as one rank and as two.

use allreel_kernels::common::check::ROOMS;

use crate::run::Workdir;

/// The rows of the table that say `ok`.
fn passed(shown: &str) -> Vec<String> {
    let rows = shown.lines().filter(|line| line.contains('┆') && line.contains("┆ ok"));
    let name = |row: &str| {
        let cells = row.split(['│', '┆']).nth(1).unwrap_or_default();
        cells.trim().to_owned()
    };
    rows.map(name).collect()
}

#[test]
fn a_quick_check_of_the_cpu_passes_everything() {
    let dir = Workdir::new();
    let shown = dir.allreel("check --device cpu --quick").ok();
    let passed = passed(&shown.out);
    let families = ["BERT", "DistilBERT", "RoBERTa", "DeBERTa", "ModernBERT", "GPT-2"];
    let want = ROOMS.map(|room| room.name.to_owned()).into_iter();
    let want = want.chain(families.map(|family| format!("a layer of {family}")));
    let on_words = [
        "a network of convolutions on words",
        "an LSTM on words",
        "a GRU on words",
        "convolutions and an LSTM on words",
        "an LSTM with attention on words",
        "an LSTM with capsules on words",
        "a transformer on words",
        "training steps",
    ];
    let want: Vec<String> = want.chain(on_words.map(str::to_owned)).collect();
    assert_eq!(passed, want, "{}", shown.out);
    assert!(shown.out.contains("step  5   0."), "{}", shown.out);
    assert!(shown.out.contains("one rank: collectives not checked"), "{}", shown.out);
    assert!(shown.out.ends_with("all comparisons are within their tolerances\n"), "{}", shown.out);
    assert!(shown.err.contains("checking attention"), "{}", shown.err);
}

#[test]
fn one_op_alone_is_checked_alone() {
    let dir = Workdir::new();
    let shown = dir.allreel("check --device cpu --quick --filter pooling").ok();
    assert_eq!(passed(&shown.out), ["pooling"]);
}

#[test]
fn tcp_two_ranks_check_their_sums() {
    let dir = Workdir::new();
    let launch = "launch -n 2 --backend processes -- check --device cpu --quick --threads 1";
    let shown = dir.allreel(launch).ok();
    let passed = passed(&shown.out);
    assert_eq!(passed.last().map(String::as_str), Some("all-reduce"), "{}", shown.out);
    assert!(shown.out.lines().all(|line| line.starts_with("[rank 0] ")), "{}", shown.out);
}
