//! Ranks over MPI, in host memory.
//!
//! One thread owns MPI: it initialises, makes every call and finalises. Open MPI progresses only
//! inside its calls, so this thread is also what lets a bucket travel while backward computes.
//!
//! MPI waits by spinning. A rank that arrives early would take a core from its own backward, so
//! each call first meets the others in a non-blocking barrier that is polled with pauses; only then
//! does it spin, for the transfer itself.

use std::{
    sync::mpsc::{Receiver, Sender, channel},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use allreel_kernels::common::host;
use candle_core::Tensor;
use mpi::{
    Threading,
    collective::SystemOperation,
    datatype::PartitionMut,
    topology::SimpleCommunicator,
    traits::{Communicator, CommunicatorCollectives},
};

use super::{Collective, Pending, State, Transfer, gone};
use crate::{Error, Result};

/// Pause between two looks whether all ranks have arrived.
const POLL: Duration = Duration::from_micros(50);
/// Elements of one MPI call: 4 MiB stays in cache between reduction and copy, which was faster
/// than one call for the whole bucket (39 against 65 ms for 100 MB, 2 ranks).
const CHUNK: usize = 1 << 20;

enum Request {
    AllReduce(Tensor, Sender<Result<Transfer>>),
    AllReduceF64(Vec<f64>, Sender<Vec<f64>>),
    AllGather(Vec<u8>, Sender<Result<Vec<Vec<u8>>>>),
    Bare(usize, Sender<f64>),
    Abort(u8),
}

/// Who this rank is.
#[derive(Clone, Copy)]
struct Place {
    rank: usize,
    world: usize,
    local_rank: usize,
    local_world: usize,
}

/// One process of an MPI job.
pub struct Mpi {
    place: Place,
    requests: Option<Sender<Request>>,
    thread: Option<JoinHandle<()>>,
}

impl Mpi {
    /// Joins the MPI job that this process was started in; alone, it is a world of one.
    ///
    /// # Errors
    /// `Bug` if MPI is initialised already, `Device` if it does not start.
    pub fn new() -> Result<Self> {
        let (requests, inbox) = channel();
        let (ready, place) = channel();
        let thread = std::thread::Builder::new()
            .name("mpi".into())
            .spawn(move || serve(&ready, &inbox))
            .map_err(|e| Error::Device(format!("cannot start the communication thread: {e}")))?;
        let place = place.recv().map_err(|_| {
            Error::Device("MPI did not start; is it installed on every node?".into())
        })?;
        Ok(Self { place, requests: Some(requests), thread: Some(thread) })
    }

    /// Seconds of one plain `MPI_Allreduce` of `len` floats from buffer to buffer: what
    /// [`all_reduce_sum`](Collective::all_reduce_sum) is measured against.
    ///
    /// # Errors
    /// If the communication thread is gone.
    pub fn bare_all_reduce(&mut self, len: usize) -> Result<f64> {
        let (answer, pending) = channel();
        self.send(Request::Bare(len, answer))?;
        pending.recv().map_err(|_| gone())
    }

    fn send(&self, request: Request) -> Result<()> {
        match &self.requests {
            Some(requests) => requests.send(request).map_err(|_| gone()),
            None => Err(gone()),
        }
    }
}

impl Drop for Mpi {
    /// Finishes what was asked for, then finalises MPI.
    fn drop(&mut self) {
        self.requests = None;
        if let Some(thread) = self.thread.take() {
            // A panic over there has been printed by the hook already.
            let _ = thread.join();
        }
    }
}

impl Collective for Mpi {
    fn rank(&self) -> usize {
        self.place.rank
    }

    fn world(&self) -> usize {
        self.place.world
    }

    fn local_rank(&self) -> usize {
        self.place.local_rank
    }

    fn local_world(&self) -> usize {
        self.place.local_world
    }

    fn all_reduce_sum(&mut self, bucket: &Tensor) -> Result<Pending> {
        if self.place.world == 1 {
            return Ok(Pending::done(0, Instant::now()));
        }
        let (answer, pending) = channel();
        self.send(Request::AllReduce(bucket.clone(), answer))?;
        Ok(Pending(State::Running(pending)))
    }

    fn all_reduce_f64(&mut self, values: &mut [f64]) -> Result<()> {
        let (answer, pending) = channel();
        self.send(Request::AllReduceF64(values.to_vec(), answer))?;
        values.copy_from_slice(&pending.recv().map_err(|_| gone())?);
        Ok(())
    }

    fn all_gather(&mut self, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        let (answer, pending) = channel();
        self.send(Request::AllGather(bytes.to_vec(), answer))?;
        pending.recv().map_err(|_| gone())?
    }

    fn abort(&mut self, code: u8) -> ! {
        // MPI_Abort tells the launcher; if the thread hangs in a call, leaving without finalising
        // makes the launcher end the job as well.
        let _ = self.send(Request::Abort(code));
        std::thread::sleep(Duration::from_millis(500));
        std::process::exit(i32::from(code))
    }
}

/// The communication thread.
fn serve(ready: &Sender<Place>, inbox: &Receiver<Request>) {
    let Some((universe, _)) = mpi::initialize_with_threading(Threading::Funneled) else {
        return;
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
    if ready.send(place).is_err() {
        return;
    }
    let mut scratch = vec![0f32; CHUNK];
    // A requester that is gone has failed already; what it asked for still has to be done, because
    // the other ranks wait for it.
    for request in inbox {
        match request {
            Request::AllReduce(bucket, answer) => {
                let _ = answer.send(all_reduce(&world, &bucket, &mut scratch));
            }
            Request::AllReduceF64(values, answer) => {
                let mut sum = vec![0.0; values.len()];
                meet(&world);
                world.all_reduce_into(&values[..], &mut sum[..], SystemOperation::sum());
                let _ = answer.send(sum);
            }
            Request::AllGather(bytes, answer) => {
                let _ = answer.send(all_gather(&world, &bytes));
            }
            Request::Bare(len, answer) => {
                let _ = answer.send(bare(&world, len));
            }
            Request::Abort(code) => world.abort(i32::from(code)),
        }
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
