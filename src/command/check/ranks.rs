//! Sums of known numbers over the ranks, by the collective that training would use.

use allreel_kernels::common::check::Finding;
use candle_core::{Device, Tensor};

use crate::{Result, collective::Collective, device::Placement};

/// Elements of the buckets: odd ones, and one that no transport sends in one piece.
const BUCKETS: [usize; 4] = [1, 3, 1001, 4_194_301];
/// Numbers repeat after as many elements; their sums over up to 1,000 ranks are exact in f32.
const PERIOD: usize = 31;

/// Every bucket, as in a step: all begun before one is waited for.
///
/// # Errors
/// `Peer` if communication fails.
pub(super) fn check(
    placement: &Placement,
    collective: &mut dyn Collective,
) -> Result<Vec<Finding>> {
    let (rank, world) = (collective.rank(), collective.world());
    let numbers = |len: usize, factor: usize| -> Vec<f32> {
        (0..len).map(|i| (factor * (i % PERIOD + 1)) as f32).collect()
    };
    let buckets = BUCKETS
        .map(|len| Tensor::from_vec(numbers(len, rank + 1), len, &placement.device))
        .into_iter()
        .collect::<candle_core::Result<Vec<_>>>()?;
    let pending = buckets
        .iter()
        .map(|bucket| collective.all_reduce_sum(bucket))
        .collect::<Result<Vec<_>>>()?;
    for pending in pending {
        pending.wait()?;
    }
    let mut findings = Vec::new();
    for bucket in buckets {
        let got = bucket.to_device(&Device::Cpu)?.to_vec1::<f32>()?;
        let want = numbers(got.len(), world * (world + 1) / 2);
        let differ = got.iter().zip(&want).filter(|(got, want)| got != want).count();
        findings.push(Finding {
            room: "all-reduce",
            what: format!("elements that differ (of {} on {world} ranks)", got.len()),
            worst: differ as f64,
            allowed: 0.0,
        });
    }
    Ok(findings)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::collective::threads::Threads;

    #[test]
    fn sums_over_three_ranks_are_exact() {
        for findings in Threads::run(3, |rank| check(&Placement::CPU, rank).expect("sums")) {
            assert_eq!(findings.len(), BUCKETS.len());
            assert!(findings.iter().all(Finding::ok), "{findings:?}");
        }
    }
}
