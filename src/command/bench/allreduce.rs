//! `allreel bench allreduce`: our bucketed all-reduce against one bare MPI_Allreduce of the same
//! size, and how much of it hides behind work.

use crate::Result;

/// Arguments of `allreel bench allreduce`.
#[derive(clap::Args)]
pub(super) struct Args {
    /// Size of the sum in MB (10^6 bytes)
    #[arg(long, default_value_t = 100)]
    megabytes: usize,
    /// Timed repetitions, after two that are not
    #[arg(long, default_value_t = 10)]
    repeats: usize,
}

/// Runs the command.
///
/// # Errors
/// `User` in a build without MPI.
#[cfg(not(feature = "mpi"))]
pub(super) fn run(args: &Args) -> Result<()> {
    Err(crate::Error::User(format!(
        "no MPI in this binary to sum {} MB {} times with; build with --features mpi",
        args.megabytes, args.repeats
    )))
}

/// Runs the command.
///
/// # Errors
/// `Peer` if communication fails.
#[cfg(feature = "mpi")]
pub(super) fn run(args: &Args) -> Result<()> {
    use candle_core::{DType, Device, Tensor};

    use super::Spread;
    use crate::collective::{Collective, mpi::Mpi};

    let mut mpi = Mpi::new()?;
    crate::command::start_threads(None, mpi.local_world());
    let len = args.megabytes * 1_000_000 / 4;
    let bucket = Tensor::zeros(len, DType::F32, &Device::Cpu)?;
    let (mut ours, mut bare) = (Vec::new(), Vec::new());
    for i in 0..args.repeats + 2 {
        let transfer = mpi.all_reduce_sum(&bucket)?.wait()?;
        let bare_seconds = mpi.bare_all_reduce(len)?;
        if i >= 2 {
            ours.push((transfer.end - transfer.start).as_secs_f64() * 1e3);
            bare.push(bare_seconds * 1e3);
        }
    }
    if mpi.rank() == 0 {
        let megabytes = args.megabytes as f64;
        for (name, times) in [("bucketed, in place", ours), ("bare MPI_Allreduce", bare)] {
            let s = Spread::of(times);
            println!(
                "{name:20} {megabytes} MB over {} ranks: median {:.1} ms (p20 {:.1}, p80 {:.1}), {:.2} GB/s",
                mpi.world(),
                s.median,
                s.p20,
                s.p80,
                megabytes / s.median
            );
        }
    }
    Ok(())
}
