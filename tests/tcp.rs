//! Ranks over TCP: each a thread of this process with connections of its own.

use std::{net::TcpListener, time::Instant};

use allreel::{
    Error, Result,
    collective::{Collective, Traffic, must_be_equal, tcp::Tcp, threads::Threads},
};
use allreel_launch::{Identity, Meeting};
use candle_core::{Device, Tensor};

/// A port that nobody listens on; the kernel picks at random, so that tests beside this one get others.
pub fn port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    listener.local_addr().expect("its address").port()
}

/// Runs `body` as `world` ranks that meet over TCP and returns their results in rank order.
pub fn ranks<R: Send>(world: usize, body: impl Fn(&mut Tcp) -> R + Sync) -> Vec<R> {
    let (port, body) = (port().to_string(), &body);
    let port = port.as_str();
    let run = move |rank| {
        let identity = Identity { rank, world, local_rank: rank, local_world: world, mpi: false };
        let meeting = Meeting::from_lookup(&identity, |name| match name {
            "MASTER_ADDR" => Some("127.0.0.1".into()),
            "MASTER_PORT" => Some(port.into()),
            _ => None,
        });
        let group = meeting.and_then(|meeting| meeting.meet()).expect("the ranks meet");
        body(&mut Tcp::of(identity, group).expect("a thread"))
    };
    std::thread::scope(|scope| {
        let ranks: Vec<_> = (0..world).map(|rank| scope.spawn(move || run(rank))).collect();
        ranks.into_iter().map(|rank| rank.join().expect("a rank panicked")).collect()
    })
}

/// Lengths around nothing, one element, and a message of 2^18.
const LENGTHS: [usize; 7] = [0, 1, 97, (1 << 18) - 1, 1 << 18, (1 << 18) + 1, 600_001];

/// Bits of summed buckets and numbers, and what was gathered.
type Exchanged = (Vec<Vec<u32>>, Vec<u64>, Vec<Vec<u8>>);

/// Buckets that are all under way at once, with small exchanges between.
fn sums(collective: &mut dyn Collective) -> Result<Exchanged> {
    let rank = collective.rank();
    let mut buckets = Vec::new();
    for length in LENGTHS {
        // Of sizes so different that the order of summation shows.
        let value =
            |i: usize| ((i * 7 + rank * 13) % 101) as f32 * 10f32.powi((i + rank) as i32 % 7);
        let values: Vec<f32> = (0..length).map(value).collect();
        buckets.push(Tensor::from_vec(values, length, &Device::Cpu)?);
    }
    let mut pending = Vec::new();
    for bucket in &buckets {
        pending.push(collective.all_reduce_sum(bucket)?);
    }
    let mut numbers = [0.1 * rank as f64, 1e9 / (rank + 1) as f64, -1e-9];
    collective.all_reduce_f64(&mut numbers)?;
    let gathered = collective.all_gather(&vec![rank as u8; 1000 * rank])?;
    collective.barrier()?;
    let (mut traffic, now) = (Traffic::default(), Instant::now());
    for pending in pending {
        traffic.add(pending.wait()?, now);
    }
    let bytes = LENGTHS.iter().map(|length| 4 * *length as u64).sum::<u64>();
    assert!(collective.world() == 1 || traffic.bytes == bytes, "{traffic:?}");
    let mut bits = Vec::new();
    for bucket in &buckets {
        bits.push(bucket.to_vec1::<f32>()?.into_iter().map(f32::to_bits).collect());
    }
    Ok((bits, numbers.map(f64::to_bits).to_vec(), gathered))
}

#[test]
fn tcp_sums_are_those_of_one_process_to_the_bit() {
    for world in [1, 2, 3, 4] {
        let over_tcp = ranks(world, |rank| sums(rank).expect("sums"));
        let threads = Threads::run(world, |rank| sums(rank).expect("sums"));
        assert!(over_tcp == threads, "{world} ranks");
    }
}

#[test]
fn tcp_ranks_with_buckets_of_other_lengths_or_other_configs_are_named() {
    let errors = ranks(3, |rank| {
        let length = if rank.rank() == 1 { 50 } else { 60 };
        let bucket = Tensor::zeros(length, candle_core::DType::F32, &Device::Cpu)?;
        rank.all_reduce_sum(&bucket)?.wait().map(|_| ())
    });
    for error in errors.into_iter().map(|result| result.expect_err("an error")) {
        assert_eq!(error.to_string(), "rank 1: has 200 bytes in a sum of 240");
        assert!(matches!(error, Error::Peer { rank: 1, .. }));
    }
    let errors = ranks(3, |rank| {
        let config = format!("seed = {}", rank.rank() / 2);
        must_be_equal(rank, "config", &config).map_err(|error| error.exit_code())
    });
    assert_eq!(errors, [Err(4); 3]);
}
