//! Row-wise int8: one scale for each row (the maths and the layout are in `mod.rs`).

use std::ops::Range;

use candle_core::{Device, Result, Tensor};
use rayon::prelude::*;

use super::{bytes_tensor, in_pieces, largest_magnitude, part_of, refuse_non_finite, weight_shape};
use crate::common::{
    Real,
    host::{Host, read},
    simd,
};

/// The largest code.
pub(super) const MAX: f32 = 127.0;

/// A matrix `[N, K]` in 8 bits an element. A clone, and [`rows`](Self::rows) of it, share its memory.
#[derive(Clone, Debug)]
pub struct Int8 {
    columns: usize,
    /// Which of the rows in memory are its own.
    pub(crate) rows: Range<usize>,
    /// Of all rows in memory, an i8 in each byte; zeros to a whole number of words follow.
    pub(crate) codes: Tensor,
    /// The largest magnitude of each row in memory.
    pub(crate) absmax: Tensor,
}

impl Int8 {
    /// Quantises `weight [N, K]` of f32 or bf16, which is widened.
    ///
    /// # Errors
    /// If it is no such matrix, or an element is not finite.
    pub fn quantize(weight: &Tensor) -> Result<Self> {
        let (n, k) = weight_shape(weight)?;
        Self::from_rows(n, k, |rows| weight.narrow(0, rows.start, rows.len()))
    }

    /// Quantises a matrix that never exists whole: `part(rows)` gives those rows of it, in f32 or bf16. It is asked
    /// for all of them, in order, for about 16 MiB of f32 at a time.
    ///
    /// # Errors
    /// If a part has another shape, or an element is not finite; and those of `part`.
    pub fn from_rows(
        rows: usize,
        columns: usize,
        part: impl FnMut(Range<usize>) -> Result<Tensor>,
    ) -> Result<Self> {
        let (mut codes, mut absmax) = (vec![0; rows * columns], vec![0.0; rows]);
        in_pieces(rows, columns, part, |first, values| {
            let codes = &mut codes[first * columns..][..values.len()];
            let absmax = &mut absmax[first..][..values.len() / columns];
            quantize_rows(values, columns, codes, absmax);
            refuse_non_finite(values, (first, columns), absmax, columns)
        })?;
        let absmax = Tensor::from_vec(absmax, rows, &Device::Cpu)?;
        Ok(Self { columns, rows: 0..rows, codes: bytes_tensor(codes)?, absmax })
    }

    /// Rows `first..first + len`, in the same memory.
    ///
    /// # Errors
    /// If it has not so many, or `len` is 0.
    pub fn rows(&self, first: usize, len: usize) -> Result<Self> {
        Ok(Self { rows: part_of(&self.rows, first, len)?, ..self.clone() })
    }

    /// The same on `device`, where it is not yet.
    ///
    /// # Errors
    /// If the device fails.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        let (codes, absmax) = (self.codes.to_device(device)?, self.absmax.to_device(device)?);
        Ok(Self { codes, absmax, ..self.clone() })
    }

    /// Where it is.
    pub fn device(&self) -> &Device {
        self.codes.device()
    }

    /// `(N, K)`.
    pub fn dims(&self) -> (usize, usize) {
        (self.rows.len(), self.columns)
    }

    /// Bytes of its rows: codes and scales.
    pub fn bytes(&self) -> usize {
        self.rows.len() * (self.columns + size_of::<f32>())
    }

    /// Its rows, to read on the host.
    pub(crate) fn borrow(&self) -> Result<Borrowed<'_>> {
        let (codes, absmax) = (read(&self.codes)?, read(&self.absmax)?);
        Ok(Borrowed { codes, absmax, first: self.rows.start, columns: self.columns })
    }
}

/// The rows of an [`Int8`] in the host's memory.
pub(crate) struct Borrowed<'a> {
    codes: Host<'a, u8>,
    absmax: Host<'a, f32>,
    first: usize,
    columns: usize,
}

impl Borrowed<'_> {
    /// The largest magnitude of a row.
    #[inline(always)]
    pub(super) fn absmax(&self, row: usize) -> f32 {
        self.absmax[self.first + row]
    }

    /// Codes of a row, an i8 in each byte.
    #[inline(always)]
    pub(super) fn codes(&self, row: usize, columns: Range<usize>) -> &[u8] {
        &self.codes[(self.first + row) * self.columns..][columns]
    }

    /// Hands the values of a row's `columns` to `put`, each with its place in `out`.
    #[inline(always)]
    pub(crate) fn values<T: Real>(
        &self,
        row: usize,
        columns: Range<usize>,
        out: &mut [T],
        put: impl Fn(&mut T, T),
    ) {
        let scale = self.absmax(row) / MAX;
        for (out, code) in out.iter_mut().zip(self.codes(row, columns)) {
            // Rounded to f32 whatever T is: f64 is to see the same weights.
            put(out, T::of(f64::from(f32::from(code.cast_signed()) * scale)));
        }
    }

    pub(super) fn tile<T: Real>(&self, rows: Range<usize>, columns: Range<usize>, out: &mut [T]) {
        simd(
            #[inline(always)]
            || {
                for (row, out) in rows.zip(out.chunks_exact_mut(columns.len())) {
                    self.values(row, columns.clone(), out, |out, value| *out = value);
                }
            },
        );
    }
}

/// Writes the codes of rows of `columns` values, and the largest magnitude of each.
pub(super) fn quantize_rows(values: &[f32], columns: usize, codes: &mut [u8], absmax: &mut [f32]) {
    let rows = codes.par_chunks_mut(columns).zip(absmax).zip(values.par_chunks(columns));
    rows.for_each(|((codes, absmax), values)| {
        simd(
            #[inline(always)]
            || {
                *absmax = largest_magnitude(values);
                let scale = if *absmax == 0.0 { 0.0 } else { MAX / *absmax };
                for (code, value) in codes.iter_mut().zip(values) {
                    *code = ((value * scale).round_ties_even() as i8).cast_unsigned();
                }
            },
        );
    });
}
