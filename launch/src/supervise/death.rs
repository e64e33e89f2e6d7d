//! How a rank died, read from what the three kinds of mpirun say about it.
//!
//! Owns every sentence of theirs that we understand. Refuses to name a rank that mpirun did not
//! name: [`Deaths::verdict`] then says so.

use std::fmt;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;

/// The way a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum How {
    Exited(i32),
    Killed(i32),
    /// It called `MPI_Abort` with this code.
    Aborted(i32),
    /// It left with code 0 while the others still expected it.
    Unfinished,
}

impl How {
    /// The exit code a shell would give for it.
    pub(super) fn code(self) -> u8 {
        match self {
            // A parent sees the low byte alone; a death must not turn into a success there.
            Self::Exited(code) | Self::Aborted(code) => ((code & 0xff) as u8).max(1),
            Self::Killed(signal) => 128 + (signal & 0x7f) as u8,
            Self::Unfinished => 1,
        }
    }

    /// From what `wait` returns, which hydra prints raw.
    fn from_wait_status(status: i32) -> Self {
        match status & 0x7f {
            0 => Self::Exited(status >> 8),
            signal => Self::Killed(signal),
        }
    }

    /// From what a parent is told of its own child.
    pub(super) fn of(status: ExitStatus) -> Self {
        Self::from_wait_status(status.into_raw())
    }

    /// From an exit code in which a shell, or mpirun, has folded a signal.
    pub(super) fn from_exit_code(code: i32) -> Self {
        match signal_hook::low_level::signal_name(code - 128) {
            Some(_) => Self::Killed(code - 128),
            None => Self::Exited(code),
        }
    }
}

impl fmt::Display for How {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Exited(code) => write!(f, "exit code {code}"),
            Self::Killed(signal) => match signal_hook::low_level::signal_name(signal) {
                Some(name) => write!(f, "killed by signal {signal} ({name})"),
                None => write!(f, "killed by signal {signal}"),
            },
            Self::Aborted(code) => write!(f, "called MPI_Abort with code {code}"),
            Self::Unfinished => write!(f, "left before MPI_Finalize with exit code 0"),
        }
    }
}

/// What the job's end comes down to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Death {
    /// Whose, if mpirun said.
    pub(super) rank: Option<usize>,
    pub(super) how: How,
}

impl Death {
    /// Whether a rank that was asked to stop has failed instead.
    pub(super) fn is_failure(&self) -> bool {
        let failed = matches!(self.how, How::Exited(_) | How::Aborted(_));
        failed && self.how.code() != How::Killed(signal_hook::consts::SIGINT).code()
    }
}

impl fmt::Display for Death {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.rank {
            Some(rank) => write!(f, "rank {rank} died: {}", self.how),
            None => write!(f, "a rank died: {} (mpirun did not say which)", self.how),
        }
    }
}

/// How Open MPI's log of states calls a rank's death. The number (signal, code) is not in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    BySignal,
    NonZero,
    Abort,
    NoFinalize,
}

impl State {
    fn of(log_line: &str) -> Option<Self> {
        [
            ("STATE ABORTED BY SIGNAL", Self::BySignal),
            ("STATE EXITED WITH NON-ZERO STATUS", Self::NonZero),
            ("STATE CALLED ABORT", Self::Abort),
            ("STATE TERMINATED WITHOUT SYNC", Self::NoFinalize),
        ]
        .into_iter()
        .find_map(|(words, state)| log_line.contains(words).then_some(state))
    }

    /// The rest of it is mpirun's own exit code, which it takes from the first rank to die.
    fn with_code(self, code: i32) -> How {
        match self {
            Self::BySignal => How::from_exit_code(code),
            Self::NonZero => How::Exited(code),
            Self::Abort => How::Aborted(code),
            Self::NoFinalize => How::Unfinished,
        }
    }
}

/// Everything learnt about deaths so far.
#[derive(Debug, Default)]
pub(super) struct Deaths {
    /// The first one that a banner named.
    named: Option<Death>,
    /// The first one in Open MPI 4's log of states, and which state that was.
    logged: Option<(usize, State)>,
    /// Seen a sentence that some rank died, named or not.
    seen: bool,
    /// Hydra's "EXIT STRING".
    string: Option<How>,
    /// Hydra's wait status of every rank, if all are of one node: then their order is the ranks'.
    statuses: Vec<i32>,
}

impl Deaths {
    /// Whether some rank is known to have died, so that mpirun should be ending the others.
    pub(super) fn any(&self) -> bool {
        self.seen
    }

    fn name(&mut self, rank: usize, how: How) {
        self.seen = true;
        self.named.get_or_insert(Death { rank: Some(rank), how });
    }

    /// Whether a banner that begins so is one of those about a death.
    pub(super) fn opens_banner(line: &str) -> bool {
        const OPENINGS: [&str; 6] = [
            "Primary job  terminated normally",
            "noticed that process rank",
            "detected that one or more processes",
            "has exited due to process rank",
            "MPI_ABORT was invoked on rank",
            "BAD TERMINATION OF ONE OF YOUR APPLICATION PROCESSES",
        ];
        OPENINGS.iter().any(|opening| line.contains(opening))
    }

