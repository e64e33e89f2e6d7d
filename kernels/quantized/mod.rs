//! Frozen linears whose weights are kept in 8 or 4 bits: quantising, dequantising, and the products, which
//! dequantise a tile at a time.
//!
//! ```text
//! x [T, K]   W [N, K] quantised   b [N]        y = x·Ŵᵀ + b        dx = dy·Ŵ
//! ```
//!
//! Ŵ is what [`Quantized::dequantize`] gives. W is frozen: it has no gradient.
//!
//! **int8**, row by row (Dettmers et al. 2022, LLM.int8(), arXiv:2208.07339):
//!
//! ```text
//! s_n = max_k |W[n,k]|        q[n,k] = round(W[n,k] · (127 / s_n))        Ŵ[n,k] = q[n,k] · (s_n / 127)
//! ```
//!
//! rounded half to even; q is 0 in a row of zeros. In memory: `q [N, K]` of i8, row by row, then `s [N]` of f32.
//! [`forward`] leaves x as it is, so its outliers need no threshold. [`forward_int8`] quantises x as well:
//!
//! ```text
//! O   = columns of x with some |x| ≥ threshold
//! s_t = max of row t over |x| < threshold        p[t,k] = round(x[t,k] · (127 / s_t)), 0 in the columns O
//! y   = (p·qᵀ)[t,n] · s_t · s_n / 127² + Σ_(k in O) x[t,k] · Ŵ[n,k] + b
//! ```
//!
//! O is of all rows together: a row's result depends, within the rounding of its codes, on those beside it. Without
//! a threshold it does not.
//!
//! **4 bits** (Dettmers et al. 2023, QLoRA, arXiv:2305.14314), over W row by row in blocks of 64, so K is a
//! multiple of 64:
//!
//! ```text
//! a_i = max |W| of block i        q = the nearest of 16 codes c to W / a_i        Ŵ = c[q] · â_i
//! ```
//!
//! The codes are quantiles of a normal distribution (NF4) or numbers of 1 sign, 2 exponent and 1 mantissa bit
//! (FP4). Byte j holds element 2j in its upper 4 bits and element 2j + 1 in its lower. The a_i are quantised in
//! turn, in blocks of 256:
//!
//! ```text
//! o   = mean of all a          m_j = max |a - o| of block j
//! p_i = code of (a_i - o) / m_j                               â_i = d[p_i] · m_j + o
//! ```
//!
//! with the 256 codes d of the dynamic 8-bit format (Dettmers et al. 2021, arXiv:2110.02861). In memory:
//! `N·K / 2` bytes of q, `N·K / 64` bytes of p, `N·K / 16,384` (rounded up) f32 of m, one f32 o: 4.127 bits a weight.
//!
//! Codes, scales and Ŵ are those of bitsandbytes 0.50.2 on a CPU, bit for bit: every operation is rounded to f32,
//! and p is the code nearest to its value's neighbour among 65,536 equal steps. What differs elsewhere, in last
//! bits and in ties: its int8 Ŵ multiplies by a rounded 1/127 last; its CUDA kernels give p the nearest code (for
//! one in 500 that is the next one), FP4's small numbers the other code for zero, and have the midpoints between
//! 4-bit codes as decimals. Its o is a sum of f32 in an order that depends on the machine; here it is the exact
//! sum, rounded.

pub(crate) mod check;
mod cpu;
#[cfg(device)]
mod device;
mod four_bit;
pub(crate) mod int8;
mod llm_int8;
mod nested;
#[cfg(test)]
mod test;

use std::ops::Range;

use candle_core::{DType, Device, Result, Tensor, bail};

use crate::common::{Real, expect_shape, host::read, run};

pub use four_bit::{BLOCK, FourBit, Kind};
pub use int8::Int8;

/// A quantised matrix `[N, K]`.
#[derive(Clone, Debug)]
pub enum Quantized {
    /// 8 bits, a scale for each row.
    Int8(Int8),
    /// 4 bits, a scale for each block of 64.
    FourBit(FourBit),
}

impl Quantized {
    /// Rows `first..first + len`, in the same memory: one of the matrices that lie in a wider one.
    ///
    /// # Errors
    /// If it has not so many, or `len` is 0.
    pub fn rows(&self, first: usize, len: usize) -> Result<Self> {
        Ok(match self {
            Self::Int8(weight) => Self::Int8(weight.rows(first, len)?),
            Self::FourBit(weight) => Self::FourBit(weight.rows(first, len)?),
        })
    }

