//! The scales of 4-bit blocks, themselves in 8 bits: the dynamic format, in blocks of 256 around their mean.

use std::sync::LazyLock;

use candle_core::{Device, Result, Tensor};

use super::{bytes_tensor, largest_magnitude};
use crate::common::host::{Host, read};

/// Scales that share a scale.
pub(super) const BLOCK: usize = 256;

/// The values of the 256 codes, ascending: for each of 7 powers of ten, from 1e-6 to 1, the middles of 1, 2, 4 .. 64
/// equal parts of [0.1, 1], their negatives, 0 and 1. Each step is rounded to f32, as where the format comes from.
pub(super) static CODE: LazyLock<[f32; 256]> = LazyLock::new(|| {
    let mut code = [0.0; 256];
    let mut next = 0;
    for power in 0..7 {
        let parts = 1 << power;
        let scale = 10f64.powi(power - 6) as f32;
        for part in 0..parts {
            let middle = (edge(part, parts) + edge(part + 1, parts)) / 2.0;
            code[next] = scale * middle;
            code[next + 1] = -scale * middle;
            next += 2;
        }
    }
    code[next] = 0.0;
    code[next + 1] = 1.0;
    code.sort_unstable_by(f32::total_cmp);
    code
});

/// Edge `i` of `parts` equal parts of [0.1, 1], counted from the nearer end and rounded once.
fn edge(i: i32, parts: i32) -> f32 {
    let step = f64::from((1.0 - 0.1f32) / parts as f32);
    // f64 holds products and sums of these exactly, but for the last rounding.
    if i < (parts + 1) / 2 {
        (f64::from(0.1f32) + step * f64::from(i)) as f32
    } else {
        (1.0 - step * f64::from(parts - i)) as f32
    }
}

/// Between one of [`CODE`] and the next: a value that is no larger gets the lower.
static MIDPOINTS: LazyLock<[f32; 255]> =
    LazyLock::new(|| std::array::from_fn(|i| (CODE[i] + CODE[i + 1]) / 2.0));

/// Positive numbers in little more than 8 bits each.
#[derive(Clone, Debug)]
pub(super) struct Nested {
    /// A byte for each; zeros to a whole number of words follow.
    pub(super) codes: Tensor,
    /// The largest distance from `offset` in each block.
    pub(super) absmax: Tensor,
    /// [`CODE`], where kernels read it.
    pub(super) code: Tensor,
    /// The mean.
    pub(super) offset: f32,
}

impl Nested {
    pub(super) fn quantize(values: &[f32]) -> Result<Self> {
        let sum: f64 = values.iter().copied().map(f64::from).sum();
        let offset = (sum / values.len() as f64) as f32;
        let centred: Vec<f32> = values.iter().map(|value| value - offset).collect();
        let mut codes = vec![0; values.len()];
        let blocks = codes.chunks_mut(BLOCK).zip(centred.chunks(BLOCK));
        let absmax: Vec<f32> = blocks.map(|(codes, block)| quantize_block(block, codes)).collect();
        let of = |values: &[f32]| Tensor::from_slice(values, values.len(), &Device::Cpu);
        Ok(Self { codes: bytes_tensor(codes)?, absmax: of(&absmax)?, code: of(&*CODE)?, offset })
    }

    pub(super) fn to_device(&self, device: &Device) -> Result<Self> {
        Ok(Self {
            codes: self.codes.to_device(device)?,
            absmax: self.absmax.to_device(device)?,
            code: self.code.to_device(device)?,
            offset: self.offset,
        })
    }

    pub(super) fn borrow(&self) -> Result<Borrowed<'_>> {
        let (codes, absmax) = (read(&self.codes)?, read(&self.absmax)?);
        Ok(Borrowed { codes, absmax, offset: self.offset })
    }
}

/// [`Nested`] in the host's memory.
pub(super) struct Borrowed<'a> {
    codes: Host<'a, u8>,
    absmax: Host<'a, f32>,
    offset: f32,
}

impl Borrowed<'_> {
    /// Number `i`. Product and sum are rounded each.
    #[inline(always)]
    pub(super) fn get(&self, i: usize) -> f32 {
        CODE[usize::from(self.codes[i])] * self.absmax[i / BLOCK] + self.offset
    }
}

/// Writes the codes of a block; returns its largest magnitude. A block of zeros has codes 0.
pub(super) fn quantize_block(values: &[f32], codes: &mut [u8]) -> f32 {
    let absmax = largest_magnitude(values);
    if absmax == 0.0 {
        codes.fill(0);
        return absmax;
    }
    let scale = 1.0 / absmax;
    for (code, value) in codes.iter_mut().zip(values) {
        *code = nearest(value * scale);
    }
    absmax
}

/// The code nearest to `value` in [-1, 1] once that is rounded to one of 65,536 equal steps.
fn nearest(value: f32) -> u8 {
    const LAST: f32 = 65_535.0;
    let step = ((value.clamp(-1.0, 1.0) + 1.0) * 0.5 * LAST + 0.5).floor();
    let value = 2.0 * step / LAST - 1.0;
    // At most the number of midpoints, 255.
    MIDPOINTS.partition_point(|midpoint| *midpoint < value) as u8
}
