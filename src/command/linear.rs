//! `eval` and `predict` with a linear model, which knows neither tokens nor devices.

use std::path::Path;

use rayon::prelude::*;

use super::{datasets, eval, predict, saved, start_threads};
use crate::{
    Error, Result,
    collective::{Collective, agree},
    config::{Config, Weights},
    data::{Review, read, submission},
    device::Choice,
    linear::{
        model::{Model, Tally, label_of},
        regression::sigmoid,
    },
};

/// A linear model, and the threads that its run asked for.
pub struct Linear {
    model: Model,
    threads: Option<usize>,
}

/// The model in a run's directory or its own, if it is a linear one.
///
/// # Errors
/// `User` if the run has none yet; `Data` if it is damaged.
pub fn open(dir: &Path) -> Result<Option<Linear>> {
    let own = dir.join("config.toml");
    if own.is_file() {
        let config = Config::load(&own, &[])?;
        return match config.model.weights {
            Weights::Linear(_) => {
                let model = Model::load(&saved::best(dir)?)?;
                Ok(Some(Linear { model, threads: config.run.threads }))
            }
            Weights::Pretrained(_) | Weights::Random(_) => Ok(None),
        };
    }
    match Model::is_in(dir) {
        true => Ok(Some(Linear { model: Model::load(dir)?, threads: None })),
        false => Ok(None),
    }
}

/// Refuses a device that linear models cannot use.
///
/// # Errors
/// `User` for `cuda`.
pub fn on_cpu(choice: Choice) -> Result<()> {
    match choice {
        Choice::Cuda => Err(Error::User(
            "--device cuda: linear models are computed on CPUs only; leave it out".into(),
        )),
        Choice::Auto | Choice::Cpu => Ok(()),
    }
}

fn check(choice: Choice, max_length: Option<usize>) -> Result<()> {
    match max_length {
        Some(length) => Err(Error::User(format!(
            "--max-length {length}: linear models read whole reviews; leave it out"
        ))),
        None => on_cpu(choice),
    }
}

/// Accuracy and mean loss of a set of `total` reviews, of which this rank has these scores.
///
/// # Errors
/// `Peer` when the others cannot be reached.
pub fn tally(
    scores: &[f64],
    labels: &[u32],
    total: usize,
    collective: &mut dyn Collective,
) -> Result<(f64, f64)> {
    let tally = Tally::of(scores, labels);
    let mut sums = [tally.correct as f64, tally.loss];
    collective.all_reduce_f64(&mut sums)?;
    Ok((sums[0] / total as f64, sums[1] / total as f64))
}

/// `allreel eval`, each rank its share.
///
/// # Errors
/// As its parts.
pub fn evaluate(args: &eval::Args, linear: &Linear, collective: &mut dyn Collective) -> Result<()> {
    start_threads(linear.threads, collective.local_world());
    agree(collective, check(args.device, args.max_length))?;
    let reviews = agree(collective, datasets::labelled(&args.data))?;
    let total = reviews.len();
    let mine: Vec<Review> =
        reviews.into_iter().skip(collective.rank()).step_by(collective.world()).collect();
    let labels: Vec<u32> = mine.iter().filter_map(|review| review.label).collect();
    let (accuracy, loss) = tally(&scores(&linear.model, &mine), &labels, total, collective)?;
    if collective.rank() == 0 {
        println!("accuracy {accuracy:.4}  loss {loss:.4}  reviews {total}");
    }
    Ok(())
}

/// `allreel predict`.
///
/// # Errors
/// As its parts.
pub fn label(args: &predict::Args, linear: &Linear) -> Result<()> {
    start_threads(linear.threads, 1);
    check(args.device, args.max_length)?;
    match (&args.text, &args.data, &args.out) {
        (Some(text), _, _) => {
            let review = Review { id: "0".into(), text: text.clone(), label: None };
            let score = scores(&linear.model, &[review])[0];
            let label = label_of(score);
            let probability = sigmoid(if label == 1 { score } else { -score });
            println!("{} {probability:.4}", predict::label_name(label as usize, 2));
            Ok(())
        }
        (None, Some(data), Some(out)) => {
            predict::check_out(out)?;
            let mut reviews = read::read(data)?;
            reviews.truncate(args.limit.unwrap_or(usize::MAX));
            let scores = scores(&linear.model, &reviews);
            let labels = reviews.iter().map(|review| review.id.as_str());
            let labels: Vec<(&str, u32)> = labels.zip(scores.into_iter().map(label_of)).collect();
            submission::write(out, &labels)?;
            println!("{} reviews labelled in {}", labels.len(), out.display());
            Ok(())
        }
        _ => Err(Error::User("give --text, or --data with --out".into())),
    }
}

fn scores(model: &Model, reviews: &[Review]) -> Vec<f64> {
    let texts: Vec<&str> = reviews.iter().map(|review| review.text.as_str()).collect();
    model.scores(&model.matrix(&model.reading.bags(texts.into_par_iter())))
}
