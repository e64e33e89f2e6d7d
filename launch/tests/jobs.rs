//! Whole jobs: shell scripts as ranks, under the machine's mpirun, under a false one, and without.
//!
//! Refuses to pass where it matters without mpirun: in CI its absence fails the tests that need
//! it, elsewhere it is said aloud.

use allreel_launch::{Backend, Launch, LaunchError, PEER_FAILED};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// What came of a job.
struct End {
    code: u8,
    out: String,
    err: String,
    took: Duration,
}

impl End {
    fn of(launch: &Launch) -> Self {
        let started = Instant::now();
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let code = launch.run_to(&mut out, &mut err).unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        Self { code, out: text(out), err: text(err), took: started.elapsed() }
    }

    fn last_line(&self) -> &str {
        self.err.lines().last().unwrap_or_default()
    }

    #[track_caller]
    fn check_no_mpirun_words(&self) {
        for words in ["-----", "[mpirun]", "Primary job", "Exit code:"] {
            assert!(!self.err.contains(words), "{words:?} in:\n{}", self.err);
        }
    }
}

fn shell(ranks: usize, script: &str) -> Launch {
    Launch {
        ranks,
        backend: Some(Backend::Mpirun),
        threads: Some(1),
        hostfile: None,
        mpirun: None,
        program: "/bin/sh".into(),
        // Open MPI's name of the rank, MPICH's, or torchrun's.
        args: vec!["-c".into(), format!("R=$OMPI_COMM_WORLD_RANK$PMI_RANK$RANK; {script}").into()],
        graceful_stop: false,
    }
}

/// The same without mpirun.
fn processes(ranks: usize, script: &str) -> Launch {
    Launch { backend: Some(Backend::Processes), ..shell(ranks, script) }
}

/// Whether the tests that need mpirun can run.
fn have_mpirun() -> bool {
    let found = std::env::var_os("ALLREEL_MPIRUN").is_some()
        || std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default())
            .any(|directory| directory.join("mpirun").is_file());
    assert!(found || std::env::var_os("CI").is_none(), "no mpirun, and CI must have one");
    if !found {
        eprintln!("SKIPPED: no mpirun on PATH; launch/setup installs one");
    }
    found
}

fn is_alive(pid_file: &Path) -> bool {
    let pid = std::fs::read_to_string(pid_file).unwrap();
    assert!(!pid.trim().is_empty());
    Path::new("/proc").join(pid.trim()).join("cwd").read_link().is_ok()
}

fn lines_carry_their_rank_on_their_own_stream(job: fn(usize, &str) -> Launch) {
    let end = End::of(&job(2, "echo out $R; echo err $R >&2; printf half; sleep 0.2; echo -$R"));
    assert_eq!(end.code, 0, "{}", end.err);
    let mut out: Vec<_> = end.out.lines().collect();
    out.sort_unstable();
    let expected = ["[rank 0] half-0", "[rank 0] out 0", "[rank 1] half-1", "[rank 1] out 1"];
    assert_eq!(out, expected);
    let mut err: Vec<_> = end.err.lines().collect();
    err.sort_unstable();
    assert_eq!(err, ["[rank 0] err 0", "[rank 1] err 1"]);
}

#[test]
fn mpi_lines_carry_their_rank() {
    if have_mpirun() {
        lines_carry_their_rank_on_their_own_stream(shell);
    }
}

#[test]
fn lines_of_processes_carry_their_rank() {
    lines_carry_their_rank_on_their_own_stream(processes);
}

fn rank_killed_is_named_and_the_others_are_gone(job: fn(usize, &str) -> Launch) {
    let directory = tempfile::tempdir().unwrap();
    let pid_file = directory.path().join("pid");
    let script = format!(
        "if [ $R = 0 ]; then echo $$ > {0}; exec sleep 60; fi; \
         while [ ! -s {0} ]; do sleep 0.05; done; kill -9 $$",
        pid_file.display()
    );
    let end = End::of(&job(2, &script));
    assert_eq!(end.last_line(), "rank 1 died: killed by signal 9 (SIGKILL)", "{}", end.err);
    assert_eq!(end.code, 137);
    end.check_no_mpirun_words();
    assert!(!is_alive(&pid_file), "rank 0 outlived the job");
    assert!(end.took < Duration::from_secs(9), "{:?}: nobody ended it", end.took);
}

