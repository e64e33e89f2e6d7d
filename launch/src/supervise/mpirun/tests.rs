//! Command lines, per mpirun, for jobs that fit their node and jobs that do not.

use super::*;
use Flavour::{Mpich, OpenMpi4, OpenMpi5};

fn job(ranks: usize) -> Launch {
    Launch {
        ranks,
        backend: None,
        threads: None,
        hostfile: None,
        mpirun: None,
        program: "/bin/true".into(),
        args: Vec::new(),
        graceful_stop: false,
    }
}

fn node(cores: usize) -> Node {
    Node { cores, root: false, rayon: None, slurm_nodes: None }
}

fn line(launch: &Launch, flavour: Flavour, node: &Node) -> String {
    let plan = Plan::new(launch, flavour, node, None).unwrap();
    let env = plan.env.iter().map(|(name, value)| format!("{name}={value}"));
    let args = plan.args.iter().map(|arg| arg.to_string_lossy().into_owned());
    env.chain(args).collect::<Vec<_>>().join(" ")
}

#[test]
fn versions_are_told_apart() {
    assert_eq!(Flavour::of("mpirun (Open MPI) 4.1.4\n\nReport bugs"), Some(OpenMpi4));
    assert_eq!(Flavour::of("mpirun (Open MPI) 5.0.11\n"), Some(OpenMpi5));
    assert_eq!(Flavour::of("HYDRA build details:\n    Version: 4.0.2\n"), Some(Mpich));
    assert_eq!(Flavour::of("Intel(R) MPI Library for Linux* OS, Version 2021.11\n"), None);
    assert_eq!(Flavour::of("mpirun (Open MPI) nightly\n"), None);
}

#[test]
fn ranks_that_fit_are_bound_to_their_share() {
    let (job, node) = (job(2), node(8));
    assert_eq!(
        line(&job, OpenMpi4, &node),
        "RAYON_NUM_THREADS=4 -n 2 --tag-output --mca state_base_verbose 1 \
         --map-by slot:PE=4 --bind-to core -x RAYON_NUM_THREADS"
    );
    assert_eq!(
        line(&job, OpenMpi5, &node),
        "RAYON_NUM_THREADS=4 -n 2 --output tag --map-by slot:PE=4 --bind-to core \
         -x RAYON_NUM_THREADS"
    );
    assert_eq!(
        line(&job, Mpich, &node),
        "RAYON_NUM_THREADS=4 -n 2 -prepend-pattern [1,%r]<rank>: -print-all-exitcodes \
         -bind-to core:4"
    );
}

#[test]
fn ranks_that_do_not_fit_are_left_unbound() {
    let (job, node) = (job(4), node(2));
    let of = |flavour| line(&job, flavour, &node);
    assert!(of(OpenMpi4).contains("RAYON_NUM_THREADS=1 "), "{}", of(OpenMpi4));
    assert!(of(OpenMpi4).contains("--oversubscribe --bind-to none"), "{}", of(OpenMpi4));
    assert!(of(OpenMpi5).contains("--map-by :oversubscribe --bind-to none"));
    assert!(of(Mpich).ends_with("-bind-to none"));
}

#[test]
fn more_threads_than_cores_unbind_without_oversubscribing() {
    let job = Launch { threads: Some(8), ..job(2) };
    let line = line(&job, OpenMpi4, &node(8));
    assert!(line.contains("RAYON_NUM_THREADS=8"), "{line}");
    assert!(line.contains("--bind-to none") && !line.contains("oversubscribe"), "{line}");
}

#[test]
fn rayon_threads_of_the_user_are_kept_unless_a_flag_says_otherwise() {
    let node = Node { rayon: Some("3".into()), ..node(8) };
    let kept = line(&job(2), OpenMpi4, &node);
    assert!(!kept.contains("RAYON_NUM_THREADS="), "{kept}");
    assert!(kept.contains("slot:PE=3") && kept.contains("-x RAYON_NUM_THREADS"), "{kept}");
    let flag = line(&Launch { threads: Some(2), ..job(2) }, OpenMpi4, &node);
    assert!(flag.contains("RAYON_NUM_THREADS=2") && flag.contains("slot:PE=2"), "{flag}");
}

#[test]
fn root_is_allowed_only_when_root() {
    let root = Node { root: true, ..node(2) };
    assert!(line(&job(1), OpenMpi4, &root).contains("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1"));
    assert!(!line(&job(1), OpenMpi4, &node(2)).contains("ROOT"));
    assert!(!line(&job(1), Mpich, &root).contains("ROOT"));
}

#[test]
fn an_allocation_places_the_ranks_itself() {
    let node = Node { slurm_nodes: Some(4), ..node(8) };
    let line = line(&job(16), OpenMpi4, &node);
    assert!(line.contains("RAYON_NUM_THREADS=2 "), "{line}");
    assert!(line.contains("slot:PE=2") && !line.contains("oversubscribe"), "{line}");
}

#[test]
fn a_hostfile_is_passed_on_and_bounds_the_ranks() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("hosts");
    std::fs::write(&path, "a slots=2\nb slots=2\n").unwrap();
    let hosts = Hosts::read(&path).unwrap();
    let plan = |ranks, flavour| {
        let job = Launch { hostfile: Some(path.clone()), ..job(ranks) };
        Plan::new(&job, flavour, &node(8), Some(&hosts))
    };
    let four = plan(4, OpenMpi4).unwrap();
    assert_eq!(four.env[0].1, "4");
    assert!(four.args.ends_with(&["--hostfile".into(), path.clone().into()]));
    assert!(plan(4, Mpich).unwrap().args.ends_with(&["-f".into(), path.clone().into()]));
    let message = plan(5, OpenMpi4).unwrap_err().to_string();
    assert!(message.contains("use -n 4 or raise slots="), "{message}");
}
