//! Activations in 8 bits: against the formula, term by term.

use super::*;
use crate::quantized::llm_int8::{columns_above, quantize};

/// Codes of x, an i8 in each byte, and the largest magnitudes of its rows.
pub(super) fn codes(x: &Tensor, threshold: Option<f32>) -> Result<(Vec<u8>, Vec<f32>)> {
    let (k, x) = (x.dim(1)?, x.flatten_all()?.to_vec1::<f32>()?);
    let outliers = threshold.map_or_else(Vec::new, |threshold| columns_above(&x, k, threshold));
    let (codes, absmax) = quantize::<f32>(&x, k, threshold, &outliers);
    Ok((codes.into_iter().map(|code| (code as i8).cast_unsigned()).collect(), absmax))
}

/// y by the formula, in f64.
fn by_formula(x: &[Vec<f32>], weight: &Int8, threshold: f32, bias: &[f64]) -> Result<Vec<f64>> {
    let k = x[0].len();
    let q: Vec<f64> =
        weight.codes.to_vec1::<u8>()?.iter().map(|code| f64::from(code.cast_signed())).collect();
    let full = Quantized::from(weight.clone()).dequantize()?.to_vec2::<f32>()?;
    let is_out: Vec<bool> = (0..k).map(|k| x.iter().any(|row| row[k].abs() >= threshold)).collect();
    let mut y = Vec::new();
    for row in x {
        let inside = row.iter().map(|x| x.abs()).filter(|x| *x < threshold);
        let own = inside.fold(0.0, f32::max);
        for (n, largest) in weight.absmax.to_vec1::<f32>()?.into_iter().enumerate() {
            let (mut whole, mut outside) = (0.0, 0.0);
            for k in 0..k {
                if is_out[k] {
                    outside += f64::from(row[k]) * f64::from(full[n][k]);
                } else {
                    let p = f64::from((row[k] * (127.0 / own)).round_ties_even());
                    whole += p * q[n * row.len() + k];
                }
            }
            let step = f64::from(own) / 127.0 * (f64::from(largest) / 127.0);
            y.push(whole * step + outside + bias[n]);
        }
    }
    Ok(y)
}

#[test]
fn quantized_activations_are_those_of_the_formula() -> Result<()> {
    // More columns than a tile is deep, more rows than a task counts outliers of.
    for (t, k, n) in [(1, 1, 1), (45, 700, 200)] {
        let small = narrow(&[&random(&[t, k], 1)?, &random(&[n, k], 2)?, &random(&[n], 3)?])?;
        let [x, bias] = [0, 2].map(|i| small[i].to_dtype(DType::F64));
        let (x, bias, weight) = (x?, bias?, Int8::quantize(&small[1])?);
        // None is an outlier, about one element in 7,000 is, in a column each.
        for (threshold, given) in [(2.0, None), (2.0, Some(2.0)), (0.9999, Some(0.9999))] {
            let rows = small[0].to_vec2::<f32>()?;
            let want = by_formula(&rows, &weight, threshold, &bias.to_vec1::<f64>()?)?;
            let want = Tensor::from_vec(want, (t, n), &Device::Cpu)?;
            assert_close("y", &forward_int8(&x, &weight, given, Some(&bias))?, &want, 1e-12)?;
            // Whole numbers are exact; scales, their product, the sum and the bias are rounded, and outliers
            // are a sum of about five terms.
            let y = forward_int8(&small[0], &weight, given, Some(&small[2]))?;
            assert_close("y f32", &y, &want, 1e-6)?;
        }
    }
    Ok(())
}

#[test]
fn quantized_activations_sum_beyond_the_whole_numbers_of_f32() -> Result<()> {
    // 2,081 products of 127²: 2^24.997, as five tiles. Each addition rounds to 24 bits, and so do the scales.
    let k = 2081;
    let ones = |rows: usize| Tensor::ones((rows, k), DType::F32, &Device::Cpu);
    let y = forward_int8(&ones(2)?, &Int8::quantize(&ones(3)?)?, None, None)?;
    let want = Tensor::full(k as f64, (2, 3), &Device::Cpu)?;
    assert_close("y", &y, &want, 8.0 * f64::from(f32::EPSILON) / 2.0)
}

#[test]
fn quantized_activations_that_are_not_finite_show() -> Result<()> {
    let weight = Int8::quantize(&random(&[3, 70], 2)?.to_dtype(DType::F32)?)?;
    for bad in [f32::NAN, f32::INFINITY] {
        let mut x = vec![0.5f32; 140];
        x[70 + 33] = bad;
        let x = Tensor::from_vec(x, (2, 70), &Device::Cpu)?;
        for threshold in [None, Some(6.0)] {
            let y = forward_int8(&x, &weight, threshold, None)?.to_vec2::<f32>()?;
            assert!(y[0].iter().all(|y| y.is_finite()), "{y:?}");
            assert!(y[1].iter().all(|y| !y.is_finite()), "{y:?}");
        }
    }
    Ok(())
}
