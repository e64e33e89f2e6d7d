//! The kernels of op.cu, run on the host, against the CPU implementation in f64.

use candle_core::{Device, Result};
use half::bf16;

use super::*;
use crate::{
    common::host_run::{
        Address, Buffer, Storage, check, check_within, in_every_order, kernels, launch, rounded,
    },
    testing::random,
};

#[repr(C)]
struct Parameters {
    logits: Address,
    labels: Address,
    d_logits: Address,
    losses: Address,
    hits: Address,
    rows: i32,
    classes: i32,
    smoothing: f32,
}

#[repr(C)]
struct Totals {
    losses: Address,
    hits: Address,
    totals: Address,
    rows: i32,
}

kernels!(
    Parameters: host_cross_entropy_f32, host_cross_entropy_bf16;
    Totals: host_cross_entropy_totals;
);

/// `(d_logits, [loss, hits])`.
fn run<S: Storage>(
    logits: &Tensor,
    labels: &[u32],
    smoothing: f64,
) -> Result<(Buffer<S>, Vec<f64>)> {
    let (rows, classes) = logits.dims2()?;
    let (logits, labels) = (Buffer::<S>::tensor(logits)?, Buffer::of(labels));
    let d_logits = Buffer::poisoned(rows * classes);
    let (losses, hits) = (Buffer::<f32>::poisoned(rows), Buffer::<u32>::poisoned(rows));
    let parameters = Parameters {
        logits: logits.address(),
        labels: labels.address(),
        d_logits: d_logits.address(),
        losses: losses.address(),
        hits: hits.address(),
        rows: rows as i32,
        classes: classes as i32,
        smoothing: smoothing as f32,
    };
    let kernel = if S::BF16 { host_cross_entropy_bf16 } else { host_cross_entropy_f32 };
    launch(kernel, [rows.div_ceil(4), 1, 1], 0, &parameters);
    let totals = Buffer::<f64>::poisoned(2);
    let parameters = Totals {
        losses: losses.address(),
        hits: hits.address(),
        totals: totals.address(),
        rows: rows as i32,
    };
    launch(host_cross_entropy_totals, [1, 1, 1], 0, &parameters);
    Ok((d_logits, totals.values().to_vec()))
}

fn compare<S: Storage>(rows: usize, classes: usize, smoothing: f64) -> Result<()> {
    let logits = rounded::<S>(&(random(&[rows, classes], 1)? * 6.0)?)?;
    let labels: Vec<u32> = (0..rows).map(|i| (i * i % classes) as u32).collect();
    let exact = cross_entropy(&logits, &labels, smoothing)?;
    let (d_logits, totals) = run::<S>(&logits, &labels, smoothing)?;
    check("d_logits", &d_logits, &exact.d_logits, 1e-6)?;
    check_within("loss", &totals[..1], &[exact.loss], 0.0, 1e-6)?;
    assert_eq!(totals[1], exact.correct as f64);
    Ok(())
}

#[test]
fn host_cross_entropy_matches_the_cpu() -> Result<()> {
    in_every_order(|| {
        for (rows, classes) in [(1, 2), (9, 3), (131, 5), (5, 77)] {
            for smoothing in [0.0, 0.1] {
                compare::<f32>(rows, classes, smoothing)?;
                compare::<bf16>(rows, classes, smoothing)?;
            }
        }
        Ok(())
    })
}

#[test]
fn host_nan_is_no_finite_loss_and_large_logits_are() -> Result<()> {
    let logits = Tensor::new(&[[f64::NAN, 0.0]], &Device::Cpu)?;
    let (_, totals) = run::<f32>(&logits, &[0], 0.0)?;
    assert!(totals[0].is_nan());
    let logits = Tensor::new(&[[80_000.0, 79_999.0]], &Device::Cpu)?;
    let (_, totals) = run::<f32>(&logits, &[0], 0.0)?;
    check_within("loss", &totals, &[(1.0 + (-1.0f64).exp()).ln(), 1.0], 0.0, 1e-6)
}
