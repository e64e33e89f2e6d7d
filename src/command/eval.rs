//! `allreel eval`: accuracy and loss of a trained classifier on labelled reviews.

use std::path::PathBuf;

use super::{datasets, linear, saved, start_threads, train::check_ids};
use crate::{
    Result,
    collective::{Collective, agree},
    device::{Choice, Placement},
    step::evaluate::evaluate,
};

/// Arguments of `allreel eval`.
#[derive(clap::Args)]
pub struct Args {
    /// Directory of a run or of a Hugging Face model, or the name of a fetched one
    pub(super) run_dir: PathBuf,
    /// Labelled reviews: .tsv, .csv, .jsonl (or .gz), or an aclImdb directory
    #[arg(long)]
    pub(super) data: PathBuf,
    /// Where to compute
    #[arg(long, default_value = "auto")]
    pub(super) device: Choice,
    /// Most tokens of a review [default: the run's]
    #[arg(long)]
    pub(super) max_length: Option<usize>,
}

/// Runs the command as one rank.
///
/// # Errors
/// As its parts.
pub fn run(args: &Args, collective: &mut dyn Collective) -> Result<()> {
    if let Some(linear) = agree(collective, linear::open(&args.run_dir))? {
        return linear::evaluate(args, &linear, collective);
    }
    let placement = Placement::open(args.device, collective.local_rank());
    let placement = agree(collective, placement)?;
    let saved = agree(collective, saved::open(&placement, &args.run_dir, args.max_length))?;
    start_threads(saved.threads, collective.local_world());
    let set = datasets::once_per_node(collective, || {
        let (tokenizer, limit) = (&saved.tokenizer, &saved.limit);
        let set = datasets::file(&args.data, true, tokenizer, saved.cleaning, limit, &saved.cache)?;
        check_ids(&set, saved.classifier.config.vocab_size(), Some(&saved.model))?;
        Ok(set)
    })?;
    let result = evaluate(&saved.classifier, &set, saved.micro_tokens, collective);
    let result = agree(collective, result)?;
    if collective.rank() == 0 {
        println!("accuracy {:.4}  loss {:.4}  reviews {}", result.accuracy, result.loss, set.len());
    }
    Ok(())
}
