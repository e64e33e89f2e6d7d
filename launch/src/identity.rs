//! Which rank this process is, as its launcher left it in the environment.
//!
//! Owns the names of those variables, for mpirun of Open MPI and of MPICH, torchrun and srun.
//! Refuses to guess: half of a launcher's variables, or a rank outside its world, is an error,
//! because the alternative is N solo copies that overwrite each other's run.

use crate::LaunchError;

/// One rank among those of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// This rank, from 0.
    pub rank: usize,
    /// Ranks in the job.
    pub world: usize,
    /// This rank among those of its node, from 0.
    pub local_rank: usize,
    /// Ranks on this node. Where the launcher does not say, all of them: that errs towards too
    /// few threads per rank, never too many.
    pub local_world: usize,
    /// Whether MPI finds the others: started by mpirun, or by srun with one of its `--mpi` kinds.
    /// Ranks of torchrun and of plain srun meet over TCP ([`crate::Meeting`]).
    pub mpi: bool,
}

/// The four names under which one launcher publishes an [`Identity`].
struct Names {
    rank: &'static str,
    world: &'static str,
    local_rank: &'static str,
    local_world: &'static str,
    mpi: bool,
}

const OPEN_MPI: Names = Names {
    rank: "OMPI_COMM_WORLD_RANK",
    world: "OMPI_COMM_WORLD_SIZE",
    local_rank: "OMPI_COMM_WORLD_LOCAL_RANK",
    local_world: "OMPI_COMM_WORLD_LOCAL_SIZE",
    mpi: true,
};
const MPICH: Names = Names {
    rank: "PMI_RANK",
    world: "PMI_SIZE",
    local_rank: "MPI_LOCALRANKID",
    local_world: "MPI_LOCALNRANKS",
    mpi: true,
};
const TORCHRUN: Names = Names {
    rank: "RANK",
    world: "WORLD_SIZE",
    local_rank: "LOCAL_RANK",
    local_world: "LOCAL_WORLD_SIZE",
    mpi: false,
};

/// Slurm numbers the steps that no `srun -n` made (batch script, interactive shell, extern) down
/// from `u32::MAX`.
const FIRST_SPECIAL_STEP: u32 = 0xffff_fff0;

impl Identity {
    /// Reads the process environment; `None` for a process that no launcher started.
    ///
    /// # Errors
    /// If a launcher's variables are incomplete, not numbers, or contradict each other.
    pub fn from_env() -> Result<Option<Self>, LaunchError> {
        Self::from_lookup(|name| std::env::var(name).ok())
    }

    /// The same from any source of variables.
    ///
    /// Slurm comes last: ranks that mpirun or torchrun started inside a Slurm job carry Slurm's
    /// variables too, and those describe the daemon that started them.
    ///
    /// # Errors
    /// As [`Identity::from_env`].
    pub fn from_lookup(get: impl Fn(&str) -> Option<String>) -> Result<Option<Self>, LaunchError> {
        for names in [OPEN_MPI, MPICH, TORCHRUN] {
            if let Some(identity) = named(&names, &get)? {
                return checked(identity, &names).map(Some);
            }
        }
        slurm(&get)
    }

    /// This rank as torchrun would publish it.
    pub(crate) fn variables(&self) -> [(&'static str, usize); 4] {
        [
            (TORCHRUN.rank, self.rank),
            (TORCHRUN.world, self.world),
            (TORCHRUN.local_rank, self.local_rank),
            (TORCHRUN.local_world, self.local_world),
        ]
    }

    /// Names that win over [`Identity::variables`], which must not be set beside them.
    pub(crate) fn stronger_variables() -> impl Iterator<Item = &'static str> {
        [OPEN_MPI, MPICH]
            .into_iter()
            .flat_map(|names| [names.rank, names.world, names.local_rank, names.local_world])
    }
}

fn named(
    names: &Names,
    get: &impl Fn(&str) -> Option<String>,
) -> Result<Option<Identity>, LaunchError> {
    let (rank, world) = match (number(names.rank, get)?, number(names.world, get)?) {
        (Some(rank), Some(world)) => (rank, world),
        (None, None) => return Ok(None),
        // Too common a name to mean torchrun on its own.
        (Some(_), None) if names.rank == "RANK" => return Ok(None),
        (None, Some(0 | 1)) if names.rank == "RANK" => return Ok(None),
        (Some(_), None) => {
            return Err(LaunchError::MissingVariable { present: names.rank, absent: names.world });
        }
        (None, Some(_)) => {
            return Err(LaunchError::MissingVariable { present: names.world, absent: names.rank });
        }
    };
    let local = match (number(names.local_rank, get)?, number(names.local_world, get)?) {
        (Some(local_rank), Some(local_world)) => Some((local_rank, local_world)),
        // srun --mpi=pmi2 sets PMI_RANK and PMI_SIZE, and the rest under its own names.
        _ => slurm(get)?
            .filter(|step| step.rank == rank && step.world == world)
            .map(|step| (step.local_rank, step.local_world)),
    };
    let (local_rank, local_world) = local.unwrap_or((rank, world));
    Ok(Some(Identity { rank, world, local_rank, local_world, mpi: names.mpi }))
}