#[test]
fn mpi_rank_killed_is_named() {
    if have_mpirun() {
        rank_killed_is_named_and_the_others_are_gone(shell);
    }
}

#[test]
fn process_killed_is_named() {
    rank_killed_is_named_and_the_others_are_gone(processes);
}

fn rank_with_a_user_error_keeps_its_message_and_exit_code(job: fn(usize, &str) -> Launch) {
    // The other ends by itself: MPICH does not miss a rank that never called MPI_Init.
    let script = "[ $R = 0 ] && exec sleep 3; echo 'error: no such key' >&2; exit 2";
    let end = End::of(&job(2, script));
    assert_eq!(end.code, 2, "{}", end.err);
    assert_eq!(end.err, "[rank 1] error: no such key\nrank 1 died: exit code 2\n");
}

#[test]
fn mpi_rank_with_a_user_error_keeps_its_exit_code() {
    if have_mpirun() {
        rank_with_a_user_error_keeps_its_message_and_exit_code(shell);
    }
}

#[test]
fn process_with_a_user_error_keeps_its_exit_code() {
    rank_with_a_user_error_keeps_its_message_and_exit_code(processes);
}

#[test]
fn processes_are_told_who_they_are_and_where_to_meet() {
    let script = "echo $RANK $WORLD_SIZE $LOCAL_RANK $LOCAL_WORLD_SIZE $RAYON_NUM_THREADS at \
                  $MASTER_ADDR:$MASTER_PORT; echo $OMPI_COMM_WORLD_RANK$PMI_RANK";
    let end = End::of(&processes(3, script));
    assert_eq!((end.code, end.err.as_str()), (0, ""));
    let (said, empty): (Vec<_>, Vec<_>) = end.out.lines().partition(|line| line.contains(" at "));
    assert!(empty.iter().all(|line| line.trim_end().len() == "[rank 0]".len()), "{empty:?}");
    let mut said: Vec<_> = said.iter().map(|line| line.split_once(" at ").unwrap()).collect();
    said.sort_unstable();
    let who: Vec<_> = said.iter().map(|(who, _)| *who).collect();
    assert_eq!(who, ["[rank 0] 0 3 0 3 1", "[rank 1] 1 3 1 3 1", "[rank 2] 2 3 2 3 1"]);
    let port = said[0].1.strip_prefix("127.0.0.1:").and_then(|port| port.parse::<u16>().ok());
    assert!(port.is_some_and(|port| port > 0), "{said:?}");
    assert!(said.iter().all(|(_, place)| *place == said[0].1), "{said:?}");
}

#[test]
fn a_process_that_only_saw_another_fail_is_not_the_one_that_died() {
    let script = format!("[ $R = 1 ] && sleep 0.3 && exit 3; exit {PEER_FAILED}");
    let end = End::of(&processes(3, &script));
    assert_eq!((end.code, end.last_line()), (3, "rank 1 died: exit code 3"));
    let end = End::of(&processes(2, &format!("[ $R = 1 ] && exit {PEER_FAILED}; exit 0")));
    assert_eq!((end.code, end.last_line()), (PEER_FAILED, "rank 1 died: exit code 4"));
}

#[test]
fn what_processes_leave_behind_is_ended_with_them() {
    let directory = tempfile::tempdir().unwrap();
    let pid_file = directory.path().join("pid");
    let script = format!("setsid sleep 300 & echo $! > {}", pid_file.display());
    let end = End::of(&processes(1, &script));
    assert_eq!((end.code, end.err.as_str()), (0, ""));
    assert!(!is_alive(&pid_file), "it outlived the job");
    assert!(end.took < Duration::from_secs(9), "{:?}", end.took);
}

