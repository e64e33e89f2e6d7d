//! The processes of a job on this node, wherever they went, and their end.
//!
//! Every process that mpirun starts inherits a variable that no other job has. That finds ranks
//! whose mpirun died before them, and ranks in process groups of their own (Open MPI makes one
//! for each), which neither a parent's pid nor mpirun's group would.

use rustix::process::{Pid, Signal};
use std::time::Duration;

/// The name of the variable that marks a job's processes.
const NAME: &str = "ALLREEL_LAUNCH_ID";

/// One job's mark.
#[derive(Debug)]
pub(super) struct Mark(String);

impl Mark {
    /// A mark that no other job on this machine has.
    pub(super) fn new() -> Self {
        let since = std::time::UNIX_EPOCH.elapsed().unwrap_or_default();
        Self(format!("{}-{}", std::process::id(), since.as_nanos()))
    }

    /// The variable to start mpirun with.
    pub(super) fn variable(&self) -> (&'static str, &str) {
        (NAME, &self.0)
    }

    /// Kills every process that carries the mark, and waits until they are gone: a kill is only
    /// a request, and one of them may have been forking meanwhile.
    pub(super) fn kill_all(&self) {
        for _ in 0..100 {
            let carriers = self.carriers();
            if carriers.is_empty() {
                return;
            }
            for pid in carriers {
                // It may have ended by itself: then there is nothing left to do.
                let _ = rustix::process::kill_process(pid, Signal::KILL);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Processes whose environment is ours to read and holds the mark. Zombies have none.
    pub(super) fn carriers(&self) -> Vec<Pid> {
        let entry = format!("{NAME}={}", self.0);
        let Ok(processes) = std::fs::read_dir("/proc") else {
            return Vec::new();
        };
        processes
            .flatten()
            .filter_map(|process| {
                let pid = Pid::from_raw(process.file_name().to_str()?.parse().ok()?)?;
                let environment = std::fs::read(process.path().join("environ")).ok()?;
                environment
                    .split(|&byte| byte == 0)
                    .any(|variable| variable == entry.as_bytes())
                    .then_some(pid)
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::CommandExt;
    use std::process::{Command, Stdio};

    #[test]
    fn marked_processes_are_found_beyond_group_and_parent_and_no_others() {
        let (ours, other) = (Mark::new(), Mark::new());
        let mut bystander = marked(&other).arg("30").spawn().unwrap();
        // Its grandchild outlives the shell between us, and is in another process group.
        let mut shell = Command::new("sh");
        let (name, value) = ours.variable();
        shell.args(["-c", "sleep 30 >/dev/null 2>&1 &"]).env(name, value).process_group(0);
        shell.status().unwrap();
        assert_eq!(ours.carriers().len(), 1);
        ours.kill_all();
        assert_eq!(ours.carriers(), [], "the marked process is still there");
        assert_eq!(other.carriers().len(), 1);
        assert!(bystander.try_wait().unwrap().is_none(), "an unmarked process was killed");
        bystander.kill().unwrap();
        bystander.wait().unwrap();
    }

    fn marked(mark: &Mark) -> Command {
        let (name, value) = mark.variable();
        let mut command = Command::new("sleep");
        command.env(name, value).stdout(Stdio::null());
        command
    }
}
