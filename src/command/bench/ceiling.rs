//! What the device can do at most: bytes copied and matrix products computed, measured in the run
//! whose cases are held against them.

use std::sync::Mutex;

use allreel_kernels::linear;
use candle_core::{DType, Device, Result, Tensor};
use serde::{Deserialize, Serialize};

use super::{
    cache,
    measure::{Body, Harness},
    op::{Setup, Work},
};

/// The two ceilings.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ceilings {
    /// Of a copy much larger than the caches; what it reads and what it writes both count.
    pub bytes_per_second: f64,
    /// Of a large square matrix product in the dtype of the run.
    pub flops_per_second: f64,
}

/// Which of the two a case meets first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Bound {
    /// Its bytes take longer.
    Copy,
    /// Its matrix products do.
    Gemm,
}

impl Ceilings {
    /// Measures both. The fastest run counts: a ceiling is what can be reached at all.
    ///
    /// # Errors
    /// If the device fails.
    pub fn measure(harness: &Harness, setup: &Setup) -> Result<Self> {
        let fastest = |(work, body): (f64, Body)| -> Result<f64> {
            let laps = harness.measure(&mut [body])?;
            let times = laps.into_iter().flat_map(|laps| laps.kernel);
            Ok(work / times.fold(f64::INFINITY, f64::min) * 1e3)
        };
        Ok(Self {
            bytes_per_second: fastest(copy(&setup.device)?)?,
            flops_per_second: fastest(product(setup)?)?,
        })
    }

    /// The higher of each: what slowed one of two measurements down was not the device.
    pub fn max(self, other: Self) -> Self {
        Self {
            bytes_per_second: self.bytes_per_second.max(other.bytes_per_second),
            flops_per_second: self.flops_per_second.max(other.flops_per_second),
        }
    }

    /// The least milliseconds that `work` can take, and what sets them.
    pub fn limit(&self, work: Work) -> (f64, Bound) {
        let bytes = work.bytes / self.bytes_per_second * 1e3;
        let flops = work.flops / self.flops_per_second * 1e3;
        if flops > bytes { (flops, Bound::Gemm) } else { (bytes, Bound::Copy) }
    }
}

/// Bytes moved by one copy, and the copy.
fn copy(device: &Device) -> Result<(f64, Body)> {
    // No cache holds a noticeable share of it.
    let bytes = 4 * cache::bytes(device)?.max(16 << 20);
    if !device.is_cpu() {
        let source = Tensor::zeros(bytes, DType::U8, device)?;
        return Ok((2.0 * bytes as f64, Box::new(move || source.copy().map(drop))));
    }
    let workers = rayon::current_num_threads();
    let part = bytes / workers;
    let parts: Vec<_> =
        (0..workers).map(|_| Mutex::new((vec![1u8; part], vec![0u8; part]))).collect();
    let body = move || {
        rayon::broadcast(|worker| {
            let mut part = cache::lock(&parts[worker.index()]);
            let (source, target) = &mut *part;
            target.copy_from_slice(source);
        });
        Ok(())
    };
    Ok((2.0 * (part * workers) as f64, Box::new(body)))
}

/// Floating-point operations of one product, and the product.
fn product(setup: &Setup) -> Result<(f64, Body)> {
    let n: usize = match &setup.device {
        Device::Cpu if rayon::current_num_threads() < 8 => 1024,
        Device::Cpu => 2048,
        _ => 8192,
    };
    let (a, b) = (setup.normal((n, n))?, setup.normal((n, n))?);
    let flops = 2.0 * (n as f64).powi(3);
    if setup.device.is_cpu() {
        return Ok((flops, Box::new(move || linear::forward(&a, &b, None).map(drop))));
    }
    // The vendor's own, whatever ours does there.
    Ok((flops, Box::new(move || a.matmul(&b).map(drop))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slower_of_the_two_is_the_limit() {
        let ceilings = Ceilings { bytes_per_second: 10e9, flops_per_second: 1e12 };
        let limit = |bytes, flops| ceilings.limit(Work { bytes, flops });
        assert_eq!(limit(20e6, 1e9), (2.0, Bound::Copy));
        assert_eq!(limit(20e6, 4e9), (4.0, Bound::Gemm));
        assert_eq!(limit(10e6, 0.0), (1.0, Bound::Copy));
        let again = Ceilings { bytes_per_second: 9e9, flops_per_second: 2e12 };
        let both = Ceilings { bytes_per_second: 10e9, flops_per_second: 2e12 };
        assert_eq!(ceilings.max(again), both);
    }
}
