//! `allreel predict`: labels for a file of reviews, or for one text.

use std::path::{Path, PathBuf};

use clap::ArgGroup;
use indicatif::{ProgressBar, ProgressStyle};

use super::{datasets, linear, saved, start_threads, train::check_ids};
use crate::{
    Error, Result,
    collective::{Collective, agree},
    data::{Review, TokenSet, read, submission},
    device::{Choice, Placement},
    step::evaluate::probabilities,
};
use allreel_kernels::cross_entropy::argmax;

/// Arguments of `allreel predict`.
#[derive(clap::Args)]
#[command(group(ArgGroup::new("input").required(true).args(["data", "text"])))]
pub struct Args {
    /// Directory of a run or of a Hugging Face model, or the name of a fetched one
    pub(super) run_dir: PathBuf,
    /// Reviews to label: .tsv, .csv, .jsonl (or .gz), or an aclImdb directory
    #[arg(long, requires = "out")]
    pub(super) data: Option<PathBuf>,
    /// Where to write `id,sentiment`
    #[arg(long, requires = "data")]
    pub(super) out: Option<PathBuf>,
    /// Label only the first N reviews
    #[arg(long, requires = "data")]
    pub(super) limit: Option<usize>,
    /// A review to label
    #[arg(long)]
    pub(super) text: Option<String>,
    /// Where to compute
    #[arg(long, default_value = "auto")]
    pub(super) device: Choice,
    /// Most tokens of a review [default: the run's]
    #[arg(long)]
    pub(super) max_length: Option<usize>,
}

/// Runs the command. Rank 0 predicts; it is not worth starting several.
///
/// # Errors
/// As its parts.
pub fn run(args: &Args, collective: &mut dyn Collective) -> Result<()> {
    let predicted = if collective.rank() == 0 { predict(args) } else { Ok(()) };
    agree(collective, predicted)
}

fn predict(args: &Args) -> Result<()> {
    if let Some(linear) = linear::open(&args.run_dir)? {
        return linear::label(args, &linear);
    }
    let placement = Placement::open(args.device, 0)?;
    let saved = saved::open(&placement, &args.run_dir, args.max_length)?;
    start_threads(saved.threads, 1);
    match (&args.text, &args.data, &args.out) {
        (Some(text), _, _) => {
            let review = Review { id: "0".into(), text: text.clone(), label: None };
            let set = TokenSet::build(&[review], saved.cleaning, &saved.tokenizer, &saved.limit)?;
            let rows = rows(&saved, &set, |_| ())?;
            let label = argmax(&rows[0]);
            println!("{} {:.4}", label_name(label, rows[0].len()), rows[0][label]);
            Ok(())
        }
        (None, Some(data), Some(out)) => {
            check_out(out)?;
            let set = match args.limit {
                None => {
                    let (tokenizer, limit) = (&saved.tokenizer, &saved.limit);
                    datasets::file(data, false, tokenizer, saved.cleaning, limit, &saved.cache)?
                }
                Some(limit) => {
                    let mut reviews = read::read(data)?;
                    reviews.truncate(limit);
                    TokenSet::build(&reviews, saved.cleaning, &saved.tokenizer, &saved.limit)?
                }
            };
            let bar = ProgressBar::new(set.len() as u64).with_style(
                ProgressStyle::with_template(
                    "{wide_bar} {pos}/{len} reviews, {per_sec}, {eta} left",
                )
                .map_err(|e| Error::Bug(e.to_string()))?,
            );
            let rows = rows(&saved, &set, |done| bar.set_position(done as u64))?;
            bar.finish_and_clear();
            let labels: Vec<(&str, u32)> = set
                .ids
                .iter()
                .zip(&rows)
                .map(|(id, row)| (id.as_str(), argmax(row) as u32))
                .collect();
            submission::write(out, &labels)?;
            println!("{} reviews labelled in {}", labels.len(), out.display());
            Ok(())
        }
        _ => Err(Error::User("give --text, or --data with --out".into())),
    }
}

/// Refuses a place where nothing can be written, before anything is computed.
pub(super) fn check_out(out: &Path) -> Result<()> {
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

fn rows(saved: &saved::Saved, set: &TokenSet, done: impl FnMut(usize)) -> Result<Vec<Vec<f64>>> {
    check_ids(set, saved.classifier.config.vocab_size(), Some(&saved.model))?;
    probabilities(&saved.classifier, set, saved.micro_tokens, done)
}

pub(super) fn label_name(label: usize, classes: usize) -> String {
    match (label, classes) {
        (0, 2) => "negative".into(),
        (1, 2) => "positive".into(),
        _ => format!("label {label}"),
    }
}
