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
    predictions: Address,
    rows: i32,
    classes: i32,
    smoothing: f32,
}

#[repr(C)]
struct Totals {
    losses: Address,
    predictions: Address,
    labels: Address,
    totals: Address,
    rows: i32,
}

kernels!(
    Parameters: host_cross_entropy_f32, host_cross_entropy_bf16;
    Totals: host_cross_entropy_totals;
);

struct Results<S> {
    d_logits: Buffer<S>,
    predictions: Vec<u32>,
    /// Loss and hits.
    totals: Vec<f64>,
}

/// Adds to totals that start at `start`.
fn run<S: Storage>(
    logits: &Tensor,
    labels: &[u32],
    smoothing: f64,
    start: [f64; 2],
) -> Result<Results<S>> {
    let (rows, classes) = logits.dims2()?;
    let (logits, labels) = (Buffer::<S>::tensor(logits)?, Buffer::of(labels));
    let d_logits = Buffer::poisoned(rows * classes);
    let (losses, predictions) = (Buffer::<f32>::poisoned(rows), Buffer::<u32>::poisoned(rows));
    let parameters = Parameters {
        logits: logits.address(),
        labels: labels.address(),
        d_logits: d_logits.address(),
        losses: losses.address(),
        predictions: predictions.address(),
        rows: rows as i32,
        classes: classes as i32,
        smoothing: smoothing as f32,
    };
    let kernel = if S::BF16 { host_cross_entropy_bf16 } else { host_cross_entropy_f32 };
    launch(kernel, [rows.div_ceil(4), 1, 1], 0, &parameters);
    let totals = Buffer::of(&start);
    let parameters = Totals {
        losses: losses.address(),
        predictions: predictions.address(),
        labels: labels.address(),
        totals: totals.address(),
        rows: rows as i32,
    };
    launch(host_cross_entropy_totals, [1, 1, 1], 0, &parameters);
    let (predictions, totals) = (predictions.values().to_vec(), totals.values().to_vec());
    Ok(Results { d_logits, predictions, totals })
}

/// [`argmax`] of every row.
fn argmaxes(logits: &Tensor) -> Result<Vec<u32>> {
    Ok(logits.to_vec2::<f64>()?.iter().map(|row| argmax(row) as u32).collect())
}

fn compare<S: Storage>(rows: usize, classes: usize, smoothing: f64) -> Result<()> {
    let logits = rounded::<S>(&(random(&[rows, classes], 1)? * 6.0)?)?;
    let labels: Vec<u32> = (0..rows).map(|i| (i * i % classes) as u32).collect();
    let exact = cross_entropy(&logits, &labels, smoothing)?;
    let got = run::<S>(&logits, &labels, smoothing, [2.5, 3.0])?;
    check("d_logits", &got.d_logits, &exact.d_logits, 1e-6)?;
    check_within("loss", &got.totals[..1], &[2.5 + exact.loss], 0.0, 1e-6)?;
    assert_eq!(got.totals[1], 3.0 + exact.correct as f64);
    assert_eq!(got.predictions, argmaxes(&logits)?);
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
    let got = run::<f32>(&logits, &[0], 0.0, [0.0; 2])?;
    assert!(got.totals[0].is_nan());
    let logits = Tensor::new(&[[80_000.0, 79_999.0]], &Device::Cpu)?;
    let got = run::<f32>(&logits, &[0], 0.0, [0.0; 2])?;
    check_within("loss", &got.totals, &[(1.0 + (-1.0f64).exp()).ln(), 1.0], 0.0, 1e-6)
}

/// Ties between lanes and within one, and what is not a number: every prediction is a class.
#[test]
fn host_predictions_are_argmax_of_ties_and_nan() -> Result<()> {
    let row = |values: &[(usize, f64)]| {
        let mut row = [-3.0; 70];
        values.iter().for_each(|(at, value)| row[*at] = *value);
        row
    };
    let rows = [
        row(&[]),
        row(&[(69, 1.0), (40, 1.0), (8, 1.0)]),
        row(&[(66, 1.0), (34, 1.0)]),
        row(&[(0, f64::NAN), (5, 1.0)]),
        row(&[(4, f64::NAN), (5, 1.0)]),
        [f64::NEG_INFINITY; 70],
    ];
    let logits = Tensor::new(&rows, &Device::Cpu)?;
    in_every_order(|| {
        let got = run::<f32>(&logits, &[0; 6], 0.0, [0.0; 2])?;
        assert_eq!(got.predictions, argmaxes(&logits)?);
        assert_eq!(got.predictions, [0, 8, 34, 0, 5, 0]);
        Ok(())
    })
}
