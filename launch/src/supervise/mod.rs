//! Starting ranks and watching over them: what `allreel launch -n N -- train ...` does.
//!
//! Owns the life of one job on this machine: it starts mpirun (or the ranks themselves: `processes`),
//! passes the ranks' lines on, hands signals down, and leaves none of the job's processes behind,
//! whichever of them died first. Refuses to run inside a job that a launcher already started.

mod death;
mod hostfile;
mod mpirun;
mod output;
mod processes;
mod survivors;

use crate::{Identity, LaunchError};
use death::{Death, How};
use hostfile::Hosts;
use mpirun::{Flavour, Node, Plan};
use output::{Output, Sinks, Stream};
use rustix::process::{Pid, Signal};
use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1};
use signal_hook::iterator::Signals;
use std::ffi::OsString;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

/// How often signals and mpirun's end are looked for when no line comes.
const TICK: Duration = Duration::from_millis(50);
/// How long mpirun may take to end the other ranks (here and on other nodes) before we do.
const GRACE: Duration = Duration::from_secs(10);
/// How long the pipes may stay open once all of the job's processes are dead.
const DRAIN: Duration = Duration::from_secs(2);

/// What starts the ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    /// mpirun does, on any nodes; they are ranks of MPI's.
    Mpirun,
    /// We do, on this machine; they meet over TCP.
    Processes,
}

/// A job to start.
#[derive(Clone, Debug)]
pub struct Launch {
    /// How many ranks.
    pub ranks: usize,
    /// What starts them. If `None`, mpirun where there is one, else we do.
    pub backend: Option<Backend>,
    /// Threads of each; `None` shares a node's cores evenly, or keeps `RAYON_NUM_THREADS`.
    pub threads: Option<usize>,
    /// The nodes to run on, in mpirun's own format; this one alone if `None`. Other nodes are
    /// taken to have as many cores as this one.
    pub hostfile: Option<PathBuf>,
    /// Which mpirun; `ALLREEL_MPIRUN`, then `PATH`, if `None`.
    pub mpirun: Option<PathBuf>,
    /// What each rank runs: usually `std::env::current_exe()`.
    pub program: PathBuf,
    /// With which arguments.
    pub args: Vec<OsString>,
    /// Whether the ranks take SIGUSR1 as "save and stop", as they do SIGINT and SIGTERM.
    ///
    /// It is the only such signal that Open MPI hands to ranks and then waits: given SIGINT or
    /// SIGTERM itself, version 4 leaves them about a second and version 5 nothing at all. So with
    /// `true` our SIGINT and SIGTERM reach them as SIGUSR1; ranks that do not handle it die of it.
    pub graceful_stop: bool,
}

impl Launch {
    /// Runs the job to its end, its output on ours, and returns the exit code to end with: 0, or
    /// that of the rank that died first (128 + signal if it was killed).
    ///
    /// SIGINT and SIGTERM of this process are the job's from here on, and stay caught afterwards.
    ///
    /// # Errors
    /// If the job could not be started.
    pub fn run(&self) -> Result<u8, LaunchError> {
        self.run_to(&mut io::stdout(), &mut io::stderr())
    }

    /// The same, with the ranks' output going elsewhere.
    ///
    /// # Errors
    /// As [`Launch::run`].
    pub fn run_to(&self, out: &mut dyn Write, err: &mut dyn Write) -> Result<u8, LaunchError> {
        if self.ranks == 0 {
            return Err(LaunchError::NoRanks);
        }
        if self.threads == Some(0) {
            return Err(LaunchError::NoThreads);
        }
        if let Some(Identity { rank, world: world @ 2.., .. }) = Identity::from_env()? {
            return Err(LaunchError::Nested { rank, world });
        }
        let sinks = Sinks { out, err };
        match self.backend.unwrap_or_else(|| self.usual_backend()) {
            Backend::Mpirun => self.run_mpirun(sinks),
            Backend::Processes => processes::run(self, sinks),
        }
    }

    /// mpirun if it is asked for in any way, or there.
    fn usual_backend(&self) -> Backend {
        let asked = self.mpirun.is_some() || self.hostfile.is_some();
        match asked || mpirun::find(None).is_ok() || std::env::var_os("ALLREEL_MPIRUN").is_some() {
            true => Backend::Mpirun,
            false => Backend::Processes,
        }
    }

