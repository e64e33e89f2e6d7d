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
    /// What starts the ranks [default: mpirun where there is one (and this binary has MPI), else
    /// processes]
    #[arg(long)]
    backend: Option<Backend>,
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

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Backend {
    /// mpirun: ranks of MPI's, on any nodes
    Mpirun,
    /// This command: plain processes of this machine, which meet over TCP
    Processes,
}

impl Args {
    /// What starts the ranks; `None` leaves it to what this machine has.
    fn backend(&self) -> Result<Option<allreel_launch::Backend>> {
        let mpirun = self.backend == Some(Backend::Mpirun)
            || self.mpirun.is_some()
            || self.hostfile.is_some();
        Ok(match self.backend {
            Some(Backend::Processes) => Some(allreel_launch::Backend::Processes),
            _ if cfg!(feature = "mpi") => mpirun.then_some(allreel_launch::Backend::Mpirun),
            _ if mpirun => {
                return Err(Error::User(
                    "this binary was built without MPI; leave --backend, --mpirun and --hostfile out, or \
                     build it with: cargo build --release --features mpi"
                        .into(),
                ));
            }
            _ => Some(allreel_launch::Backend::Processes),
        })
    }
}

/// Runs the command; returns the exit code of the job.
///
/// # Errors
/// `User` if there is no usable mpirun or the arguments do not fit.
pub fn run(args: &Args) -> Result<u8> {
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
        backend: args.backend()?,
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
