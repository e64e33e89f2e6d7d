//! The kernels of op.cu, run on the host, against the CPU implementation in f64.

use candle_core::Result;
use half::bf16;

use super::*;
use crate::{
    common::host_run::{
        Address, Buffer, Kernel, Storage, add_partials, check, in_every_order, kernels, launch,
        parts, rounded,
    },
    testing::{random, zeros},
};

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
    Forward: host_activation_forward_f32, host_activation_forward_bf16,
        host_activation_gated_forward_f32, host_activation_gated_forward_bf16;
    Backward: host_activation_backward_f32, host_activation_backward_bf16,
        host_activation_gated_backward_f32, host_activation_gated_backward_bf16;
);

const ALL: [Activation; 5] =
    [Activation::Gelu, Activation::GeluTanh, Activation::Relu, Activation::Silu, Activation::Tanh];

fn forward_kernel<S: Storage>(gated: bool) -> Kernel<Forward> {
    match (S::BF16, gated) {
        (false, false) => host_activation_forward_f32,
        (true, false) => host_activation_forward_bf16,
        (false, true) => host_activation_gated_forward_f32,
        (true, true) => host_activation_gated_forward_bf16,
    }
}

fn backward_kernel<S: Storage>(gated: bool) -> Kernel<Backward> {
    match (S::BF16, gated) {
        (false, false) => host_activation_backward_f32,
        (true, false) => host_activation_backward_bf16,
        (false, true) => host_activation_gated_backward_f32,
        (true, true) => host_activation_gated_backward_bf16,
    }
}

/// `[y, dh]` in `S` and the bias gradient, which starts at `start`.
struct Results<S> {
    y: Buffer<S>,
    dh: Buffer<S>,
    db: Buffer<f32>,
}

fn run<S: Storage>(
    [h, dy]: [&Tensor; 2],
    bias: Option<&Tensor>,
    start: &Tensor,
    function: Activation,
) -> Result<Results<S>> {
    let ((rows, width), columns) = (h.dims2()?, dy.dim(1)?);
    let gated = width != columns;
    let (h, dy) = (Buffer::<S>::tensor(h)?, Buffer::<S>::tensor(dy)?);
    let bias = bias.map(Buffer::<f32>::tensor).transpose()?;
    let (y, dh) = (Buffer::poisoned(rows * columns), Buffer::poisoned(rows * width));
    let forward = Forward {
        h: h.address(),
        bias: Address::of(bias.as_ref()),
        y: y.address(),
        rows: rows as i32,
        columns: columns as i32,
        function: function as i32,
    };
    let grid = (rows * columns.div_ceil(8)).div_ceil(256);
    launch(forward_kernel::<S>(gated), [grid, 1, 1], 0, &forward);
    let (rows_per_part, parts) = parts(rows);
    let partials = Buffer::poisoned(parts * width);
    let backward = Backward {
        dy: dy.address(),
        h: h.address(),
        bias: forward.bias,
        dh: dh.address(),
        partials: partials.address(),
        rows: rows as i32,
        columns: columns as i32,
        rows_per_part: rows_per_part as i32,
        function: function as i32,
    };
    launch(backward_kernel::<S>(gated), [columns.div_ceil(256), parts, 1], 0, &backward);
    let db = Buffer::tensor(start)?;
    add_partials(&partials, &db);
    Ok(Results { y, dh, db })
}

fn compare<S: Storage>(rows: usize, columns: usize, gated: bool) -> Result<()> {
    let width = if gated { 2 * columns } else { columns };
    let h = rounded::<S>(&(random(&[rows, width], 1)? * 4.0)?)?;
    let (dy, bias) = (rounded::<S>(&random(&[rows, columns], 2)?)?, random(&[width], 3)?);
    let bias = rounded::<f32>(&bias)?;
    let start = rounded::<f32>(&random(&[width], 4)?)?;
    for (function, bias) in ALL.into_iter().flat_map(|f| [(f, None), (f, Some(&bias))]) {
        let got = run::<S>([&h, &dy], bias, &start, function)?;
        let db = (&zeros(&start)? + &start)?;
        let (y, dh) = if gated {
            (
                gated_forward(&h, bias, function)?,
                gated_backward(&dy, &h, bias, function, Some(&db))?,
            )
        } else {
            (forward(&h, bias, function)?, backward(&dy, &h, bias, function, Some(&db))?)
        };
        let what = format!("{function:?} {rows} x {columns} gated {gated}");
        // f32 functions, measured: 2e-7 of the largest value. Sums of `rows` terms lose 6e-8 each.
        check(&format!("y {what}"), &got.y, &y, 1e-6)?;
        check(&format!("dh {what}"), &got.dh, &dh, 1e-6)?;
        check(&format!("db {what}"), &got.db, &db, 1e-6)?;
    }
    Ok(())
}

#[test]
fn host_kernels_match_the_cpu() -> Result<()> {
    in_every_order(|| {
        for (rows, columns) in [(1, 1), (97, 17), (3, 264), (50, 24)] {
            for gated in [false, true] {
                compare::<f32>(rows, columns, gated)?;
                compare::<bf16>(rows, columns, gated)?;
            }
        }
        Ok(())
    })
}

#[test]
fn host_relu_keeps_nan() -> Result<()> {
    let nan = Tensor::new(&[[f64::NAN, -1.0, 2.0]], &Device::Cpu)?;
    let got = run::<f32>([&nan, &nan], None, &nan.squeeze(0)?, Activation::Relu)?;
    assert!(got.y.values()[0].is_nan());
    assert_eq!(got.y.values()[1..], [0.0, 2.0]);
    Ok(())
}
