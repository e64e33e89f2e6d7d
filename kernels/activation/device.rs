//! Launches of bias + activation, plain and gated.

use candle_core::{DType, Result, Tensor};

use super::Activation;
use crate::common::device::{
    Address, Kernel, Launch, int, kernels, of_dtype,
    parameters::{Parts, add_partials},
    unwritten,
};

const OP: &str = "activation";
const THREADS: usize = 256;
/// Columns that a block of backward takes.
const STRIP: usize = 256;

#[repr(C)]
struct Forward {
    h: Address,
    bias: Address,
    y: Address,
    rows: i32,
    columns: i32,
    function: i32,
}

#[repr(C)]
struct Backward {
    dy: Address,
    h: Address,
    bias: Address,
    dh: Address,
    partials: Address,
    rows: i32,
    columns: i32,
    rows_per_part: i32,
    function: i32,
}

kernels!(
    Forward, THREADS as u32 => activation_forward_f32, activation_forward_bf16,
        activation_gated_forward_f32, activation_gated_forward_bf16;
    Backward, STRIP as u32 => activation_backward_f32, activation_backward_bf16,
        activation_gated_backward_f32, activation_gated_backward_bf16;
);

pub(super) fn forward(h: &Tensor, bias: Option<&Tensor>, activation: Activation) -> Result<Tensor> {
    let kernel = of_dtype(OP, h, activation_forward_f32, activation_forward_bf16)?;
    launch_forward(kernel, h, h.dim(1)?, bias, activation)
}

pub(super) fn gated_forward(
    h: &Tensor,
    bias: Option<&Tensor>,
    activation: Activation,
) -> Result<Tensor> {
    let kernel = of_dtype(OP, h, activation_gated_forward_f32, activation_gated_forward_bf16)?;
    launch_forward(kernel, h, h.dim(1)? / 2, bias, activation)
}

fn launch_forward(
    kernel: Kernel<Forward>,
    h: &Tensor,
    columns: usize,
    bias: Option<&Tensor>,
    activation: Activation,
) -> Result<Tensor> {
    let rows = h.dim(0)?;
    let y = unwritten(h.device(), (rows, columns), h.dtype())?;
    let mut launch = Launch::on(OP, h)?;
    let parameters = Forward {
        h: launch.read(h, h.dtype())?,
        bias: launch.read_some(bias, DType::F32)?,
        y: launch.write(&y, h.dtype())?,
        rows: int(OP, rows)?,
        columns: int(OP, columns)?,
        function: activation as i32,
    };
    let grid = (rows * columns.div_ceil(8)).div_ceil(THREADS);
    launch.run(kernel, [grid, 1, 1], 0, &parameters)?;
    Ok(y)
}

pub(super) fn backward(
    dy: &Tensor,
    h: &Tensor,
    bias: Option<&Tensor>,
    activation: Activation,
    bias_grad: Option<&Tensor>,
) -> Result<Tensor> {
    let kernel = of_dtype(OP, h, activation_backward_f32, activation_backward_bf16)?;
    launch_backward(kernel, [dy, h], bias, activation, bias_grad)
}

pub(super) fn gated_backward(
    dy: &Tensor,
    h: &Tensor,
    bias: Option<&Tensor>,
    activation: Activation,
    bias_grad: Option<&Tensor>,
) -> Result<Tensor> {
    let kernel = of_dtype(OP, h, activation_gated_backward_f32, activation_gated_backward_bf16)?;
    launch_backward(kernel, [dy, h], bias, activation, bias_grad)
}

fn launch_backward(
    kernel: Kernel<Backward>,
    [dy, h]: [&Tensor; 2],
    bias: Option<&Tensor>,
    activation: Activation,
    bias_grad: Option<&Tensor>,
) -> Result<Tensor> {
    let (rows, columns) = dy.dims2()?;
    let parts = Parts::of(rows);
    let dh = unwritten(h.device(), h.dims(), h.dtype())?;
    let partials = bias_grad.map(|_| parts.tensor(h, h.dim(1)?)).transpose()?;
    let mut launch = Launch::on(OP, h)?;
    let parameters = Backward {
        dy: launch.read(dy, h.dtype())?,
        h: launch.read(h, h.dtype())?,
        bias: launch.read_some(bias, DType::F32)?,
        dh: launch.write(&dh, h.dtype())?,
        partials: launch.write_some(partials.as_ref(), DType::F32)?,
        rows: int(OP, rows)?,
        columns: int(OP, columns)?,
        rows_per_part: int(OP, parts.rows)?,
        function: activation as i32,
    };
    launch.run(kernel, [columns.div_ceil(STRIP), parts.count, 1], 0, &parameters)?;
    if let (Some(partials), Some(bias_grad)) = (&partials, bias_grad) {
        add_partials(OP, partials, bias_grad)?;
    }
    Ok(dh)
}
