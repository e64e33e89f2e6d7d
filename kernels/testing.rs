//! What the rooms' tests share: random tensors, f64 finite differences, ragged batches.

use std::path::PathBuf;

use candle_core::{DType, Device, Result, Tensor};

pub(crate) use crate::common::check::random;
#[cfg(feature = "host-kernels")]
use crate::common::{
    check::Checker,
    host_run::{in_every_order, kernels_for_f32},
};
use crate::{DropoutKey, Ragged, common::Dropout};

/// A gradient of zeros to accumulate into.
pub(crate) fn zeros(like: &Tensor) -> Result<Tensor> {
    Tensor::zeros(like.dims(), like.dtype(), &Device::Cpu)
}

/// Σ y∘w: a scalar whose gradient with respect to y is w.
pub(crate) fn weighted(y: &Tensor, w: &Tensor) -> Result<f64> {
    (y * w)?.to_dtype(DType::F64)?.sum_all()?.to_scalar()
}

/// Three sequences of odd lengths, keyed by unrelated sample ids.
pub(crate) fn ragged() -> Result<Ragged> {
    Ragged::new(&[5, 1, 9], &[31, 4, 15])
}

/// A dropout that drops a good share.
pub(crate) fn dropout() -> Dropout {
    Dropout::new(0.3, DropoutKey { seed: 3, step: 2, stream: 0 }, 1).expect("p > 0")
}

/// Holds `gradient` to central differences of `loss` at `x`, element by element.
pub(crate) fn check_gradient(
    what: &str,
    x: &Tensor,
    gradient: &Tensor,
    loss: impl Fn(&Tensor) -> Result<f64>,
) -> Result<()> {
    const STEP: f64 = 1e-5;
    // Central differences in f64 are good to about STEP² + 1e-16/STEP, 1e-10 here.
    const TOLERANCE: f64 = 2e-8;
    assert_eq!(x.dims(), gradient.dims(), "{what}");
    let (values, gradient) =
        (x.flatten_all()?.to_vec1::<f64>()?, gradient.flatten_all()?.to_vec1::<f64>()?);
    for i in (0..values.len()).step_by(values.len().div_ceil(80)) {
        let moved = |by: f64| {
            let mut values = values.clone();
            values[i] += by;
            loss(&Tensor::from_vec(values, x.dims(), &Device::Cpu)?)
        };
        let slope = (moved(STEP)? - moved(-STEP)?) / (2.0 * STEP);
        let error = (slope - gradient[i]).abs() / slope.abs().max(1.0);
        assert!(error < TOLERANCE, "{what}[{i}]: {} but differences say {slope}", gradient[i]);
    }
    Ok(())
}

/// Holds `got` to `want` within `tolerance` times the largest magnitude in `want` (at least 1).
pub(crate) fn assert_close(what: &str, got: &Tensor, want: &Tensor, tolerance: f64) -> Result<()> {
    assert_eq!(got.dims(), want.dims(), "{what}");
    let wide = |t: &Tensor| t.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>();
    let (got, want) = (wide(got)?, wide(want)?);
    let scale = want.iter().fold(1.0f64, |m, x| m.max(x.abs()));
    for (i, (got, want)) in got.iter().zip(&want).enumerate() {
        // Written so that NaN fails.
        let close = (got - want).abs() <= tolerance * scale;
        assert!(close, "{what}[{i}]: {got}, expected {want} within {}", tolerance * scale);
    }
    Ok(())
}

/// Every tensor as f32.
pub(crate) fn narrow(tensors: &[&Tensor]) -> Result<Vec<Tensor>> {
    tensors.iter().map(|t| t.to_dtype(DType::F32)).collect()
}

/// A folder of reference data named by an environment variable, or `None` where a user has none.
pub(crate) fn reference(variable: &str) -> Option<PathBuf> {
    match std::env::var_os(variable) {
        Some(path) => Some(path.into()),
        None if std::env::var_os("CI").is_some() => panic!("{variable} is not set, and this is CI"),
        None => {
            eprintln!("SKIPPED: {variable} is not set; this test compared nothing");
            None
        }
    }
}

/// Runs `check` over the kernels on the host, f32 ones as well, with threads in every order: each of its
/// findings must be ok.
#[cfg(feature = "host-kernels")]
pub(crate) fn on_host(check: impl Fn(&mut Checker) -> Result<()>) -> Result<()> {
    in_every_order(|| {
        kernels_for_f32(|| {
            let mut checker = Checker::new(Device::Cpu, vec![DType::F32, DType::BF16]);
            check(&mut checker)?;
            let findings = checker.take();
            assert!(!findings.is_empty(), "nothing was compared");
            for finding in findings {
                println!("{finding}");
                assert!(finding.ok(), "{finding}");
            }
            Ok(())
        })
    })
}
