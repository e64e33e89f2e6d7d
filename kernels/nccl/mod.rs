//! Exchange of device memory between ranks over NCCL, one communicator a rank.
//!
//! Work goes to a stream of its own, of the highest priority, so that a bucket travels while backward
//! computes. An event orders it after what the compute stream had been given, another lets the compute
//! stream wait for it; the host waits for neither. Nothing relies on cudarc's tracking of events.
//!
//! One thread owns the device and the communicator: it alone makes these calls, in the same order on
//! every rank. A watchdog thread looks for errors and for work that does not end; it then aborts the
//! communicator, which lets the device go on (with wrong values), and every later call fails. So before
//! results are kept, [`Communicator::check`].
//!
//! A communicator that is dropped ends in good order, for which it needs the other ranks; while its thread
//! panics, or after a failure, it is aborted.
//!
//! Not yet run on a GPU: docs/gpu-debt.md.

#[cfg(feature = "nccl")]
mod comm;
#[cfg(feature = "nccl")]
mod communicator;
mod watchdog;

#[cfg(feature = "nccl")]
pub use comm::UniqueId;
#[cfg(feature = "nccl")]
pub use communicator::{Communicator, NcclError, Started};
