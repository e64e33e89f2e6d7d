//! The one error type, and what exit code each kind ends the process with.
//!
//! The kinds answer "who has to act": the user (a flag, a config, a file), nobody until the
//! machine has room (`Device`), the operator of another rank (`Peer`), or us (`Bug`).

/// Everything that can stop a run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A bad flag, config or combination of settings; says what to write instead.
    #[error("{0}")]
    User(String),
    /// A bad input file; names the file, the line, the value and the remedy.
    #[error("{0}")]
    Data(String),
    /// The machine ran out of something (memory, disk, network): what was asked for and what would
    /// fit.
    #[error("{0}")]
    Device(String),
    /// A device has no memory left: what was asked for, and what there was.
    #[error("{0}")]
    Memory(String),
    /// Another rank failed or disagrees.
    #[error("rank {rank}: {message}")]
    Peer {
        /// The rank that failed.
        rank: usize,
        /// What it said, or what was seen of it.
        message: String,
    },
    /// Ctrl-C or SIGTERM: everything was saved before this was returned.
    #[error("{0}")]
    Interrupted(String),
    /// Any of the above, known to all ranks: each leaves by itself, and nobody waits.
    #[error(transparent)]
    Agreed(Box<Error>),
    /// Another rank has failed and says so itself; this one only leaves with the same code.
    #[error("another rank failed")]
    Said {
        /// That rank's exit code.
        code: u8,
    },
    /// An invariant of ours does not hold.
    #[error("internal error (please report it): {0}")]
    Bug(String),
}

/// `std::result::Result` with our [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// The process exit code: 2 for bad input, 3 for the machine, 4 for a peer, 130 for an
    /// interrupt, 70 (`EX_SOFTWARE`) for a bug.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::User(_) | Self::Data(_) => 2,
            Self::Device(_) | Self::Memory(_) => 3,
            Self::Peer { .. } => allreel_launch::PEER_FAILED,
            Self::Agreed(error) => error.exit_code(),
            Self::Said { code } => *code,
            Self::Interrupted(_) => 130,
            Self::Bug(_) => 70,
        }
    }

    /// A file that could not be read: the user's to fix.
    pub fn reading(path: &std::path::Path, error: impl std::fmt::Display) -> Self {
        Self::Data(format!("cannot read {}: {error}", path.display()))
    }

    /// A file that could not be written: disk full, permissions.
    pub fn writing(path: &std::path::Path, error: impl std::fmt::Display) -> Self {
        Self::Device(format!(
            "cannot write {}: {error}; free some space there, or choose another place",
            path.display()
        ))
    }
}

/// Shape and dtype errors of the tensor library are invariants of ours by the time they surface:
/// inputs are checked where they enter. A device may be out of memory, though, or fail.
impl From<candle_core::Error> for Error {
    fn from(error: candle_core::Error) -> Self {
        match allreel_kernels::common::is_out_of_memory(&error) {
            true => Self::Memory(error.to_string()),
            false if error.to_string().contains("CUDA_ERROR") => {
                Self::Device(format!("the CUDA device failed: {error}"))
            }
            false => Self::Bug(error.to_string()),
        }
    }
}
