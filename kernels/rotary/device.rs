//! Launches of the rotation.

use candle_core::{Result, Tensor};

use super::Table;
use crate::common::{
    Ragged,
    device::{Address, Launch, int, kernels, of_dtype, unwritten},
};

const OP: &str = "rotary";
const THREADS: usize = 256;

#[repr(C)]
struct Rotate {
    x: Address,
    y: Address,
    cosines: Address,
    sines: Address,
    position: Address,
    rows: i32,
    heads: i32,
    half: i32,
    direction: f32,
}

kernels!(Rotate, THREADS as u32 => rotary_f32, rotary_bf16;);

pub(super) fn forward(x: &Tensor, table: &Table, ragged: &Ragged) -> Result<Tensor> {
    rotate(x, table, ragged, 1.0)
}

pub(super) fn backward(dy: &Tensor, table: &Table, ragged: &Ragged) -> Result<Tensor> {
    rotate(dy, table, ragged, -1.0)
}

/// Rotates by the table's angles times `direction`, 1 or -1.
fn rotate(x: &Tensor, table: &Table, ragged: &Ragged, direction: f32) -> Result<Tensor> {
    let kernel = of_dtype(OP, x, rotary_f32, rotary_bf16)?;
    let (rows, columns) = x.dims2()?;
    let y = unwritten(x.device(), (rows, columns), x.dtype())?;
    let [cosines, sines] = &table.rounded;
    let mut launch = Launch::on(OP, x)?;
    let parameters = Rotate {
        x: launch.read(x, x.dtype())?,
        y: launch.write(&y, x.dtype())?,
        cosines: launch.mirror(cosines)?,
        sines: launch.mirror(sines)?,
        position: launch.mirror(&ragged.token_rows().position)?,
        rows: int(OP, rows)?,
        heads: int(OP, columns / (2 * table.half))?,
        half: int(OP, table.half)?,
        direction,
    };
    launch.run(kernel, [(rows * columns / 2).div_ceil(THREADS), 1, 1], 0, &parameters)?;
    Ok(y)
}
