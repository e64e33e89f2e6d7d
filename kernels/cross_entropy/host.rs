//! The kernels of op.cu, run on the host, against the CPU implementation in f64.

use candle_core::Result;

use super::*;
use crate::{
    common::host_run::in_every_order,
    testing::{STORED, check, random, rounded, wide},
};

/// Totals that start at something.
fn started() -> Result<Totals> {
    Ok(Totals { sums: Tensor::new(&[2.5f64, 3.0], &Device::Cpu)?.into() })
}

/// [`argmax`] of every row.
fn argmaxes(logits: &Tensor) -> Result<Vec<u32>> {
    let rows = wide(logits)?.to_vec2::<f64>()?;
    Ok(rows.iter().map(|row| argmax(row) as u32).collect())
}

fn compare(rows: usize, classes: usize, dtype: DType, smoothing: f64) -> Result<()> {
    let logits = rounded(&(random(&[rows, classes], 1)? * 6.0)?, dtype)?;
    let labels = (0..rows).map(|i| (i * i % classes) as u32).collect::<Vec<_>>().into();
    let (totals, exact) = (started()?, started()?);
    // Twice: a step's micro-batches add up.
    for _ in 0..2 {
        let sums = totals.on(&Device::Cpu)?;
        let d_logits = device::cross_entropy(&logits, &labels, smoothing, sums)?;
        let exact_d_logits = cross_entropy(&wide(&logits)?, &labels, smoothing, &exact)?;
        check("d_logits", &d_logits, &exact_d_logits, 1e-6)?;
        let (got, want) = (totals.read()?, exact.read()?);
        let scalar = |x: f64| Tensor::new(x, &Device::Cpu);
        check("loss", &scalar(got.0)?, &scalar(want.0)?, 1e-6)?;
        assert_eq!(got.1, want.1);
    }
    let predictions = device::of_rows(&logits, &labels, smoothing)?.predictions;
    assert_eq!(predictions.to_vec1::<u32>()?, argmaxes(&logits)?);
    Ok(())
}

#[test]
fn host_cross_entropy_matches_the_cpu() -> Result<()> {
    in_every_order(|| {
        for (rows, classes) in [(1, 2), (9, 3), (131, 5), (5, 77)] {
            for smoothing in [0.0, 0.1] {
                for dtype in STORED {
                    compare(rows, classes, dtype, smoothing)?;
                }
            }
        }
        Ok(())
    })
}

#[test]
fn host_nan_is_no_finite_loss_and_large_logits_are() -> Result<()> {
    let run = |logits: [f32; 2]| {
        let sums = Tensor::zeros(2, DType::F64, &Device::Cpu)?;
        let logits = Tensor::new(&[logits], &Device::Cpu)?;
        device::cross_entropy(&logits, &vec![0].into(), 0.0, &sums)?;
        Ok::<_, candle_core::Error>(sums)
    };
    assert!(run([f32::NAN, 0.0])?.to_vec1::<f64>()?[0].is_nan());
    let exact = Tensor::new(&[(1.0 + (-1.0f64).exp()).ln(), 1.0], &Device::Cpu)?;
    check("loss and hit", &run([80_000.0, 79_999.0])?, &exact, 1e-6)
}

/// Ties between lanes and within one, and what is not a number: every prediction is a class.
#[test]
fn host_predictions_are_argmax_of_ties_and_nan() -> Result<()> {
    let row = |values: &[(usize, f32)]| {
        let mut row = [-3.0; 70];
        values.iter().for_each(|(at, value)| row[*at] = *value);
        row
    };
    let rows = [
        row(&[]),
        row(&[(69, 1.0), (40, 1.0), (8, 1.0)]),
        row(&[(66, 1.0), (34, 1.0)]),
        row(&[(0, f32::NAN), (5, 1.0)]),
        row(&[(4, f32::NAN), (5, 1.0)]),
        [f32::NEG_INFINITY; 70],
    ];
    let logits = Tensor::new(&rows, &Device::Cpu)?;
    in_every_order(|| {
        let got =
            device::of_rows(&logits, &vec![0; 6].into(), 0.0)?.predictions.to_vec1::<u32>()?;
        assert_eq!(got, argmaxes(&logits)?);
        assert_eq!(got, [0, 8, 34, 0, 5, 0]);
        Ok(())
    })
}
