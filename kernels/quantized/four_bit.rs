//! 4 bits in blocks of 64: NF4 and FP4 (the maths and the layout are in `mod.rs`).

use std::ops::Range;

use candle_core::{Device, Result, Tensor, bail};
use rayon::prelude::*;

use super::{
    bytes_tensor, in_pieces, largest_magnitude,
    nested::{self, Nested},
    part_of, refuse_non_finite, weight_shape,
};
use crate::common::{
    Real,
    host::{Host, read},
    simd,
};

/// Elements that share a scale.
pub const BLOCK: usize = 64;
/// Bytes of their codes.
const BYTES: usize = BLOCK / 2;
/// Blocks that one task quantises.
const BLOCKS_PER_TASK: usize = 64;

/// Which 16 values the codes stand for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Quantiles of a normal distribution, zero among them.
    Nf4,
    /// A sign, two bits of exponent and one of mantissa.
    Fp4,
}

/// The codes of a [`Kind`], and what is made of them.
pub(super) struct Codes {
    /// What each code stands for.
    pub(super) values: [f32; 16],
    /// The codes in the order of their values.
    sorted: [u8; 16],
    /// Between one of `sorted` and the next: a value that is no larger gets the lower.
    midpoints: [f32; 15],
}

static NF4: Codes = Codes::new(
    [
        -1.0,
        -0.696_192_8,
        -0.525_073_05,
        -0.394_917_5,
        -0.284_441_38,
        -0.184_773_43,
        -0.091_050_036,
        0.0,
        0.079_580_3,
        0.160_930_2,
        0.246_112_3,
        0.337_915_24,
        0.440_709_83,
        0.562_617,
        0.722_956_84,
        1.0,
    ],
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15],
);

/// Of the two zeros, 0 comes first.
static FP4: Codes = Codes::new(
    fp4([0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0]),
    [11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3],
);

/// FP4's values: those of sign 0 as parts of their largest, then their negatives.
const fn fp4(magnitudes: [f32; 8]) -> [f32; 16] {
    let mut values = [0.0; 16];
    let mut i = 0;
    while i < 8 {
        values[i] = magnitudes[i] / 12.0;
        // Zero has no sign: 0 - 0 is +0.
        values[i + 8] = 0.0 - values[i];
        i += 1;
    }
    values
}

impl Codes {
    const fn new(values: [f32; 16], sorted: [u8; 16]) -> Self {
        let mut midpoints = [0.0; 15];
        let mut i = 0;
        while i < 15 {
            midpoints[i] = (values[sorted[i] as usize] + values[sorted[i + 1] as usize]) / 2.0;
            i += 1;
        }
        Self { values, sorted, midpoints }
    }

    /// Writes the codes of a block, two a byte; returns its largest magnitude.
    #[inline(always)]
    fn quantize(&self, values: &[f32], packed: &mut [u8]) -> f32 {
        let absmax = largest_magnitude(values);
        let scale = if absmax == 0.0 { 0.0 } else { 1.0 / absmax };
        let mut rank = [0u32; BLOCK];
        for midpoint in self.midpoints {
            for (rank, value) in rank.iter_mut().zip(values) {
                *rank += u32::from(value * scale > midpoint);
            }
        }
        for (byte, rank) in packed.iter_mut().zip(rank.chunks_exact(2)) {
            *byte = self.sorted[rank[0] as usize] << 4 | self.sorted[rank[1] as usize];
        }
        absmax
    }

    /// Writes what the codes of a block stand for, times `scale`.
    #[inline(always)]
    pub(super) fn dequantize<T: Real>(&self, packed: &[u8], scale: f32, out: &mut [T]) {
        let mut codes = [0; BLOCK];
        for (two, byte) in codes.chunks_exact_mut(2).zip(packed) {
            two[0] = u32::from(byte >> 4);
            two[1] = u32::from(byte & 15);
        }
        for (out, code) in out.iter_mut().zip(codes) {
            // Rounded to f32 whatever T is: f64 is to see the same weights.
            *out = T::of(f64::from(self.value(code) * scale));
        }
    }

    /// What a code stands for: its bits choose among 16 values. Loads from a table, which the compiler makes
    /// gathers of, took half as long again.
    #[inline(always)]
    fn value(&self, code: u32) -> f32 {
        let [one, two, four, eight] = [0, 1, 2, 3].map(|bit| (code >> bit & 1).wrapping_neg());
        let choose = |mask: u32, clear: u32, set: u32| clear ^ (mask & (clear ^ set));
        let of_2 = |i: usize| choose(one, self.values[i].to_bits(), self.values[i + 1].to_bits());
        let of_4 = |i: usize| choose(two, of_2(i), of_2(i + 2));
        let of_8 = |i: usize| choose(four, of_4(i), of_4(i + 4));
        f32::from_bits(choose(eight, of_8(0), of_8(8)))
    }
}

impl Kind {
    pub(super) fn codes(self) -> &'static Codes {
        match self {
            Self::Nf4 => &NF4,
            Self::Fp4 => &FP4,
        }
    }
}

/// A matrix `[N, K]` in 4 bits an element, K a multiple of [`BLOCK`]. A clone, and [`rows`](Self::rows) of it, share
/// its memory.
#[derive(Clone, Debug)]
pub struct FourBit {
    pub(super) kind: Kind,
    columns: usize,
    /// Which of the rows in memory are its own.
    pub(super) rows: Range<usize>,
    /// `K / 2` bytes for each row in memory, the earlier element in the upper half.
    pub(super) packed: Tensor,
    /// The largest magnitudes of the blocks in memory.
    pub(super) absmax: Nested,
}

