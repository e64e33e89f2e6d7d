//! SIGINT and SIGTERM of the launcher, sent to this very process: hence a binary of its own, and
//! one job at a time in it.

use allreel_launch::{Backend, Launch};
use signal_hook::consts::{SIGINT, SIGTERM};
use std::sync::Mutex;
use std::time::{Duration, Instant};

static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// Collects lines, and raises a signal in this process when both ranks have said they are up.
struct RaiseWhenUp {
    signal: i32,
    text: Vec<u8>,
    raised: bool,
}

impl std::io::Write for RaiseWhenUp {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.text.extend_from_slice(bytes);
        let text = String::from_utf8_lossy(&self.text);
        if !self.raised && text.contains("[rank 0] up") && text.contains("[rank 1] up") {
            self.raised = true;
            signal_hook::low_level::raise(self.signal)?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

struct End {
    code: u8,
    out: String,
    err: String,
    took: Duration,
}

/// Runs two ranks of a script and signals the launcher when they are up; `None` without the mpirun
/// that it takes.
fn stop(backend: Backend, signal: i32, graceful_stop: bool, script: &str) -> Option<End> {
    let found = backend == Backend::Processes
        || std::env::var_os("ALLREEL_MPIRUN").is_some()
        || std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default())
            .any(|directory| directory.join("mpirun").is_file());
    assert!(found || std::env::var_os("CI").is_none(), "no mpirun, and CI must have one");
    if !found {
        eprintln!("SKIPPED: no mpirun on PATH; launch/setup installs one");
        return None;
    }
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let launch = Launch {
        ranks: 2,
        backend: Some(backend),
        threads: Some(1),
        hostfile: None,
        mpirun: None,
        program: "/bin/sh".into(),
        args: vec!["-c".into(), format!("R=$OMPI_COMM_WORLD_RANK$PMI_RANK$RANK; {script}").into()],
        graceful_stop,
    };
    let started = Instant::now();
    let mut out = RaiseWhenUp { signal, text: Vec::new(), raised: false };
    let mut err = Vec::new();
    let code = launch.run_to(&mut out, &mut err).unwrap();
    assert!(out.raised, "the ranks never came up");
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Some(End { code, out: text(out.text), err: text(err), took: started.elapsed() })
}

/// Saving takes longer than mpirun's own patience (a second), and ranks leave together, as after
/// `MPI_Finalize`.
const SAVES: &str = "
    trap 'got=yes' USR1 INT TERM
    echo up
    while [ -z \"$got\" ]; do sleep 0.05; done
    sleep 2
    touch $SAVED.$R
    echo saved
    while [ ! -e $SAVED.0 ] || [ ! -e $SAVED.1 ]; do sleep 0.02; done
";

fn saves(directory: &tempfile::TempDir, then: &str) -> String {
    format!("SAVED={}/saved; {SAVES} {then}", directory.path().display())
}

fn graceful_stop_lets_every_rank_save(backend: Backend) {
    for signal in [SIGINT, SIGTERM] {
        let directory = tempfile::tempdir().unwrap();
        let Some(end) = stop(backend, signal, true, &saves(&directory, "exit 130")) else {
            return;
        };
        assert!(end.out.contains("[rank 0] saved"), "{}{}", end.out, end.err);
        assert!(end.out.contains("[rank 1] saved"), "{}{}", end.out, end.err);
        assert_eq!(end.code, 130, "{}", end.err);
        assert!(end.err.contains("asking every rank to save and stop"), "{}", end.err);
        let last = end.err.lines().last().unwrap_or_default();
        assert!(last.starts_with("stopped by SIG"), "{}", end.err);
    }
}

fn failure_while_stopping_is_not_hidden(backend: Backend) {
    let directory = tempfile::tempdir().unwrap();
    let fails = "[ $R = 0 ] && exec sleep 3; echo 'disk full' >&2; exit 3";
    let Some(end) = stop(backend, SIGTERM, true, &saves(&directory, fails)) else {
        return;
    };
    assert_eq!(end.code, 3, "{}", end.err);
    assert!(end.err.contains("[rank 1] disk full"), "{}", end.err);
    assert_eq!(end.err.lines().last(), Some("rank 1 died: exit code 3"));
}

fn plain_stop_ends_the_job_with_the_signals_code(backend: Backend) {
    let Some(end) = stop(backend, SIGTERM, false, "echo up; exec sleep 60") else {
        return;
    };
    assert_eq!(end.code, 143, "{}", end.err);
    assert_eq!(end.err.lines().last(), Some("stopped by SIGTERM"));
    assert!(end.took < Duration::from_secs(9), "{:?}", end.took);
}

#[test]
fn mpi_graceful_stop_lets_every_rank_save() {
    graceful_stop_lets_every_rank_save(Backend::Mpirun);
}

#[test]
fn processes_graceful_stop_lets_every_rank_save() {
    graceful_stop_lets_every_rank_save(Backend::Processes);
}

#[test]
fn mpi_failure_while_stopping_is_not_hidden() {
    failure_while_stopping_is_not_hidden(Backend::Mpirun);
}

#[test]
fn processes_failure_while_stopping_is_not_hidden() {
    failure_while_stopping_is_not_hidden(Backend::Processes);
}

#[test]
fn mpi_plain_stop_ends_the_job_with_the_signals_code() {
    plain_stop_ends_the_job_with_the_signals_code(Backend::Mpirun);
}

#[test]
fn processes_plain_stop_ends_the_job_with_the_signals_code() {
    plain_stop_ends_the_job_with_the_signals_code(Backend::Processes);
}

#[test]
fn processes_that_do_not_obey_end_at_the_second_signal() {
    // The one who hears the first asks for the second.
    let script =
        "trap 'kill -TERM $PPID' TERM; trap '' USR1; echo up; while :; do sleep 0.05; done";
    let end = stop(Backend::Processes, SIGTERM, true, script).expect("it takes no mpirun");
    assert_eq!(end.code, 143, "{}", end.err);
    assert_eq!(end.err.lines().last(), Some("stopped by SIGTERM"));
    assert!(end.took < Duration::from_secs(9), "{:?}", end.took);
}
