use candle_core::{Device, Result};

use super::*;
use crate::testing::{assert_close, random};

/// f32 values of `n` parameters, on their first step.
fn state(n: usize, seed: u64, copied: bool) -> Result<State> {
    let values = random(&[n], seed)?.to_dtype(DType::F32)?;
    let zeros = |dtype| Tensor::zeros(n, dtype, &Device::Cpu);
    let copy = copied.then(|| zeros(DType::BF16)).transpose()?;
    Ok(State { values, exp_avg: zeros(DType::F32)?, exp_avg_sq: zeros(DType::F32)?, copy })
}

fn settings(step: u64) -> AdamW {
    AdamW { learning_rate: 0.01, beta1: 0.9, beta2: 0.99, epsilon: 1e-8, weight_decay: 0.1, step }
}

/// The mean of two samples' gradients, not clipped.
fn step(update: &Update<'_>, step: u64) -> Result<f64> {
    let norm = update.norm(2, 0.0, None)?;
    update.step(&settings(step), &norm)?;
    Ok(norm.read()?.wait()?.0)
}

/// The formula of the module's head in f64, one element at a time.
#[test]
fn steps_follow_the_formula_across_chunks_and_the_decay_border() -> Result<()> {
    let (n, decayed) = (40_000, 17_001);
    let bucket = state(n, 1, true)?;
    let mut p: Vec<f64> = bucket.values.to_dtype(DType::F64)?.to_vec1()?;
    let (mut m, mut v) = (vec![0.0; n], vec![0.0; n]);
    for t in 1..=3 {
        let gradient = random(&[n], 10 + t)?;
        let gradients = gradient.to_dtype(DType::F32)?;
        for (i, g) in gradients.to_dtype(DType::F64)?.to_vec1::<f64>()?.iter().enumerate() {
            let g = g * 0.5;
            if i < decayed {
                p[i] *= 1.0 - 0.01 * 0.1;
            }
            m[i] = 0.9 * m[i] + 0.1 * g;
            v[i] = 0.99 * v[i] + 0.01 * g * g;
            let (c1, c2) = (1.0 - 0.9f64.powi(t as i32), 1.0 - 0.99f64.powi(t as i32));
            p[i] -= 0.01 / c1 * m[i] / (v[i].sqrt() / c2.sqrt() + 1e-8);
        }
        let bucket = Bucket { state: &bucket, gradients: &gradients, decayed };
        step(&Update::new(vec![bucket], None)?, t)?;
        assert!(gradients.to_vec1::<f32>()?.iter().all(|g| *g == 0.0), "gradients not zeroed");
    }
    assert_close("p", &bucket.values, &Tensor::from_vec(p, n, &Device::Cpu)?, 1e-6)?;
    assert_close("m", &bucket.exp_avg, &Tensor::from_vec(m, n, &Device::Cpu)?, 1e-6)?;
    let rounded = bucket.values.to_dtype(DType::BF16)?;
    assert_close("copy", bucket.copy.as_ref().expect("asked for"), &rounded, 0.0)
}

#[test]
fn sparse_rows_step_like_the_dense_gradient() -> Result<()> {
    let (rows, width) = (700, 48);
    let (dense, sparse) = (state(rows * width, 1, false)?, state(rows * width, 1, false)?);
    for t in 1..=3u64 {
        let ids: Vec<u32> =
            (0..rows as u32).filter(|i| (i * 7 + t as u32).is_multiple_of(5)).collect();
        let values = random(&[ids.len() * width], t)?.to_dtype(DType::F32)?;
        let sparse_rows = SparseRows { ids, values, width };
        let all: Vec<u32> = (0..rows as u32).collect();
        let full = sparse_rows.spread(&all)?.values;
        let bucket = Bucket { state: &dense, gradients: &full, decayed: rows * width };
        let table = Table { state: &sparse, rows: &sparse_rows };
        let norms = (
            step(&Update::new(vec![bucket], None)?, t)?,
            step(&Update::new(vec![], Some(table))?, t)?,
        );
        assert!((norms.0 - norms.1).abs() <= 1e-6 * norms.0, "{norms:?}");
    }
    assert_eq!(dense.values.to_vec1::<f32>()?, sparse.values.to_vec1::<f32>()?);
    assert_eq!(dense.exp_avg_sq.to_vec1::<f32>()?, sparse.exp_avg_sq.to_vec1::<f32>()?);
    Ok(())
}

#[test]
fn the_norm_sees_every_element_and_nan() -> Result<()> {
    let mut values = vec![0f32; 40_000];
    (values[0], values[16_384], values[39_999]) = (3.0, 4.0, 12.0);
    let state = state(values.len(), 1, false)?;
    let norm = |v: &[f32], before| -> Result<Norm> {
        let gradients = Tensor::new(v, &Device::Cpu)?;
        let bucket = Bucket { state: &state, gradients: &gradients, decayed: 0 };
        Update::new(vec![bucket], None)?.norm(1, 0.0, before)
    };
    let good = norm(&values, None)?;
    assert_eq!(good.read()?.wait()?, (13.0, true));
    assert_eq!(norm(&values, Some(&good))?.read()?.wait()?, (13.0, true));
    let mut poisoned = values.clone();
    poisoned[20_001] = f32::NAN;
    let bad = norm(&poisoned, Some(&good))?;
    let (nan, finite) = bad.read()?.wait()?;
    assert!(nan.is_nan() && !finite);
    // No step may follow one that did nothing.
    assert_eq!(norm(&values, Some(&bad))?.read()?.wait()?, (13.0, false));
    assert_eq!(clip_coefficient(0.5, 1.0), 1.0);
    assert!((clip_coefficient(4.0, 1.0) - 0.25).abs() < 1e-6);
    Ok(())
}

#[test]
fn a_gradient_that_is_not_finite_changes_nothing() -> Result<()> {
    let state = state(3, 1, true)?;
    let before = state.values.to_vec1::<f32>()?;
    let gradients = Tensor::new(&[1.0, f32::INFINITY, 2.0], &Device::Cpu)?;
    let bucket = Bucket { state: &state, gradients: &gradients, decayed: 3 };
    step(&Update::new(vec![bucket], None)?, 1)?;
    assert_eq!(state.values.to_vec1::<f32>()?, before);
    assert_eq!(state.exp_avg.to_vec1::<f32>()?, [0.0; 3]);
    Ok(())
}

#[test]
fn what_does_not_fit_is_refused() -> Result<()> {
    let state = state(6, 1, false)?;
    let rows = |ids: &[u32], width: usize| -> Result<SparseRows> {
        let values = Tensor::zeros(ids.len() * width, DType::F32, &Device::Cpu)?;
        Ok(SparseRows { ids: ids.to_vec(), values, width })
    };
    for (rows, fits) in
        [(rows(&[0, 2], 2)?, true), (rows(&[3], 2)?, false), (rows(&[0], 4)?, false)]
    {
        let table = Table { state: &state, rows: &rows };
        assert_eq!(Update::new(vec![], Some(table)).is_ok(), fits, "{rows:?}");
    }
    let gradients = Tensor::zeros(5, DType::F32, &Device::Cpu)?;
    let bucket = Bucket { state: &state, gradients: &gradients, decayed: 0 };
    assert!(Update::new(vec![bucket], None).is_err());
    assert!(Update::new(vec![], None).is_err());
    Ok(())
}
