//! The kernels of op.cu, run on the host, and the products between them, against the CPU
//! implementation in f64.

use candle_core::{DType, Device, Result};

use super::*;
use crate::{
    common::host_run::in_every_order,
    testing::{STORED, check, check_against, random, rounded, wide},
};

/// Lengths below every kernel's reach and above it.
fn lengths() -> Result<Ragged> {
    Ragged::new(&[1, 97, 2, 13, 3], &[5, 4, 3, 2, 1])
}

/// Unfolding is a convolution itself: every channel a group, of k outputs, and output j sees tap j.
fn compare_unfolded(columns: usize, taps: usize, ragged: &Ragged, dtype: DType) -> Result<()> {
    let identity = Tensor::eye(taps, DType::F64, &Device::Cpu)?.unsqueeze(1)?;
    let identity = identity.repeat((columns, 1, 1))?;
    let x = rounded(&random(&[ragged.tokens(), columns], 1)?, dtype)?;
    let u = device::unfold(&x, Shape { inputs: columns, outputs: 1, taps, groups: 1 }, ragged)?;
    // Elements are moved, so they are what they were.
    check("u", &u, &forward(&wide(&x)?, &identity, None, columns, ragged)?, 0.0)
}

#[test]
fn host_unfolded_rows_are_what_taps_see() -> Result<()> {
    let ragged = lengths()?;
    in_every_order(|| {
        for (columns, taps) in [(1, 1), (5, 3), (24, 3), (7, 11), (264, 5)] {
            for dtype in STORED {
                compare_unfolded(columns, taps, &ragged, dtype)?;
            }
        }
        Ok(())
    })
}

/// dx as a plain implementation has it: a product of each tap alone, stored, and their sum.
fn naive(
    dy: &Tensor,
    weight: &Tensor,
    groups: usize,
    ragged: &Ragged,
    dtype: DType,
) -> Result<Tensor> {
    let taps = weight.dim(2)?;
    let shape = (ragged.tokens(), weight.dim(1)? * groups);
    let mut sum = Tensor::zeros(shape, DType::F64, &Device::Cpu)?;
    for tap in Tensor::eye(taps, DType::F64, &Device::Cpu)?.chunk(taps, 0)? {
        let alone = backward_input(dy, &weight.broadcast_mul(&tap)?, groups, ragged)?;
        sum = wide(&rounded(&(sum + wide(&rounded(&alone, dtype)?)?)?, dtype)?)?;
    }
    Ok(sum)
}

fn compare(
    (inputs, outputs, taps, groups): (usize, usize, usize, usize),
    ragged: &Ragged,
    dtype: DType,
) -> Result<()> {
    let t = ragged.tokens();
    let x = rounded(&random(&[t, inputs], 1)?, dtype)?;
    let weight = rounded(&random(&[outputs, inputs / groups, taps], 2)?, dtype)?;
    let dy = rounded(&random(&[t, outputs], 3)?, dtype)?;
    let shape = Shape::of(&weight, groups)?;
    let (wide_x, wide_weight, wide_dy) = (wide(&x)?, wide(&weight)?, wide(&dy)?);

    // Sums of at most 116 products below 1, each addition off by 6e-8 of a partial sum.
    let arithmetic = 1e-5;
    let bias = rounded(&random(&[outputs], 4)?, DType::F32)?;
    for bias in [None, Some(&bias)] {
        let y = device::forward(&x, &weight, bias, shape, ragged)?;
        let laid = bias.map(|bias| wide(&rounded(bias, dtype)?)).transpose()?;
        let exact = forward(&wide_x, &wide_weight, laid.as_ref(), groups, ragged)?;
        check("y", &y, &exact, arithmetic)?;
    }
    let start = rounded(&random(weight.dims(), 5)?, DType::F32)?;
    let (dw, exact) = (start.copy()?, wide(&start)?);
    device::backward_weight(&dy, &x, &dw, shape, ragged)?;
    backward_parameters(&wide_dy, &wide_x, groups, ragged, Some(&exact), None)?;
    check("dw", &dw, &exact, arithmetic)?;
    let dx = device::backward_input(&dy, &weight, shape, ragged)?;
    let exact = backward_input(&wide_dy, &wide_weight, groups, ragged)?;
    let naive = naive(&wide_dy, &wide_weight, groups, ragged, dtype)?;
    check_against("dx", &dx, &exact, &naive, 4e-6)
}

#[test]
fn host_convolution_matches_the_cpu() -> Result<()> {
    let ragged = lengths()?;
    in_every_order(|| {
        for shape in [(5, 7, 1, 1), (24, 17, 3, 1), (6, 9, 5, 3), (4, 4, 11, 4)] {
            for dtype in STORED {
                compare(shape, &ragged, dtype)?;
            }
        }
        Ok(())
    })
}
