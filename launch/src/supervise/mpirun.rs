//! Which mpirun there is, and the command line that suits it, this node and the job.
//!
//! Owns every flag of Open MPI 4 (ORTE), Open MPI 5 (PRRTE) and MPICH (hydra) that we use.
//! Refuses any other: a flag that means something else elsewhere starts the wrong job silently.

use super::hostfile::Hosts;
use crate::{Launch, LaunchError};
use std::collections::HashSet;
use std::ffi::OsString;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The three families of mpirun, by who reads the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Flavour {
    /// Open MPI up to 4: ORTE.
    OpenMpi4,
    /// Open MPI 5 and later: PRRTE.
    OpenMpi5,
    /// MPICH: hydra.
    Mpich,
}

/// Finds mpirun: the flag, then `ALLREEL_MPIRUN`, then `PATH`.
pub(super) fn find(flag: Option<&Path>) -> Result<PathBuf, LaunchError> {
    let variable = std::env::var_os("ALLREEL_MPIRUN").map(PathBuf::from);
    let named = flag
        .map(|path| ("--mpirun", path.to_path_buf()))
        .or_else(|| variable.map(|path| ("ALLREEL_MPIRUN", path)));
    if let Some((origin, path)) = named {
        return match check_runnable(&path) {
            Ok(()) => Ok(path),
            Err(reason) => Err(LaunchError::NotRunnable { origin, path, reason }),
        };
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .map(|directory| directory.join("mpirun"))
        .find(|file| check_runnable(file).is_ok())
        .ok_or(LaunchError::NoMpirun)
}

fn check_runnable(path: &Path) -> Result<(), String> {
    let data = path.metadata().map_err(|error| error.to_string())?;
    if data.is_file() && data.permissions().mode() & 0o111 != 0 {
        Ok(())
    } else {
        Err("not an executable file".into())
    }
}

impl Flavour {
    /// Asks the program for its version.
    pub(super) fn probe(mpirun: &Path) -> Result<Self, LaunchError> {
        let answer = Command::new(mpirun)
            .arg("--version")
            .output()
            .map_err(LaunchError::io(format!("run {} --version", mpirun.display())))?;
        let said = String::from_utf8_lossy(&answer.stdout);
        Self::of(&said).ok_or_else(|| {
            let stderr = String::from_utf8_lossy(&answer.stderr);
            let first = said.lines().chain(stderr.lines()).find(|line| !line.trim().is_empty());
            LaunchError::UnknownMpirun {
                path: mpirun.to_path_buf(),
                said: first.unwrap_or_default().trim().to_string(),
            }
        })
    }

    fn of(version: &str) -> Option<Self> {
        if version.contains("HYDRA build details") {
            return Some(Self::Mpich);
        }
        let (_, number) = version.split_once("(Open MPI) ")?;
        let major: u32 = number.split('.').next()?.trim().parse().ok()?;
        Some(if major >= 5 { Self::OpenMpi5 } else { Self::OpenMpi4 })
    }
}

/// What the command line depends on besides the job itself.
#[derive(Clone, Debug)]
pub(super) struct Node {
    /// Physical cores this process may use.
    pub(super) cores: usize,
    /// Whether we are root, which Open MPI refuses unless told twice.
    pub(super) root: bool,
    /// `RAYON_NUM_THREADS` as the user set it.
    pub(super) rayon: Option<String>,
    /// Nodes of the Slurm allocation we are in, if any: it places the ranks, not we.
    pub(super) slurm_nodes: Option<usize>,
}

impl Node {
    /// This machine and this environment.
    pub(super) fn here() -> Self {
        let variable = |name| std::env::var(name).ok();
        Self {
            cores: cores(),
            root: rustix::process::geteuid().is_root(),
            rayon: variable("RAYON_NUM_THREADS"),
            slurm_nodes: variable("SLURM_JOB_ID")
                .map(|_| variable("SLURM_JOB_NUM_NODES").and_then(|n| n.parse().ok()).unwrap_or(1)),
        }
    }
}

/// Physical cores within our affinity mask, at most what a container's quota grants: two matrix
/// multiplications on the hyper-threads of one core are slower than one after the other.
fn cores() -> usize {
    let logical = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let Ok(allowed) = rustix::thread::sched_getaffinity(None) else {
        return logical;
    };
    let physical: HashSet<String> = (0..rustix::thread::CpuSet::MAX_CPU)
        .filter(|&cpu| allowed.is_set(cpu))
        .filter_map(|cpu| {
            let file = format!("/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list");
            std::fs::read_to_string(file).ok()
        })
        .collect();
    if physical.is_empty() { logical } else { physical.len().min(logical) }
}

/// What to run: mpirun's own arguments and the variables to add to its environment.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) args: Vec<OsString>,
    pub(super) env: Vec<(&'static str, String)>,
}

impl Plan {
    pub(super) fn new(
        launch: &Launch,
        flavour: Flavour,
        node: &Node,
        hosts: Option<&Hosts>,
    ) -> Result<Self, LaunchError> {
        let ranks = launch.ranks;
        if let (Some(path), Some(slots)) = (&launch.hostfile, hosts.and_then(Hosts::slots))
            && ranks > slots
        {
            return Err(LaunchError::TooFewSlots { ranks, slots, path: path.clone() });
        }
        let ranks_here = match (hosts, node.slurm_nodes) {
            (Some(hosts), _) => hosts.fullest(ranks, node.cores),
            (None, Some(nodes)) => ranks.div_ceil(nodes.max(1)),
            (None, None) => ranks,
        };
        let from_env = node.rayon.as_deref().and_then(|text| text.trim().parse().ok());
        let threads = launch
            .threads
            .or(from_env.filter(|&threads| threads > 0))
            .unwrap_or((node.cores / ranks_here).max(1));
        let bind = ranks_here * threads <= node.cores;
        // An allocation or a hostfile states its own slots; only a bare node has to be stretched.
        let oversubscribe = hosts.is_none() && node.slurm_nodes.is_none() && ranks > node.cores;

        let mut env = Vec::new();
        if launch.threads.is_some() || node.rayon.is_none() {
            env.push(("RAYON_NUM_THREADS", threads.to_string()));
        }
        if node.root && flavour != Flavour::Mpich {
            env.push(("OMPI_ALLOW_RUN_AS_ROOT", "1".into()));
            env.push(("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1".into()));
        }
        let mut args: Vec<OsString> = vec!["-n".into(), ranks.to_string().into()];
        let mut add = |words: &[&str]| args.extend(words.iter().map(OsString::from));
        match flavour {
            // Its banners leave out the dead rank's name whenever it sees the end of the job
            // before its own report is due (4.1.4: a third of the time); its log does not.
            Flavour::OpenMpi4 => add(&["--tag-output", "--mca", "state_base_verbose", "1"]),
            Flavour::OpenMpi5 => add(&["--output", "tag"]),
            // Tagged as Open MPI tags, so that one reader does for all; the statuses are hydra's
            // only way to say which rank failed.
            Flavour::Mpich => {
                add(&["-prepend-pattern", "[1,%r]<rank>:", "-print-all-exitcodes"]);
            }
        }
        match flavour {
            Flavour::Mpich if bind => add(&["-bind-to", &format!("core:{threads}")]),
            Flavour::Mpich => add(&["-bind-to", "none"]),
            _ if bind => {
                add(&["--map-by", &format!("slot:PE={threads}"), "--bind-to", "core"]);
            }
            Flavour::OpenMpi5 if oversubscribe => {
                add(&["--map-by", ":oversubscribe", "--bind-to", "none"]);
            }
            Flavour::OpenMpi4 if oversubscribe => add(&["--oversubscribe", "--bind-to", "none"]),
            _ => add(&["--bind-to", "none"]),
        }
        // Hydra hands its whole environment on; Open MPI, to other nodes, only what it is told.
        if flavour != Flavour::Mpich {
            add(&["-x", "RAYON_NUM_THREADS"]);
        }
        if let Some(hostfile) = &launch.hostfile {
            add(&[if flavour == Flavour::Mpich { "-f" } else { "--hostfile" }]);
            args.push(hostfile.into());
        }
        Ok(Self { args, env })
    }
}

#[cfg(test)]
mod tests;
