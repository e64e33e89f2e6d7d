//! Groups of threads on this machine's loopback device, whole and broken.

use super::*;
use crate::{Identity, LaunchError};
use std::io::{Read, Write};
use std::net::TcpListener;
use std::time::Instant;

/// A port that nobody listens on; the kernel picks at random, so that tests beside this one get others.
fn port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn meeting(rank: usize, world: usize, port: u16, seconds: usize) -> Meeting {
    let identity = Identity { rank, world, local_rank: rank, local_world: world, mpi: false };
    Meeting::from_lookup(&identity, |name| match name {
        "MASTER_ADDR" => Some("127.0.0.1".into()),
        "MASTER_PORT" => Some(port.to_string()),
        "ALLREEL_RENDEZVOUS_TIMEOUT" => Some(seconds.to_string()),
        _ => None,
    })
    .unwrap()
}

/// Runs `body` on each of `ranks`, which were all told that they are of `worlds[i]`.
fn meet<R: Send>(
    ranks: &[(usize, usize)],
    seconds: usize,
    body: impl Fn(Result<Group, LaunchError>) -> R + Sync,
) -> Vec<R> {
    let port = port();
    let body = &body;
    std::thread::scope(|scope| {
        let threads: Vec<_> = (ranks.iter())
            .map(|&(rank, world)| {
                scope.spawn(move || body(meeting(rank, world, port, seconds).meet()))
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// A group that met.
fn group<R: Send>(world: usize, body: impl Fn(Group) -> R + Sync) -> Vec<R> {
    let ranks: Vec<_> = (0..world).map(|rank| (rank, world)).collect();
    meet(&ranks, 60, |group| body(group.unwrap()))
}

/// The errors of ranks that must not meet.
fn refused(ranks: &[(usize, usize)], seconds: usize) -> Vec<String> {
    meet(ranks, seconds, |group| {
        let error = group.expect_err("an error");
        assert!(error.is_user(), "{error}");
        error.to_string()
    })
}

#[test]
fn every_rank_gets_what_all_of_them_gave() {
    for world in [1, 2, 5] {
        let results = group(world, |mut group| {
            let rank = group.rank();
            assert_eq!(group.world(), world);
            let gathered = group.gather(&vec![rank as u8; rank]).unwrap();
            let id = group.broadcast(&[rank as u8 + 7; 128]).unwrap();
            // More than any socket buffers, so that writing has to wait for reading.
            let large = group.gather(&vec![rank as u8; 5 << 20]).unwrap();
            let large = large.iter().map(|bytes| (bytes.len(), bytes[bytes.len() - 1])).collect();
            (gathered, id, large)
        });
        let expected: Vec<Vec<u8>> = (0..world).map(|rank| vec![rank as u8; rank]).collect();
        let large: Vec<(usize, u8)> = (0..world).map(|rank| (5 << 20, rank as u8)).collect();
        for result in results {
            assert_eq!(result, (expected.clone(), vec![7; 128], large.clone()));
        }
    }
}

#[test]
fn rank_0_combines_in_the_order_of_ranks() {
    let words = group(4, |mut group| {
        let mine = [b'a' + group.rank() as u8];
        let join = |mine: &[u8], theirs: Vec<Vec<u8>>| Ok([mine, &theirs.concat()].concat());
        group.exchange(Call::Sum, &mine, join).unwrap()
    });
    assert_eq!(words, vec![b"abcd".to_vec(); 4]);
}

#[test]
fn ranks_that_do_not_fit_together_are_all_told_why() {
    for said in refused(&[(0, 3), (1, 3), (1, 3)], 60) {
        assert!(said.contains("two processes came as rank 1"), "{said}");
        assert!(said.contains("127.0.0.1:") && said.contains("its own RANK"), "{said}");
    }
    for said in refused(&[(0, 2), (1, 3)], 60) {
        assert!(said.contains("rank 1 (127.0.0.1:"), "{said}");
        assert!(said.contains("one of 3") && said.contains("one of 2"), "{said}");
        assert!(said.contains("same WORLD_SIZE"), "{said}");
    }
}

#[test]
fn a_rank_that_does_not_come_is_named_to_all_that_did() {
    for said in refused(&[(0, 4), (2, 4)], 1) {
        assert!(said.contains("of 4 ranks, 1, 3 did not come within 1 s"), "{said}");
    }
}

#[test]
fn nobody_listening_is_an_error_in_time() {
    let started = Instant::now();
    let said = meeting(1, 2, port(), 1).meet().unwrap_err().to_string();
    assert!(said.contains("rank 1 found no rank 0 there within 1 s (Connection refused"), "{said}");
    assert!(said.contains("127.0.0.1:") && said.contains("same MASTER_PORT"), "{said}");
    assert!(started.elapsed() < Duration::from_secs(20));
}

#[test]
fn a_port_that_is_taken_is_an_error_at_once() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let said = meeting(0, 2, port, 60).meet().unwrap_err().to_string();
    assert!(said.contains(&format!("127.0.0.1:{port}: something listens")), "{said}");
    assert!(said.contains("another free port"), "{said}");
}

/// Connects as soon as rank 0 listens.
fn intrude(port: u16) -> TcpStream {
    loop {
        match TcpStream::connect(("127.0.0.1", port)) {
            Ok(stream) => return stream,
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}

#[test]
fn strangers_do_not_disturb_and_other_versions_are_named() {
    let port = port();
    std::thread::scope(|scope| {
        let hosting =
            scope.spawn(move || meeting(0, 2, port, 60).meet().map(|group| group.world()));
        intrude(port).write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
        drop(intrude(port));
        assert!(!hosting.is_finished());
        let joined = meeting(1, 2, port, 60).meet().unwrap();
        assert_eq!((hosting.join().unwrap().unwrap(), joined.rank()), (2, 1));
    });
    std::thread::scope(|scope| {
        let hosting = scope.spawn(move || meeting(0, 2, port, 60).meet().map(|_| ()));
        let mut old = intrude(port);
        old.write_all(b"allreel\x00\x01\0\0\0\x02\0\0\0").unwrap();
        let said = hosting.join().unwrap().unwrap_err().to_string();
        assert!(said.contains("rank 1") && said.contains("version 0"), "{said}");
        assert!(said.contains("same binary"), "{said}");
        let mut told = String::new();
        old.take(1 << 10).read_to_string(&mut told).unwrap();
        assert!(told.contains("version 0"), "{told}");
    });
}

/// What every rank but `who` is told when that one does `what`, or ends.
fn without(who: usize, what: impl Fn(&mut Group) + Sync) -> Vec<Lost> {
    let results = group(3, |mut group| {
        group.gather(b"all here").unwrap();
        if group.rank() == who {
            what(&mut group);
            return None;
        }
        let lost = group.gather(b"").unwrap_err();
        // It stays broken.
        assert_eq!(group.broadcast(b"").unwrap_err(), lost);
        Some(lost)
    });
    results.into_iter().flatten().collect()
}

#[test]
fn a_rank_that_is_gone_is_named_by_every_other() {
    for who in 0..3 {
        let told = without(who, |_| ());
        assert_eq!(told.len(), 2);
        for lost in told {
            assert_eq!(lost.rank, who, "{lost}");
            assert!(lost.message.contains("its connection has ended"), "{lost}");
        }
    }
}

#[test]
fn a_rank_that_says_why_it_leaves_is_quoted() {
    for who in 0..3 {
        for lost in without(who, |group| group.leave("disk full")) {
            assert_eq!(lost, Lost { rank: who, message: "disk full".into() });
        }
    }
}

#[test]
fn a_rank_in_another_call_is_found_out() {
    for lost in without(2, |group| assert!(group.broadcast(b"").is_err())) {
        assert_eq!(lost.rank, 2);
        assert!(lost.message.contains("is at Broadcast where rank 0 is at Gather"), "{lost}");
    }
}
