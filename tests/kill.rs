//! SIGKILL at random moments, a full disk, signals, damaged checkpoints: whatever happened, the run
//! that `--resume` goes on with ends in bitwise what an unbroken one ends in.
//!
//! | file | owns |
//! |---|---|
//! | this | the tests |
//! | [`run`] | a run, its processes, and what it ends in |
//! | [`random`] | an unbroken run, and killing others at random moments |
//!
//! Tests that start ranks of MPI's say so and pass where there is no mpirun; with `CI` set they fail instead.

mod random;
mod run;

use std::{
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
    process::Command,
};

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use random::{Unbroken, kills};
use run::{Process, Ranks, Run, STEPS, names, signal};

#[test]
fn mpi_ranks_killed_at_random_moments_change_nothing() {
    if mpirun() {
        kills(Ranks::Mpi, 20, 1);
    }
}

#[test]
fn tcp_ranks_killed_at_random_moments_change_nothing() {
    kills(Ranks::Tcp, 10, 4);
}

#[test]
fn one_process_killed_at_random_moments_changes_nothing() {
    kills(Ranks::One, 6, 2);
}

/// What a kill may leave whose moment is too short to be met by chance.
#[test]
fn a_kill_between_two_renames_loses_nothing() {
    let root = tempfile::tempdir().expect("a directory");
    let run = Run::new(root.path(), "run", Ranks::One);
    run.start(false).wait();
    let end = run.end();
    let file = |path: &str| run.dir.join(path);
    let half_written = |path: &str| {
        fs::create_dir(file(path)).expect("a new directory");
        fs::write(file(path).join("model.safetensors"), b"half").expect("a file");
    };
    // The old best model is out of the way, the new one is not in its place yet.
    fs::rename(file("best"), file(".unfinished-best-old")).expect("renamed");
    half_written(".unfinished-best");
    run.resume();
    run.must_end_as(&end, "best model being exchanged");
    half_written(".unfinished-best-old");
    run.resume();
    run.must_end_as(&end, "old best model being removed");
    half_written("checkpoints/.unfinished-step-00000007");
    half_written("checkpoints/step-00000109");
    fs::write(file(".metrics.jsonl.1-0.tmp"), b"half").expect("a file");
    run.resume();
    fs::remove_dir_all(file("checkpoints/step-00000109")).expect("no checkpoint, so not touched");
    run.must_end_as(&end, "debris");
}

/// A run that was killed on its way, somewhere in its second half.
fn half(root: &Path, name: &str, ranks: Ranks) -> Run {
    let run = Run::new(root, name, ranks);
    // On a busy machine the kill may come after the last step: then there is nothing to go on with.
    for _ in 0..20 {
        let mut process = run.start(false);
        if process.until(|_| run.lines() > STEPS / 2) {
            process.kill_all();
            if run.checkpoints().last().is_some_and(|last| !last.ends_with("step-00000108")) {
                return run;
            }
        }
        run.clear();
    }
    panic!("it always ended before it was killed");
}

/// Resumes `run` where a file cannot be written: that must be said in one line, and what was saved
/// before must stay as it was.
fn refused(run: &Run, before: &[&str], file: &str) {
    let mut saved = run.saved();
    saved.retain(|path, _| !path.contains(".unfinished-"));
    let log = run.config.with_extension("log");
    let ended = Process::start(run.command(before, true), log).wait();
    let said = &ended.said;
    assert_eq!(ended.code, Some(3), "{said}");
    let errors: Vec<&str> = said.lines().filter(|line| line.contains("error")).collect();
    let [error] = errors[..] else { panic!("not one error: {said}") };
    let path = error.split_once("cannot write ").unwrap_or_default().1;
    assert!(path.starts_with(&*run.dir.to_string_lossy()), "names no file of the run: {error}");
    assert!(path.contains(file), "{file} is not named: {error}");
    assert!(error.contains("; free some space"), "no remedy: {error}");
    assert!(!said.contains("panicked"), "{said}");
    assert!(run.saved() == saved, "checkpoints or best model changed: {said}");
}

