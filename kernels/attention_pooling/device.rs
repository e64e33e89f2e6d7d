//! Launches of attention pooling.

use candle_core::{DType, Result, Tensor};

use super::{Gradients, OP, Operands};
use crate::common::{
    Ragged,
    device::{
        Address, Launch, int, kernels, of_dtype,
        parameters::{Parts, add_partials},
        unwritten,
    },
};

const THREADS: u32 = 256;
/// Columns that a block takes where it sums over rows.
const STRIP: usize = 256;

#[repr(C)]
struct Weights {
    u: Address,
    v: Address,
    weights: Address,
    cu_seqlens: Address,
    width: i32,
}

#[repr(C)]
struct Pool {
    x: Address,
    weights: Address,
    y: Address,
    cu_seqlens: Address,
    columns: i32,
}

#[repr(C)]
struct Scores {
    x: Address,
    dy: Address,
    weights: Address,
    scores: Address,
    dx: Address,
    cu_seqlens: Address,
    columns: i32,
}

#[repr(C)]
struct Context {
    u: Address,
    v: Address,
    scores: Address,
    du: Address,
    partials: Address,
    rows: i32,
    width: i32,
    rows_per_part: i32,
}

kernels!(
    Weights, THREADS => attention_pooling_weights_f32, attention_pooling_weights_bf16;
    Pool, STRIP as u32 => attention_pooling_pool_f32, attention_pooling_pool_bf16;
    Scores, THREADS => attention_pooling_scores_f32, attention_pooling_scores_bf16;
    Context, STRIP as u32 => attention_pooling_context_f32, attention_pooling_context_bf16;
);

/// f32 `[T]`.
pub(super) fn weights(u: &Tensor, v: &Tensor, ragged: &Ragged) -> Result<Tensor> {
    let kernel = of_dtype(OP, u, attention_pooling_weights_f32, attention_pooling_weights_bf16)?;
    let (rows, width) = u.dims2()?;
    let weights = unwritten(u.device(), rows, DType::F32)?;
    let mut launch = Launch::on(OP, u)?;
    let parameters = Weights {
        u: launch.read(u, u.dtype())?,
        v: launch.read(v, DType::F32)?,
        weights: launch.write(&weights, DType::F32)?,
        cu_seqlens: launch.mirror(ragged.starts())?,
        width: int(OP, width)?,
    };
    launch.run(kernel, [ragged.sequences(), 1, 1], 0, &parameters)?;
    Ok(weights)
}

pub(super) fn pool(x: &Tensor, a: &Tensor, ragged: &Ragged) -> Result<Tensor> {
    let kernel = of_dtype(OP, x, attention_pooling_pool_f32, attention_pooling_pool_bf16)?;
    let (sequences, columns) = (ragged.sequences(), x.dim(1)?);
    let y = unwritten(x.device(), (sequences, columns), x.dtype())?;
    let mut launch = Launch::on(OP, x)?;
    let parameters = Pool {
        x: launch.read(x, x.dtype())?,
        weights: launch.read(a, DType::F32)?,
        y: launch.write(&y, x.dtype())?,
        cu_seqlens: launch.mirror(ragged.starts())?,
        columns: int(OP, columns)?,
    };
    launch.run(kernel, [columns.div_ceil(STRIP), sequences, 1], 0, &parameters)?;
    Ok(y)
}

pub(super) fn backward(
    operands: Operands<'_>,
    a: &Tensor,
    dy: &Tensor,
    ragged: &Ragged,
    v_grad: Option<&Tensor>,
) -> Result<Gradients> {
    let (x, scores) = scores(operands.x, a, dy, ragged)?;
    Ok(Gradients { x, u: context(operands, &scores, v_grad)? })
}

/// dx, and the gradient of the scores, f32 `[T]`.
fn scores(x: &Tensor, a: &Tensor, dy: &Tensor, ragged: &Ragged) -> Result<(Tensor, Tensor)> {
    let kernel = of_dtype(OP, dy, attention_pooling_scores_f32, attention_pooling_scores_bf16)?;
    let ((rows, columns), dtype) = (x.dims2()?, dy.dtype());
    let dx = unwritten(dy.device(), (rows, columns), dtype)?;
    let scores = unwritten(dy.device(), rows, DType::F32)?;
    let mut launch = Launch::on(OP, dy)?;
    let parameters = Scores {
        x: launch.read(x, dtype)?,
        dy: launch.read(dy, dtype)?,
        weights: launch.read(a, DType::F32)?,
        scores: launch.write(&scores, DType::F32)?,
        dx: launch.write(&dx, dtype)?,
        cu_seqlens: launch.mirror(ragged.starts())?,
        columns: int(OP, columns)?,
    };
    launch.run(kernel, [ragged.sequences(), 1, 1], 0, &parameters)?;
    Ok((dx, scores))
}

/// du; adds the gradient of v.
fn context(operands: Operands<'_>, scores: &Tensor, v_grad: Option<&Tensor>) -> Result<Tensor> {
    let u = operands.u;
    let kernel = of_dtype(OP, u, attention_pooling_context_f32, attention_pooling_context_bf16)?;
    let (rows, width) = u.dims2()?;
    let (du, parts) = (unwritten(u.device(), (rows, width), u.dtype())?, Parts::of(rows));
    let partials = v_grad.map(|_| parts.tensor(u, width)).transpose()?;
    let mut launch = Launch::on(OP, u)?;
    let parameters = Context {
        u: launch.read(u, u.dtype())?,
        v: launch.read(operands.v, DType::F32)?,
        scores: launch.read(scores, DType::F32)?,
        du: launch.write(&du, u.dtype())?,
        partials: launch.write_some(partials.as_ref(), DType::F32)?,
        rows: int(OP, rows)?,
        width: int(OP, width)?,
        rows_per_part: int(OP, parts.rows)?,
    };
    launch.run(kernel, [width.div_ceil(STRIP), parts.count, 1], 0, &parameters)?;
    if let (Some(partials), Some(v_grad)) = (&partials, v_grad) {
        add_partials(OP, partials, v_grad)?;
    }
    Ok(du)
}
