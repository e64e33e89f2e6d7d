//! The order of an epoch, the shards of a batch and its micro-batches.
//!
//! All of it is a pure function of the lengths, the seed and the epoch, so every rank computes it
//! alone, and a resumed run finds its place by counting. The batches of an epoch do not depend on
//! the number of ranks; only who computes which samples of a batch does.

use rand::{SeedableRng, seq::SliceRandom};
use rand_chacha::ChaCha12Rng;

use crate::config;

/// The batches of one epoch: every sample exactly once. Samples are shuffled, cut into windows of
/// `window` batches, sorted by length inside each window and cut into batches, whose order inside
/// the window is shuffled again.
pub fn epoch(
    lengths: &[usize],
    batch: config::Batch,
    window: usize,
    seed: u64,
    epoch: usize,
) -> Vec<Vec<u32>> {
    let mut hash = blake3::Hasher::new();
    hash.update(b"epoch").update(&seed.to_le_bytes()).update(&(epoch as u64).to_le_bytes());
    let mut rng = ChaCha12Rng::from_seed(*hash.finalize().as_bytes());
    let mut order: Vec<u32> = (0..lengths.len() as u32).collect();
    order.shuffle(&mut rng);

    let length = |id: &u32| lengths[*id as usize];
    let mut batches = Vec::new();
    for mut group in fill(order, batch, window.max(1), &length) {
        if window > 1 {
            group.sort_by_key(|id| length(id));
        }
        let mut group = fill(group, batch, 1, &length);
        if window > 1 {
            group.shuffle(&mut rng);
        }
        batches.append(&mut group);
    }
    batches
}

/// Cuts `order` into runs of at most `times` batches' worth of samples or tokens.
fn fill(
    order: Vec<u32>,
    batch: config::Batch,
    times: usize,
    length: &impl Fn(&u32) -> usize,
) -> Vec<Vec<u32>> {
    match batch {
        config::Batch::Samples(samples) => {
            order.chunks(samples.saturating_mul(times)).map(<[u32]>::to_vec).collect()
        }
        config::Batch::Tokens(tokens) => within(order, tokens.saturating_mul(times), length),
    }
}

/// Cuts `order` into runs of at most `budget` tokens; a single longer sample is a run of its own.
fn within(order: Vec<u32>, budget: usize, length: &impl Fn(&u32) -> usize) -> Vec<Vec<u32>> {
    let (mut runs, mut run, mut tokens) = (Vec::new(), Vec::new(), 0);
    for id in order {
        let more = length(&id);
        if !run.is_empty() && tokens + more > budget {
            runs.push(std::mem::take(&mut run));
            tokens = 0;
        }
        tokens += more;
        run.push(id);
    }
    if !run.is_empty() {
        runs.push(run);
    }
    runs
}

/// Rank `rank`'s part of a batch: samples go, longest first, to the rank with the fewest tokens.
/// A rank gets none when there are fewer samples than ranks.
pub fn shard(batch: &[u32], lengths: &[usize], rank: usize, world: usize) -> Vec<u32> {
    let mut order = batch.to_vec();
    order.sort_by_key(|id| std::cmp::Reverse(lengths[*id as usize]));
    let mut loads = vec![0usize; world];
    let mut mine = Vec::new();
    for id in order {
        let target = (0..world).min_by_key(|r| loads[*r]).unwrap_or(0);
        loads[target] += lengths[id as usize];
        if target == rank {
            mine.push(id);
        }
    }
    mine
}

/// Cuts a rank's samples into micro-batches of at most `budget` tokens.
pub fn micro_batches(samples: &[u32], lengths: &[usize], budget: usize) -> Vec<Vec<u32>> {
    within(samples.to_vec(), budget, &|id: &u32| lengths[*id as usize])
}

