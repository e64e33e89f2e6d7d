//! Ranks as plain processes of this machine: what `allreel launch` does where there is no mpirun.
//!
//! Each is told who it is as torchrun would tell it, and where rank 0 listens ([`crate::Meeting`]).
//! Refuses other machines: those take mpirun, srun or torchrun.

use super::death::{Death, How};
use super::mpirun::Node;
use super::output::{Sinks, Speaker, Stream};
use super::{DRAIN, Event, Launch, TICK, asked_to_stop, name_of, read_lines, survivors};
use crate::rendezvous::Address;
use crate::{Identity, LaunchError, PEER_FAILED};
use rustix::process::{Pid, Signal};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

/// How long the others may take to see that a rank has died, and to end by themselves.
const GRACE: Duration = Duration::from_secs(5);

/// Runs the job to its end; returns its exit code.
pub(super) fn run(launch: &Launch, mut sinks: Sinks<'_>) -> Result<u8, LaunchError> {
    let flags = [("--hostfile", &launch.hostfile), ("--mpirun", &launch.mpirun)];
    if let Some((flag, _)) = flags.into_iter().find(|(_, given)| given.is_some()) {
        return Err(LaunchError::NotWithProcesses { flag });
    }
    // Before any rank exists, so that no signal finds us without a handler and them without us.
    let signals = Signals::new([SIGINT, SIGTERM]).map_err(LaunchError::io("catch signals"))?;
    let address = Address::free_here().map_err(LaunchError::io("find a free port"))?;
    let mut job = Job { ranks: Vec::new(), mark: survivors::Mark::new() };
    for rank in 0..launch.ranks {
        let what = format!("start rank {rank}: {}", launch.program.display());
        job.start(launch, rank, &address).map_err(LaunchError::io(what))?;
    }
    let watch = Watch { job, signals, graceful: launch.graceful_stop, deaths: Vec::new() };
    watch.follow(&mut sinks).map_err(LaunchError::io("pass the ranks' output on"))
}

/// All ranks and everything they started. None of it outlives this.
struct Job {
    ranks: Vec<Rank>,
    mark: survivors::Mark,
}

struct Rank {
    process: Child,
    ended: bool,
}

impl Job {
    fn start(&mut self, launch: &Launch, rank: usize, address: &Address) -> io::Result<()> {
        let world = launch.ranks;
        let identity = Identity { rank, world, local_rank: rank, local_world: world, mpi: false };
        let mut command = Command::new(&launch.program);
        for name in Identity::stronger_variables() {
            command.env_remove(name);
        }
        let (name, mark) = self.mark.variable();
        command
            .args(&launch.args)
            .envs(identity.variables().map(|(name, value)| (name, value.to_string())))
            .env("MASTER_ADDR", &address.host)
            .env("MASTER_PORT", address.port.to_string())
            .env_remove("TORCHELASTIC_USE_AGENT_STORE")
            .envs(threads(launch).map(|threads| ("RAYON_NUM_THREADS", threads.to_string())))
            .env(name, mark)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            // A Ctrl-C at the terminal is ours to hand down, once.
            .process_group(0);
        self.ranks.push(Rank { process: command.spawn()?, ended: false });
        Ok(())
    }

    fn running(&self) -> bool {
        self.ranks.iter().any(|rank| !rank.ended)
    }

    /// Signals every rank that has not ended.
    fn signal(&self, signal: i32) {
        let Some(signal) = Signal::from_named_raw(signal) else { return };
        for rank in self.ranks.iter().filter(|rank| !rank.ended) {
            // It may have ended meanwhile, which is as good.
            let _ = rustix::process::kill_process(Pid::from_child(&rank.process), signal);
        }
    }

    fn kill(&mut self) {
        self.signal(rustix::process::Signal::KILL.as_raw());
        self.mark.kill_all();
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        self.kill();
        for rank in &mut self.ranks {
            let _ = rank.process.wait();
        }
    }
}

/// Threads that each rank is to be told; `None` if the environment says so already.
fn threads(launch: &Launch) -> Option<usize> {
    let node = Node::here();
    let share = || (node.cores / launch.ranks).max(1);
    launch.threads.or_else(|| node.rayon.is_none().then(share))
}

/// The loop over running ranks.
struct Watch {
    job: Job,
    signals: Signals,
    graceful: bool,
    /// Of ranks that we did not kill, in the order in which they were seen.
    deaths: Vec<Death>,
}

