//! Ranks on CUDA devices: buckets go from device to device over NCCL, all else over the carrier (MPI or
//! TCP) that brought the ranks together.

use std::time::{Duration, Instant};

use allreel_kernels::nccl::{Communicator, NcclError, UniqueId};
use candle_core::{CudaDevice, Tensor};

use super::{Collective, Pending, State, Transfer, agree};
use crate::{Error, Result};

/// How long anything may take, unless `ALLREEL_NCCL_TIMEOUT` gives seconds.
const TIMEOUT: u64 = 600;

/// One rank of several with a CUDA device each (or a share of one).
pub struct Nccl<'a> {
    communicator: Communicator,
    carrier: &'a mut dyn Collective,
}

impl<'a> Nccl<'a> {
    /// Joins the ranks of `carrier` over NCCL as well, for tensors of `device`.
    ///
    /// # Errors
    /// `Device` if NCCL does not start; `User` for a bad `ALLREEL_NCCL_TIMEOUT`.
    pub fn new(carrier: &'a mut dyn Collective, device: &CudaDevice) -> Result<Self> {
        let timeout = agree(carrier, timeout())?;
        let id = (carrier.rank() == 0).then(UniqueId::new).transpose().map_err(unusable);
        let id = agree(carrier, id)?.map(UniqueId::to_bytes);
        let ids = carrier.all_gather(id.as_ref().map_or(&[], |id| &id[..]))?;
        let id = ids[0].as_slice().try_into().map(UniqueId::from_bytes);
        let id = id.map_err(|_| Error::Bug(format!("an NCCL id of {} bytes", ids[0].len())))?;
        let (rank, world) = (carrier.rank(), carrier.world());
        let communicator = Communicator::new(device, id, rank, world, timeout);
        let communicator = agree(carrier, communicator.map_err(unusable))?;
        Ok(Self { communicator, carrier })
    }

    /// What NCCL has run into, as an error of the rank that waited.
    fn lost(&self, error: NcclError) -> Error {
        match error {
            NcclError::Failed(message) => Error::Peer { rank: self.carrier.rank(), message },
            NcclError::Call(error) => error.into(),
        }
    }

    /// Wrong values must not be told to anybody.
    fn check(&self) -> Result<()> {
        self.communicator.check().map_err(|error| self.lost(error))
    }
}

fn unusable(error: impl std::fmt::Display) -> Error {
    Error::Device(format!("NCCL does not start here: {error}"))
}

fn timeout() -> Result<Duration> {
    let Ok(value) = std::env::var("ALLREEL_NCCL_TIMEOUT") else {
        return Ok(Duration::from_secs(TIMEOUT));
    };
    value.parse().ok().filter(|seconds| *seconds > 0).map(Duration::from_secs).ok_or_else(|| {
        Error::User(format!(
            "environment: ALLREEL_NCCL_TIMEOUT={value}: expected whole seconds from 1"
        ))
    })
}

impl Collective for Nccl<'_> {
    fn rank(&self) -> usize {
        self.carrier.rank()
    }

    fn world(&self) -> usize {
        self.carrier.world()
    }

    fn local_rank(&self) -> usize {
        self.carrier.local_rank()
    }

    fn local_world(&self) -> usize {
        self.carrier.local_world()
    }

    /// Sums a bucket of the device over NCCL, one of the host (rows of a sparse gradient) over the carrier.
    fn all_reduce_sum(&mut self, bucket: &Tensor) -> Result<Pending> {
        if !bucket.device().is_cuda() {
            self.check()?;
            return self.carrier.all_reduce_sum(bucket);
        }
        let started = self.communicator.all_reduce_sum(&[bucket]);
        let started = started.map_err(|error| self.lost(error))?;
        // When it travels only the device knows: no time on the wire is claimed.
        let now = Instant::now();
        let bytes = bucket.elem_count() * bucket.dtype().size_in_bytes();
        let rank = self.carrier.rank();
        Ok(Pending(State::OnDevice(started, Transfer { bytes, start: now, end: now }, rank)))
    }

    fn all_reduce_f64(&mut self, values: &mut [f64]) -> Result<()> {
        self.check()?;
        self.carrier.all_reduce_f64(values)
    }

    fn all_gather(&mut self, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.check()?;
        self.carrier.all_gather(bytes)
    }

    fn break_off(&mut self) {
        self.communicator.abort();
    }

    fn abort(&mut self, code: u8) -> ! {
        self.communicator.abort();
        self.carrier.abort(code)
    }
}
