//! `allreel bench`: kernels against what the device can do, whole training steps, and the all-reduce.
//!
//! | file | owns |
//! |---|---|
//! | `ops` | `allreel bench [OP]...` |
//! | `op` | the cases: sizes, bytes and FLOPs, what is run |
//! | `measure`, `clock`, `cache` | repetitions and quantiles; the two clocks; emptying the caches |
//! | `ceiling` | what the device can do at most |
//! | `record`, `table`, `compare` | a run as JSON, as a table, beside an older one |
//! | `step` | `allreel bench step` |
//! | `allreduce` | `allreel bench allreduce` |

mod allreduce;
mod cache;
mod ceiling;
mod clock;
mod compare;
mod measure;
mod op;
mod ops;
mod record;
mod step;
mod table;

use clap::Subcommand;

use super::complain;

/// Arguments of `allreel bench`.
#[derive(clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Args {
    #[command(subcommand)]
    whole: Option<Whole>,
    #[command(flatten)]
    ops: ops::Args,
}

/// What is not one op.
#[derive(Subcommand)]
enum Whole {
    /// One training step: forward, backward, AdamW
    Step(step::Args),
    /// The bucketed all-reduce against one bare MPI_Allreduce (start it with `allreel launch -n 2 --`)
    Allreduce(allreduce::Args),
}

/// Runs the command; returns the exit code.
pub fn run(args: &Args) -> u8 {
    let done = match &args.whole {
        Some(Whole::Allreduce(args)) => return allreduce::run(args),
        Some(Whole::Step(args)) => step::run(args),
        None => ops::run(&args.ops),
    };
    match done {
        Ok(()) => 0,
        Err(error) => complain(&error, None),
    }
}
