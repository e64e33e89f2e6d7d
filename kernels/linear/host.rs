//! The kernels of op.cu, run on the host, and the products around them, against the CPU implementation
//! in f64.

use candle_core::{DType, Result};

use super::*;
use crate::{
    common::host_run::in_every_order,
    testing::{STORED, check, random, rounded, wide},
};

fn compare(t: usize, k: usize, n: usize, dtype: DType) -> Result<()> {
    let x = rounded(&random(&[t, k], 1)?, dtype)?;
    let weight = rounded(&random(&[n, k], 2)?, dtype)?;
    let bias = rounded(&random(&[n], 3)?, DType::F32)?;
    let dy = rounded(&random(&[t, n], 4)?, dtype)?;
    let (wide_x, wide_weight, wide_dy) = (wide(&x)?, wide(&weight)?, wide(&dy)?);
    // Sums of at most 33 products below 1 in f32, each addition off by 6e-8 of a partial sum.
    let arithmetic = 4e-6;
    let y = device::forward(&x, &weight, None)?;
    check("y", &y, &forward(&wide_x, &wide_weight, None)?, arithmetic)?;
    let dx = device::backward_input(&dy, &weight)?;
    check("dx", &dx, &backward_input(&wide_dy, &wide_weight)?, arithmetic)?;

    // Added to what is there: weights' gradients in f32 whatever the rest is stored as.
    let start = rounded(&random(&[t, k], 5)?, dtype)?;
    let (into, exact) = (start.copy()?, wide(&start)?);
    device::backward_input_into(&dy, &weight, &into)?;
    backward_input_into(&wide_dy, &wide_weight, &exact)?;
    check("dx +=", &into, &exact, arithmetic)?;
    let start = rounded(&random(&[n, k], 6)?, DType::F32)?;
    let (dw, exact) = (start.copy()?, wide(&start)?);
    device::backward_weight(&dy, &x, &dw)?;
    backward_weight(&wide_dy, &wide_x, &exact)?;
    // Of at most 257 products.
    check("dw", &dw, &exact, 2e-5)?;
    let start = rounded(&random(&[n], 7)?, DType::F32)?;
    let (db, exact) = (start.copy()?, wide(&start)?);
    device::backward_bias(&dy, &db)?;
    backward_bias(&wide_dy, &exact)?;
    // At most 22 additions in a row (3 of a warp's rows, 8 warps, 11 parts), each off by 6e-8.
    check("db", &db, &exact, 1.4e-6)?;

    // The bias is rounded where it lies under y, so a product of zeros leaves exactly that.
    let zeros = weight.zeros_like()?;
    let y = device::forward(&x, &zeros, Some(&bias))?;
    check("bias", &y, &forward(&wide_x, &wide(&zeros)?, Some(&wide(&bias)?))?, 0.0)?;
    let y = device::forward(&x, &weight, Some(&bias))?;
    let laid = wide(&bias.to_dtype(dtype)?)?;
    check("y with bias", &y, &forward(&wide_x, &wide_weight, Some(&laid))?, arithmetic)
}

#[test]
fn host_linear_matches_the_cpu() -> Result<()> {
    in_every_order(|| {
        for (t, k, n) in [(1, 1, 1), (97, 5, 17), (257, 3, 264), (50, 33, 24)] {
            for dtype in STORED {
                compare(t, k, n, dtype)?;
            }
        }
        Ok(())
    })
}