#[test]
fn kill_and_a_file_size_limit_leave_the_checkpoints_whole() {
    let root = tempfile::tempdir().expect("a directory");
    let unbroken = Unbroken::new(root.path(), Ranks::One);
    let size = |file: &str| unbroken.end[&format!("checkpoints/step-00000108/{file}")].len();
    let (model, optimizer) = (size("model.safetensors"), size("optimizer.safetensors"));
    let run = half(root.path(), "run", Ranks::One);
    for (bytes, file) in [
        ((model + optimizer) / 2, "/checkpoints/.unfinished-step-"),
        (model / 2, "model.safetensors"),
        (4096, "metrics.jsonl"),
    ] {
        let kibibytes = (bytes / 1024).to_string();
        // Ignored, the signal for a file too large becomes the error EFBIG.
        let limited = r#"trap '' XFSZ; ulimit -f "$0"; exec "$@""#;
        refused(&run, &["bash", "-c", limited, &kibibytes], file);
    }
    run.resume();
    run.must_end_as(&unbroken.end, "file size limit");
}

/// A small file system in memory, gone with this.
struct Tmpfs(PathBuf);

impl Tmpfs {
    /// `None` where this process may not mount.
    fn mount(at: &Path) -> Option<Self> {
        fs::create_dir(at).expect("a new directory");
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", "size=8m", "none"]).arg(at);
        let output = mount.output().ok()?;
        output.status.success().then(|| Self(at.to_owned()))
    }

