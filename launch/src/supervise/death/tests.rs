//! What each mpirun printed when a rank died, word for word, and what it means.

use super::*;

fn after_banner(text: &str) -> Death {
    let first = text.lines().next().unwrap();
    assert!(Deaths::opens_banner(first), "{first}");
    let mut deaths = Deaths::default();
    deaths.banner(text);
    assert!(deaths.any());
    deaths.verdict(1)
}

fn rank(rank: usize, how: How) -> Death {
    Death { rank: Some(rank), how }
}

#[test]
fn open_mpi_4_and_5_banners() {
    for text in [
        "mpirun noticed that process rank 1 with PID 0 on node vm exited on signal 9 (Killed).",
        "prterun noticed that process rank 1 with PID 13782 on node vm exited on\nsignal 9 \
         (Killed).",
    ] {
        assert_eq!(after_banner(text), rank(1, How::Killed(9)));
    }
    for text in [
        "mpirun detected that one or more processes exited with non-zero status, thus causing\n\
         the job to be terminated. The first process to do so was:\n\n  \
         Process name: [[23237,1],12]\n  Exit code:    2",
        "prterun detected that one or more processes exited with non-zero status,\nthus causing \
         the job to be terminated. The first process to do so was:\n\n   \
         Process name: [prterun-vm-13788@1,12]\n   Exit code:    2",
    ] {
        assert_eq!(after_banner(text), rank(12, How::Exited(2)));
    }
    for text in [
        "MPI_ABORT was invoked on rank 1 in communicator MPI_COMM_WORLD\nwith errorcode 4.\n\n\
         NOTE: invoking MPI_ABORT causes Open MPI to kill all MPI processes.",
        "MPI_ABORT was invoked on rank 1 in communicator MPI_COMM_WORLD\n  \
         Proc: [[61662,1],1]\n  Errorcode: 4\n\nNOTE: invoking",
    ] {
        assert_eq!(after_banner(text), rank(1, How::Aborted(4)));
    }
    let improper = "mpirun has exited due to process rank 1 with PID 0 on\nnode vm exiting \
                    improperly. There are three reasons this could occur:";
    assert_eq!(after_banner(improper), rank(1, How::Unfinished));
}

#[test]
fn open_mpi_4s_log_names_whom_its_banners_leave_out() {
    let verdict = |states: &[(usize, &str)], code| {
        let mut deaths = Deaths::default();
        for (rank, state) in states {
            assert!(deaths.line(&format!(
                "[vm:13434] [[5440,0],0] ACTIVATE PROC [[5440,1],{rank}] STATE {state} AT \
                 ../orte/mca/odls/base/odls_base_default_fns.c:1746"
            )));
        }
        deaths.banner("Primary job  terminated normally, but 1 process returned");
        deaths.verdict(code)
    };
    let killed = [(0, "RUNNING"), (12, "ABORTED BY SIGNAL"), (0, "ABORTED BY SIGNAL")];
    assert_eq!(verdict(&killed, 137), rank(12, How::Killed(9)));
    assert_eq!(verdict(&[(1, "EXITED WITH NON-ZERO STATUS")], 2), rank(1, How::Exited(2)));
    assert_eq!(verdict(&[(1, "CALLED ABORT")], 4), rank(1, How::Aborted(4)));
    assert_eq!(verdict(&[(1, "TERMINATED WITHOUT SYNC")], 1), rank(1, How::Unfinished));
    assert_eq!(verdict(&[(1, "NORMALLY TERMINATED")], 2).rank, None);
}

#[test]
fn an_unnamed_death_is_not_pinned_on_anyone() {
    let mut deaths = Deaths::default();
    deaths.banner("Primary job  terminated normally, but 1 process returned\na non-zero exit");
    assert_eq!(deaths.verdict(2), Death { rank: None, how: How::Exited(2) });
    assert_eq!(deaths.verdict(137), Death { rank: None, how: How::Killed(9) });
    assert!(deaths.verdict(2).to_string().contains("did not say which"));
}

#[test]
fn hydra_names_a_rank_only_when_one_status_fits() {
    let verdict = |lines: &[&str]| {
        let mut deaths = Deaths::default();
        for line in lines {
            assert!(deaths.line(line), "{line}");
        }
        deaths.verdict(9)
    };
    let killed = "YOUR APPLICATION TERMINATED WITH THE EXIT STRING: Killed (signal 9)";
    let codes = |codes: &str| format!("[mpiexec@vm] Exit codes: [vm] {codes}");
    assert_eq!(verdict(&[&codes("0,9"), killed]), rank(1, How::Killed(9)));
    assert_eq!(verdict(&[&codes("0,512")]), rank(1, How::Exited(2)));
    assert_eq!(
        verdict(&[
            &codes("139,9"),
            "YOUR APPLICATION TERMINATED WITH THE EXIT STRING: Segmentation fault (signal 11)"
        ]),
        rank(0, How::Killed(11))
    );
    let unknown = Death { rank: None, how: How::Killed(9) };
    assert_eq!(verdict(&[&codes("9,9"), killed]), unknown);
    assert_eq!(verdict(&[&codes("0,0 [vm2] 0,9"), killed]), unknown);
    let abort = "Abort(4) on node 1 (rank 1 in comm 0): application called \
                 MPI_Abort(MPI_COMM_WORLD, 4) - process 1";
    assert_eq!(verdict(&[abort]), rank(1, How::Aborted(4)));
}

#[test]
fn exit_codes_are_a_shells() {
    assert_eq!(How::Killed(9).code(), 137);
    assert_eq!(How::Exited(2).code(), 2);
    assert_eq!(How::Aborted(4).code(), 4);
    assert_eq!(How::Aborted(256).code(), 1, "never 0");
    assert_eq!(How::from_exit_code(143), How::Killed(15));
    assert_eq!(How::from_exit_code(255), How::Exited(255));
    assert_eq!(rank(1, How::Killed(9)).to_string(), "rank 1 died: killed by signal 9 (SIGKILL)");
}
