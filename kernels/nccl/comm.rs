//! NCCL's communicator, call by call. It is non-blocking: a call may return before it has taken effect,
//! and [`Comm::settle`] waits until it has, or has failed.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::time::{Duration, Instant};

use cudarc::driver::CudaStream;
use cudarc::nccl::sys::{self, ncclDataType_t, ncclRedOp_t, ncclResult_t};

/// What the initialiser of `ncclConfig_t` in nccl.h stands for.
const MAGIC: u32 = 0xcafe_beef;
/// NCCL 2.24.3, whose functions these are; later ones read its configuration.
const VERSION: u32 = 22_403;
/// `NCCL_CONFIG_UNDEF_INT`: NCCL's own choice.
const UNSET: c_int = c_int::MIN;
/// Between two looks whether a call has taken effect.
const POLL: Duration = Duration::from_micros(20);
/// How long it is looked at without a pause.
const SPIN: Duration = Duration::from_micros(200);

/// Names a group of ranks that is about to form; rank 0 makes it and gives it to the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UniqueId([u8; UniqueId::BYTES]);

impl UniqueId {
    /// Its size.
    pub const BYTES: usize = 128;

    /// A new one.
    ///
    /// # Errors
    /// NCCL's, in words.
    pub fn new() -> Result<Self, String> {
        let mut id = sys::ncclUniqueId { internal: [0; Self::BYTES] };
        // SAFETY: NCCL fills the structure that the pointer is to, which outlives the call.
        check(unsafe { sys::ncclGetUniqueId(&mut id) }, std::ptr::null_mut())?;
        Ok(Self(id.internal.map(|byte| byte as u8)))
    }

    /// As bytes to send.
    pub fn to_bytes(self) -> [u8; Self::BYTES] {
        self.0
    }

    /// As received.
    pub fn from_bytes(bytes: [u8; Self::BYTES]) -> Self {
        Self(bytes)
    }
}

/// One end of a memory transfer: elements of a device, contiguous.
#[derive(Clone, Copy, Debug)]
pub(super) struct Elements {
    /// Device address of the first.
    pub(super) address: u64,
    /// How many.
    pub(super) count: usize,
    pub(super) dtype: Dtype,
}

/// What can be summed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Dtype {
    F32,
    Bf16,
}

impl Dtype {
    fn raw(self) -> ncclDataType_t {
        match self {
            Self::F32 => ncclDataType_t::ncclFloat32,
            Self::Bf16 => ncclDataType_t::ncclBfloat16,
        }
    }

    pub(super) fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }
}

/// One call of every rank.
#[derive(Clone, Copy, Debug)]
pub(super) enum Call {
    /// Sums in place.
    AllReduce(Elements),
    /// Rank `root`'s elements to all, in place.
    Broadcast { elements: Elements, root: usize },
    /// Sums, of which every rank gets its `to.count`.
    ReduceScatter { from: Elements, to: Elements },
    /// Every rank's `from.count`, in rank order.
    AllGather { from: Elements, to: Elements },
}

/// A communicator. Not freed by itself: whoever owns it ends it with [`Comm::destroy`] or [`Comm::abort`].
#[derive(Debug)]
pub(super) struct Comm(sys::ncclComm_t);

// SAFETY: NCCL lets any thread use a communicator that has its device current, one thread at a time; a
// Comm is not Sync, so that is what the compiler holds its users to.
unsafe impl Send for Comm {}

impl Comm {
    /// Begins to join the group of `id`; [`Comm::settle`] waits for it to form. The device must be current.
    pub(super) fn start(id: UniqueId, rank: usize, world: usize) -> Result<Self, String> {
        let mut config = sys::ncclConfig_t {
            size: size_of::<sys::ncclConfig_t>(),
            magic: MAGIC,
            version: VERSION,
            blocking: 0,
            cgaClusterSize: UNSET,
            minCTAs: UNSET,
            maxCTAs: UNSET,
            netName: std::ptr::null(),
            splitShare: UNSET,
        };
        let id = sys::ncclUniqueId { internal: id.0.map(|byte| byte as c_char) };
        let mut comm = std::ptr::null_mut();
        // SAFETY: both pointers are to locals that outlive the call; NCCL copies the configuration, which
        // is initialised as nccl.h does for the version it states.
        let result = unsafe {
            sys::ncclCommInitRankConfig(&mut comm, world as c_int, id, rank as c_int, &mut config)
        };
        check(result, comm)?;
        Ok(Self(comm))
    }

    /// Whether the last call has taken effect.
    pub(super) fn is_settled(&self) -> Result<bool, String> {
        let mut state = ncclResult_t::ncclSuccess;
        // SAFETY: the communicator is live (it ends by value), the pointer is to a local.
        check(unsafe { sys::ncclCommGetAsyncError(self.0, &mut state) }, self.0)?;
        check(state, self.0)?;
        Ok(state != ncclResult_t::ncclInProgress)
    }