/// Rank `rank`'s batches for evaluation: all samples by length, in batches of at most `budget`
/// tokens dealt out in turn, so that every rank gets a like share of long and short ones.
pub fn evaluation(lengths: &[usize], budget: usize, rank: usize, world: usize) -> Vec<Vec<u32>> {
    let mut order: Vec<u32> = (0..lengths.len() as u32).collect();
    order.sort_by_key(|id| std::cmp::Reverse(lengths[*id as usize]));
    // Small batches spread evenly; a rank's share is never more than one batch off.
    let share = (lengths.iter().sum::<usize>() / (4 * world)).max(1);
    let batches = within(order, budget.min(share), &|id: &u32| lengths[*id as usize]);
    batches.into_iter().skip(rank).step_by(world).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lengths(n: usize) -> Vec<usize> {
        (0..n).map(|i| 10 + i * 7919 % 500).collect()
    }

    fn sorted(parts: impl IntoIterator<Item = Vec<u32>>) -> Vec<u32> {
        let mut all: Vec<u32> = parts.into_iter().flatten().collect();
        all.sort_unstable();
        all
    }

    #[test]
    fn every_sample_is_seen_once_whatever_divides() {
        for n in [1, 15, 16, 17, 1003] {
            for rule in [config::Batch::Samples(16), config::Batch::Tokens(2000)] {
                for window in [1, 8] {
                    let batches = epoch(&lengths(n), rule, window, 42, 1);
                    let want: Vec<u32> = (0..n as u32).collect();
                    assert_eq!(sorted(batches.clone()), want);
                    if let config::Batch::Samples(_) = rule {
                        assert_eq!(batches.len(), n.div_ceil(16));
                    }
                    for batch in &batches {
                        for world in [1, 2, 4, 7] {
                            let shards = (0..world).map(|r| shard(batch, &lengths(n), r, world));
                            let mut whole = batch.clone();
                            whole.sort_unstable();
                            assert_eq!(sorted(shards), whole);
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn epochs_and_seeds_differ_and_repeat() {
        let make = |seed, e| epoch(&lengths(200), config::Batch::Samples(8), 4, seed, e);
        assert_eq!(make(1, 1), make(1, 1));
        assert_ne!(make(1, 1), make(1, 2));
        assert_ne!(make(1, 1), make(2, 1));
    }

    #[test]
    fn windows_group_similar_lengths() {
        let lengths = lengths(2048);
        let spread = |window| -> usize {
            let batches = epoch(&lengths, config::Batch::Samples(16), window, 3, 1);
            let of = |id: &u32| lengths[*id as usize];
            let spans = batches
                .iter()
                .map(|b| b.iter().map(of).max().unwrap_or(0) - b.iter().map(of).min().unwrap_or(0));
            spans.sum()
        };
        assert!(spread(8) * 4 < spread(1), "{} against {}", spread(8), spread(1));
    }

    #[test]
    fn token_budgets_hold() {
        let lengths = lengths(500);
        let tokens = |b: &Vec<u32>| b.iter().map(|id| lengths[*id as usize]).sum::<usize>();
        let batches = epoch(&lengths, config::Batch::Tokens(4000), 8, 1, 1);
        assert!(batches.iter().all(|b| tokens(b) <= 4000));
        assert!(batches.len() <= lengths.iter().sum::<usize>() / 3000);
        let micro = micro_batches(&[0, 1, 2, 3, 4, 5], &lengths, 600);
        assert!(micro.len() > 1 && micro.iter().all(|b| tokens(b) <= 600));
        assert_eq!(sorted(micro), [0, 1, 2, 3, 4, 5]);
    }

    #[test]
    fn ranks_get_equal_work() {
        let lengths = lengths(64);
        let batch: Vec<u32> = (0..64).collect();
        let loads: Vec<usize> = (0..4)
            .map(|r| shard(&batch, &lengths, r, 4).iter().map(|id| lengths[*id as usize]).sum())
            .collect();
        let (least, most) = (loads.iter().min().unwrap_or(&0), loads.iter().max().unwrap_or(&0));
        assert!(most - least < most / 50, "{loads:?}");
    }

    #[test]
    fn evaluation_covers_the_set() {
        for world in [1, 2, 3] {
            let parts: Vec<_> =
                (0..world).flat_map(|r| evaluation(&lengths(101), 4096, r, world)).collect();
            assert_eq!(sorted(parts), (0..101).collect::<Vec<u32>>());
        }
    }
}
