use candle_core::{DType, Device, Result, Tensor};

use super::*;
use crate::testing::{assert_close, random};

fn state(n: usize) -> Result<State> {
    let values = random(&[n], 1)?.to_dtype(DType::F32)?;
    let zeros = || Tensor::zeros(n, DType::F32, &Device::Cpu);
    Ok(State { values, exp_avg: zeros()?, exp_avg_sq: zeros()? })
}

fn settings(step: u64) -> AdamW {
    AdamW {
        learning_rate: 0.01,
        beta1: 0.9,
        beta2: 0.99,
        epsilon: 1e-8,
        weight_decay: 0.1,
        step,
        scale: 0.5,
    }
}

/// The formula of the module's head in f64, one element at a time.
#[test]
fn steps_follow_the_formula_across_chunks_and_the_decay_border() -> Result<()> {
    let (n, decayed) = (40_000, 17_001);
    let bucket = state(n)?;
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
        step(&settings(t), &bucket, &gradients, decayed)?;
        assert!(gradients.to_vec1::<f32>()?.iter().all(|g| *g == 0.0), "gradients not zeroed");
    }
    assert_close("p", &bucket.values, &Tensor::from_vec(p, n, &Device::Cpu)?, 1e-6)?;
    assert_close("m", &bucket.exp_avg, &Tensor::from_vec(m, n, &Device::Cpu)?, 1e-6)
}

#[test]
fn sparse_rows_step_like_the_dense_gradient() -> Result<()> {
    let (rows, width) = (700, 48);
    let (dense, sparse) = (state(rows * width)?, state(rows * width)?);
    for t in 1..=3u64 {
        let ids: Vec<u32> =
            (0..rows as u32).filter(|i| (i * 7 + t as u32).is_multiple_of(5)).collect();
        let values = random(&[ids.len() * width], t)?.to_dtype(DType::F32)?.to_vec1::<f32>()?;
        let mut full = vec![0f32; rows * width];
        for (id, row) in ids.iter().zip(values.chunks(width)) {
            full[*id as usize * width..][..width].copy_from_slice(row);
        }
        let full = Tensor::from_vec(full, rows * width, &Device::Cpu)?;
        let sparse_rows = SparseRows { ids, values, width };
        let norms = (sum_of_squares(&full)?, sum_of_squares_rows(&sparse_rows));
        assert!((norms.0 - norms.1).abs() <= 1e-6 * norms.0, "{norms:?}");
        step(&settings(t), &dense, &full, rows * width)?;
        step_rows(&settings(t), &sparse, &sparse_rows)?;
    }
    assert_eq!(dense.values.to_vec1::<f32>()?, sparse.values.to_vec1::<f32>()?);
    assert_eq!(dense.exp_avg_sq.to_vec1::<f32>()?, sparse.exp_avg_sq.to_vec1::<f32>()?);
    Ok(())
}

#[test]
fn the_norm_sees_every_element_and_nan() -> Result<()> {
    let mut values = vec![0f32; 40_000];
    (values[0], values[16_384], values[39_999]) = (3.0, 4.0, 12.0);
    let norm = |v: &[f32]| sum_of_squares(&Tensor::new(v, &Device::Cpu)?);
    assert_eq!(norm(&values)?, 169.0);
    values[20_001] = f32::NAN;
    assert!(norm(&values)?.is_nan());
    assert_eq!(clip_coefficient(0.5, 1.0), 1.0);
    assert!((clip_coefficient(4.0, 1.0) - 0.25).abs() < 1e-6);
    Ok(())
}