    /// Waits until the last call has taken effect.
    pub(super) fn settle(&self, what: &str, timeout: Duration) -> Result<(), String> {
        let started = Instant::now();
        while !self.is_settled()? {
            if started.elapsed() > timeout {
                let seconds = timeout.as_secs();
                return Err(format!(
                    "{what} did not get going within {seconds} s; not all ranks came"
                ));
            }
            // As a rule it takes microseconds, which a sleep would turn into a hundred.
            if started.elapsed() < SPIN { std::hint::spin_loop() } else { std::thread::sleep(POLL) }
        }
        Ok(())
    }

    /// Enqueues calls on `stream` as one.
    ///
    /// # Safety
    /// Until `stream` has run them, the addresses must be memory of the communicator's device of the sizes
    /// stated, which nothing else writes, nor reads where it is written here.
    pub(super) unsafe fn enqueue(&self, calls: &[Call], stream: &CudaStream) -> Result<(), String> {
        // SAFETY: no arguments; every start is ended below, also after an error.
        check(unsafe { sys::ncclGroupStart() }, self.0)?;
        // SAFETY: by this function's own contract.
        let enqueue = |call: &Call| unsafe { self.enqueue_one(*call, stream) };
        let enqueued = calls.iter().try_for_each(enqueue);
        // SAFETY: ends the group started above.
        let ended = check(unsafe { sys::ncclGroupEnd() }, self.0);
        enqueued.and(ended)
    }

    /// # Safety
    /// As [`Comm::enqueue`].
    unsafe fn enqueue_one(&self, call: Call, stream: &CudaStream) -> Result<(), String> {
        let stream = stream.cu_stream().cast();
        let read = |e: Elements| e.address as *const c_void;
        let write = |e: Elements| e.address as *mut c_void;
        // SAFETY: the communicator is live, the stream is borrowed; addresses and counts are good by this
        // function's contract.
        let result = unsafe {
            match call {
                Call::AllReduce(e) => sys::ncclAllReduce(
                    read(e),
                    write(e),
                    e.count,
                    e.dtype.raw(),
                    ncclRedOp_t::ncclSum,
                    self.0,
                    stream,
                ),
                Call::Broadcast { elements: e, root } => sys::ncclBroadcast(
                    read(e),
                    write(e),
                    e.count,
                    e.dtype.raw(),
                    root as c_int,
                    self.0,
                    stream,
                ),
                Call::ReduceScatter { from, to } => sys::ncclReduceScatter(
                    read(from),
                    write(to),
                    to.count,
                    to.dtype.raw(),
                    ncclRedOp_t::ncclSum,
                    self.0,
                    stream,
                ),
                Call::AllGather { from, to } => sys::ncclAllGather(
                    read(from),
                    write(to),
                    from.count,
                    from.dtype.raw(),
                    self.0,
                    stream,
                ),
            }
        };
        check(result, self.0)
    }

    /// Ends it in good order, together with the other ranks; aborts it where that fails.
    pub(super) fn destroy(self, timeout: Duration) -> Result<(), String> {
        // SAFETY: the communicator is live.
        let finalized = check(unsafe { sys::ncclCommFinalize(self.0) }, self.0);
        let finalized = finalized.and_then(|()| self.settle("NCCL's end", timeout));
        if let Err(error) = finalized {
            self.abort();
            return Err(error);
        }
        // SAFETY: finalised, and `self` ends here, so nothing uses it again.
        check(unsafe { sys::ncclCommDestroy(self.0) }, std::ptr::null_mut())
    }

    /// Ends it at once, with whatever it has under way.
    pub(super) fn abort(self) {
        // SAFETY: the communicator is live, and `self` ends here, so nothing uses it again. What NCCL
        // answers changes nothing.
        unsafe { sys::ncclCommAbort(self.0) };
    }
}

/// NCCL's answer in words; "in progress" is no error.
fn check(result: ncclResult_t, comm: sys::ncclComm_t) -> Result<(), String> {
    if matches!(result, ncclResult_t::ncclSuccess | ncclResult_t::ncclInProgress) {
        return Ok(());
    }
    // SAFETY: takes any result and returns a static string.
    let what = unsafe { text(sys::ncclGetErrorString(result)) };
    // SAFETY: takes a live communicator or null, and returns a string of its own.
    let last = unsafe { text(sys::ncclGetLastError(comm)) };
    Err(format!("NCCL: {what} ({}; NCCL_DEBUG=INFO says more)", last.trim()))
}

/// # Safety
/// `pointer` is null or a string that ends with a zero and lives through the call.
unsafe fn text(pointer: *const c_char) -> String {
    if pointer.is_null() {
        return "no details".into();
    }
    // SAFETY: not null, and by this function's contract.
    unsafe { CStr::from_ptr(pointer) }.to_string_lossy().into_owned()
}
