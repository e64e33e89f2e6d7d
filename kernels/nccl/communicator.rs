//! [`Communicator`]: tensors, streams and events around NCCL's calls.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use candle_core::cuda_backend::{CudaDevice, CudaStorageSlice};
use candle_core::{Storage, Tensor, bail};
use cudarc::driver::{CudaEvent, CudaStream, DevicePtr, DriverError, result::stream};

use super::comm::{Call, Comm, Dtype, Elements, UniqueId};
use super::watchdog::{Transport, Watchdog, Work};

/// Why ranks could not exchange something.
#[derive(Debug)]
pub enum NcclError {
    /// NCCL, the device or another rank failed; the communicator is of no more use.
    Failed(String),
    /// The call itself was wrong: a shape, a dtype, a device.
    Call(candle_core::Error),
}

impl std::fmt::Display for NcclError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Failed(message) => f.write_str(message),
            Self::Call(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for NcclError {}

impl From<candle_core::Error> for NcclError {
    fn from(error: candle_core::Error) -> Self {
        Self::Call(error)
    }
}

impl From<DriverError> for NcclError {
    fn from(error: DriverError) -> Self {
        Self::Failed(format!("CUDA: {error}"))
    }
}

/// The communicator as both threads share it; `None` once it has been ended.
#[derive(Clone)]
struct Shared {
    comm: Arc<Mutex<Option<Comm>>>,
    stream: Arc<CudaStream>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Option<Comm>> {
        // It is whole or gone, whoever panicked.
        self.comm.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Transport for Shared {
    fn error(&self) -> Option<String> {
        self.lock().as_ref().and_then(|comm| comm.is_settled().err())
    }

    fn abort(&self) {
        // Without its device current NCCL could free nothing; it is aborted all the same.
        let _ = self.stream.context().bind_to_thread();
        if let Some(comm) = self.lock().take() {
            comm.abort();
        }
    }
}

/// Calls under way, and the tensors that they read and write.
struct UnderWay {
    done: Arc<CudaEvent>,
    _tensors: Vec<Tensor>,
}

impl Work for UnderWay {
    fn is_done(&self) -> Result<bool, String> {
        // The watchdog's thread asks, and drops the tensors if so: cudarc binds the device for neither.
        let bound = self.done.context().bind_to_thread();
        bound.and_then(|()| self.done.try_is_complete()).map_err(|error| format!("CUDA: {error}"))
    }
}

/// Something that has been put on the communication stream.
#[must_use = "the compute stream does not wait for it by itself"]
pub struct Started {
    done: Arc<CudaEvent>,
    compute: Arc<CudaStream>,
}

impl Started {
    /// Makes what the compute stream is given from here on wait for it. The host does not wait.
    ///
    /// # Errors
    /// `Failed` if the device has failed.
    pub fn wait(self) -> Result<(), NcclError> {
        Ok(self.compute.wait(&self.done)?)
    }
}

/// This rank's end of a group of ranks.
pub struct Communicator {
    shared: Shared,
    compute: Arc<CudaStream>,
    watchdog: Watchdog<UnderWay>,
    world: usize,
    timeout: Duration,
    /// Calls so far, to name the one that hangs.
    calls: std::cell::Cell<u64>,
}

impl Communicator {
    /// Joins the group of `id` as `rank` of `world`, on `device` and its stream. Nothing may take longer
    /// than `timeout`, forming the group included.
    ///
    /// # Errors
    /// `Failed` if not all ranks come, or NCCL cannot work here.
    pub fn new(
        device: &CudaDevice,
        id: UniqueId,
        rank: usize,
        world: usize,
        timeout: Duration,
    ) -> Result<Self, NcclError> {
        let compute = device.cuda_stream();
        compute.context().bind_to_thread()?;
        let (_, highest) = stream::get_priority_range()?;
        let stream = compute.context().new_stream_with_priority(highest)?;
        let comm = Comm::start(id, rank, world).map_err(NcclError::Failed)?;
        if let Err(error) = comm.settle("the group of ranks", timeout) {
            comm.abort();
            return Err(NcclError::Failed(error));
        }
        let shared = Shared { comm: Arc::new(Mutex::new(Some(comm))), stream };
        let watchdog = Watchdog::start(shared.clone(), timeout)
            .map_err(|e| NcclError::Failed(format!("cannot start the watchdog thread: {e}")))?;
        Ok(Self { shared, compute, watchdog, world, timeout, calls: Default::default() })
    }

    /// Fails if anything has failed so far. What the device holds is then not to be used.
    ///
    /// # Errors
    /// `Failed`, naming what hung or what NCCL said.
    pub fn check(&self) -> Result<(), NcclError> {
        self.watchdog.failure().map_or(Ok(()), |failure| Err(NcclError::Failed(failure)))
    }

    /// Starts summing contiguous f32 or bf16 tensors over all ranks, in place, as one call. They must not
    /// be used before [`Started::wait`].
    ///
    /// # Errors
    /// `Call` for other tensors; `Failed` as [`Communicator::check`].
    pub fn all_reduce_sum(&self, tensors: &[&Tensor]) -> Result<Started, NcclError> {
        self.start("all-reduce", tensors, |elements| {
            Ok(elements.iter().map(|elements| Call::AllReduce(*elements)).collect())
        })
    }

    /// Starts giving every rank the elements of rank `root`, in place.
    ///
    /// # Errors
    /// As [`Communicator::all_reduce_sum`].
    pub fn broadcast(&self, tensor: &Tensor, root: usize) -> Result<Started, NcclError> {
        if root >= self.world {
            return Err(NcclError::Call(candle_core::Error::Msg(format!(
                "nccl: broadcast from rank {root} of {}",
                self.world
            ))));
        }
        self.start("broadcast", &[tensor], |elements| {
            Ok(vec![Call::Broadcast { elements: elements[0], root }])
        })
    }

    /// Starts summing `from` over all ranks, each of which gets its equal part of it into `to`.
    ///
    /// # Errors
    /// As [`Communicator::all_reduce_sum`]; `Call` also unless `from` is `world` times as long as `to`.
    pub fn reduce_scatter_sum(&self, from: &Tensor, to: &Tensor) -> Result<Started, NcclError> {
        self.start("reduce-scatter", &[from, to], |elements| {
            let (from, to) = (elements[0], elements[1]);
            self.expect_parts("reduce-scatter", from, to)?;
            Ok(vec![Call::ReduceScatter { from, to }])
        })
    }

    /// Starts putting the `from` of every rank one after the other into `to`.
    ///
    /// # Errors
    /// As [`Communicator::all_reduce_sum`]; `Call` also unless `to` is `world` times as long as `from`.
    pub fn all_gather(&self, from: &Tensor, to: &Tensor) -> Result<Started, NcclError> {
        self.start("all-gather", &[from, to], |elements| {
            let (from, to) = (elements[0], elements[1]);
            self.expect_parts("all-gather", to, from)?;
            Ok(vec![Call::AllGather { from, to }])
        })
    }

    fn expect_parts(&self, name: &str, whole: Elements, part: Elements) -> candle_core::Result<()> {
        if whole.count != part.count * self.world || whole.dtype != part.dtype {
            bail!(
                "nccl: {name} of {} {:?} in {} parts of {} {:?}",
                whole.count,
                whole.dtype,
                self.world,
                part.count,
                part.dtype
            );
        }
        Ok(())
    }

    /// Enqueues what `calls` makes of the tensors' memory behind what the compute stream has been given.
    fn start(
        &self,
        name: &str,
        tensors: &[&Tensor],
        calls: impl FnOnce(&[Elements]) -> candle_core::Result<Vec<Call>>,
    ) -> Result<Started, NcclError> {
        self.check()?;
        let stream = &self.shared.stream;
        let elements = tensors.iter().map(|tensor| elements(tensor, &self.compute));
        let elements = elements.collect::<candle_core::Result<Vec<_>>>()?;
        let calls = calls(&elements)?;
        stream.join(&self.compute)?;
        let number = self.calls.replace(self.calls.get() + 1);
        let bytes: usize = elements.iter().map(|e| e.count * e.dtype.bytes()).sum();
        let what = format!("{name} {number} of {bytes} bytes");
        self.enqueue(&what, &calls)?;
        let done = Arc::new(stream.record_event(None)?);
        let tensors = tensors.iter().map(|tensor| (*tensor).clone()).collect();
        self.watchdog.add(what, UnderWay { done: done.clone(), _tensors: tensors });
        Ok(Started { done, compute: self.compute.clone() })
    }

    fn enqueue(&self, what: &str, calls: &[Call]) -> Result<(), NcclError> {
        let mut comm = self.shared.lock();
        let Some(live) = comm.as_ref() else {
            return self.check().and(Err(NcclError::Failed("NCCL has been ended".into())));
        };
        // SAFETY: the addresses and counts are those of tensors that `start` has borrowed, and which it
        // keeps until the stream is done. The stream waits for what the compute stream was given before;
        // what it is given later waits by `Started::wait`, which callers are told to call first.
        let enqueued = unsafe { live.enqueue(calls, &self.shared.stream) };
        // Only then does the stream have it, and can an event be recorded behind it.
        let settled = enqueued.and_then(|()| live.settle(what, self.timeout));
        if let Err(error) = &settled {
            self.watchdog.fail(error);
            if let Some(comm) = comm.take() {
                comm.abort();
            }
        }
        settled.map_err(NcclError::Failed)
    }

    /// Ends it in good order: waits for what is under way, and for the other ranks to do the same.
    ///
    /// # Errors
    /// `Failed` if they do not within the timeout, or anything has failed before.
    pub fn finish(self) -> Result<(), NcclError> {
        self.end()
    }

    /// Ends it at once, with whatever is under way.
    pub fn abort(&self) {
        self.watchdog.fail("this rank aborted");
        self.shared.abort();
    }

    fn end(&self) -> Result<(), NcclError> {
        self.check()?;
        // While it waits, the watchdog still watches.
        self.shared.stream.synchronize()?;
        self.check()?;
        match self.shared.lock().take() {
            Some(comm) => comm.destroy(self.timeout).map_err(NcclError::Failed),
            None => Ok(()),
        }
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        let ended = match std::thread::panicking() || self.check().is_err() {
            true => Ok(()),
            false => self.end(),
        };
        if let Err(error) = ended {
            eprintln!("warning: NCCL did not end in good order: {error}");
        }
        self.shared.abort();
    }
}

/// The memory of a contiguous tensor on the device of `stream`.
fn elements(tensor: &Tensor, stream: &CudaStream) -> candle_core::Result<Elements> {
    let (storage, layout) = tensor.storage_and_layout();
    let Some((start, end)) = layout.contiguous_offsets() else {
        bail!("nccl: a tensor of shape {:?} is not contiguous", layout.shape());
    };
    let Storage::Cuda(storage) = &*storage else {
        bail!("nccl: a tensor that is not on a CUDA device");
    };
    if storage.device.cuda_stream().context().ordinal() != stream.context().ordinal() {
        bail!("nccl: a tensor of another device");
    }
    let (dtype, base) = match &storage.slice {
        CudaStorageSlice::F32(slice) => (Dtype::F32, slice.device_ptr(stream).0),
        CudaStorageSlice::BF16(slice) => (Dtype::Bf16, slice.device_ptr(stream).0),
        _ => bail!("nccl: cannot sum {:?}", tensor.dtype()),
    };
    Ok(Elements { address: base + (start * dtype.bytes()) as u64, count: end - start, dtype })
}