    /// Reads a banner, its lines joined by blanks: PRRTE wraps them anywhere.
    pub(super) fn banner(&mut self, text: &str) {
        self.seen = true;
        let words: Vec<&str> = text.split_whitespace().collect();
        let text = words.join(" ");
        if let Some(rank) = number_after(&text, "noticed that process rank ")
            && let Some(signal) = number_after(&text, "exited on signal ")
        {
            self.name(rank, How::Killed(signal as i32));
        } else if let Some((_, name)) = text.split_once("Process name: [")
            && let Some(rank) = name.split_once(']').and_then(|_| rank_of_name(name))
            && let Some(code) = number_after(&text, "Exit code: ")
        {
            self.name(rank, How::Exited(code as i32));
        } else if let Some(rank) = number_after(&text, "MPI_ABORT was invoked on rank ") {
            let code =
                number_after(&text, "errorcode ").or_else(|| number_after(&text, "Errorcode: "));
            self.name(rank, How::Aborted(code.unwrap_or(1) as i32));
        } else if text.contains("exiting improperly")
            && let Some(rank) = number_after(&text, "has exited due to process rank ")
        {
            self.name(rank, How::Unfinished);
        }
    }

    /// Reads a line that stands alone; returns whether it is about a death (or about the end of
    /// the job) and nothing else, so that nobody needs to see it.
    pub(super) fn line(&mut self, line: &str) -> bool {
        if let Some(signal) = line
            .strip_prefix("YOUR APPLICATION TERMINATED WITH THE EXIT STRING: ")
            .and_then(|string| number_after(string, "(signal "))
        {
            self.seen = true;
            self.string = Some(How::Killed(signal as i32));
            return true;
        }
        if let Some((_, entry)) = line.split_once("] ACTIVATE ") {
            // `PROC [[5440,1],0] STATE ABORTED BY SIGNAL AT file:line`
            if let (Some(state), Some((name, _))) = (State::of(entry), entry.split_once("] STATE "))
                && let Some(rank) = name.rsplit_once(',').and_then(|(_, rank)| rank.parse().ok())
            {
                self.seen = true;
                self.logged.get_or_insert((rank, state));
            }
            return true;
        }
        if let Some((_, list)) = line.split_once("] Exit codes: [") {
            if let Some((_, codes)) = list.split_once("] ") {
                // A second node's list does not parse, and so leaves this empty.
                self.statuses = codes
                    .split(',')
                    .map(|code| code.trim().parse())
                    .collect::<Result<_, _>>()
                    .unwrap_or_default();
            }
            return true;
        }
        if line.starts_with("Abort(") && line.contains("application called MPI_Abort(") {
            if let Some(rank) = number_after(line, "on node ")
                && let Some(code) = number_after(line, "Abort(")
            {
                self.name(rank, How::Aborted(code as i32));
            }
            return true;
        }
        const ASIDES: [&str; 9] = [
            "This typically refers to a problem with your application.",
            "Please see the FAQ page for debugging suggestions",
            "has sent help message help-",
            "have sent help message help-",
            "Set MCA parameter \"orte_base_help_aggregate\" to 0",
            "(some possibly by mpirun during cleanup)",
            // What mpirun runs into when it tries to print the banner of an abort.
            "in file ../../../orte/util/show_help.c",
            ": Forwarding signal ",
            "Ctrl-C ",
        ];
        line.trim().is_empty() || ASIDES.iter().any(|aside| line.contains(aside))
    }

    /// Who died and how, given mpirun's own (non-zero) exit code.
    pub(super) fn verdict(&self, mpirun_code: i32) -> Death {
        if let Some((rank, state)) = self.logged {
            let same = self.named.filter(|named| named.rank == Some(rank));
            return same.unwrap_or(Death { rank: Some(rank), how: state.with_code(mpirun_code) });
        }
        if let Some(named) = self.named {
            return named;
        }
        let dead: Vec<(usize, How)> = (self.statuses.iter().enumerate())
            .filter(|&(_, &status)| status != 0)
            .map(|(rank, &status)| (rank, How::from_wait_status(status)))
            .filter(|&(_, how)| self.string.is_none_or(|string| string == how))
            .collect();
        match (dead.as_slice(), self.string) {
            // Hydra kills the rest with the very signal it reports, so only one match is proof.
            (&[(rank, how)], _) => Death { rank: Some(rank), how },
            (_, Some(how)) => Death { rank: None, how },
            (&[(_, how), ..], None) => Death { rank: None, how },
            ([], None) => Death { rank: None, how: How::from_exit_code(mpirun_code) },
        }
    }
}

/// The number that follows the first `mark`.
fn number_after(text: &str, mark: &str) -> Option<usize> {
    let (_, rest) = text.split_once(mark)?;
    let end = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
    rest[..end].parse().ok()
}

/// The rank in `[23237,1],1]` (ORTE) or `prterun-node-13788@1,1]` (PRRTE).
fn rank_of_name(name: &str) -> Option<usize> {
    let (process, _) = name.split_once(" Exit code")?;
    process.trim_end_matches(']').rsplit_once(',')?.1.parse().ok()
}

#[cfg(test)]
mod tests;
