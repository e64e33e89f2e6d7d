//! The convolution on a device: what each token's taps see is laid side by side, `[T, K·k]`, then it is
//! one product a group.

use candle_core::{Result, Tensor};

use super::Shape;
use crate::{
    common::{
        Ragged,
        device::{
            Address, Kernel, Launch, int, kernels, of_dtype,
            product::{Matrix, product},
            unwritten,
        },
    },
    linear,
};

const OP: &str = "convolution";
const THREADS: usize = 128;
/// Columns that a thread of `unfold` writes.
const CHUNK: usize = 8;

#[repr(C)]
struct Windows {
    from: Address,
    to: Address,
    position: Address,
    rows: i32,
    columns: i32,
    taps: i32,
}

kernels!(
    Windows, THREADS as u32 => convolution_unfold_f32, convolution_unfold_bf16,
        convolution_fold_f32, convolution_fold_bf16;
);

pub(super) fn forward(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    shape: Shape,
    ragged: &Ragged,
) -> Result<Tensor> {
    let u = unfold(x, shape, ragged)?;
    let y = linear::with_bias(x, bias, (ragged.tokens(), shape.outputs))?;
    let matrices = [
        Matrix::groups_of_columns(&u, shape.groups)?,
        Matrix::groups_of_rows(weight, shape.groups)?.t(),
        Matrix::groups_of_columns(&y, shape.groups)?,
    ];
    product(OP, matrices, shape.groups, bias.is_some())?;
    Ok(y)
}

pub(super) fn backward_input(
    dy: &Tensor,
    weight: &Tensor,
    shape: Shape,
    ragged: &Ragged,
) -> Result<Tensor> {
    let rows = ragged.tokens();
    let du = unwritten(dy.device(), (rows, shape.inputs * shape.taps), dy.dtype())?;
    let matrices = [
        Matrix::groups_of_columns(dy, shape.groups)?,
        Matrix::groups_of_rows(weight, shape.groups)?,
        Matrix::groups_of_columns(&du, shape.groups)?,
    ];
    product(OP, matrices, shape.groups, false)?;
    let kernel = of_dtype(OP, dy, convolution_fold_f32, convolution_fold_bf16)?;
    windows(kernel, [&du, dy], shape.inputs, shape.inputs.div_ceil(THREADS), (shape, ragged))
}

pub(super) fn backward_weight(
    dy: &Tensor,
    x: &Tensor,
    weight_grad: &Tensor,
    shape: Shape,
    ragged: &Ragged,
) -> Result<()> {
    let u = unfold(x, shape, ragged)?;
    let matrices = [
        Matrix::groups_of_columns(dy, shape.groups)?.t(),
        Matrix::groups_of_columns(&u, shape.groups)?,
        Matrix::groups_of_rows(weight_grad, shape.groups)?,
    ];
    product(OP, matrices, shape.groups, true)
}

/// `[T, K·k]` from `x [T, K]`.
pub(super) fn unfold(x: &Tensor, shape: Shape, ragged: &Ragged) -> Result<Tensor> {
    let kernel = of_dtype(OP, x, convolution_unfold_f32, convolution_unfold_bf16)?;
    let columns = shape.inputs * shape.taps;
    let blocks = columns.div_ceil(CHUNK).div_ceil(THREADS);
    windows(kernel, [x, x], columns, blocks, (shape, ragged))
}

/// `[T, columns]` of `from`'s device and of `like`'s dtype, by `blocks` blocks a row.
fn windows(
    kernel: Kernel<Windows>,
    [from, like]: [&Tensor; 2],
    columns: usize,
    blocks: usize,
    (shape, ragged): (Shape, &Ragged),
) -> Result<Tensor> {
    let rows = ragged.tokens();
    let to = unwritten(like.device(), (rows, columns), like.dtype())?;
    let mut launch = Launch::on(OP, from)?;
    let parameters = Windows {
        from: launch.read(from, like.dtype())?,
        to: launch.write(&to, like.dtype())?,
        position: launch.mirror(&ragged.token_rows().position)?,
        rows: int(OP, rows)?,
        columns: int(OP, shape.inputs)?,
        taps: int(OP, shape.taps)?,
    };
    launch.run(kernel, [rows, blocks, 1], 0, &parameters)?;
    Ok(to)
}
