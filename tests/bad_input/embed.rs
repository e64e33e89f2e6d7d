//! `allreel embed` with what it cannot use.

use super::{misused, refused};
use crate::run::{Workdir, easy};

#[test]
fn embed_names_the_flag_and_the_file() {
    let dir = Workdir::new();
    dir.reviews("a.tsv", &easy(20, 1));
    for (flag, said) in [
        ("--dimensions 0", "--dimensions 0: must be at least 1; 100 is usual"),
        ("--epochs 0", "--epochs 0: must be at least 1"),
        ("--window 0", "--window 0: must be at least 1"),
        ("--negative 0", "--negative 0: must be at least 1"),
        ("--min-count 0", "--min-count 0: must be at least 1"),
        ("--threads 0", "--threads 0: must be at least 1"),
        ("--subsample nan", "--subsample NaN: must be 0"),
        ("--subsample=-1", "--subsample -1: must be 0"),
        ("--learning-rate 0", "--learning-rate 0: must be greater than 0"),
        ("--learning-rate nan", "--learning-rate NaN: must be greater than 0"),
        ("--min-count 100000", "--min-count 100000: 0 of the reviews' words occur so often"),
        ("--data gone.tsv", "gone.tsv does not exist"),
    ] {
        refused(&dir, &format!("embed --data a.tsv --out v.txt {flag}"), &[said]);
    }
    refused(&dir, "embed --data a.tsv --out none/v.txt", &["--out: there is no folder none"]);
    refused(&dir, "embed --data a.tsv --out .", &["--out: . is a directory; name a file"]);
    misused(
        &dir,
        "embed --data a.tsv --out v.txt --cleaning word",
        &["'word' for '--cleaning <CLEANING>': use none, html, words or letters"],
    );
}