#[test]
fn processes_that_cannot_be_are_refused() {
    let refuse = |launch: &Launch| launch.run_to(&mut Vec::new(), &mut Vec::new()).unwrap_err();
    let error = refuse(&Launch { program: "/no/such/program".into(), ..processes(2, "") });
    assert!(error.to_string().contains("start rank 0: /no/such/program"), "{error}");
    let error = refuse(&Launch { hostfile: Some("hosts".into()), ..processes(2, "") });
    assert!(error.is_user() && error.to_string().contains("--hostfile is for mpirun"), "{error}");
    let error = refuse(&Launch { mpirun: Some("mpirun".into()), ..processes(2, "") });
    assert!(error.to_string().contains("leave --mpirun out"), "{error}");
    assert!(refuse(&processes(0, "")).to_string().contains("-n 0"));
}

#[test]
fn mpi_ranks_beyond_the_cores_start_and_are_told_their_threads() {
    if !have_mpirun() {
        return;
    }
    let ranks = 2 * std::thread::available_parallelism().unwrap().get() + 1;
    let mut launch = shell(ranks, "echo threads=$RAYON_NUM_THREADS");
    launch.threads = Some(3);
    let end = End::of(&launch);
    assert_eq!(end.code, 0, "{}", end.err);
    assert_eq!(end.out.matches("] threads=3\n").count(), ranks, "{}", end.out);
}

#[test]
fn mpi_program_that_does_not_exist_shows_mpiruns_own_words() {
    if !have_mpirun() {
        return;
    }
    let mut launch = shell(1, "");
    launch.program = "/no/such/program".into();
    let end = End::of(&launch);
    assert_ne!(end.code, 0);
    assert!(end.err.contains("/no/such/program"), "{}", end.err);
}

/// A script that answers `--version` like Open MPI 4 and then does as told.
struct FalseMpirun {
    _directory: tempfile::TempDir,
    path: PathBuf,
}

impl FalseMpirun {
    fn new(version: &str, script: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("mpirun");
        let text = format!(
            "#!/bin/sh\nif [ \"$1\" = --version ]; then echo '{version}'; exit 0; fi\n{script}\n"
        );
        // Written by a process of its own: a descriptor of ours, open for writing, could be
        // inherited by another test's child and make the script "busy".
        let mut writer = std::process::Command::new("tee");
        writer.arg(&path).stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::null());
        let mut writer = writer.spawn().unwrap();
        std::io::Write::write_all(&mut writer.stdin.take().unwrap(), text.as_bytes()).unwrap();
        assert!(writer.wait().unwrap().success());
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        Self { _directory: directory, path }
    }

    fn job(&self, ranks: usize) -> Launch {
        Launch { mpirun: Some(self.path.clone()), ..shell(ranks, "true") }
    }
}

const OPEN_MPI: &str = "mpirun (Open MPI) 4.1.4";

#[test]
fn the_command_line_ends_with_program_and_arguments() {
    let mpirun = FalseMpirun::new(OPEN_MPI, "printf '<%s>' \"$@\"; echo \" T=$RAYON_NUM_THREADS\"");
    let mut launch = mpirun.job(3);
    launch.program = "/opt/a program".into();
    launch.args = vec!["train".into(), "x y.toml".into(), "--set".into(), "a=b".into()];
    let end = End::of(&launch);
    assert_eq!((end.code, end.out.as_str()), (0, ""));
    assert!(end.err.starts_with("[mpirun] <-n><3><--tag-output>"), "{}", end.err);
    let tail = "</opt/a program><train><x y.toml><--set><a=b> T=1\n";
    assert!(end.err.ends_with(tail), "{}", end.err);
}

