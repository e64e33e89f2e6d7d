//! Ranks: finding out which one this process is, starting them, and watching over them.
//!
//! [`Identity`] reads what a launcher (mpirun, srun, torchrun) left in the environment;
//! [`Launch`] drives mpirun itself, as `allreel launch` does. Neither links MPI, so a binary
//! built without it can still tell that it was started as one rank of several, and refuse.

mod error;
mod identity;
mod supervise;

pub use error::LaunchError;
pub use identity::Identity;
pub use supervise::Launch;
