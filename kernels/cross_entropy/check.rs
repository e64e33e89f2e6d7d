//! The kernels against the CPU implementation in f64.

use candle_core::{DType, Device, Result, Tensor};

use super::*;
use crate::common::check::{Checker, Sizes, random, wide};

/// With label smoothing and without, over two micro-batches of a step.
pub(crate) fn check(c: &mut Checker, sizes: Sizes) -> Result<()> {
    let sizes = match sizes {
        Sizes::Odd => &[(1, 2), (9, 3), (131, 5), (5, 77)][..],
        Sizes::Real => &[(16, 2), (4096, 2)][..],
    };
    for (rows, classes) in sizes {
        for smoothing in [0.0, 0.1] {
            for dtype in c.stored() {
                compare(c, *rows, *classes, dtype, smoothing)?;
            }
        }
    }
    Ok(())
}

fn compare(
    c: &mut Checker,
    rows: usize,
    classes: usize,
    dtype: DType,
    smoothing: f64,
) -> Result<()> {
    c.case(format!("{rows} x {classes}, smoothing {smoothing}, {dtype:?}"));
    let logits = c.rounded(&(random(&[rows, classes], 1)? * 6.0)?, dtype)?;
    let exact_logits = wide(&logits)?;
    let labels = (0..rows).map(|i| (i * i % classes) as u32).collect::<Vec<_>>().into();
    let (totals, exact) = (started(c.device())?, started(&Device::Cpu)?);
    // Twice: a step's micro-batches add up.
    for _ in 0..2 {
        let d_logits = cross_entropy(&logits, &labels, smoothing, &totals)?;
        let exact_d_logits = cross_entropy(&exact_logits, &labels, smoothing, &exact)?;
        c.check("d_logits", &d_logits, &exact_d_logits, 1e-6)?;
        let (got, want) = (totals.read()?, exact.read()?);
        let scalar = |x: f64| Tensor::new(x, &Device::Cpu);
        c.check("loss", &scalar(got.0)?, &scalar(want.0)?, 1e-6)?;
        c.same("hits", got.1, want.1);
    }
    Ok(())
}

/// Totals that start at something.
fn started(device: &Device) -> Result<Totals> {
    Ok(Totals { sums: Tensor::new(&[2.5f64, 3.0], device)?.into() })
}

#[cfg(all(test, feature = "host-kernels"))]
mod host {
    use super::*;
    use crate::{
        common::{check::numbers, host_run::in_every_order},
        testing::on_host,
    };

    #[test]
    fn host_cross_entropy_matches_the_cpu() -> Result<()> {
        on_host(|c| check(c, Sizes::Odd))
    }

    #[test]
    fn host_nan_is_no_finite_loss_and_large_logits_are() -> Result<()> {
        let run = |logits: [f32; 2]| {
            let sums = Tensor::zeros(2, DType::F64, &Device::Cpu)?;
            let logits = Tensor::new(&[logits], &Device::Cpu)?;
            device::cross_entropy(&logits, &vec![0].into(), 0.0, &sums)?;
            sums.to_vec1::<f64>()
        };
        assert!(run([f32::NAN, 0.0])?[0].is_nan());
        let (got, exact) = (run([80_000.0, 79_999.0])?, (1.0 + (-1.0f64).exp()).ln());
        assert!((got[0] - exact).abs() <= 1e-6 && got[1] == 1.0, "{got:?}, expected {exact}");
        Ok(())
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
            assert_eq!(predictions(&logits, 0.0)?, [0, 8, 34, 0, 5, 0]);
            Ok(())
        })?;
        let logits = (random(&[131, 5], 1)? * 6.0)?.to_dtype(DType::BF16)?;
        in_every_order(|| predictions(&logits, 0.1).map(|_| ()))
    }

    /// Of the kernel; they are those of [`argmax`].
    fn predictions(logits: &Tensor, smoothing: f64) -> Result<Vec<u32>> {
        let labels = vec![0; logits.dim(0)?].into();
        let got = device::of_rows(logits, &labels, smoothing)?.predictions.to_vec1::<u32>()?;
        let rows = numbers(logits)?;
        let want: Vec<u32> = rows.chunks(logits.dim(1)?).map(|row| argmax(row) as u32).collect();
        assert_eq!(got, want);
        Ok(got)
    }
}
