//! Launches of pooling.

use candle_core::{Result, Tensor};

use super::Pool;
use crate::common::{
    Ragged,
    device::{Address, Kernel, Launch, int, kernels, of_dtype, unwritten},
};

const OP: &str = "pooling";
/// Columns of one sequence that a block takes.
const STRIP: usize = 256;

#[repr(C)]
struct Pooling {
    from: Address,
    to: Address,
    cu_seqlens: Address,
    columns: i32,
    pool: i32,
    skip: i32,
}

kernels!(
    Pooling, STRIP as u32 => pooling_forward_f32, pooling_forward_bf16, pooling_backward_f32,
        pooling_backward_bf16;
);

pub(super) fn forward(x: &Tensor, ragged: &Ragged, pool: Pool, skip: usize) -> Result<Tensor> {
    let kernel = of_dtype(OP, x, pooling_forward_f32, pooling_forward_bf16)?;
    launch(kernel, x, ragged.sequences(), ragged, (pool, skip))
}

pub(super) fn backward(dy: &Tensor, ragged: &Ragged, pool: Pool, skip: usize) -> Result<Tensor> {
    let kernel = of_dtype(OP, dy, pooling_backward_f32, pooling_backward_bf16)?;
    launch(kernel, dy, ragged.tokens(), ragged, (pool, skip))
}

/// `to [rows, H]`.
fn launch(
    kernel: Kernel<Pooling>,
    from: &Tensor,
    rows: usize,
    ragged: &Ragged,
    (pool, skip): (Pool, usize),
) -> Result<Tensor> {
    let columns = from.dim(1)?;
    let to = unwritten(from.device(), (rows, columns), from.dtype())?;
    let mut launch = Launch::on(OP, from)?;
    let parameters = Pooling {
        from: launch.read(from, from.dtype())?,
        to: launch.write(&to, from.dtype())?,
        cu_seqlens: launch.mirror(ragged.starts())?,
        columns: int(OP, columns)?,
        pool: pool as i32,
        skip: int(OP, skip)?,
    };
    launch.run(kernel, [columns.div_ceil(STRIP), ragged.sequences(), 1], 0, &parameters)?;
    Ok(to)
}
