//! Linear on a device: cuBLAS, with the bias laid under the product.

use candle_core::{DType, Result, Tensor};

use crate::common::device::{
    Address, Launch, int, kernels, of_dtype,
    parameters::{Parts, add_partials},
    product::{Matrix, product},
    unwritten,
};

const OP: &str = "linear";
/// Columns of a block, and rows that it writes.
const STRIP: usize = 256;
const STRIP_ROWS: usize = 8;

#[repr(C)]
struct FillBias {
    bias: Address,
    y: Address,
    rows: i32,
    columns: i32,
}

#[repr(C)]
struct SumRows {
    dy: Address,
    partials: Address,
    rows: i32,
    columns: i32,
    rows_per_part: i32,
}

kernels!(
    FillBias, STRIP as u32 => linear_fill_bias_f32, linear_fill_bias_bf16;
    SumRows, STRIP as u32 => linear_sum_rows_f32, linear_sum_rows_bf16;
);

pub(super) fn forward(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let (t, n) = (x.dim(0)?, weight.dim(0)?);
    let y = with_bias(x, bias, (t, n))?;
    let matrices = [Matrix::of(x)?, Matrix::of(weight)?.t(), Matrix::of(&y)?];
    product(OP, matrices, 1, bias.is_some())?;
    Ok(y)
}

pub(super) fn forward_into(x: &Tensor, weight: &Tensor, y: &Tensor) -> Result<()> {
    product(OP, [Matrix::of(x)?, Matrix::of(weight)?.t(), Matrix::of(y)?], 1, true)
}

/// `[t, n]`, like `x` else: the bias in every row, or nothing yet.
pub(crate) fn with_bias(
    x: &Tensor,
    bias: Option<&Tensor>,
    (t, n): (usize, usize),
) -> Result<Tensor> {
    let y = unwritten(x.device(), (t, n), x.dtype())?;
    if let Some(bias) = bias {
        let kernel = of_dtype(OP, x, linear_fill_bias_f32, linear_fill_bias_bf16)?;
        let mut launch = Launch::on(OP, x)?;
        let parameters = FillBias {
            bias: launch.read(bias, DType::F32)?,
            y: launch.write(&y, x.dtype())?,
            rows: int(OP, t)?,
            columns: int(OP, n)?,
        };
        launch.run(kernel, [t.div_ceil(STRIP_ROWS), n.div_ceil(STRIP), 1], 0, &parameters)?;
    }
    Ok(y)
}

pub(super) fn backward_input(dy: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let dx = unwritten(dy.device(), (dy.dim(0)?, weight.dim(1)?), dy.dtype())?;
    product(OP, [Matrix::of(dy)?, Matrix::of(weight)?, Matrix::of(&dx)?], 1, false)?;
    Ok(dx)
}

pub(super) fn backward_input_into(dy: &Tensor, weight: &Tensor, dx: &Tensor) -> Result<()> {
    product(OP, [Matrix::of(dy)?, Matrix::of(weight)?, Matrix::of(dx)?], 1, true)
}

pub(super) fn backward_weight(dy: &Tensor, x: &Tensor, weight_grad: &Tensor) -> Result<()> {
    product(OP, [Matrix::of(dy)?.t(), Matrix::of(x)?, Matrix::of(weight_grad)?], 1, true)
}

pub(super) fn backward_bias(dy: &Tensor, bias_grad: &Tensor) -> Result<()> {
    let kernel = of_dtype(OP, dy, linear_sum_rows_f32, linear_sum_rows_bf16)?;
    let (rows, columns) = dy.dims2()?;
    let parts = Parts::of(rows);
    let partials = parts.tensor(dy, columns)?;
    let mut launch = Launch::on(OP, dy)?;
    let parameters = SumRows {
        dy: launch.read(dy, dy.dtype())?,
        partials: launch.write(&partials, DType::F32)?,
        rows: int(OP, rows)?,
        columns: int(OP, columns)?,
        rows_per_part: int(OP, parts.rows)?,
    };
    launch.run(kernel, [columns.div_ceil(STRIP), parts.count, 1], 0, &parameters)?;
    add_partials(OP, &partials, bias_grad)
}
