//! `allreel launch`: start N ranks of this binary and watch over them.

use std::{ffi::OsString, path::PathBuf};

use clap::Parser;

use super::{Cli, Command};
use crate::{Error, Result};

/// Arguments of `allreel launch`.
#[derive(clap::Args)]
pub struct Args {
    /// Number of ranks
    #[arg(short = 'n', long)]
    ranks: usize,
    /// Hosts to spread the ranks over, as mpirun reads them
    #[arg(long)]
    hostfile: Option<PathBuf>,
    /// Worker threads of each rank [default: cores of a node / ranks on it]
    #[arg(long)]
    threads: Option<usize>,
    /// The mpirun to use [default: $ALLREEL_MPIRUN, or the one on PATH]
    #[arg(long)]
    mpirun: Option<PathBuf>,
    /// The allreel command that every rank runs
    #[arg(last = true, required = true)]
    command: Vec<OsString>,
}

/// Runs the command; returns the exit code of the job.
///
/// # Errors
/// `User` if there is no usable mpirun or the arguments do not fit.
pub fn run(args: &Args) -> Result<u8> {
    if !cfg!(feature = "mpi") {
        return Err(Error::User(
            "this binary was built without MPI; build it with: cargo build --release --features mpi"
                .into(),
        ));
    }
    // Once, here, what every rank would say otherwise.
    let own_name = OsString::from("allreel");
    match Cli::try_parse_from(std::iter::once(&own_name).chain(&args.command)) {
        Ok(Cli { command: Command::Launch(_) }) => {
            return Err(Error::User(
                "launch cannot start a launch; write the command after -- without it".into(),
            ));
        }
        Ok(_) => {}
        Err(error) => error.exit(),
    }
    let program =
        std::env::current_exe().map_err(|e| Error::Bug(format!("own executable: {e}")))?;
    let launch = allreel_launch::Launch {
        ranks: args.ranks,
        threads: args.threads,
        hostfile: args.hostfile.clone(),
        mpirun: args.mpirun.clone(),
        program,
        args: args.command.clone(),
        // `train` saves a checkpoint on SIGTERM.
        graceful_stop: true,
    };
    launch.run().map_err(|e| match e.is_user() {
        true => Error::User(e.to_string()),
        false => Error::Device(e.to_string()),
    })
}