    /// The same on `device`, where it is not yet. Of [`rows`](Self::rows) of a wider matrix, all of that is copied:
    /// take them there.
    ///
    /// # Errors
    /// If the device fails.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        Ok(match self {
            Self::Int8(weight) => Self::Int8(weight.to_device(device)?),
            Self::FourBit(weight) => Self::FourBit(weight.to_device(device)?),
        })
    }

    /// Where it is.
    pub fn device(&self) -> &Device {
        match self {
            Self::Int8(weight) => weight.device(),
            Self::FourBit(weight) => weight.device(),
        }
    }

    /// `(N, K)`.
    pub fn dims(&self) -> (usize, usize) {
        match self {
            Self::Int8(weight) => weight.dims(),
            Self::FourBit(weight) => weight.dims(),
        }
    }

    /// Bytes of its rows: codes, scales and all.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Int8(weight) => weight.bytes(),
            Self::FourBit(weight) => weight.bytes(),
        }
    }

    /// The whole matrix Ŵ `[N, K]` in f32: for merging and for saving; the products do without it.
    ///
    /// # Errors
    /// If the device fails.
    pub fn dequantize(&self) -> Result<Tensor> {
        match self.device() {
            Device::Cpu => cpu::dequantize(self),
            #[cfg(device)]
            device => {
                let (n, k) = self.dims();
                device::dequantize(self, 0..n, 0..k, device, DType::F32)
            }
            #[cfg(not(device))]
            device => bail!("quantized: no implementation on {device:?}"),
        }
    }

    /// Its rows, to read on the host.
    fn borrow(&self) -> Result<Borrowed<'_>> {
        Ok(match self {
            Self::Int8(weight) => Borrowed::Int8(weight.borrow()?),
            Self::FourBit(weight) => Borrowed::FourBit(weight.borrow()?),
        })
    }
}

/// The rows of a [`Quantized`] in the host's memory.
enum Borrowed<'a> {
    Int8(int8::Borrowed<'a>),
    FourBit(four_bit::Borrowed<'a>),
}

impl Borrowed<'_> {
    /// Writes the tile `rows × columns` of Ŵ, row by row. `columns` start and end at blocks, where there are blocks.
    fn tile<T: Real>(&self, rows: Range<usize>, columns: Range<usize>, out: &mut [T]) {
        match self {
            Self::Int8(weight) => weight.tile(rows, columns, out),
            Self::FourBit(weight) => weight.tile(rows, columns, out),
        }
    }
}

impl From<Int8> for Quantized {
    fn from(weight: Int8) -> Self {
        Self::Int8(weight)
    }
}

impl From<FourBit> for Quantized {
    fn from(weight: FourBit) -> Self {
        Self::FourBit(weight)
    }
}

/// `x·Ŵᵀ + b`: `[T, K]` by `[N, K]` gives `[T, N]`.
///
/// A thread of the CPU dequantises into 384 KiB (f32) that it reuses; no more of Ŵ exists at a time. The result is
/// the same to the bit on any number of threads. A device multiplies by the codes themselves if tokens are few,
/// and else dequantises into at most 64 MiB, rounding Ŵ to what x is stored as.
///
/// # Errors
/// If the shapes do not fit, or on a device or in a dtype without an implementation.
pub fn forward(x: &Tensor, weight: &Quantized, bias: Option<&Tensor>) -> Result<Tensor> {
    check_forward(x, weight.dims(), bias)?;
    run!("quantized", x, forward(x, weight, bias))
}

/// `dy·Ŵ`: the gradient with respect to the input, `[T, K]`. Memory and order as in [`forward`] of many tokens.
///
/// # Errors
/// As [`forward`].
pub fn backward_input(dy: &Tensor, weight: &Quantized) -> Result<Tensor> {
    check_backward(dy, weight)?;
    run!("quantized", dy, backward_input(dy, weight))
}

/// `dx += dy·Ŵ`, into an existing gradient: what a tensor read by several linears needs.
///
/// # Errors
/// As [`forward`].
pub fn backward_input_into(dy: &Tensor, weight: &Quantized, dx: &Tensor) -> Result<()> {
    let (rows, k) = check_backward(dy, weight)?;
    expect_shape("quantized", "dx", dx, &[rows, k])?;
    run!("quantized", dy, backward_input_into(dy, weight, dx))
}

