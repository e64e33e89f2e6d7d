//! `allreel embed`: vectors of words, trained on reviews with or without labels.

use std::{
    path::{Path, PathBuf},
    time::Instant,
};

use indicatif::{ProgressBar, ProgressStyle};
use rayon::prelude::*;

use super::start_threads;
use crate::{
    Error, Result,
    atomic::write_atomic,
    config::Cleaning,
    data::read,
    words::skipgram::{Prepared, Settings},
};

/// Arguments of `allreel embed`.
#[derive(clap::Args)]
pub struct Args {
    /// Reviews: .tsv, .csv, .jsonl (or .gz), or an aclImdb directory; may be given several times
    #[arg(long, required = true)]
    data: Vec<PathBuf>,
    /// Where to write the vectors, in word2vec's text format
    #[arg(long)]
    out: PathBuf,
    /// Length of a vector
    #[arg(long, default_value_t = 100)]
    dimensions: usize,
    /// How often every review is read
    #[arg(long, default_value_t = 5)]
    epochs: usize,
    /// Words on either side that a word may learn from
    #[arg(long, default_value_t = 5)]
    window: usize,
    /// Words drawn for each window, to be told from the one in its middle
    #[arg(long, default_value_t = 5)]
    negative: usize,
    /// How often a word must occur to have a vector
    #[arg(long, default_value_t = 5)]
    min_count: u64,
    /// Share of all words above which one is left out now and then; 0 leaves none out
    #[arg(long, default_value_t = 1e-3)]
    subsample: f64,
    /// Rate at the beginning; it falls to zero
    #[arg(long, default_value_t = 0.025)]
    learning_rate: f64,
    /// Threads; with one the vectors can be repeated [default: all cores]
    #[arg(long)]
    threads: Option<usize>,
    /// Seed of everything drawn
    #[arg(long, default_value_t = 42)]
    seed: u64,
    /// What is done to the text, as by data.cleaning: none, html, words or letters
    #[arg(long, default_value = "words", value_parser = cleaning)]
    cleaning: Cleaning,
}

fn cleaning(name: &str) -> std::result::Result<Cleaning, String> {
    serde_json::from_value(name.into()).map_err(|_| "use none, html, words or letters".into())
}

/// Runs the command.
///
/// # Errors
/// `User` for a setting out of its range; as its parts.
pub fn run(args: &Args) -> Result<()> {
    let settings = settings(args)?;
    check_place(&args.out)?;
    let threads = start_threads(args.threads, 1);
    let texts = texts(&args.data, args.cleaning)?;
    let prepared = Prepared::new(&texts, &settings)?;
    let (reviews, words) = (texts.len(), prepared.words());
    drop(texts);
    println!("{reviews} reviews, {words} words, {} different ones", prepared.vocabulary());
    let total = words * settings.epochs as u64;
    let bar = ProgressBar::new(total).with_style(
        ProgressStyle::with_template(
            "{wide_bar} {human_pos}/{human_len} words, {per_sec}, {eta} left",
        )
        .map_err(|e| Error::Bug(e.to_string()))?,
    );
    let start = Instant::now();
    let trained = prepared.train(&settings, |done| bar.set_position(done))?;
    let seconds = start.elapsed().as_secs_f64();
    bar.finish_and_clear();
    write_atomic(&args.out, trained.to_text().as_bytes())?;
    println!(
        "{} vectors in {}: {seconds:.1} s, {:.0} words/s, {threads} thread{}",
        trained.words.len(),
        args.out.display(),
        total as f64 / seconds,
        if threads == 1 { "" } else { "s" }
    );
    Ok(())
}

fn settings(args: &Args) -> Result<Settings> {
    let numbers = [
        (args.dimensions, "dimensions", 100),
        (args.epochs, "epochs", 5),
        (args.window, "window", 5),
        (args.negative, "negative", 5),
        (usize::try_from(args.min_count).unwrap_or(usize::MAX), "min-count", 5),
        (args.threads.unwrap_or(1), "threads", 1),
    ];
    if let Some((_, name, usual)) = numbers.into_iter().find(|(number, ..)| *number == 0) {
        return Err(Error::User(format!("--{name} 0: must be at least 1; {usual} is usual")));
    }
    // Written so that NaN is refused.
    if !(args.learning_rate > 0.0 && args.learning_rate.is_finite()) {
        let rate = args.learning_rate;
        return Err(Error::User(format!(
            "--learning-rate {rate}: must be greater than 0 and finite; 0.025 is usual"
        )));
    }
    if !(args.subsample >= 0.0 && args.subsample.is_finite()) {
        return Err(Error::User(format!(
            "--subsample {}: must be 0 (no word is left out) or more, and finite; 0.001 is usual",
            args.subsample
        )));
    }
    Ok(Settings {
        dimensions: args.dimensions,
        epochs: args.epochs,
        window: args.window,
        negative: args.negative,
        min_count: args.min_count,
        subsample: args.subsample,
        learning_rate: args.learning_rate,
        seed: args.seed,
    })
}

/// Refuses before the work what could not be written after it.
fn check_place(out: &Path) -> Result<()> {
    let folder = out.parent().filter(|folder| !folder.as_os_str().is_empty());
    if let Some(folder) = folder.filter(|folder| !folder.is_dir()) {
        return Err(Error::User(format!("--out: there is no folder {}", folder.display())));
    }
    if out.is_dir() {
        let message = format!("--out: {} is a directory; name a file", out.display());
        return Err(Error::User(message));
    }
    Ok(())
}

/// The cleaned texts of all files.
fn texts(files: &[PathBuf], cleaning: Cleaning) -> Result<Vec<String>> {
    let mut texts = Vec::new();
    for file in files {
        let reviews = read::read(file)?;
        let cleaned = reviews.par_iter().map(|review| cleaning.clean(&review.text).into_owned());
        texts.par_extend(cleaned);
    }
    Ok(texts)
}
