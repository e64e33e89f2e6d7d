//! `allreel bench`: whole training steps, and the all-reduce.

mod allreduce;
mod step;

use clap::Subcommand;

use super::complain;

/// Arguments of `allreel bench`.
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// One training step: forward, backward, AdamW
    Step(step::Args),
    /// The bucketed all-reduce against one bare MPI_Allreduce (start it with `allreel launch -n 2 --`)
    Allreduce(allreduce::Args),
}

/// Runs the command; returns the exit code.
pub fn run(args: &Args) -> u8 {
    match &args.what {
        What::Step(args) => match step::run(args) {
            Ok(()) => 0,
            Err(error) => complain(&error, None),
        },
        What::Allreduce(args) => allreduce::run(args),
    }
}

/// Minimum, 20th percentile, median and 80th percentile of some times.
struct Spread {
    min: f64,
    p20: f64,
    median: f64,
    p80: f64,
}

impl Spread {
    fn of(mut times: Vec<f64>) -> Self {
        times.sort_by(f64::total_cmp);
        let at = |share: f64| times[((times.len() - 1) as f64 * share).round() as usize];
        Self { min: at(0.0), p20: at(0.2), median: at(0.5), p80: at(0.8) }
    }
}