#[test]
fn an_mpirun_that_hangs_after_a_death_is_killed_with_all_it_started() {
    let rule = "-".repeat(74);
    let script = format!(
        "trap '' TERM INT\nsetsid sleep 300 >/dev/null 2>&1 &\necho $! > \"$0.pid\"\n\
         echo '[1,1]<stderr>:last words' >&2\n\
         printf '%s\\n' {rule} 'mpirun noticed that process rank 1 with PID 0 on node vm exited \
         on signal 9 (Killed).' {rule} >&2\nwhile :; do sleep 1; done"
    );
    let mpirun = FalseMpirun::new(OPEN_MPI, &script);
    let end = End::of(&mpirun.job(2));
    assert_eq!(end.err, "[rank 1] last words\nrank 1 died: killed by signal 9 (SIGKILL)\n");
    assert_eq!(end.code, 137);
    assert!(!is_alive(&mpirun.path.with_extension("pid")), "a rank outlived the job");
    assert!(end.took < Duration::from_secs(30), "{:?}", end.took);
}

#[test]
fn an_mpirun_that_dies_itself_takes_its_ranks_along() {
    // The rank holds the pipes open, as one whose mpirun was killed does.
    let script = "setsid sleep 300 &\necho $! > \"$0.pid\"\nkill -9 $$";
    let mpirun = FalseMpirun::new(OPEN_MPI, script);
    let end = End::of(&mpirun.job(2));
    assert_eq!(end.err, "mpirun died: killed by signal 9 (SIGKILL)\n");
    assert_eq!(end.code, 137);
    assert!(!is_alive(&mpirun.path.with_extension("pid")), "a rank outlived the job");
}

#[test]
fn words_of_mpirun_that_name_no_death_are_shown() {
    let rule = "-".repeat(74);
    let script = format!(
        "printf '%s\\n' {rule} 'There are not enough slots available in the system' {rule} >&2\n\
         exit 1"
    );
    let end = End::of(&FalseMpirun::new(OPEN_MPI, &script).job(2));
    assert_eq!(end.code, 1);
    assert!(end.err.contains("[mpirun] There are not enough slots"), "{}", end.err);
    assert_eq!(end.last_line(), "mpirun failed with exit code 1; its own words are above");
}

#[test]
fn output_that_cannot_be_written_ends_the_job() {
    struct Full;
    impl std::io::Write for Full {
        fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
            Err(std::io::ErrorKind::BrokenPipe.into())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let script = "sleep 300 &\necho $! > \"$0.pid\"\necho '[1,0]<stdout>:line'\nwait";
    let mpirun = FalseMpirun::new(OPEN_MPI, script);
    let error = mpirun.job(1).run_to(&mut Full, &mut Vec::new()).unwrap_err();
    assert!(matches!(error, LaunchError::Io { .. }) && !error.is_user(), "{error}");
    assert!(!is_alive(&mpirun.path.with_extension("pid")), "a rank outlived the job");
}

#[test]
fn bad_input_is_one_error_of_the_users() {
    let message = |launch: &Launch| {
        let error = launch.run_to(&mut Vec::new(), &mut Vec::new()).unwrap_err();
        assert!(error.is_user(), "{error}");
        error.to_string()
    };
    assert!(message(&shell(0, "")).contains("-n 0"));
    assert!(message(&Launch { threads: Some(0), ..shell(1, "") }).contains("--threads 0"));
    let m = message(&Launch { mpirun: Some("/no/such/mpirun".into()), ..shell(1, "") });
    assert!(m.contains("--mpirun names /no/such/mpirun"), "{m}");
    let m = message(&Launch { mpirun: Some("/etc/passwd".into()), ..shell(1, "") });
    assert!(m.contains("not an executable file"), "{m}");
    let other = FalseMpirun::new("Some MPI 1.0", "exit 0");
    let m = message(&other.job(1));
    assert!(m.contains("neither Open MPI nor MPICH") && m.contains("Some MPI 1.0"), "{m}");
    let hostfile = Some(PathBuf::from("/no/such/hosts"));
    let m = message(&Launch { hostfile, ..shell(1, "") });
    assert!(m.contains("/no/such/hosts"), "{m}");
}
