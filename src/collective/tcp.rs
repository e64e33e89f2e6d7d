//! Ranks over TCP, in host memory: for jobs that no MPI started (`allreel launch` without mpirun,
//! torchrun, plain srun).
//!
//! Sums go through rank 0, which adds in the order of ranks: the same bits whatever arrives first, and the
//! same as [`super::threads`]. Its network carries every bucket `2 (world - 1)` times, so this is for a few
//! ranks; many nodes want MPI, or NCCL on GPUs.

use std::time::Instant;

use allreel_kernels::common::host;
use allreel_launch::{Call, Group, Identity, LaunchError, Lost, Meeting};
use candle_core::Tensor;

use super::{
    Transfer,
    carrier::{Carried, Carrier, Place},
};
use crate::{Error, Result};

/// Elements of one message of a bucket.
const CHUNK: usize = 1 << 18;

/// One process of a job whose ranks met over TCP.
pub type Tcp = Carried<TcpCarrier>;

impl Tcp {
    /// Meets the other ranks where the environment says.
    ///
    /// # Errors
    /// `User` if it says nothing, or the ranks do not come together; `Device` if there is no network.
    pub fn new(identity: &Identity) -> Result<Self> {
        let met = Meeting::from_env(identity).and_then(|meeting| meeting.meet());
        Self::of(*identity, met.map_err(refused)?)
    }

    /// The ranks of `group`, which have met.
    ///
    /// # Errors
    /// `Device` if there can be no thread.
    pub fn of(identity: Identity, group: Group) -> Result<Self> {
        Carried::start(move || Ok(TcpCarrier { identity, group }))
    }
}

fn refused(error: LaunchError) -> Error {
    match error.is_user() {
        true => Error::User(error.to_string()),
        false => Error::Device(error.to_string()),
    }
}

/// TCP as a carrier.
pub struct TcpCarrier {
    identity: Identity,
    group: Group,
}

impl TcpCarrier {
    /// Sums numbers of `N` bytes each, of which all ranks have equally many, in place.
    fn sum<const N: usize>(
        &mut self,
        values: &mut [u8],
        add: impl Fn([u8; N], [u8; N]) -> [u8; N],
    ) -> Result<()> {
        let sum = self.group.exchange(Call::Sum, values, |mine, theirs| {
            let mut sum = mine.to_vec();
            for (i, theirs) in theirs.iter().enumerate() {
                same_length(i + 1, theirs, mine.len())?;
                for (sum, value) in sum.as_chunks_mut().0.iter_mut().zip(theirs.as_chunks().0) {
                    *sum = add(*sum, *value);
                }
            }
            Ok(sum)
        });
        let sum = sum.and_then(|sum| same_length(0, &sum, values.len()).map(|()| sum));
        values.copy_from_slice(&sum.map_err(lost)?);
        Ok(())
    }
}

fn same_length(rank: usize, bytes: &[u8], expected: usize) -> Result<(), Lost> {
    if bytes.len() == expected {
        return Ok(());
    }
    let message = format!("has {} bytes in a sum of {expected}", bytes.len());
    Err(Lost { rank, message })
}

fn lost(lost: Lost) -> Error {
    Error::Peer { rank: lost.rank, message: lost.message }
}

impl Carrier for TcpCarrier {
    fn place(&self) -> Place {
        let Identity { rank, world, local_rank, local_world, .. } = self.identity;
        Place { rank, world, local_rank, local_world }
    }

    fn all_reduce(&mut self, bucket: &Tensor) -> Result<Transfer> {
        // Waiting for the others is no time on the wire.
        self.group.broadcast(&[]).map_err(lost)?;
        let start = Instant::now();
        let mut result = Ok(());
        let bytes = host::write::<f32, _>(bucket, |values| {
            let add = |a, b| (f32::from_ne_bytes(a) + f32::from_ne_bytes(b)).to_ne_bytes();
            result = values
                .chunks_mut(CHUNK)
                .try_for_each(|chunk| self.sum(bytemuck::cast_slice_mut(chunk), add));
            Ok(std::mem::size_of_val(values))
        })?;
        result.map(|()| Transfer { bytes, start, end: Instant::now() })
    }

    fn all_reduce_f64(&mut self, values: &mut [f64]) -> Result<()> {
        let add = |a, b| (f64::from_ne_bytes(a) + f64::from_ne_bytes(b)).to_ne_bytes();
        self.sum(bytemuck::cast_slice_mut(values), add)
    }

    fn all_gather(&mut self, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.group.gather(bytes).map_err(lost)
    }

    fn abort(&mut self, code: u8) {
        self.group.leave(&format!("it ended with exit code {code}; see its own output"));
    }
}