/// [`forward`] with x in 8 bits too, but for its columns with outliers (the maths is above). `threshold` is above
/// zero; without, no column is one. Its backward is [`backward_input`].
///
/// # Errors
/// As [`forward`]; on a device there is no implementation.
pub fn forward_int8(
    x: &Tensor,
    weight: &Int8,
    threshold: Option<f32>,
    bias: Option<&Tensor>,
) -> Result<Tensor> {
    check_forward(x, weight.dims(), bias)?;
    if let Some(threshold) = threshold.filter(|threshold| threshold.is_nan() || *threshold <= 0.0) {
        bail!("quantized: a threshold of {threshold} for outliers; it has to be above zero");
    }
    match (x.device(), x.dtype()) {
        (Device::Cpu, DType::F32) => llm_int8::forward::<f32>(x, weight, threshold, bias),
        (Device::Cpu, DType::F64) => llm_int8::forward::<f64>(x, weight, threshold, bias),
        (device, dtype) => bail!(
            "quantized: activations in 8 bits have no implementation for {dtype:?} on {device:?}; \
             leave them as they are"
        ),
    }
}

fn check_forward(x: &Tensor, (n, wk): (usize, usize), bias: Option<&Tensor>) -> Result<()> {
    if x.dims2()?.1 != wk {
        bail!("quantized: x {:?} does not fit weight {:?}", x.dims(), [n, wk]);
    }
    bias.map_or(Ok(()), |bias| expect_shape("quantized", "bias", bias, &[n]))
}

/// The shape of dx.
fn check_backward(dy: &Tensor, weight: &Quantized) -> Result<(usize, usize)> {
    let (rows, n) = dy.dims2()?;
    let (wn, k) = weight.dims();
    if wn != n {
        bail!("quantized: dy {:?} does not fit weight {:?}", dy.dims(), [wn, k]);
    }
    Ok((rows, k))
}

/// The shape `(N, K)` of a weight that is to be quantised.
fn weight_shape(weight: &Tensor) -> Result<(usize, usize)> {
    match weight.dims() {
        [n, k] => Ok((*n, *k)),
        dims => bail!("quantized: weight {dims:?} is no matrix"),
    }
}

/// Elements that are quantised at a time: 16 MiB of f32.
const PIECE: usize = match cfg!(test) {
    true => 4 << 10, // so that small matrices have several
    false => 4 << 20,
};

/// Hands `[rows, columns]` to `take`, piece by piece in f32, each with its first row.
fn in_pieces(
    rows: usize,
    columns: usize,
    mut part: impl FnMut(Range<usize>) -> Result<Tensor>,
    mut take: impl FnMut(usize, &[f32]) -> Result<()>,
) -> Result<()> {
    if rows * columns == 0 {
        bail!("quantized: weight {:?} is no matrix of at least one element", [rows, columns]);
    }
    let each = (PIECE / columns).max(1);
    for first in (0..rows).step_by(each) {
        let range = first..rows.min(first + each);
        let piece = part(range.clone())?;
        expect_shape("quantized", "a piece of the weight", &piece, &[range.len(), columns])?;
        match piece.dtype() {
            DType::F32 | DType::BF16 => take(first, &read::<f32>(&piece.to_dtype(DType::F32)?)?)?,
            dtype => bail!("quantized: a weight of {dtype:?}; f32 and bf16 can be quantised"),
        }
    }
    Ok(())
}

/// Bytes as kernels read them: with zeros to a whole number of their widest words.
fn bytes_tensor(mut bytes: Vec<u8>) -> Result<Tensor> {
    const WORD: usize = 16;
    bytes.resize(bytes.len().next_multiple_of(WORD), 0);
    let len = bytes.len();
    Tensor::from_vec(bytes, len, &Device::Cpu)
}

/// Rows `first..first + len` of `rows`.
fn part_of(rows: &Range<usize>, first: usize, len: usize) -> Result<Range<usize>> {
    match first.checked_add(len) {
        Some(end) if len > 0 && end <= rows.len() => Ok(rows.start + first..rows.start + end),
        _ => bail!("quantized: no {len} rows from {first} on in a matrix of {}", rows.len()),
    }
}

/// Largest magnitude. By their bits, as whole numbers, magnitudes are in the order of their values, with
/// infinity and then NaN above all: neither is lost.
#[inline(always)]
fn largest_magnitude(values: &[f32]) -> f32 {
    f32::from_bits(values.iter().fold(0, |max, value| max.max(value.abs().to_bits())))
}

/// Fails on the first element that is not finite, given the largest magnitude of each `block` of elements. `values`
/// are rows from `first` on.
fn refuse_non_finite(
    values: &[f32],
    (first, columns): (usize, usize),
    largest: &[f32],
    block: usize,
) -> Result<()> {
    let Some(bad) = largest.iter().position(|largest| !largest.is_finite()) else { return Ok(()) };
    for (i, value) in values.iter().enumerate().skip(bad * block) {
        if !value.is_finite() {
            let (row, column) = (first + i / columns, i % columns);
            bail!(
                "quantized: weight [{row}, {column}] is {value}; only finite weights have a code"
            );
        }
    }
    unreachable!("a largest magnitude that no element has")
}
