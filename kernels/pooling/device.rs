//! Launches of pooling.

use candle_core::{DType, Result, Tensor};

use super::{Pool, Saved};
use crate::common::{
    Ragged,
    device::{Address, Launch, int, kernels, of_dtype, unwritten},
};

const OP: &str = "pooling";
/// Columns of one sequence that a block takes, one a thread in the end.
const STRIP: usize = 256;
/// Columns that a thread takes where there is nothing to sum or compare.
const CHUNK: usize = 8;

#[repr(C)]
struct Pooling {
    from: Address,
    to: Address,
    rows: Address,
    cu_seqlens: Address,
    columns: i32,
    pool: i32,
    skip: i32,
}

kernels!(
    Pooling, STRIP as u32 => pooling_pick_f32, pooling_pick_bf16, pooling_mean_f32, pooling_mean_bf16,
        pooling_max_f32, pooling_max_bf16, pooling_backward_f32, pooling_backward_bf16;
);

/// y, and the rows of maxima.
pub(super) fn forward(
    x: &Tensor,
    ragged: &Ragged,
    pool: Pool,
    skip: usize,
) -> Result<(Tensor, Option<Tensor>)> {
    let (kernel, block) = match pool {
        Pool::Mean => (of_dtype(OP, x, pooling_mean_f32, pooling_mean_bf16)?, STRIP),
        Pool::Max => (of_dtype(OP, x, pooling_max_f32, pooling_max_bf16)?, STRIP),
        _ => (of_dtype(OP, x, pooling_pick_f32, pooling_pick_bf16)?, STRIP * CHUNK),
    };
    let (sequences, columns) = (ragged.sequences(), x.dim(1)?);
    let shape = (sequences, columns);
    let y = unwritten(x.device(), shape, x.dtype())?;
    let rows = (pool == Pool::Max).then(|| unwritten(x.device(), shape, DType::U32)).transpose()?;
    let mut launch = Launch::on(OP, x)?;
    let parameters = Pooling {
        from: launch.read(x, x.dtype())?,
        to: launch.write(&y, x.dtype())?,
        rows: launch.write_some(rows.as_ref(), DType::U32)?,
        cu_seqlens: launch.mirror(ragged.starts())?,
        columns: int(OP, columns)?,
        pool: pool as i32,
        skip: int(OP, skip)?,
    };
    launch.run(kernel, [columns.div_ceil(block), sequences, 1], 0, &parameters)?;
    Ok((y, rows))
}

pub(super) fn backward(dy: &Tensor, ragged: &Ragged, saved: &Saved) -> Result<Tensor> {
    let kernel = of_dtype(OP, dy, pooling_backward_f32, pooling_backward_bf16)?;
    let columns = dy.dim(1)?;
    let dx = unwritten(dy.device(), (ragged.tokens(), columns), dy.dtype())?;
    let mut launch = Launch::on(OP, dy)?;
    let parameters = Pooling {
        from: launch.read(dy, dy.dtype())?,
        to: launch.write(&dx, dy.dtype())?,
        rows: launch.read_some(saved.rows.as_ref(), DType::U32)?,
        cu_seqlens: launch.mirror(ragged.starts())?,
        columns: int(OP, columns)?,
        pool: saved.pool as i32,
        skip: int(OP, saved.skip)?,
    };
    launch.run(kernel, [columns.div_ceil(STRIP), ragged.sequences(), 1], 0, &parameters)?;
    Ok(dx)
}
