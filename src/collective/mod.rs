//! Ranks talking to each other: one trait, and what implements it.
//!
//! | file | ranks |
//! |---|---|
//! | [`solo`] | one process alone; refuses to be one of several |
//! | [`threads`] | N ranks in one process, for tests |
//! | [`carrier`] | processes, in host memory: what the next two have in common |
//! | [`mpi`] | over MPI |
//! | [`tcp`] | over TCP, where no MPI started them |
//! | `nccl` | either, with a CUDA device each (feature `nccl`) |
//!
//! [`connect`] chooses. A process that MPI's launcher started (mpirun, srun with `--mpi`) is a rank of
//! MPI's, if the binary has MPI. Any other that was told to be one of several (`RANK` and `WORLD_SIZE`, as
//! by torchrun and `allreel launch --backend processes`; or a plain srun) meets the others over TCP. What
//! nobody told anything is alone. Ranks that train on CUDA devices then go [`on_device`].
//!
//! Every rank must make the same calls in the same order. A rank that cannot go on calls
//! [`Collective::abort`], which ends all of them.

pub mod carrier;
#[cfg(feature = "mpi")]
pub mod mpi;
#[cfg(feature = "nccl")]
pub mod nccl;
pub mod solo;
pub mod tcp;
pub mod threads;

use std::time::{Duration, Instant};

use allreel_launch::Identity;
use candle_core::{Device, Tensor};

use self::{solo::Solo, tcp::Tcp};
use crate::{Error, Result};

/// The collective of this process, as it was started.
///
/// # Errors
/// `User` if the environment contradicts itself, or the other ranks are not met.
pub fn connect() -> Result<Box<dyn Collective>> {
    let identity = Identity::from_env().map_err(|e| Error::User(e.to_string()))?;
    // Outside mpirun and srun there is nobody to meet, and MPI costs a quarter of a second.
    let Some(identity) = identity else { return Ok(Box::new(Solo::new(1)?)) };
    #[cfg(feature = "mpi")]
    if identity.mpi {
        return Ok(Box::new(mpi::Mpi::join(&identity)?));
    }
    match identity.world {
        1 => Ok(Box::new(Solo::new(1)?)),
        _ => Ok(Box::new(Tcp::new(&identity)?)),
    }
}

/// The same ranks for tensors of `device`: over NCCL as well, if that is a CUDA device and there are several.
///
/// # Errors
/// `User` if this binary has no NCCL; `Device` if NCCL does not start.
pub fn on_device<'a>(
    carrier: &'a mut dyn Collective,
    device: &Device,
) -> Result<Box<dyn Collective + 'a>> {
    match device {
        Device::Cuda(device) if carrier.world() > 1 => over_nccl(carrier, device),
        _ => Ok(Box::new(carrier)),
    }
}

#[cfg(feature = "nccl")]
fn over_nccl<'a>(
    carrier: &'a mut dyn Collective,
    device: &candle_core::CudaDevice,
) -> Result<Box<dyn Collective + 'a>> {
    Ok(Box::new(nccl::Nccl::new(carrier, device)?))
}

#[cfg(not(feature = "nccl"))]
fn over_nccl<'a>(
    carrier: &'a mut dyn Collective,
    _: &candle_core::CudaDevice,
) -> Result<Box<dyn Collective + 'a>> {
    Err(Error::User(format!(
        "{} ranks on CUDA devices, but this binary was built without NCCL; build it with: cargo build \
         --release --features mpi,nccl",
        carrier.world()
    )))
}

/// A group of ranks.
pub trait Collective {
    /// Own number, from 0.
    fn rank(&self) -> usize;

    /// Number of ranks.
    fn world(&self) -> usize;

    /// Own number among the ranks of this node.
    fn local_rank(&self) -> usize;

    /// Number of ranks on this node.
    fn local_world(&self) -> usize;

    /// Starts summing a flat f32 tensor over all ranks, in place. The tensor must not be touched
    /// until [`Pending::wait`] returns. All ranks end with the same bits.
    ///
    /// # Errors
    /// `Peer` when the others cannot be reached.
    fn all_reduce_sum(&mut self, bucket: &Tensor) -> Result<Pending>;

    /// Sums a few numbers over all ranks, in place.
    ///
    /// # Errors
    /// As above.
    fn all_reduce_f64(&mut self, values: &mut [f64]) -> Result<()>;

    /// The bytes of every rank, in rank order; lengths may differ.
    ///
    /// # Errors
    /// As above.
    fn all_gather(&mut self, bytes: &[u8]) -> Result<Vec<Vec<u8>>>;

    /// Returns once every rank has called.
    ///
    /// # Errors
    /// As above.
    fn barrier(&mut self) -> Result<()> {
        self.all_gather(&[]).map(|_| ())
    }

    /// This rank fails and goes without the others: nothing may wait for them from here on.
    fn break_off(&mut self) {}

