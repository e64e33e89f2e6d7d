//! Row-wise int8: one scale for each row (the maths and the layout are in `mod.rs`).

use std::ops::Range;

use candle_core::{DType, Result, Tensor, bail};
use half::bf16;
use rayon::prelude::*;

use super::{largest_magnitude, refuse_non_finite, weight_shape};
use crate::common::{Real, host::read, simd};

/// The largest code.
const MAX: f32 = 127.0;

/// A matrix `[N, K]` in 8 bits an element.
#[derive(Clone, Debug)]
pub struct Int8 {
    columns: usize,
    /// `[N, K]`.
    pub(super) codes: Vec<i8>,
    /// `[N]`: the largest magnitude of each row.
    pub(super) absmax: Vec<f32>,
}

impl Int8 {
    /// Quantises `weight [N, K]` of f32 or bf16, which is widened.
    ///
    /// # Errors
    /// If it is no such matrix, or an element is not finite.
    pub fn quantize(weight: &Tensor) -> Result<Self> {
        let (n, k) = weight_shape(weight)?;
        match weight.dtype() {
            DType::F32 => Self::of(&read::<f32>(weight)?, n, k),
            DType::BF16 => Self::of(&read::<bf16>(weight)?, n, k),
            dtype => bail!("quantized: a weight of {dtype:?}; f32 and bf16 can be quantised"),
        }
    }

    fn of<V: Copy + Sync + Into<f32>>(values: &[V], n: usize, k: usize) -> Result<Self> {
        let (mut codes, mut absmax) = (vec![0; n * k], vec![0.0; n]);
        codes.par_chunks_mut(k).zip(&mut absmax).zip(values.par_chunks(k)).for_each_init(
            || vec![0.0; k],
            |row, ((codes, absmax), values)| {
                simd(
                    #[inline(always)]
                    || *absmax = quantize_row(values, row, codes),
                );
            },
        );
        refuse_non_finite(values, k, &absmax, k)?;
        Ok(Self { columns: k, codes, absmax })
    }

    pub(super) fn dims(&self) -> (usize, usize) {
        (self.absmax.len(), self.columns)
    }

    pub(super) fn bytes(&self) -> usize {
        self.codes.len() + size_of_val(&self.absmax[..])
    }

    pub(super) fn tile<T: Real>(&self, rows: Range<usize>, columns: Range<usize>, out: &mut [T]) {
        simd(
            #[inline(always)]
            || {
                for (row, out) in rows.zip(out.chunks_exact_mut(columns.len())) {
                    let scale = self.absmax[row] / MAX;
                    let codes = &self.codes[row * self.columns..][columns.clone()];
                    for (out, code) in out.iter_mut().zip(codes) {
                        // Rounded to f32 whatever T is: f64 is to see the same weights.
                        *out = T::of(f64::from(f32::from(*code) * scale));
                    }
                }
            },
        );
    }
}

/// Writes the codes of `values`, widened into `row`; returns their largest magnitude.
#[inline(always)]
fn quantize_row<V: Copy + Into<f32>>(values: &[V], row: &mut [f32], codes: &mut [i8]) -> f32 {
    for (wide, value) in row.iter_mut().zip(values) {
        *wide = (*value).into();
    }
    let absmax = largest_magnitude(row);
    let scale = if absmax == 0.0 { 0.0 } else { MAX / absmax };
    for (code, value) in codes.iter_mut().zip(&*row) {
        *code = (value * scale).round_ties_even() as i8;
    }
    absmax
}
