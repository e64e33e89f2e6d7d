//! The commands, one file each, and how a process becomes a rank.
//!
//! | file | command |
//! |---|---|
//! | [`train`] | `allreel train CONFIG` |
//! | [`eval`] | `allreel eval RUN_DIR --data FILE` |
//! | [`predict`] | `allreel predict RUN_DIR --data FILE --out FILE`, or `--text` |
//! | [`mod@bench`] | `allreel bench [OP]...`, `allreel bench step`, `allreel bench allreduce` |
//! | [`check`] | `allreel check` |
//! | [`embed`] | `allreel embed --data FILE --out FILE` |
//! | [`merge`] | `allreel merge RUN_DIR --out DIR` |
//! | [`fetch`] | `allreel fetch MODEL`, `allreel fetch imdb` |
//! | [`plan`] | `allreel plan CONFIG` |
//! | [`launch`] | `allreel launch -n N -- COMMAND` |
//! | [`datasets`], [`saved`], [`linear`] | token sets, and models that a run left: what they share |

pub mod bench;
pub mod check;
pub mod datasets;
pub mod embed;
pub mod eval;
pub mod fetch;
pub mod launch;
pub mod linear;
pub mod merge;
mod model;
pub mod plan;
pub mod predict;
pub mod saved;
pub mod train;

use std::{
    io::Write,
    panic::{AssertUnwindSafe, catch_unwind},
};

use clap::{Parser, Subcommand};

use crate::{
    Error, Result,
    collective::{self, Collective},
};

/// Distributed trainer for sentiment classifiers.
#[derive(Parser)]
#[command(name = "allreel", version, about, max_term_width = 100)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Train a classifier as a config file says
    Train(train::Args),
    /// Accuracy and loss of a trained classifier on labelled reviews
    Eval(eval::Args),
    /// Label reviews: a file into a submission, or a text on the command line
    Predict(predict::Args),
    /// Time kernels, whole training steps or the all-reduce
    Bench(Box<bench::Args>),
    /// Whether this machine computes right: kernels, layers, training steps, ranks
    Check(check::Args),
    /// Train vectors of words on reviews
    Embed(embed::Args),
    /// Fold a LoRA adapter into its model's weights: a plain Hugging Face model
    Merge(merge::Args),
    /// Fetch models of the Hugging Face Hub, or the IMDB reviews
    Fetch(fetch::Args),
    /// How much memory a run will need, and the largest batch that fits
    Plan(plan::Args),
    /// Start N ranks, with mpirun or without, and watch over them
    Launch(launch::Args),
}

impl Cli {
    /// Runs the command; returns the process's exit code.
    pub fn run(self) -> u8 {
        match self.command {
            Command::Launch(args) => match launch::run(&args) {
                Ok(code) => code,
                Err(error) => complain(&error, None),
            },
            Command::Train(args) => as_rank(|collective| train::run(&args, collective)),
            Command::Eval(args) => as_rank(|collective| eval::run(&args, collective)),
            Command::Predict(args) => as_rank(|collective| predict::run(&args, collective)),
            Command::Bench(args) => bench::run(&args),
            Command::Check(args) => as_rank(|collective| check::run(&args, collective)),
            Command::Embed(args) => alone(embed::run(&args)),
            Command::Fetch(args) => alone(fetch::run(&args)),
            Command::Merge(args) => alone(merge::run(&args)),
            Command::Plan(args) => alone(plan::run(&args)),
        }
    }
}

/// The exit code of a command that is no rank.
fn alone(result: Result<()>) -> u8 {
    result.map_or_else(|error| complain(&error, None), |()| 0)
}

/// Joins the ranks that this process was started with, and runs `body` as one of them.
fn as_rank(body: impl FnOnce(&mut dyn Collective) -> Result<()>) -> u8 {
    let mut collective = match collective::connect() {
        Ok(collective) => collective,
        Err(error) => return complain(&error, None),
    };
    let rank = (collective.world() > 1).then(|| collective.rank());
    // A rank that unwound into finalising would wait for peers that wait for it.
    let result = catch_unwind(AssertUnwindSafe(|| body(&mut *collective)))
        .unwrap_or_else(|_| Err(Error::Bug("a panic; its message is above".into())));
    let Err(error) = result else { return 0 };
    let code = complain(&error, rank);
    match error {
        // Every rank knows of these and leaves by itself.
        Error::Agreed(_) | Error::Said { .. } | Error::Interrupted(_) => code,
        // The others would wait for this one for ever.
        _ if rank.is_some() => collective.abort(code),
        _ => code,
    }
}

/// Prints an error the way users see all of them; returns its exit code.
pub(crate) fn complain(error: &Error, rank: Option<usize>) -> u8 {
    if !matches!(error, Error::Said { .. }) {
        let line = match rank {
            Some(rank) => format!("error (rank {rank}): {error}\n"),
            None => format!("error: {error}\n"),
        };
        // In one piece: between the pieces that eprintln writes, mpirun put its banner about the abort.
        let _ = std::io::stderr().write_all(line.as_bytes());
    }
    error.exit_code()
}

/// Starts the worker threads of this rank: as many as asked for (`RAYON_NUM_THREADS` asks too), or
/// its share of the node's cores.
pub(crate) fn start_threads(asked: Option<usize>, local_world: usize) -> usize {
    let environment = std::env::var("RAYON_NUM_THREADS").ok().and_then(|n| n.parse().ok());
    let asked = asked.or(environment.filter(|n| *n > 0));
    let usable = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = asked.unwrap_or_else(|| {
        // A launcher that bound this rank to some of the cores has divided them already.
        let bound = online_cpus().is_some_and(|online| usable < online);
        if bound { usable } else { usable / local_world }
    });
    allreel_kernels::threads::start(threads.max(1))
}

/// Processors that this node has, whatever this process may use; `None` if Linux does not say.
fn online_cpus() -> Option<usize> {
    let list = std::fs::read_to_string("/sys/devices/system/cpu/online").ok()?;
    let mut count = 0;
    for range in list.trim().split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        count += last.parse::<usize>().ok()? + 1 - first.parse::<usize>().ok()?;
    }
    Some(count)
}
