//! Ranks over MPI, in host memory.
//!
//! The thread that owns it initialises MPI, makes every call and finalises. Open MPI progresses only
//! inside its calls, so that thread is also what lets a bucket travel while backward computes.
//!
//! MPI waits by spinning. A rank that arrives early would take a core from its own backward, so
//! each call first meets the others in a non-blocking barrier that is polled with pauses; only then
//! does it spin, for the transfer itself.

use std::time::{Duration, Instant};

use allreel_kernels::common::host;
use allreel_launch::Identity;
use candle_core::Tensor;
use mpi::{
    Threading,
    collective::SystemOperation,
    datatype::PartitionMut,
    environment::Universe,
    topology::SimpleCommunicator,
    traits::{Communicator, CommunicatorCollectives},
};

use super::{
    Collective, Transfer,
    carrier::{Carried, Carrier, Place},
};
use crate::{Error, Result};

/// Pause between two looks whether all ranks have arrived.
const POLL: Duration = Duration::from_micros(50);
/// Elements of one MPI call: 4 MiB stays in cache between reduction and copy, which was faster
/// than one call for the whole bucket (39 against 65 ms for 100 MB, 2 ranks).
const CHUNK: usize = 1 << 20;

/// One process of an MPI job.
pub type Mpi = Carried<MpiCarrier>;

impl Mpi {
    /// Joins the MPI job that this process was started in; alone, it is a world of one.
    ///
    /// # Errors
    /// `Device` if MPI does not start.
    pub fn new() -> Result<Self> {
        Carried::start(MpiCarrier::new)
    }

    /// Joins the MPI job in which a launcher says this process is `identity`.
    ///
    /// # Errors
    /// As [`Mpi::new`]; `User` if MPI sees another world than the launcher made.
    pub fn join(identity: &Identity) -> Result<Self> {
        let mpi = Self::new()?;
        if mpi.world() == identity.world {
            return Ok(mpi);
        }
        Err(Error::User(format!(
            "started as rank {} of {}, but MPI sees {} rank(s), so each would train alone; use \
             `allreel launch`, mpirun, or srun --mpi=pmix (--mpi=pmi2 for MPICH)",
            identity.rank,
            identity.world,
            mpi.world()
        )))
    }

    /// Seconds of one plain `MPI_Allreduce` of `len` floats from buffer to buffer: what
    /// [`all_reduce_sum`](Collective::all_reduce_sum) is measured against.
    ///
    /// # Errors
    /// If the communication thread is gone.
    pub fn bare_all_reduce(&mut self, len: usize) -> Result<f64> {
        self.call(move |carrier| bare(&carrier.world, len))
    }
}

/// MPI as a carrier.
pub struct MpiCarrier {
    place: Place,
    world: SimpleCommunicator,
    scratch: Vec<f32>,
    /// Finalises MPI when it goes.
    _universe: Universe,
}

impl MpiCarrier {
    fn new() -> Result<Self> {
        let Some((universe, _)) = mpi::initialize_with_threading(Threading::Funneled) else {
            return Err(Error::Device("MPI did not start; is it installed on every node?".into()));
        };
        let world = universe.world();
        let node = world.split_shared(world.rank());
        let place = Place {
            rank: world.rank() as usize,
            world: world.size() as usize,
            local_rank: node.rank() as usize,
            local_world: node.size() as usize,
        };
        drop(node);
        Ok(Self { place, world, scratch: vec![0f32; CHUNK], _universe: universe })
    }
}

impl Carrier for MpiCarrier {
    fn place(&self) -> Place {
        self.place
    }

    fn all_reduce(&mut self, bucket: &Tensor) -> Result<Transfer> {
        all_reduce(&self.world, bucket, &mut self.scratch)
    }

    fn all_reduce_f64(&mut self, values: &mut [f64]) -> Result<()> {
        let mut sum = vec![0.0; values.len()];
        meet(&self.world);
        self.world.all_reduce_into(&*values, &mut sum[..], SystemOperation::sum());
        values.copy_from_slice(&sum);
        Ok(())
    }

    fn all_gather(&mut self, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        all_gather(&self.world, bytes)
    }

    /// `MPI_Abort` tells the launcher, which ends the job.
    fn abort(&mut self, code: u8) {
        self.world.abort(i32::from(code))
    }
}

/// Waits for all ranks without taking a core.
fn meet(world: &SimpleCommunicator) {
    let mut request = world.immediate_barrier();
    while let Err(pending) = request.test() {
        request = pending;
        std::thread::sleep(POLL);
    }
}

fn all_reduce(
    world: &SimpleCommunicator,
    bucket: &Tensor,
    scratch: &mut [f32],
) -> Result<Transfer> {
    meet(world);
    let start = Instant::now();
    let bytes = host::write::<f32, _>(bucket, |values| {
        for chunk in values.chunks_mut(CHUNK) {
            let sum = &mut scratch[..chunk.len()];
            world.all_reduce_into(&*chunk, sum, SystemOperation::sum());
            chunk.copy_from_slice(sum);
        }
        Ok(std::mem::size_of_val(values))
    })?;
    Ok(Transfer { bytes, start, end: Instant::now() })
}

fn all_gather(world: &SimpleCommunicator, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
    meet(world);
    // An empty Vec's pointer is 1, which is Open MPI's MPI_IN_PLACE: one byte more, cut off below.
    let bytes: Vec<u8> = bytes.iter().copied().chain([0]).collect();
    let mine = i32::try_from(bytes.len())
        .map_err(|_| Error::Bug(format!("{} bytes in one message", bytes.len())))?;
    let mut counts = vec![0i32; world.size() as usize];
    world.all_gather_into(&mine, &mut counts[..]);
    let mut displacements = Vec::with_capacity(counts.len());
    let mut total = 0i32;
    for count in &counts {
        displacements.push(total);
        total = total
            .checked_add(*count)
            .ok_or_else(|| Error::Bug("over 2 GiB in one gather".into()))?;
    }
    let mut all = vec![0u8; total as usize];
    world.all_gather_varcount_into(
        &bytes[..],
        &mut PartitionMut::new(&mut all[..], &counts[..], &displacements[..]),
    );
    let part =
        |(count, start): (&i32, &i32)| all[*start as usize..][..*count as usize - 1].to_vec();
    Ok(counts.iter().zip(&displacements).map(part).collect())
}

fn bare(world: &SimpleCommunicator, len: usize) -> f64 {
    let (values, mut sum) = (vec![1f32; len], vec![0f32; len]);
    meet(world);
    let start = Instant::now();
    world.all_reduce_into(&values[..], &mut sum[..], SystemOperation::sum());
    start.elapsed().as_secs_f64()
}
