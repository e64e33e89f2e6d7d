//! Launches over quantised weights, and which way a product goes: fused for few tokens, for many over
//! dequantised rows or columns of bounded size and cuBLAS.

use std::ops::Range;

use candle_core::{DType, Device, Result, Tensor};

use super::{BLOCK, FourBit, Int8, Quantized};
use crate::{
    common::device::{
        Address, Kernel, Launch, int, kernels, of_dtype,
        product::{Matrix, product},
        unwritten,
    },
    linear::with_bias,
};

const OP: &str = "quantized";
const DEQUANTIZE_THREADS: usize = 256;
const FEW_THREADS: usize = 128;
/// Outputs of a block of the fused kernel, and tokens.
const FEW_ROWS: usize = FEW_THREADS / 32;
const TOKENS: usize = 8;
/// Memory for dequantised weights, in bytes.
const SCRATCH: usize = match cfg!(test) {
    true => 16 << 10, // so that small matrices take several parts
    false => 64 << 20,
};

/// Most tokens for which the fused kernel is taken.
struct FusedUpTo {
    int8: usize,
    four_bit: usize,
}

/// Estimated, not measured (docs/gpu-debt.md). The fused kernel reads the codes once for each 8 tokens and is bound by
/// its arithmetic, 17 instructions a weight: 6 µs for 6,144 x 1,536 on an H200. The other way writes and reads 2 bytes
/// a weight, 12 µs, and takes no longer up to hundreds of tokens.
const FUSED_UP_TO: FusedUpTo = FusedUpTo { int8: 16, four_bit: 16 };

#[repr(C)]
struct Dequantize<W> {
    weight: W,
    out: Address,
    first_row: i32,
    first_column: i32,
    rows: i32,
    columns: i32,
    width: i32,
}

#[repr(C)]
struct FewTokens<W> {
    weight: W,
    x: Address,
    bias: Address,
    y: Address,
    first_row: i32,
    tokens: i32,
    rows: i32,
    width: i32,
}

#[repr(C)]
struct Int8Parameters {
    codes: Address,
    absmax: Address,
}

/// `FourBit` of codes.cuh.
#[repr(C)]
struct FourBitParameters {
    packed: Address,
    scales: Address,
    largest: Address,
    code8: Address,
    offset: f32,
    code4: [f32; 16],
}

kernels!(
    Dequantize<Int8Parameters>, DEQUANTIZE_THREADS as u32 =>
        quantized_dequantize_int8_f32, quantized_dequantize_int8_bf16;
    Dequantize<FourBitParameters>, DEQUANTIZE_THREADS as u32 =>
        quantized_dequantize_four_bit_f32, quantized_dequantize_four_bit_bf16;
    FewTokens<Int8Parameters>, FEW_THREADS as u32 =>
        quantized_few_tokens_int8_f32, quantized_few_tokens_int8_bf16;
    FewTokens<FourBitParameters>, FEW_THREADS as u32 =>
        quantized_few_tokens_four_bit_f32, quantized_few_tokens_four_bit_bf16;
);

/// A format, and its kernels.
trait Weight: Sized {
    type Parameters;

    fn parameters<'a>(&'a self, launch: &mut Launch<'a>) -> Result<Self::Parameters>;
    /// Where its rows are in memory, and K.
    fn place(&self) -> (&Range<usize>, usize);
    /// Into what is stored like `out`.
    fn dequantize(out: &Tensor) -> Result<Kernel<Dequantize<Self::Parameters>>>;
    fn few_tokens(x: &Tensor) -> Result<Kernel<FewTokens<Self::Parameters>>>;
}

impl Weight for Int8 {
    type Parameters = Int8Parameters;

    fn parameters<'a>(&'a self, launch: &mut Launch<'a>) -> Result<Int8Parameters> {
        Ok(Int8Parameters {
            codes: launch.read(&self.codes, DType::U8)?,
            absmax: launch.read(&self.absmax, DType::F32)?,
        })
    }

    fn place(&self) -> (&Range<usize>, usize) {
        (&self.rows, self.dims().1)
    }

    fn dequantize(out: &Tensor) -> Result<Kernel<Dequantize<Int8Parameters>>> {
        of_dtype(OP, out, quantized_dequantize_int8_f32, quantized_dequantize_int8_bf16)
    }

    fn few_tokens(x: &Tensor) -> Result<Kernel<FewTokens<Int8Parameters>>> {
        of_dtype(OP, x, quantized_few_tokens_int8_f32, quantized_few_tokens_int8_bf16)
    }
}

impl Weight for FourBit {
    type Parameters = FourBitParameters;

    fn parameters<'a>(&'a self, launch: &mut Launch<'a>) -> Result<FourBitParameters> {
        Ok(FourBitParameters {
            packed: launch.read(&self.packed, DType::U8)?,
            scales: launch.read(&self.absmax.codes, DType::U8)?,
            largest: launch.read(&self.absmax.absmax, DType::F32)?,
            code8: launch.read(&self.absmax.code, DType::F32)?,
            offset: self.absmax.offset,
            code4: self.kind.codes().values,
        })
    }

    fn place(&self) -> (&Range<usize>, usize) {
        (&self.rows, self.dims().1)
    }

    fn dequantize(out: &Tensor) -> Result<Kernel<Dequantize<FourBitParameters>>> {
        of_dtype(OP, out, quantized_dequantize_four_bit_f32, quantized_dequantize_four_bit_bf16)
    }

    fn few_tokens(x: &Tensor) -> Result<Kernel<FewTokens<FourBitParameters>>> {
        of_dtype(OP, x, quantized_few_tokens_four_bit_f32, quantized_few_tokens_four_bit_bf16)
    }
}