    /// Ends this process and, where the transport can, every other rank, with `code`.
    fn abort(&mut self, code: u8) -> ! {
        std::process::exit(i32::from(code))
    }
}

impl Collective for &mut dyn Collective {
    fn rank(&self) -> usize {
        (**self).rank()
    }

    fn world(&self) -> usize {
        (**self).world()
    }

    fn local_rank(&self) -> usize {
        (**self).local_rank()
    }

    fn local_world(&self) -> usize {
        (**self).local_world()
    }

    fn all_reduce_sum(&mut self, bucket: &Tensor) -> Result<Pending> {
        (**self).all_reduce_sum(bucket)
    }

    fn all_reduce_f64(&mut self, values: &mut [f64]) -> Result<()> {
        (**self).all_reduce_f64(values)
    }

    fn all_gather(&mut self, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        (**self).all_gather(bytes)
    }

    fn break_off(&mut self) {
        (**self).break_off();
    }

    fn abort(&mut self, code: u8) -> ! {
        (**self).abort(code)
    }
}

/// A reduction under way.
pub struct Pending(State);

enum State {
    Done(Transfer),
    Running(std::sync::mpsc::Receiver<Result<Transfer>>),
    /// And the rank that waits.
    #[cfg(feature = "nccl")]
    OnDevice(allreel_kernels::nccl::Started, Transfer, usize),
}

/// When a bucket was on the wire (not when it waited for the other ranks to arrive).
#[derive(Clone, Copy, Debug)]
pub struct Transfer {
    /// Bytes of the bucket.
    pub bytes: usize,
    /// First byte.
    pub start: Instant,
    /// Last byte.
    pub end: Instant,
}

impl Pending {
    fn done(bytes: usize, start: Instant) -> Self {
        Self(State::Done(Transfer { bytes, start, end: Instant::now() }))
    }

    /// Waits until the sum is there. On a CUDA device only what it is given from here on waits, not the
    /// host.
    ///
    /// # Errors
    /// `Peer` when the reduction failed.
    pub fn wait(self) -> Result<Transfer> {
        match self.0 {
            State::Done(transfer) => Ok(transfer),
            State::Running(answer) => answer.recv().map_err(|_| gone())?,
            #[cfg(feature = "nccl")]
            State::OnDevice(started, transfer, rank) => match started.wait() {
                Ok(()) => Ok(transfer),
                Err(error) => Err(Error::Peer { rank, message: error.to_string() }),
            },
        }
    }
}

/// What communication cost, over a whole run.
#[derive(Clone, Copy, Debug, Default)]
pub struct Traffic {
    /// Bytes summed.
    pub bytes: u64,
    /// Time on the wire.
    pub busy: Duration,
    /// The part of it that ran while backward was still computing.
    pub hidden: Duration,
}

impl Traffic {
    /// Adds one transfer; backward ended at `backward_end`.
    pub fn add(&mut self, transfer: Transfer, backward_end: Instant) {
        self.bytes += transfer.bytes as u64;
        self.busy += transfer.end - transfer.start;
        self.hidden += transfer.end.min(backward_end).saturating_duration_since(transfer.start);
    }
}

/// Makes a failure of any rank everybody's: the lowest failing rank keeps its error (as
/// [`Error::Agreed`]), the others get [`Error::Said`]. For checks that ranks make each on their own before they depend on each other.
///
/// # Errors
/// If any rank's `result` is one.
pub fn agree<T>(collective: &mut dyn Collective, result: Result<T>) -> Result<T> {
    let code = result.as_ref().err().map_or(0, Error::exit_code);
    let codes = collective.all_gather(&[code])?;
    let Some(failed) = codes.iter().position(|code| code != &[0]) else {
        return result;
    };
    if failed == collective.rank() {
        return result.map_err(|error| Error::Agreed(Box::new(error)));
    }
    Err(Error::Said { code: codes[failed].first().copied().unwrap_or(70) })
}

/// Fails unless every rank has the same `value` of `what`.
///
/// # Errors
/// `Peer` naming the first rank that differs from rank 0.
pub fn must_be_equal(collective: &mut dyn Collective, what: &str, value: &str) -> Result<()> {
    let all = collective.all_gather(value.as_bytes())?;
    let Some(rank) = all.iter().position(|other| *other != all[0]) else {
        return Ok(());
    };
    if collective.rank() != 0 {
        return Err(Error::Said { code: 4 });
    }
    let text = |i: usize| String::from_utf8_lossy(&all[i]).into_owned();
    let (own, theirs) = (text(0), text(rank));
    let (own, theirs) = own
        .lines()
        .zip(theirs.lines())
        .find(|(a, b)| a != b)
        .map_or((own.as_str(), theirs.as_str()), |lines| lines);
    Err(Error::Agreed(Box::new(Error::Peer {
        rank,
        message: format!(
            "runs another {what}: {theirs:?} where rank 0 has {own:?}; start all ranks with the same binary and config"
        ),
    })))
}

fn gone() -> Error {
    Error::Bug("the communication thread is gone".into())
}