/// A step of srun with more than one task. The shell of sbatch or salloc has `SLURM_PROCID` too,
/// but is no rank of anything.
fn slurm(get: &impl Fn(&str) -> Option<String>) -> Result<Option<Identity>, LaunchError> {
    let is_step = get("SLURM_STEP_ID")
        .and_then(|step| step.parse::<u32>().ok())
        .is_some_and(|step| step < FIRST_SPECIAL_STEP);
    let tasks = match number("SLURM_STEP_NUM_TASKS", get)? {
        Some(tasks) => Some(tasks),
        None => number("SLURM_NTASKS", get)?,
    };
    let (true, Some(world @ 2..)) = (is_step, tasks) else {
        return Ok(None);
    };
    let names = Names {
        rank: "SLURM_PROCID",
        world: "SLURM_STEP_NUM_TASKS",
        local_rank: "SLURM_LOCALID",
        local_world: "SLURM_STEP_TASKS_PER_NODE",
        // What srun --mpi=pmix sets beside its own; --mpi=pmi2 has been read as MPICH's.
        mpi: get("PMIX_RANK").is_some(),
    };
    let Some(rank) = number(names.rank, get)? else {
        return Err(LaunchError::MissingVariable { present: names.world, absent: names.rank });
    };
    let local = number(names.local_rank, get)?.zip(tasks_on_node(get)?);
    let (local_rank, local_world) = local.unwrap_or((rank, world));
    checked(Identity { rank, world, local_rank, local_world, mpi: names.mpi }, &names).map(Some)
}

/// Slurm's list of tasks on each node, such as `4(x2),1`, at this node's index.
fn tasks_on_node(get: &impl Fn(&str) -> Option<String>) -> Result<Option<usize>, LaunchError> {
    let name = "SLURM_STEP_TASKS_PER_NODE";
    let (Some(list), Some(node)) = (get(name), number("SLURM_NODEID", get)?) else {
        return Ok(None);
    };
    let mut first = 0;
    for item in list.split(',') {
        let (tasks, nodes) = match item.split_once("(x") {
            Some((tasks, nodes)) => (tasks, nodes.trim_end_matches(')')),
            None => (item, "1"),
        };
        let (Ok(tasks), Ok(nodes)) = (tasks.trim().parse(), nodes.parse::<usize>()) else {
            return Err(LaunchError::BadVariable {
                name,
                expected: "expected a list such as 4(x2),1".into(),
                value: list.clone(),
            });
        };
        first += nodes;
        if node < first {
            return Ok(Some(tasks));
        }
    }
    Err(LaunchError::BadVariable {
        name,
        expected: format!("has no entry for this node, SLURM_NODEID={node}"),
        value: list,
    })
}

pub(crate) fn number(
    name: &'static str,
    get: &impl Fn(&str) -> Option<String>,
) -> Result<Option<usize>, LaunchError> {
    let Some(value) = get(name) else {
        return Ok(None);
    };
    match value.trim().parse() {
        Ok(number) => Ok(Some(number)),
        Err(_) => Err(LaunchError::BadVariable {
            name,
            value,
            expected: "expected a whole number from 0".into(),
        }),
    }
}

fn checked(identity: Identity, names: &Names) -> Result<Identity, LaunchError> {
    let bad = |name, value: usize, expected| {
        Err(LaunchError::BadVariable { name, value: value.to_string(), expected })
    };
    let Identity { rank, world, local_rank, local_world, .. } = identity;
    if rank >= world {
        return bad(names.rank, rank, format!("must be below {}={world}", names.world));
    }
    if local_world > world {
        return bad(
            names.local_world,
            local_world,
            format!("must be at most {}={world}", names.world),
        );
    }
    if local_rank >= local_world {
        return bad(
            names.local_rank,
            local_rank,
            format!("must be below {}={local_world}", names.local_world),
        );
    }
    Ok(identity)
}

#[cfg(test)]
mod tests;
