//! `allreel bench allreduce`: our bucketed all-reduce against one bare MPI_Allreduce of the same
//! size.

#[cfg(feature = "mpi")]
use {
    super::measure::Spread,
    crate::{
        Result,
        collective::{Collective, mpi::Mpi},
    },
    candle_core::{DType, Device, Tensor},
};

/// Arguments of `allreel bench allreduce`.
#[derive(clap::Args)]
#[cfg_attr(not(feature = "mpi"), allow(dead_code))]
pub(super) struct Args {
    /// Size of the sum in MB (10^6 bytes)
    #[arg(long, default_value_t = 100)]
    megabytes: usize,
    /// Timed repetitions, after two that are not
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    repeats: u32,
}

/// Runs the command; returns the exit code.
#[cfg(not(feature = "mpi"))]
pub(super) fn run(_: &Args) -> u8 {
    let text =
        "this binary has no MPI to time; build it with: cargo build --release --features mpi";
    crate::command::complain(&crate::Error::User(text.into()), None)
}

/// Runs the command; returns the exit code.
#[cfg(feature = "mpi")]
pub(super) fn run(args: &Args) -> u8 {
    let mut mpi = match Mpi::new() {
        Ok(mpi) => mpi,
        Err(error) => return crate::command::complain(&error, None),
    };
    match time(args, &mut mpi) {
        Ok(()) => 0,
        Err(error) => {
            let code = crate::command::complain(&error, Some(mpi.rank()));
            mpi.abort(code)
        }
    }
}

#[cfg(feature = "mpi")]
fn time(args: &Args, mpi: &mut Mpi) -> Result<()> {
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
    if mpi.rank() != 0 {
        return Ok(());
    }
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
    Ok(())
}