pub(super) fn forward(x: &Tensor, weight: &Quantized, bias: Option<&Tensor>) -> Result<Tensor> {
    let (t, (n, k)) = (x.dim(0)?, weight.dims());
    match weight {
        Quantized::Int8(weight) if t <= FUSED_UP_TO.int8 => return few_tokens(x, weight, bias),
        Quantized::FourBit(weight) if t <= FUSED_UP_TO.four_bit => {
            return few_tokens(x, weight, bias);
        }
        _ => {}
    }
    let y = with_bias(x, bias, (t, n))?;
    for rows in parts(n, k * x.dtype().size_in_bytes(), 1) {
        let part = dequantize(weight, rows.clone(), 0..k, x.device(), x.dtype())?;
        let matrices = [Matrix::of(x)?, Matrix::of(&part)?.t(), Matrix::columns(&y, rows)?];
        product(OP, matrices, 1, bias.is_some())?;
    }
    Ok(y)
}

pub(super) fn backward_input(dy: &Tensor, weight: &Quantized) -> Result<Tensor> {
    let dx = unwritten(dy.device(), (dy.dim(0)?, weight.dims().1), dy.dtype())?;
    input_gradient(dy, weight, &dx, false)?;
    Ok(dx)
}

pub(super) fn backward_input_into(dy: &Tensor, weight: &Quantized, dx: &Tensor) -> Result<()> {
    input_gradient(dy, weight, dx, true)
}

/// By columns of W: the whole sum of each is one product's, in f32, and rounded once.
fn input_gradient(dy: &Tensor, weight: &Quantized, dx: &Tensor, accumulate: bool) -> Result<()> {
    let (n, k) = weight.dims();
    for columns in parts(k, n * dy.dtype().size_in_bytes(), BLOCK) {
        let part = dequantize(weight, 0..n, columns.clone(), dy.device(), dy.dtype())?;
        let matrices = [Matrix::of(dy)?, Matrix::of(&part)?, Matrix::columns(dx, columns)?];
        product(OP, matrices, 1, accumulate)?;
    }
    Ok(())
}

/// `0..whole` in parts of as many as [`SCRATCH`] has room for at `bytes` each, a multiple of `step`.
fn parts(whole: usize, bytes: usize, step: usize) -> impl Iterator<Item = Range<usize>> {
    let each = (SCRATCH / bytes / step * step).max(step);
    (0..whole).step_by(each).map(move |first| first..whole.min(first + each))
}

/// Ŵ at `rows` and `columns`, which start at a multiple of 8.
pub(super) fn dequantize(
    weight: &Quantized,
    rows: Range<usize>,
    columns: Range<usize>,
    device: &Device,
    dtype: DType,
) -> Result<Tensor> {
    let out = unwritten(device, (rows.len(), columns.len()), dtype)?;
    let corner = (rows.start, columns.start);
    match weight {
        Quantized::Int8(weight) => write_part(weight, corner, &out)?,
        Quantized::FourBit(weight) => write_part(weight, corner, &out)?,
    }
    Ok(out)
}

fn write_part<W: Weight>(weight: &W, (row, column): (usize, usize), out: &Tensor) -> Result<()> {
    let (rows, columns) = out.dims2()?;
    let (own, width) = weight.place();
    let mut launch = Launch::on(OP, out)?;
    let parameters = Dequantize {
        weight: weight.parameters(&mut launch)?,
        out: launch.write(out, out.dtype())?,
        first_row: int(OP, own.start + row)?,
        first_column: int(OP, column)?,
        rows: int(OP, rows)?,
        columns: int(OP, columns)?,
        width: int(OP, width)?,
    };
    let grid = (rows * columns.div_ceil(8)).div_ceil(DEQUANTIZE_THREADS);
    launch.run(W::dequantize(out)?, [grid, 1, 1], 0, &parameters)
}

fn few_tokens<W: Weight>(x: &Tensor, weight: &W, bias: Option<&Tensor>) -> Result<Tensor> {
    let (tokens, (own, width)) = (x.dim(0)?, weight.place());
    let y = unwritten(x.device(), (tokens, own.len()), x.dtype())?;
    let mut launch = Launch::on(OP, x)?;
    let parameters = FewTokens {
        weight: weight.parameters(&mut launch)?,
        x: launch.read(x, x.dtype())?,
        bias: launch.read_some(bias, DType::F32)?,
        y: launch.write(&y, x.dtype())?,
        first_row: int(OP, own.start)?,
        tokens: int(OP, tokens)?,
        rows: int(OP, own.len())?,
        width: int(OP, width)?,
    };
    let grid = [own.len().div_ceil(FEW_ROWS), tokens.div_ceil(TOKENS), 1];
    launch.run(W::few_tokens(x)?, grid, 0, &parameters)?;
    Ok(y)
}
