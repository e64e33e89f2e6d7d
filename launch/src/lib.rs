//! Ranks: finding out which one this process is, meeting the others, starting them, and watching
//! over them.
//!
//! [`Identity`] reads what a launcher (mpirun, srun, torchrun) left in the environment; [`Meeting`] brings
//! ranks together over TCP; [`Launch`] starts them, by mpirun or as plain processes, as `allreel launch`
//! does. None of it links MPI.

mod error;
mod identity;
mod rendezvous;
mod supervise;

pub use error::LaunchError;
pub use identity::Identity;
pub use rendezvous::{Call, Group, Lost, Meeting};
pub use supervise::{Backend, Launch};

/// The exit code of a rank that ends only because another one failed.
pub const PEER_FAILED: u8 = 4;
