//! `allreel embed`, and a tokenizer of whole words in a run.

use allreel::{data::Tokenizer, words::vectors};

use crate::run::{Workdir, easy};

#[test]
fn embed_writes_vectors_of_labelled_and_unlabelled_reviews_again_and_again() {
    let dir = Workdir::new();
    dir.reviews("a.tsv", &easy(60, 1));
    dir.write("b.csv", "text\n\"Good rare, rare<br />rare\"\n");
    let args =
        "embed --data a.tsv --data b.csv --dimensions 8 --epochs 2 --min-count 3 --threads 1 --out";
    let shown = dir.allreel(&format!("{args} v.txt")).ok();
    let mut lines = shown.out.lines();
    assert!(lines.next().is_some_and(|line| line.starts_with("61 reviews, ")), "{}", shown.out);
    let last = lines.next().expect("a second line");
    assert!(last.contains("v.txt: ") && last.contains(" words/s, 1 thread"), "{last}");
    let written = dir.read("v.txt");
    dir.allreel(&format!("{args} again.txt")).ok();
    assert_eq!(written, dir.read("again.txt"), "one thread, one seed, one result");
    dir.allreel(&format!("{args} other.txt --seed 1")).ok();
    assert_ne!(written, dir.read("other.txt"));
    let read = vectors::read(&dir.path("v.txt"), |_| true).expect("vectors");
    assert_eq!((read.dimensions, read.rows.len()), (8, written.lines().count() - 1));
    assert!(read.rows.contains_key("rare") && !read.rows.contains_key("br"), "cleaned as words");
}

#[test]
fn a_run_on_whole_words_saves_their_tokenizer() {
    let dir = Workdir::prepared();
    let words = "--set data.tokenizer=words --set data.min_count=1";
    dir.allreel(&format!("train first.toml {words} --set model.vocab_size=5000")).ok();
    let tokenizer = Tokenizer::load(&dir.path("first/best")).expect("a tokenizer");
    let entries = tokenizer.entries();
    assert_eq!((entries[0].0.as_str(), entries[1].0.as_str()), ("[PAD]", "[UNK]"));
    assert!(dir.read("first/config.toml").contains("min_count = 1"));
    let shown = dir.allreel("eval first --data validation.csv").ok();
    assert!(shown.out.ends_with("reviews 50\n"), "{}", shown.out);
}
