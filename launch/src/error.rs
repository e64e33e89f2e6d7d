//! Everything that keeps a job from starting. A job that started and failed is no error here: it
//! has an exit code.

use std::path::PathBuf;

/// Why ranks could not be started, or why this process cannot tell which rank it is.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// `-n 0`.
    #[error("-n 0: a job needs at least one rank; use -n 1 or more")]
    NoRanks,
    /// `--threads 0`.
    #[error(
        "--threads 0: a rank needs at least one thread; leave it out to share the cores evenly"
    )]
    NoThreads,
    /// `allreel launch` under a launcher would start the whole job once per rank.
    #[error(
        "this is already rank {rank} of {world}, so `launch` would start {world} jobs; \
         drop `launch -n N --` here, or the outer mpirun or srun"
    )]
    Nested {
        /// The rank this process is.
        rank: usize,
        /// How many there are.
        world: usize,
    },
    /// Nothing called mpirun anywhere.
    #[error(
        "no mpirun on PATH; install one with \
         `apt-get install -y --no-install-recommends openmpi-bin libopenmpi-dev`, \
         name it with --mpirun or ALLREEL_MPIRUN, or use --backend processes"
    )]
    NoMpirun,
    /// The mpirun that was named cannot be run.
    #[error(
        "{origin} names {}, which cannot be run ({reason}); give the path of an mpirun",
        path.display()
    )]
    NotRunnable {
        /// `--mpirun` or `ALLREEL_MPIRUN`.
        origin: &'static str,
        /// The path it gave.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// It runs, but it is none that we know how to drive.
    #[error(
        "{} is neither Open MPI nor MPICH (`--version` says {said:?}); \
         name one of those with --mpirun or ALLREEL_MPIRUN", path.display()
    )]
    UnknownMpirun {
        /// The program asked.
        path: PathBuf,
        /// The first line of its answer.
        said: String,
    },
    /// The hostfile is missing, empty or malformed.
    #[error("{}: {reason}", place(path, *line))]
    Hostfile {
        /// The file.
        path: PathBuf,
        /// The line, from 1; 0 when it is the whole file.
        line: usize,
        /// What is wrong, and what to write instead.
        reason: String,
    },
    /// More ranks than the hostfile has slots.
    #[error(
        "-n {ranks}: {} offers {slots} slots; use -n {slots} or raise slots= there", path.display()
    )]
    TooFewSlots {
        /// Ranks asked for.
        ranks: usize,
        /// Slots of all hosts together.
        slots: usize,
        /// The hostfile.
        path: PathBuf,
    },
    /// A launcher's variable holds something else than it should.
    #[error("environment: {name}={value}: {expected}")]
    BadVariable {
        /// The variable.
        name: &'static str,
        /// What it holds.
        value: String,
        /// What it should hold.
        expected: String,
    },
    /// Half of a launcher's variables.
    #[error("environment: {present} is set but {absent} is not; set both, or unset {present}")]
    MissingVariable {
        /// The one that is there.
        present: &'static str,
        /// The one that is not.
        absent: &'static str,
    },
    /// Nothing says where ranks without MPI should meet.
    #[error(
        "started as rank {rank} of {world}, not by MPI's own launcher (or with a binary built without \
         MPI), and MASTER_ADDR is not set; set MASTER_ADDR to the host of rank 0 and MASTER_PORT to a \
         free port there, the same for every rank, or use `allreel launch`"
    )]
    NoMeetingPlace {
        /// The rank this process is.
        rank: usize,
        /// How many there are.
        world: usize,
    },
    /// The ranks did not come together over TCP.
    #[error("{address}: {reason}")]
    Rendezvous {
        /// Where they were to meet, as `MASTER_ADDR:MASTER_PORT`.
        address: String,
        /// Who is missing or does not fit, and what to do.
        reason: String,
    },
    /// `--hostfile` or `--mpirun` without an mpirun to read them.
    #[error(
        "{flag} is for mpirun, and this job would be plain processes of this machine; leave {flag} \
         out, or use --backend mpirun"
    )]
    NotWithProcesses {
        /// The flag.
        flag: &'static str,
    },
    /// The operating system refused something.
    #[error("cannot {doing}: {error}")]
    Io {
        /// What was being done, as in "start mpirun".
        doing: String,
        /// Its answer.
        error: std::io::Error,
    },
}

impl LaunchError {
    /// Whether the user can put it right by another flag, file or variable (exit code 2).
    pub fn is_user(&self) -> bool {
        !matches!(self, Self::Io { .. })
    }

    pub(crate) fn io(doing: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let doing = doing.into();
        move |error| Self::Io { doing, error }
    }
}

fn place(path: &std::path::Path, line: usize) -> String {
    match line {
        0 => path.display().to_string(),
        _ => format!("{}:{line}", path.display()),
    }
}