impl Watch {
    fn follow(mut self, sinks: &mut Sinks<'_>) -> io::Result<u8> {
        let events = self.read_pipes();
        let mut open_pipes = 2 * self.job.ranks.len();
        let mut stopped_by = None;
        // When our patience ends: with the ranks while one lives, with the pipes after that.
        let mut deadline: Option<Instant> = None;
        let mut killed = false;
        loop {
            match events.recv_timeout(TICK) {
                Ok(Event::Bytes((stream, rank), bytes)) => pass_on(stream, rank, &bytes, sinks)?,
                Ok(Event::Closed) => open_pipes -= 1,
                Err(RecvTimeoutError::Timeout) => {}
                // All pipes are closed, so nothing wakes us but the clock.
                Err(RecvTimeoutError::Disconnected) => std::thread::sleep(TICK),
            }
            let late = deadline.is_some_and(|deadline| Instant::now() > deadline);
            if !self.job.running() {
                if open_pipes == 0 || late {
                    return conclude(&self.deaths, killed, stopped_by, sinks);
                }
                continue;
            }
            self.reap(killed)?;
            if !self.job.running() {
                self.job.mark.kill_all();
                deadline = Some(Instant::now() + DRAIN);
                continue;
            }
            let mut allowed = (!self.deaths.is_empty()).then_some(GRACE);
            for signal in self.signals.pending() {
                let again = stopped_by.is_some();
                allowed = self.stop(signal, again, sinks)?.or(allowed);
                killed |= again;
                stopped_by = Some(signal);
            }
            deadline = deadline.or(allowed.map(|grace| Instant::now() + grace));
            killed |= late;
            if killed {
                self.job.kill();
            }
        }
    }

    /// One thread per pipe, because a read cannot wait for two.
    fn read_pipes(&mut self) -> Receiver<Event<(Stream, usize)>> {
        // Bounded: a terminal that stands still holds the ranks, rather than filling memory.
        let (sender, receiver) = sync_channel(256);
        for (number, rank) in self.job.ranks.iter_mut().enumerate() {
            if let Some(stdout) = rank.process.stdout.take() {
                read_lines(stdout, (Stream::Out, number), sender.clone());
            }
            if let Some(stderr) = rank.process.stderr.take() {
                read_lines(stderr, (Stream::Err, number), sender.clone());
            }
        }
        receiver
    }

    /// Notes which ranks have ended, and how those that we did not kill did.
    fn reap(&mut self, killed: bool) -> io::Result<()> {
        for (number, rank) in self.job.ranks.iter_mut().enumerate().filter(|(_, r)| !r.ended) {
            let Some(status) = rank.process.try_wait()? else { continue };
            rank.ended = true;
            if !status.success() && !killed {
                self.deaths.push(Death { rank: Some(number), how: How::of(status) });
            }
        }
        Ok(())
    }

    /// Passes a request to stop on: the first politely, any other ends the job at once. Returns how long it
    /// may then take, if that is limited.
    fn stop(
        &self,
        signal: i32,
        again: bool,
        sinks: &mut Sinks<'_>,
    ) -> io::Result<Option<Duration>> {
        if again {
            return Ok(None);
        }
        if self.graceful {
            writeln!(sinks.err, "{}: asking every rank to save and stop", name_of(signal))?;
        }
        self.job.signal(signal);
        Ok((!self.graceful).then_some(GRACE))
    }
}

fn pass_on(stream: Stream, rank: usize, bytes: &[u8], sinks: &mut Sinks<'_>) -> io::Result<()> {
    let line = bytes.strip_suffix(b"\n").unwrap_or(bytes);
    sinks.line(stream, Speaker::Rank(rank), line.strip_suffix(b"\r").unwrap_or(line))
}

/// The exit code, after the one line that says what became of the job.
fn conclude(
    deaths: &[Death],
    killed: bool,
    stopped_by: Option<i32>,
    sinks: &mut Sinks<'_>,
) -> io::Result<u8> {
    // Who only says that another failed comes second, even if it was quicker.
    let peers = How::Exited(i32::from(PEER_FAILED));
    let first = deaths.iter().find(|death| death.how != peers).or(deaths.first());
    let (code, line) = match (stopped_by, first) {
        (Some(signal), _) if killed || first.is_some() => {
            let failed = deaths.iter().find(|death| death.is_failure());
            asked_to_stop(signal, failed.or(first).copied())
        }
        (_, None) => return Ok(0),
        (_, Some(death)) => (death.how.code(), death.to_string()),
    };
    writeln!(sinks.err, "{line}")?;
    sinks.err.flush()?;
    Ok(code)
}
