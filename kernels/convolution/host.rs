//! The kernels of op.cu, run on the host, against the CPU implementation in f64.

use candle_core::{DType, Result};
use half::bf16;

use super::*;
use crate::{
    common::host_run::{
        Address, Buffer, Kernel, Storage, check, check_against, in_every_order, kernels, launch,
        rounded,
    },
    testing::{assert_close, random, zeros},
};

#[repr(C)]
struct Windows {
    from: Address,
    to: Address,
    position: Address,
    rows: i32,
    columns: i32,
    taps: i32,
}

kernels!(
    Windows: host_convolution_unfold_f32, host_convolution_unfold_bf16,
        host_convolution_fold_f32, host_convolution_fold_bf16;
);

/// `[T, to]` from `[T, _]`, by blocks of so many columns.
fn run<S: Storage>(
    kernel: Kernel<Windows>,
    from: &Tensor,
    (to, block): (usize, usize),
    (columns, taps): (usize, usize),
    ragged: &Ragged,
) -> Result<Buffer<S>> {
    let rows = ragged.tokens();
    let (from, out) = (Buffer::<S>::tensor(from)?, Buffer::poisoned(rows * to));
    let position = Buffer::of(&ragged.token_rows().position);
    let parameters = Windows {
        from: from.address(),
        to: out.address(),
        position: position.address(),
        rows: rows as i32,
        columns: columns as i32,
        taps: taps as i32,
    };
    launch(kernel, [rows, to.div_ceil(block), 1], 0, &parameters);
    Ok(out)
}

/// `u [T, K·k]` from `x [T, K]`.
fn unfold<S: Storage>(x: &Tensor, taps: usize, ragged: &Ragged) -> Result<Buffer<S>> {
    let kernel: Kernel<Windows> =
        if S::BF16 { host_convolution_unfold_bf16 } else { host_convolution_unfold_f32 };
    let columns = x.dim(1)?;
    run(kernel, x, (columns * taps, 8 * 128), (columns, taps), ragged)
}

/// `dx [T, K]` from `du [T, K·k]`.
fn fold<S: Storage>(du: &Tensor, taps: usize, ragged: &Ragged) -> Result<Buffer<S>> {
    let kernel: Kernel<Windows> =
        if S::BF16 { host_convolution_fold_bf16 } else { host_convolution_fold_f32 };
    let columns = du.dim(1)? / taps;
    run(kernel, du, (columns, 128), (columns, taps), ragged)
}

/// Lengths below every kernel's reach and above it.
fn lengths() -> Result<Ragged> {
    Ragged::new(&[1, 97, 2, 13, 3], &[5, 4, 3, 2, 1])
}

/// Unfolding is a convolution itself: every channel a group, of k outputs, and output j sees tap j.
fn compare<S: Storage>(columns: usize, taps: usize, ragged: &Ragged) -> Result<()> {
    let (t, width) = (ragged.tokens(), columns * taps);
    let identity = Tensor::eye(taps, DType::F64, &Device::Cpu)?.unsqueeze(1)?;
    let identity = identity.repeat((columns, 1, 1))?;
    let x = rounded::<S>(&random(&[t, columns], 1)?)?;
    // Elements are moved, so they are what they were.
    let u = unfold::<S>(&x, taps, ragged)?;
    check("u", &u, &forward(&x, &identity, None, columns, ragged)?, 0.0)?;
    let du = rounded::<S>(&random(&[t, width], 2)?)?;
    let dx = fold::<S>(&du, taps, ragged)?;
    // Sums of at most 11 terms below 1, each addition off by 6e-8 of a partial sum below 11.
    check("dx", &dx, &backward_input(&du, &identity, columns, ragged)?, 4e-6)
}

#[test]
fn host_unfold_and_fold_match_the_cpu() -> Result<()> {
    let ragged = lengths()?;
    in_every_order(|| {
        for (columns, taps) in [(1, 1), (5, 3), (24, 3), (7, 11), (264, 5)] {
            compare::<f32>(columns, taps, &ragged)?;
            compare::<bf16>(columns, taps, &ragged)?;
        }
        Ok(())
    })
}

/// `product` of each group's part of both along its dimension, side by side along `along`.
fn by_group(
    [a, b]: [(&Tensor, usize); 2],
    groups: usize,
    along: usize,
    product: impl Fn(&Tensor, &Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    let parts =
        (0..groups).map(|g| product(&a.0.chunk(groups, a.1)?[g], &b.0.chunk(groups, b.1)?[g]));
    Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, along)
}

/// dx as a plain implementation in `S` has it: a product of each tap alone, stored, and their sum.
fn naive<S: Storage>(
    dy: &Tensor,
    weight: &Tensor,
    groups: usize,
    ragged: &Ragged,
) -> Result<Vec<f64>> {
    let taps = weight.dim(2)?;
    let mut sum = vec![0.0; ragged.tokens() * weight.dim(1)? * groups];
    for tap in Tensor::eye(taps, DType::F64, &Device::Cpu)?.chunk(taps, 0)? {
        let alone = backward_input(dy, &weight.broadcast_mul(&tap)?, groups, ragged)?;
        for (sum, part) in sum.iter_mut().zip(alone.flatten_all()?.to_vec1::<f64>()?) {
            *sum = S::of(*sum + S::of(part).wide()).wide();
        }
    }
    Ok(sum)
}

/// The whole op as a device runs it, the products in f64 with the weight as it is stored.
fn compare_products<S: Storage>(
    (inputs, outputs, taps, groups): (usize, usize, usize, usize),
    ragged: &Ragged,
) -> Result<()> {
    let t = ragged.tokens();
    let x = rounded::<S>(&random(&[t, inputs], 1)?)?;
    let weight = rounded::<S>(&random(&[outputs, inputs / groups, taps], 2)?)?;
    let dy = rounded::<S>(&random(&[t, outputs], 3)?)?;
    let w = weight.flatten_from(1)?;
    let u = unfold::<S>(&x, taps, ragged)?.wide();
    let u = Tensor::from_vec(u, (t, inputs * taps), &Device::Cpu)?;

    let y = by_group([(&u, 1), (&w, 0)], groups, 1, |u, w| u.matmul(&w.t()?))?;
    assert_close("y", &y, &forward(&x, &weight, None, groups, ragged)?, 1e-13)?;
    let dw = by_group([(&dy, 1), (&u, 1)], groups, 0, |dy, u| dy.t()?.matmul(u))?;
    let exact = zeros(&weight)?;
    backward_parameters(&dy, &x, groups, ragged, Some(&exact), None)?;
    assert_close("dw", &dw.reshape(weight.dims())?, &exact, 1e-13)?;
    let du = by_group([(&dy, 1), (&w, 0)], groups, 1, Tensor::matmul)?;
    let dx = fold::<S>(&du, taps, ragged)?;
    let exact = backward_input(&dy, &weight, groups, ragged)?.flatten_all()?.to_vec1::<f64>()?;
    check_against("dx", &dx, &exact, &naive::<S>(&dy, &weight, groups, ragged)?)
}

#[test]
fn host_products_of_unfolded_rows_are_the_convolution() -> Result<()> {
    let ragged = lengths()?;
    for shape in [(5, 7, 1, 1), (24, 17, 3, 1), (6, 9, 5, 3), (4, 4, 11, 4)] {
        compare_products::<f32>(shape, &ragged)?;
        compare_products::<bf16>(shape, &ragged)?;
    }
    Ok(())
}