impl FourBit {
    /// Quantises `weight [N, K]` of f32 or bf16, which is widened.
    ///
    /// # Errors
    /// If it is no such matrix, K is no multiple of [`BLOCK`], or an element is not finite.
    pub fn quantize(weight: &Tensor, kind: Kind) -> Result<Self> {
        let (n, k) = weight_shape(weight)?;
        Self::from_rows(n, k, kind, |rows| weight.narrow(0, rows.start, rows.len()))
    }

    /// Quantises a matrix that never exists whole, as [`Int8::from_rows`](super::Int8::from_rows) does.
    ///
    /// # Errors
    /// As there, and if `columns` is no multiple of [`BLOCK`].
    pub fn from_rows(
        rows: usize,
        columns: usize,
        kind: Kind,
        part: impl FnMut(Range<usize>) -> Result<Tensor>,
    ) -> Result<Self> {
        if !columns.is_multiple_of(BLOCK) {
            bail!(
                "quantized: weight {:?} has {columns} columns, no multiple of the {BLOCK} of a 4-bit block; \
                 int8 takes any number",
                [rows, columns]
            );
        }
        let blocks = rows * columns / BLOCK;
        // Of all blocks: their scales are quantised around the mean of all.
        let (mut packed, mut absmax) = (vec![0; blocks * BYTES], vec![0.0; blocks]);
        in_pieces(rows, columns, part, |first, values| {
            let first_block = first * columns / BLOCK;
            let packed = &mut packed[first_block * BYTES..][..values.len() / 2];
            let absmax = &mut absmax[first_block..][..values.len() / BLOCK];
            quantize_blocks(values, kind, packed, absmax);
            refuse_non_finite(values, (first, columns), absmax, BLOCK)
        })?;
        let (packed, absmax) = (bytes_tensor(packed)?, Nested::quantize(&absmax)?);
        Ok(Self { kind, columns, rows: 0..rows, packed, absmax })
    }

    /// Which codes it has.
    pub fn kind(&self) -> Kind {
        self.kind
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
        let (packed, absmax) = (self.packed.to_device(device)?, self.absmax.to_device(device)?);
        Ok(Self { packed, absmax, ..self.clone() })
    }

    /// Where it is.
    pub fn device(&self) -> &Device {
        self.packed.device()
    }

    /// `(N, K)`.
    pub fn dims(&self) -> (usize, usize) {
        (self.rows.len(), self.columns)
    }

    /// Bytes of its rows: codes, scales, and the scales of those, as many as its own would need.
    pub fn bytes(&self) -> usize {
        let blocks = self.rows.len() * self.columns / BLOCK;
        blocks * (BYTES + 1) + (blocks.div_ceil(nested::BLOCK) + 1) * size_of::<f32>()
    }

    /// Its rows, to read on the host.
    pub(super) fn borrow(&self) -> Result<Borrowed<'_>> {
        Ok(Borrowed {
            codes: self.kind.codes(),
            packed: read(&self.packed)?,
            absmax: self.absmax.borrow()?,
            first: self.rows.start,
            columns: self.columns,
        })
    }
}

/// The rows of a [`FourBit`] in the host's memory.
pub(super) struct Borrowed<'a> {
    codes: &'static Codes,
    packed: Host<'a, u8>,
    absmax: nested::Borrowed<'a>,
    first: usize,
    columns: usize,
}

impl Borrowed<'_> {
    pub(super) fn tile<T: Real>(&self, rows: Range<usize>, columns: Range<usize>, out: &mut [T]) {
        assert!(
            columns.start.is_multiple_of(BLOCK) && columns.len().is_multiple_of(BLOCK),
            "columns {columns:?}"
        );
        simd(
            #[inline(always)]
            || {
                for (row, out) in rows.zip(out.chunks_exact_mut(columns.len())) {
                    let first = ((self.first + row) * self.columns + columns.start) / BLOCK;
                    let packed = self.packed[first * BYTES..].chunks_exact(BYTES);
                    for (i, (out, packed)) in out.chunks_exact_mut(BLOCK).zip(packed).enumerate() {
                        self.codes.dequantize(packed, self.absmax.get(first + i), out);
                    }
                }
            },
        );
    }
}

/// Writes the codes of `values`, whole blocks of them, and the largest magnitude of each block.
pub(super) fn quantize_blocks(values: &[f32], kind: Kind, packed: &mut [u8], absmax: &mut [f32]) {
    let codes = kind.codes();
    packed
        .par_chunks_mut(BYTES * BLOCKS_PER_TASK)
        .zip(absmax.par_chunks_mut(BLOCKS_PER_TASK))
        .zip(values.par_chunks(BLOCK * BLOCKS_PER_TASK))
        .for_each(|((packed, absmax), values)| {
            simd(
                #[inline(always)]
                || {
                    let blocks = packed.chunks_exact_mut(BYTES).zip(values.chunks_exact(BLOCK));
                    for (absmax, (packed, values)) in absmax.iter_mut().zip(blocks) {
                        *absmax = codes.quantize(values, packed);
                    }
                },
            );
        });
}