    fn run_mpirun(&self, sinks: Sinks<'_>) -> Result<u8, LaunchError> {
        let hosts = self.hostfile.as_deref().map(Hosts::read).transpose()?;
        let mpirun = mpirun::find(self.mpirun.as_deref())?;
        let flavour = Flavour::probe(&mpirun)?;
        let plan = Plan::new(self, flavour, &Node::here(), hosts.as_ref())?;

        // Before mpirun exists, so that no signal finds us without a handler and it without us.
        let signals = Signals::new([SIGINT, SIGTERM]).map_err(LaunchError::io("catch signals"))?;
        let mut command = Command::new(&mpirun);
        command.args(&plan.args).arg(&self.program).args(&self.args).envs(plan.env);
        let job =
            Job::start(command).map_err(LaunchError::io(format!("start {}", mpirun.display())))?;
        let watch = Watch { job, signals, flavour, graceful: self.graceful_stop };
        watch.follow(sinks).map_err(LaunchError::io("pass the ranks' output on"))
    }
}

/// mpirun and everything it started. None of it outlives this.
struct Job {
    mpirun: Child,
    mark: survivors::Mark,
}

impl Job {
    fn start(mut command: Command) -> io::Result<Self> {
        let mark = survivors::Mark::new();
        let (name, value) = mark.variable();
        let mpirun = command
            .env(name, value)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            // A Ctrl-C at the terminal is ours to hand down, once: a second signal during its
            // clean-up can hang mpirun for good.
            .process_group(0)
            .spawn()?;
        Ok(Self { mpirun, mark })
    }

    fn pid(&self) -> Pid {
        Pid::from_child(&self.mpirun)
    }

    /// Signals mpirun alone; it may have ended meanwhile, which is as good.
    fn signal(&self, signal: i32) {
        if let Some(signal) = Signal::from_named_raw(signal) {
            let _ = rustix::process::kill_process(self.pid(), signal);
        }
    }

    /// Kills mpirun first, so that it has no time to report the others' deaths as news.
    fn kill(&mut self) {
        let _ = self.mpirun.kill();
        self.mark.kill_all();
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        self.kill();
        let _ = self.mpirun.wait();
    }
}

/// What a reader thread has to say, and of which pipe.
enum Event<Pipe> {
    Bytes(Pipe, Vec<u8>),
    Closed,
}

/// The loop over a running job.
struct Watch {
    job: Job,
    signals: Signals,
    flavour: Flavour,
    graceful: bool,
}

impl Watch {
    fn follow(mut self, mut sinks: Sinks<'_>) -> io::Result<u8> {
        let events = self.read_pipes();
        let mut output = Output::new(self.flavour);
        let mut open_pipes = 2;
        let mut stopped_by = None;
        let mut status: Option<ExitStatus> = None;
        // When our patience ends: with mpirun while it lives, with the pipes after that.
        let mut deadline: Option<Instant> = None;
        let status = loop {
            match events.recv_timeout(TICK) {
                Ok(Event::Bytes(stream, bytes)) => output.feed(stream, &bytes, &mut sinks)?,
                Ok(Event::Closed) => open_pipes -= 1,
                Err(RecvTimeoutError::Timeout) => {}
                // Both pipes are closed, so nothing wakes us but the clock.
                Err(RecvTimeoutError::Disconnected) => std::thread::sleep(TICK),
            }
            let late = deadline.is_some_and(|deadline| Instant::now() > deadline);
            if let Some(status) = status {
                if open_pipes == 0 || late {
                    break status;
                }
                continue;
            }
            if late {
                self.job.kill();
            }
            status = self.job.mpirun.try_wait()?;
            if status.is_some() {
                self.job.mark.kill_all();
                deadline = Some(Instant::now() + DRAIN);
                continue;
            }
            for signal in self.signals.pending() {
                let allowed = self.stop(signal, stopped_by.is_some(), &mut sinks)?;
                stopped_by = Some(signal);
                deadline = deadline.or(allowed.map(|grace| Instant::now() + grace));
            }
            if output.deaths.any() {
                deadline.get_or_insert_with(|| Instant::now() + GRACE);
            }
        };
        output.finish(&mut sinks)?;
        conclude(status, stopped_by, &output, &mut sinks)
    }

