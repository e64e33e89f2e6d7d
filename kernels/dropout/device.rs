//! The launch of dropout on its own.

use candle_core::{Result, Tensor};

use crate::common::{
    Dropout, RowIds,
    device::{
        Address, Launch, int, kernels, of_dtype,
        parameters::{DropoutParameters, RowIdParameters},
        unwritten,
    },
};

const OP: &str = "dropout";
const THREADS: usize = 256;

#[repr(C)]
struct Apply {
    x: Address,
    y: Address,
    dropout: DropoutParameters,
    ids: RowIdParameters,
    rows: i32,
    columns: i32,
}

kernels!(Apply, THREADS as u32 => dropout_apply_f32, dropout_apply_bf16;);

pub(super) fn apply(x: &Tensor, dropout: &Dropout, ids: &RowIds) -> Result<Tensor> {
    let kernel = of_dtype(OP, x, dropout_apply_f32, dropout_apply_bf16)?;
    let (rows, columns) = x.dims2()?;
    let y = unwritten(x.device(), (rows, columns), x.dtype())?;
    let mut launch = Launch::on(OP, x)?;
    let parameters = Apply {
        x: launch.read(x, x.dtype())?,
        y: launch.write(&y, x.dtype())?,
        dropout: DropoutParameters::new(Some(dropout)),
        ids: RowIdParameters::new(&mut launch, ids)?,
        rows: int(OP, rows)?,
        columns: int(OP, columns)?,
    };
    let grid = (rows * columns.div_ceil(8)).div_ceil(THREADS);
    launch.run(kernel, [grid, 1, 1], 0, &parameters)?;
    Ok(y)
}
