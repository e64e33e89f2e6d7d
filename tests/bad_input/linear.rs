//! What a classifier on n-grams refuses.

use super::refused;
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

#[test]
fn settings_that_make_no_linear_model() {
    let dir = prepared();
    for (setting, says) in [
        ("model.min_count=0", "must be at least 1; 2 is usual"),
        ("model.ngram_range=[0,2]", "must be the fewest and the most words of an n-gram"),
        ("model.ngram_range=[3,2]", "must be the fewest and the most words of an n-gram"),
        ("model.ngram_range=3", "expected"),
        ("model.buckets=0", "must be at least 1"),
        ("model.c=0", "must be greater than 0 and finite"),
        ("model.c=nan", "must be greater than 0 and finite"),
        ("model.features=bm25", "expected one of `binary`, `count`, `tfidf`"),
        ("model.kind=ngrams", "`transformer`, `ngram`, `majority`; the nearest is `ngram`"),
        ("model.kind=majority --set model.c=1", "is only for model.kind = \"ngram\"; remove it"),
        ("model.kind=bert --set model.c=1", "is only for model.kind = \"ngram\"; remove it"),
        ("model.hidden_size=8", "means nothing to a linear model"),
        ("model.num_labels=3", "must be 2 for model.kind = \"ngram\""),
        ("data.tokenizer=wordpiece", "means nothing to model.kind = \"ngram\"; remove it"),
        ("data.max_length=64", "means nothing to model.kind = \"ngram\"; remove it"),
        ("train.batch_size=8", "means nothing to model.kind = \"ngram\"; remove it"),
        ("adapter.method=lora", "[adapter] means nothing"),
        ("run.device=cuda", "is computed on CPUs only"),
    ] {
        let key = setting.split(" --set ").last().and_then(|set| set.split_once('='));
        let key = key.map_or(setting, |(key, _)| key);
        refused(&dir, &format!("train first.toml --set {setting}"), &[key, says]);
    }
    let both = "train first.toml --set model.vocabulary=true --set model.buckets=9";
    refused(&dir, both, &["model.buckets=9", "model.vocabulary", "remove one"]);
    refused(&dir, "plan first.toml", &["model.kind = \"ngram\"", "networks only"]);
}

#[test]
fn reviews_that_nothing_can_be_learnt_from() {
    let dir = prepared();
    let mut reviews = easy(40, 3);
    reviews.retain(|review| review.label == Some(0));
    let all = format!("all {} training reviews have the label 0, none has 1", reviews.len());
    dir.reviews("sour.csv", &reviews);
    refused(&dir, "train first.toml --set data.train=sour.csv", &["data.train", &all]);
    let rare = "train first.toml --set model.min_count=100000";
    refused(&dir, rare, &["model.min_count = 100000", "use a smaller one"]);
}

#[test]
fn a_linear_model_takes_no_lengths_and_no_devices() {
    let dir = prepared();
    dir.allreel("train first.toml").ok();
    let eval = "eval first --data validation.csv";
    refused(&dir, &format!("{eval} --max-length 9"), &["--max-length 9", "leave it out"]);
    refused(&dir, &format!("{eval} --device cuda"), &["--device cuda", "leave it out"]);
    let config = dir.read("first/best/config.json").replace("\"binary\"", "\"bm25\"");
    dir.write("first/best/config.json", config);
    refused(&dir, eval, &["first/best/config.json", "bm25"]);
}
