//! The kernels of op.cu, run on the host, against the CPU implementation in f64.

use candle_core::Result;
use half::bf16;

use super::*;
use crate::{
    common::host_run::{
        Address, Buffer, Kernel, Storage, add_partials, check, in_every_order, kernels, launch,
        parts, rounded,
    },
    testing::random,
};

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
    FillBias: host_linear_fill_bias_f32, host_linear_fill_bias_bf16;
    SumRows: host_linear_sum_rows_f32, host_linear_sum_rows_bf16;
);

/// `[T, N]` of biases.
fn fill_bias<S: Storage>(bias: &Tensor, rows: usize) -> Result<Buffer<S>> {
    let kernel: Kernel<FillBias> =
        if S::BF16 { host_linear_fill_bias_bf16 } else { host_linear_fill_bias_f32 };
    let columns = bias.dim(0)?;
    let (bias, y) = (Buffer::<f32>::tensor(bias)?, Buffer::poisoned(rows * columns));
    let parameters = FillBias {
        bias: bias.address(),
        y: y.address(),
        rows: rows as i32,
        columns: columns as i32,
    };
    launch(kernel, [rows.div_ceil(8), columns.div_ceil(256), 1], 0, &parameters);
    Ok(y)
}

/// `start + Σ_t dy`.
fn sum_rows<S: Storage>(dy: &Tensor, start: &Tensor) -> Result<Buffer<f32>> {
    let kernel: Kernel<SumRows> =
        if S::BF16 { host_linear_sum_rows_bf16 } else { host_linear_sum_rows_f32 };
    let (rows, columns) = dy.dims2()?;
    let (rows_per_part, parts) = parts(rows);
    let (dy, partials) = (Buffer::<S>::tensor(dy)?, Buffer::poisoned(parts * columns));
    let parameters = SumRows {
        dy: dy.address(),
        partials: partials.address(),
        rows: rows as i32,
        columns: columns as i32,
        rows_per_part: rows_per_part as i32,
    };
    launch(kernel, [columns.div_ceil(256), parts, 1], 0, &parameters);
    let gradient = Buffer::tensor(start)?;
    add_partials(&partials, &gradient);
    Ok(gradient)
}

fn compare<S: Storage>(rows: usize, columns: usize) -> Result<()> {
    let bias = rounded::<f32>(&random(&[columns], 1)?)?;
    // A product of zeros leaves the bias.
    let (x, w) = (random(&[rows, 1], 2)?, bias.zeros_like()?.unsqueeze(1)?);
    check("y", &fill_bias::<S>(&bias, rows)?, &forward(&x, &w, Some(&bias))?, 0.0)?;
    let dy = rounded::<S>(&random(&[rows, columns], 3)?)?;
    let start = rounded::<f32>(&random(&[columns], 4)?)?;
    let db = start.copy()?;
    backward_bias(&dy, &db)?;
    // At most 22 additions in a row (3 of a warp's rows, 8 warps, 11 parts), each off by 6e-8.
    check("db", &sum_rows::<S>(&dy, &start)?, &db, 1.4e-6)
}

#[test]
fn host_bias_and_its_gradient_match_the_cpu() -> Result<()> {
    in_every_order(|| {
        for (rows, columns) in [(1, 1), (97, 17), (257, 264), (50, 24)] {
            compare::<f32>(rows, columns)?;
            compare::<bf16>(rows, columns)?;
        }
        Ok(())
    })
}
