//! The runtime itself: kernels with one fault each are reported, in every order of threads, and the
//! language means on the host what it means on a device.

use candle_core::Result;
use half::bf16;

use super::{Address, Buffer, Kernel, in_every_order, outcome};
use crate::common::device::kernels;

#[repr(C)]
struct Faulty {
    out: Address,
}

#[repr(C)]
struct Right {
    input: Address,
    out: Address,
}

const THREADS: usize = 64;

kernels!(
    Faulty, THREADS as u32 => fault_no_barrier, fault_no_barrier_before_reuse,
        fault_no_warp_barrier, fault_never_written, fault_barrier_in_a_branch,
        fault_two_barriers, fault_shuffle_in_a_branch, fault_one_too_far,
        fault_far_away, fault_two_blocks_write, fault_unaligned,
        fault_copy_not_waited_for, fault_copy_used_too_early;
    Right, THREADS as u32 => fault_none;
);

#[test]
fn host_faults_are_reported() -> Result<()> {
    let faults: [(&str, Kernel<Faulty>, &str); 12] = [
        ("no barrier", fault_no_barrier, "race: "),
        ("no barrier before reuse", fault_no_barrier_before_reuse, "race: "),
        ("no __syncwarp", fault_no_warp_barrier, "of this block"),
        ("uninitialised", fault_never_written, "never written"),
        ("barrier in a branch", fault_barrier_in_a_branch, "divergent __syncthreads"),
        ("two barriers", fault_two_barriers, "divergent __syncthreads"),
        ("shuffle in a branch", fault_shuffle_in_a_branch, "deadlock"),
        ("one too far", fault_one_too_far, "of a buffer of 260 bytes"),
        ("far away", fault_far_away, "outside every buffer"),
        ("two blocks", fault_two_blocks_write, "of another block wrote"),
        ("unaligned", fault_unaligned, "not aligned"),
        ("copy not waited for", fault_copy_not_waited_for, "never waited for"),
    ];
    in_every_order(|| {
        for (what, kernel, message) in faults {
            let out = Buffer::<f32>::poisoned(THREADS + 1);
            let parameters = Faulty { out: out.address() };
            let failure = outcome(kernel, [2, 1, 1], 1024, &parameters);
            let failure = failure.expect_err(what);
            assert!(failure.contains(message), "{what}: {failure}");
        }
        Ok(())
    })
}

#[test]
fn host_copies_used_before_they_land_are_nan() -> Result<()> {
    in_every_order(|| {
        let out = Buffer::<f32>::of(&[1.0; THREADS]);
        let parameters = Faulty { out: out.address() };
        outcome(fault_copy_used_too_early, [1, 1, 1], 1024, &parameters).expect("a launch");
        assert!(out.values().iter().all(|x| x.is_nan()));
        Ok(())
    })
}

#[test]
fn host_language_means_what_it_means_on_a_device() -> Result<()> {
    // Ties, the largest finite f32, subnormals, infinities.
    let special = [1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0, f32::MAX, 1e-40, f32::INFINITY, -0.0];
    let input: Vec<f32> = special.into_iter().chain((0..58).map(|i| (i as f32).sin())).collect();
    in_every_order(|| {
        let (from, out) = (Buffer::of(&input), Buffer::<u32>::poisoned(THREADS * 6));
        let parameters = Right { input: from.address(), out: out.address() };
        outcome(fault_none, [1, 1, 1], 0, &parameters).expect("a launch");
        for (thread, got) in (0u32..).zip(out.values().chunks_exact(6)) {
            let (lane, base) = (thread % 32, thread / 32 * 32);
            let bits = |at: u32| u32::from(bf16::from_f32(input[at as usize]).to_bits());
            let want = [
                base + 5,
                thread ^ 6,
                0x4924_9249,
                if lane < 16 { thread ^ 1 } else { 7 },
                u32::from(thread < 32),
                bits(thread) << 16 | bits(63 - thread),
            ];
            assert_eq!(got, want, "thread {thread}");
        }
        Ok(())
    })
}
