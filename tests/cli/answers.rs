//! `allreel eval` and `allreel predict`.

use std::fs;

use allreel::data::Review;

use super::number;
use crate::{
    run::{Workdir, easy},
    support::reference,
};

/// `accuracy A  loss L  reviews N` of `allreel eval`.
pub(super) fn eval(dir: &Workdir, model: &str, file: &str) -> String {
    let shown = dir.allreel(&format!("eval {model} --data {file}")).ok();
    assert_eq!(shown.out.lines().count(), 1, "{}", shown.out);
    shown.out
}

#[test]
fn eval_finds_the_accuracy_of_the_summary_in_every_format() {
    let dir = Workdir::prepared();
    dir.reviews("test.jsonl", &easy(70, 3));
    dir.allreel("train first.toml --set data.test=test.jsonl").ok();
    let summary = dir.summary("first");
    let accuracy = |key| format!("accuracy {:.4}  loss ", number(&summary, key));
    let found = eval(&dir, "first", "validation.csv");
    assert!(found.starts_with(&accuracy("best_val_accuracy")), "{found}");
    assert!(found.ends_with("reviews 50\n"), "{found}");
    for format in ["copy.tsv", "copy.jsonl", "copy"] {
        dir.reviews(format, &easy(50, 2));
        assert_eq!(eval(&dir, "first", format), found, "{format}");
    }
    // A model directory alone, which knows neither cleaning nor max_length, reads these the same.
    assert_eq!(eval(&dir, "first/best", "validation.csv"), found);
    let found = eval(&dir, "first", "test.jsonl");
    assert!(found.starts_with(&accuracy("test_accuracy")), "{found}");
}

/// Ids and labels of a submission, whose header is checked.
fn submission(dir: &Workdir, file: &str) -> Vec<(String, String)> {
    let text = dir.read(file);
    assert_eq!(text.lines().next(), Some("id,sentiment"));
    let mut reader = csv::Reader::from_reader(text.as_bytes());
    reader
        .records()
        .map(|row| {
            let row = row.expect("a row");
            assert!(row.len() == 2 && matches!(&row[1], "0" | "1"), "{row:?}");
            (row[0].to_owned(), row[1].to_owned())
        })
        .collect()
}

#[test]
fn predict_labels_a_file_under_its_own_ids() {
    let dir = Workdir::trained();
    let odd = [
        "12311_10",
        "007",
        "say \"x\"",
        "\"\"",
        "a,b",
        " space ",
        "naïve 日本",
        "semi;colon",
        "'",
        "back\\slash",
        "-1",
        "=1+1",
        "",
    ];
    let reviews: Vec<Review> = easy(odd.len(), 4)
        .into_iter()
        .zip(odd)
        .map(|(review, id)| Review { id: id.into(), ..review })
        .collect();
    let mut labels = Vec::new();
    for file in ["odd.tsv", "odd.csv", "odd.jsonl"] {
        dir.reviews(file, &reviews);
        let args = format!("predict first --data {file} --out {file}.out");
        let shown = dir.allreel(&args).ok();
        assert!(shown.out.contains("13 reviews labelled"), "{}", shown.out);
        let (ids, found): (Vec<_>, Vec<_>) =
            submission(&dir, &format!("{file}.out")).into_iter().unzip();
        assert_eq!(ids, odd, "{file}");
        labels.push(found);
    }
    assert!(labels.iter().all(|found| *found == labels[0]), "{labels:?}");
    // Plain ids stand there plainly.
    assert!(dir.read("odd.tsv.out").contains("\n12311_10,"));

    let args = "predict first --data odd.tsv --out few.out --limit 4";
    dir.allreel(args).ok();
    assert_eq!(submission(&dir, "few.out"), submission(&dir, "odd.tsv.out")[..4]);
    dir.allreel("predict first --data odd.tsv --out all.out --limit 99").ok();
    assert_eq!(dir.read("all.out"), dir.read("odd.tsv.out"));
}

#[test]
fn predict_and_eval_agree() {
    let dir = Workdir::trained();
    dir.allreel("predict first --data validation.csv --out labels.csv").ok();
    let right = submission(&dir, "labels.csv")
        .iter()
        .zip(easy(50, 2))
        .filter(|((id, label), review)| {
            assert_eq!(*id, review.id);
            label.parse() == Ok(review.label.expect("a label"))
        })
        .count();
    let found = eval(&dir, "first", "validation.csv");
    let accuracy = format!("accuracy {:.4} ", right as f64 / 50.0);
    assert!(found.starts_with(&accuracy), "{found} against {accuracy}");
    assert!(right > 40, "it has learnt nothing: {right}");
}

#[test]
fn predict_labels_a_text() {
    let dir = Workdir::trained();
    for (text, label) in [("A splendid film", "positive"), ("dreadful , dreadful", "negative")] {
        for model in ["first", "first/best"] {
            let shown = dir.allreel_with(&["predict", model, "--text", text]).ok();
            let (said, probability) = shown.out.trim_end().split_once(' ').expect("two words");
            assert_eq!(said, label, "{text}");
            let probability: f64 = probability.parse().expect("a number");
            assert!((0.5..=1.0).contains(&probability), "{probability}");
        }
    }
    // Nothing to read is no reason to fail.
    dir.allreel_with(&["predict", "first", "--text", ""]).ok();
}

#[test]
fn kaggles_test_file_keeps_its_ids() {
    let Some(data) = reference("ALLREEL_DATA") else {
        return;
    };
    let file = data.join("imdb/testData.tsv.gz");
    let raw = fs::File::open(&file).expect("Kaggle's file");
    let mut ids = Vec::new();
    let table = std::io::BufReader::new(flate2::read::GzDecoder::new(raw));
    for line in std::io::BufRead::lines(table).skip(1).take(50) {
        let line = line.expect("a line");
        let (id, _) = line.split_once('\t').expect("two columns");
        ids.push(id.trim_matches('"').to_owned());
    }
    let dir = Workdir::trained();
    let file = file.to_str().expect("UTF-8");
    let args = ["predict", "first", "--data", file, "--out", "labels.csv", "--limit", "50"];
    dir.allreel_with(&args).ok();
    let found: Vec<String> = submission(&dir, "labels.csv").into_iter().map(|(id, _)| id).collect();
    assert_eq!(found, ids);
    assert_eq!(dir.read("labels.csv").lines().count(), 51);
    assert!(!dir.read("labels.csv").contains('"'));
}