    /// One thread per pipe, because a read cannot wait for two.
    fn read_pipes(&mut self) -> Receiver<Event<Stream>> {
        // Bounded: a terminal that stands still holds the ranks, rather than filling memory.
        let (sender, receiver) = sync_channel(256);
        if let Some(stdout) = self.job.mpirun.stdout.take() {
            read_lines(stdout, Stream::Out, sender.clone());
        }
        if let Some(stderr) = self.job.mpirun.stderr.take() {
            read_lines(stderr, Stream::Err, sender);
        }
        receiver
    }

    /// Passes a request to stop on: the first politely, any other at once. Returns how long the
    /// job may then take, if that is limited.
    fn stop(
        &mut self,
        signal: i32,
        again: bool,
        sinks: &mut Sinks<'_>,
    ) -> io::Result<Option<Duration>> {
        if again {
            self.job.kill();
            return Ok(Some(GRACE));
        }
        if !self.graceful {
            self.job.signal(signal);
            return Ok(Some(GRACE));
        }
        writeln!(sinks.err, "{}: asking every rank to save and stop", name_of(signal))?;
        // Hydra hands any signal on and waits; Open MPI none of those that end a program.
        let open_mpi = self.flavour != Flavour::Mpich;
        self.job.signal(if open_mpi { SIGUSR1 } else { signal });
        Ok(None)
    }
}

fn read_lines<Pipe: Copy + Send + 'static>(
    from: impl Read + Send + 'static,
    pipe: Pipe,
    events: SyncSender<Event<Pipe>>,
) {
    std::thread::spawn(move || {
        let mut from = BufReader::new(from);
        loop {
            let mut bytes = Vec::new();
            // An error on a pipe of a dying child means the same as its end.
            if !from.read_until(b'\n', &mut bytes).is_ok_and(|count| count > 0) {
                break;
            }
            if events.send(Event::Bytes(pipe, bytes)).is_err() {
                return;
            }
        }
        // Nobody listens any more once the job was given up.
        let _ = events.send(Event::Closed);
    });
}

/// The exit code, after the one line that says what became of the job.
fn conclude(
    status: ExitStatus,
    stopped_by: Option<i32>,
    output: &Output,
    sinks: &mut Sinks<'_>,
) -> io::Result<u8> {
    if status.success() {
        return Ok(0);
    }
    let (code, line) = match (stopped_by, status.signal()) {
        (None, Some(signal)) if !output.deaths.any() => {
            let how = How::Killed(signal);
            (how.code(), format!("mpirun died: {how}"))
        }
        (None, signal) => {
            let code = status.code().or(signal.map(|signal| 128 + signal)).unwrap_or(1);
            let death = output.deaths.verdict(code);
            let line = if death.rank.is_none() && output.mpirun_spoke && !output.deaths.any() {
                format!("mpirun failed with exit code {code}; its own words are above")
            } else {
                death.to_string()
            };
            (death.how.code(), line)
        }
        (Some(stopped), _) => stopped_job(stopped, status, output),
    };
    writeln!(sinks.err, "{line}")?;
    sinks.err.flush()?;
    Ok(code)
}

/// What to say of a job that was told to stop, by what mpirun says of its ranks.
fn stopped_job(stopped: i32, status: ExitStatus, output: &Output) -> (u8, String) {
    let died = output.deaths.any() || status.code().is_some_and(|code| code > 1);
    let death = died.then(|| output.deaths.verdict(status.code().unwrap_or(1)));
    asked_to_stop(stopped, death)
}

/// What to say of a job that was asked to stop: ranks that then die of a signal, or with the exit
/// code of an interrupt, did as told; any other code is a failure that must not hide behind it.
fn asked_to_stop(stopped: i32, death: Option<Death>) -> (u8, String) {
    let interrupted = How::Killed(SIGINT).code();
    let obeyed = format!("stopped by {}", name_of(stopped));
    match death {
        Some(death) if death.is_failure() => (death.how.code(), death.to_string()),
        Some(death) if death.how.code() == interrupted => (interrupted, obeyed),
        _ => (How::Killed(stopped).code(), obeyed),
    }
}

fn name_of(signal: i32) -> &'static str {
    signal_hook::low_level::signal_name(signal).unwrap_or("a signal")
}
