//! The kernels of op.cu, run on the host, against the CPU implementation in f64.

use candle_core::{DType, Device, Result};

use super::*;
use crate::{
    common::host_run::in_every_order,
    testing::{STORED, check, random, rounded, wide},
};

const ALL: [Activation; 5] =
    [Activation::Gelu, Activation::GeluTanh, Activation::Relu, Activation::Silu, Activation::Tanh];

fn compare(rows: usize, columns: usize, gated: bool, dtype: DType) -> Result<()> {
    let width = if gated { 2 * columns } else { columns };
    let h = rounded(&(random(&[rows, width], 1)? * 4.0)?, dtype)?;
    let dy = rounded(&random(&[rows, columns], 2)?, dtype)?;
    let bias = rounded(&random(&[width], 3)?, DType::F32)?;
    let start = rounded(&random(&[width], 4)?, DType::F32)?;
    for (function, bias) in ALL.into_iter().flat_map(|f| [(f, None), (f, Some(&bias))]) {
        let (db, exact_db) = (start.copy()?, wide(&start)?);
        let exact_bias = bias.map(wide).transpose()?;
        let exact_bias = exact_bias.as_ref();
        let [y, dh, exact_y, exact_dh] = if gated {
            [
                device::gated_forward(&h, bias, function)?,
                device::gated_backward(&dy, &h, bias, function, Some(&db))?,
                gated_forward(&wide(&h)?, exact_bias, function)?,
                gated_backward(&wide(&dy)?, &wide(&h)?, exact_bias, function, Some(&exact_db))?,
            ]
        } else {
            [
                device::forward(&h, bias, function)?,
                device::backward(&dy, &h, bias, function, Some(&db))?,
                forward(&wide(&h)?, exact_bias, function)?,
                backward(&wide(&dy)?, &wide(&h)?, exact_bias, function, Some(&exact_db))?,
            ]
        };
        let what = format!("{function:?} {rows} x {columns} gated {gated}");
        // f32 functions, measured: 2e-7 of the largest value. Sums of `rows` terms lose 6e-8 each.
        check(&format!("y {what}"), &y, &exact_y, 1e-6)?;
        check(&format!("dh {what}"), &dh, &exact_dh, 1e-6)?;
        check(&format!("db {what}"), &db, &exact_db, 1e-6)?;
    }
    Ok(())
}

#[test]
fn host_kernels_match_the_cpu() -> Result<()> {
    in_every_order(|| {
        for (rows, columns) in [(1, 1), (97, 17), (3, 264), (50, 24)] {
            for (gated, dtype) in [false, true].into_iter().flat_map(|g| STORED.map(|d| (g, d))) {
                compare(rows, columns, gated, dtype)?;
            }
        }
        Ok(())
    })
}

#[test]
fn host_relu_keeps_nan() -> Result<()> {
    let nan = Tensor::new(&[[f32::NAN, -1.0, 2.0]], &Device::Cpu)?;
    let y = device::forward(&nan, None, Activation::Relu)?.to_vec2::<f32>()?;
    assert!(y[0][0].is_nan());
    assert_eq!(y[0][1..], [0.0, 2.0]);
    Ok(())
}

#[test]
fn host_bf16_on_the_cpu_takes_the_kernels() -> Result<()> {
    let h = rounded(&random(&[3, 5], 1)?, DType::BF16)?;
    assert_eq!(forward(&h, None, Activation::Gelu)?.dtype(), DType::BF16);
    let wrong = device::forward(&h, Some(&h.flatten_all()?), Activation::Gelu);
    assert!(wrong.unwrap_err().to_string().contains("BF16 where the kernel takes F32"));
    Ok(())
}