    /// Fills it up to the last `room` bytes; returns the file that does.
    fn fill(&self, room: u64) -> PathBuf {
        let path = self.0.join("filler");
        let mut file = File::create(&path).expect("a file");
        while file.write_all(&[1; 4096]).is_ok() {}
        let length = file.metadata().expect("its size").len();
        file.set_len(length - room).expect("shortened");
        path
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

/// Not required in CI either: it takes the right to mount.
fn full_disk(ranks: Ranks) {
    let root = tempfile::tempdir().expect("a directory");
    let Some(disk) = Tmpfs::mount(&root.path().join("run")) else {
        eprintln!("SKIPPED: may not mount a tmpfs; no disk was full");
        return;
    };
    let unbroken = Unbroken::new(root.path(), ranks);
    let run = half(root.path(), "run", ranks);
    for (room, file) in [(0, ""), (64 << 10, ""), (256 << 10, "/checkpoints/.unfinished-step-")] {
        let filler = disk.fill(room);
        refused(&run, &[], file);
        fs::remove_file(filler).expect("removed");
    }
    run.resume();
    run.must_end_as(&unbroken.end, "full disk");
}

#[test]
fn kill_and_a_full_disk_leave_the_checkpoints_whole() {
    full_disk(Ranks::One);
}

#[test]
fn mpi_ranks_on_a_full_disk_leave_the_checkpoints_whole() {
    if mpirun() {
        full_disk(Ranks::Mpi);
    }
}

/// Stops a run in good order, twice with each signal, and goes on.
fn stops(ranks: Ranks) {
    let root = tempfile::tempdir().expect("a directory");
    let unbroken = Unbroken::new(root.path(), ranks);
    let mut random = ChaCha8Rng::seed_from_u64(3);
    for name in ["TERM", "INT"] {
        let run = Run::new(root.path(), name, ranks);
        for first in [0, STEPS / 2] {
            let mut process = run.start(first > 0);
            let line = first + random.random_range(10..STEPS / 2 - 20);
            assert!(process.until(|_| run.lines() > line), "it ended before");
            signal(name, &[process.pid()]);
            let ended = process.wait();
            assert_eq!(ended.code, Some(130), "{}", ended.said);
            let said: Vec<&str> =
                ended.said.lines().filter(|line| line.contains("interrupted after")).collect();
            let [said] = said[..] else { panic!("not said once: {}", ended.said) };
            let (_, step) = said.split_once("interrupted after step ").expect("a step");
            let (step, rest) = step.split_once("; ").expect("a remedy");
            assert_eq!(rest, "everything is saved, continue with --resume");
            let newest = names(&run.dir.join("checkpoints")).pop().expect("a checkpoint");
            assert_eq!(newest, format!("step-{step:0>8}"), "not where it stopped");
        }
        run.resume();
        run.must_end_as(&unbroken.end, name);
    }
}

#[test]
fn a_polite_kill_saves_and_says_how_to_go_on() {
    stops(Ranks::One);
}

#[test]
fn mpi_ranks_told_to_stop_save_and_say_how_to_go_on() {
    if mpirun() {
        stops(Ranks::Mpi);
    }
}

#[test]
fn tcp_ranks_told_to_stop_save_and_say_how_to_go_on() {
    stops(Ranks::Tcp);
}

/// Resumes runs whose newest checkpoint was damaged in several ways.
fn damaged(ranks: Ranks) {
    type Damage = fn(&Path);
    let root = tempfile::tempdir().expect("a directory");
    let unbroken = Unbroken::new(root.path(), ranks);
    let damages: [(&str, Damage); 4] = [
        ("model.safetensors", |path| {
            let mut bytes = fs::read(path).expect("weights");
            let middle = bytes.len() / 2;
            bytes[middle] ^= 1;
            fs::write(path, bytes).expect("written");
        }),
        ("optimizer.safetensors", |path| fs::remove_file(path).expect("removed")),
        ("state.json", |path| fs::write(path, b"").expect("emptied")),
        ("MANIFEST.json", |path| fs::write(path, b"{").expect("torn")),
    ];
    // How a file is damaged is for one process to find out; ranks have to agree on it.
    for &(file, damage) in &damages[..if ranks != Ranks::One { 2 } else { damages.len() }] {
        let run = half(root.path(), file, ranks);
        let checkpoints = run.checkpoints();
        assert!(checkpoints.len() >= 2, "{checkpoints:?}");
        let path = checkpoints[checkpoints.len() - 1].join(file);
        damage(&path);
        let said = run.resume();
        let warnings: Vec<&str> = said.lines().filter(|line| line.contains("warning")).collect();
        let [warning] = warnings[..] else { panic!("not one warning: {said}") };
        assert!(warning.contains(&*path.to_string_lossy()), "{warning}");
        assert!(warning.ends_with("trying the one before it"), "{warning}");
        run.must_end_as(&unbroken.end, file);
    }
    let run = half(root.path(), "all", ranks);
    for checkpoint in run.checkpoints() {
        fs::remove_file(checkpoint.join("optimizer.safetensors")).expect("removed");
    }
    let before = run.saved();
    let ended = run.start(true).wait();
    assert_eq!(ended.code, Some(2), "{}", ended.said);
    let errors: Vec<&str> = ended
        .said
        .lines()
        .filter(|line| line.contains("error") && !line.contains("warning"))
        .collect();
    let [error] = errors[..] else { panic!("not one error: {}", ended.said) };
    assert!(error.contains("damaged; start again in another run.dir"), "{error}");
    assert!(run.saved() == before, "something of the run was changed");
}

#[test]
fn a_damaged_checkpoint_after_a_kill_is_passed_over() {
    damaged(Ranks::One);
}

#[test]
fn mpi_ranks_pass_a_damaged_checkpoint_over() {
    if mpirun() {
        damaged(Ranks::Mpi);
    }
}

/// Whether ranks can be started; in CI they must be.
fn mpirun() -> bool {
    let program = std::env::var_os("ALLREEL_MPIRUN").unwrap_or_else(|| "mpirun".into());
    let there = Command::new(program).arg("--version").output().is_ok();
    if there && cfg!(feature = "mpi") {
        return true;
    }
    assert!(std::env::var_os("CI").is_none(), "no mpirun or no feature `mpi`, and this is CI");
    eprintln!("SKIPPED: no mpirun or built without the feature `mpi`; nothing was killed");
    false
}
