//! Environments as each launcher sets them, and as none should.

use super::*;

fn read(variables: &[(&str, &str)]) -> Result<Option<Identity>, LaunchError> {
    Identity::from_lookup(|name| {
        variables.iter().find(|(n, _)| *n == name).map(|(_, value)| (*value).to_string())
    })
}

fn some(rank: usize, world: usize, local_rank: usize, local_world: usize) -> Option<Identity> {
    Some(Identity { rank, world, local_rank, local_world, mpi: false })
}

fn over_mpi(identity: Option<Identity>) -> Option<Identity> {
    identity.map(|identity| Identity { mpi: true, ..identity })
}

#[test]
fn nothing_set_is_nobody() {
    assert_eq!(read(&[]).unwrap(), None);
}

#[test]
fn each_launcher_is_read_by_its_own_names() {
    for names in [OPEN_MPI, MPICH, TORCHRUN] {
        let set = [
            (names.rank, "5"),
            (names.world, "8"),
            (names.local_rank, "1"),
            (names.local_world, "4"),
        ];
        let with_mpi = |identity| if names.mpi { over_mpi(identity) } else { identity };
        assert_eq!(read(&set).unwrap(), with_mpi(some(5, 8, 1, 4)), "{}", names.rank);
        assert_eq!(read(&set[..2]).unwrap(), with_mpi(some(5, 8, 5, 8)), "{}", names.rank);
    }
}

/// What Slurm's own documentation calls a step of 5 tasks on nodes of 2, 2 and 1.
const STEP: [(&str, &str); 7] = [
    ("SLURM_STEP_ID", "0"),
    ("SLURM_PROCID", "3"),
    ("SLURM_NTASKS", "5"),
    ("SLURM_STEP_NUM_TASKS", "5"),
    ("SLURM_LOCALID", "1"),
    ("SLURM_NODEID", "1"),
    ("SLURM_STEP_TASKS_PER_NODE", "2(x2),1"),
];

fn step_with(name: &'static str, value: Option<&'static str>) -> Vec<(&'static str, &'static str)> {
    let others = STEP.into_iter().filter(|(n, _)| *n != name);
    others.chain(value.map(|value| (name, value))).collect()
}

#[test]
fn slurm_step_counts_and_its_shells_do_not() {
    assert_eq!(read(&STEP).unwrap(), some(3, 5, 1, 2));
    assert_eq!(read(&step_with("SLURM_STEP_ID", None)).unwrap(), None);
    for shell in ["4294967291", "4294967290", "4294967292"] {
        assert_eq!(read(&step_with("SLURM_STEP_ID", Some(shell))).unwrap(), None, "{shell}");
    }
    assert_eq!(read(&step_with("SLURM_STEP_NUM_TASKS", Some("1"))).unwrap(), None);
    assert_eq!(read(&step_with("SLURM_STEP_NUM_TASKS", None)).unwrap(), some(3, 5, 1, 2));
}

#[test]
fn slurm_tasks_per_node_is_expanded() {
    let mut last = step_with("SLURM_NODEID", Some("2"));
    last.retain(|(name, _)| *name != "SLURM_LOCALID");
    last.push(("SLURM_LOCALID", "0"));
    assert_eq!(read(&last).unwrap(), some(3, 5, 0, 1));
    assert_eq!(read(&step_with("SLURM_STEP_TASKS_PER_NODE", None)).unwrap(), some(3, 5, 3, 5));
    for bad in ["2(y2)", "two", ""] {
        let error = read(&step_with("SLURM_STEP_TASKS_PER_NODE", Some(bad))).unwrap_err();
        assert!(error.to_string().contains("SLURM_STEP_TASKS_PER_NODE"), "{error}");
    }
    let error = read(&step_with("SLURM_NODEID", Some("3"))).unwrap_err().to_string();
    assert!(error.contains("SLURM_NODEID=3"), "{error}");
}

#[test]
fn launchers_inside_slurm_win_over_it_and_pmi2_borrows_its_node() {
    let inside = |more: &[(&'static str, &'static str)]| {
        let all: Vec<_> = STEP.iter().chain(more).copied().collect();
        read(&all).unwrap()
    };
    assert_eq!(
        inside(&[
            ("OMPI_COMM_WORLD_RANK", "7"),
            ("OMPI_COMM_WORLD_SIZE", "8"),
            ("OMPI_COMM_WORLD_LOCAL_RANK", "3"),
            ("OMPI_COMM_WORLD_LOCAL_SIZE", "4"),
        ]),
        over_mpi(some(7, 8, 3, 4))
    );
    assert_eq!(inside(&[("PMI_RANK", "3"), ("PMI_SIZE", "5")]), over_mpi(some(3, 5, 1, 2)));
    assert_eq!(inside(&[("PMIX_RANK", "3")]), over_mpi(some(3, 5, 1, 2)));
    // Two torchrun workers per task: Slurm's node does not describe them.
    assert_eq!(inside(&[("RANK", "6"), ("WORLD_SIZE", "10")]), some(6, 10, 6, 10));
}

#[test]
fn half_a_set_is_refused_except_the_generic_names() {
    let message = |set: &[(&str, &str)]| read(set).unwrap_err().to_string();
    assert!(message(&[("OMPI_COMM_WORLD_RANK", "0")]).contains("OMPI_COMM_WORLD_SIZE is not"));
    assert!(message(&[("PMI_SIZE", "2")]).contains("PMI_RANK is not"));
    assert!(message(&[("WORLD_SIZE", "2")]).contains("RANK is not"));
    assert_eq!(read(&[("WORLD_SIZE", "1")]).unwrap(), None);
    assert_eq!(read(&[("RANK", "1")]).unwrap(), None);
}

#[test]
fn nonsense_is_refused_by_name_and_value() {
    let message = |set: &[(&str, &str)]| {
        let error = read(set).unwrap_err();
        assert!(error.is_user());
        error.to_string()
    };
    let m = message(&[("PMI_RANK", "-1"), ("PMI_SIZE", "2")]);
    assert!(m.contains("PMI_RANK=-1"), "{m}");
    let m = message(&[("RANK", "2"), ("WORLD_SIZE", "2")]);
    assert!(m.contains("RANK=2: must be below WORLD_SIZE=2"), "{m}");
    let m = message(&[
        ("RANK", "0"),
        ("WORLD_SIZE", "2"),
        ("LOCAL_RANK", "2"),
        ("LOCAL_WORLD_SIZE", "2"),
    ]);
    assert!(m.contains("LOCAL_RANK=2"), "{m}");
    let m = message(&[
        ("RANK", "0"),
        ("WORLD_SIZE", "2"),
        ("LOCAL_RANK", "0"),
        ("LOCAL_WORLD_SIZE", "3"),
    ]);
    assert!(m.contains("LOCAL_WORLD_SIZE=3: must be at most WORLD_SIZE=2"), "{m}");
}

#[test]
fn variables_given_are_read_back() {
    let rank = Identity { rank: 2, world: 4, local_rank: 1, local_world: 2, mpi: false };
    let given = rank.variables();
    let value = |name: &str| given.iter().find(|(n, _)| *n == name).map(|(_, v)| v.to_string());
    assert_eq!(Identity::from_lookup(value).unwrap(), Some(rank));
}
