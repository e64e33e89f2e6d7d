//! Linear: `y = x·Wᵀ + b`, with gradients accumulated in place.
//!
//! ```text
//! x [T, K]   W [N, K]   b [N]   y [T, N]
//! dx  = dy·W          dW += dyᵀ·x          db += Σ_t dy
//! ```
//!
//! W is stored as PyTorch stores it. Sums over T accumulate into gradient memory (GEMM with
//! beta = 1), so micro-batches need no buffer of their own.
//!
//! On a device the products are cuBLAS's; the bias is laid under y first, db is summed by parts, in f32.
//! `dx +=` in bf16 sums in f32 and rounds what it stores each time: after 2 products dx is 1.2 times as far
//! off as rounded once, after 3 (queries, keys, values) 1.4, after 24 it would be 3.4, after 48 5.1 (root
//! mean square over terms alike in size). Sums of more than a few belong in f32.

pub(crate) mod check;
mod cpu;
#[cfg(device)]
mod device;
pub(crate) use cpu::{View, add, add_partials, gemm};
#[cfg(device)]
pub(crate) use device::with_bias;
#[cfg(test)]
mod test;

use candle_core::{Result, Tensor, bail};

use crate::common::{expect_shape, run};

/// `x·Wᵀ + b`: `[T, K]` by `[N, K]` gives `[T, N]`. Without `bias` the sum starts at zero.
///
/// # Errors
/// If the shapes do not fit, or on a device without an implementation.
pub fn forward(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let (_, k) = x.dims2()?;
    let (n, wk) = weight.dims2()?;
    if wk != k {
        bail!("linear: x {:?} does not fit weight {:?}", x.dims(), weight.dims());
    }
    if let Some(bias) = bias {
        expect_shape("linear", "bias", bias, &[n])?;
    }
    run!("linear", x, forward(x, weight, bias))
}

/// `y += x·Wᵀ`: what a layer with a second, narrower weight beside its own needs (LoRA).
///
/// # Errors
/// As [`forward`].
pub fn forward_into(x: &Tensor, weight: &Tensor, y: &Tensor) -> Result<()> {
    let ((rows, k), (n, wk)) = (x.dims2()?, weight.dims2()?);
    if wk != k {
        bail!("linear: x {:?} does not fit weight {:?}", x.dims(), weight.dims());
    }
    expect_shape("linear", "y", y, &[rows, n])?;
    run!("linear", x, forward_into(x, weight, y))
}

/// `dy·W`: the gradient with respect to the input, `[T, K]`.
///
/// # Errors
/// As [`forward`].
pub fn backward_input(dy: &Tensor, weight: &Tensor) -> Result<Tensor> {
    check_input(dy, weight)?;
    run!("linear", dy, backward_input(dy, weight))
}

/// `dx += dy·W`, into an existing gradient: what a tensor read by several linears needs.
///
/// # Errors
/// As [`forward`].
pub fn backward_input_into(dy: &Tensor, weight: &Tensor, dx: &Tensor) -> Result<()> {
    let (rows, k) = check_input(dy, weight)?;
    expect_shape("linear", "dx", dx, &[rows, k])?;
    run!("linear", dy, backward_input_into(dy, weight, dx))
}

/// `dW += dyᵀ·x`.
///
/// # Errors
/// As [`forward`].
pub fn backward_weight(dy: &Tensor, x: &Tensor, weight_grad: &Tensor) -> Result<()> {
    let (rows, n) = dy.dims2()?;
    let (x_rows, k) = x.dims2()?;
    if rows != x_rows {
        bail!("linear: dy {:?} does not fit x {:?}", dy.dims(), x.dims());
    }
    expect_shape("linear", "weight gradient", weight_grad, &[n, k])?;
    run!("linear", dy, backward_weight(dy, x, weight_grad))
}

/// `db += Σ_t dy`.
///
/// # Errors
/// As [`forward`].
pub fn backward_bias(dy: &Tensor, bias_grad: &Tensor) -> Result<()> {
    let (_, n) = dy.dims2()?;
    expect_shape("linear", "bias gradient", bias_grad, &[n])?;
    run!("linear", dy, backward_bias(dy, bias_grad))
}

fn check_input(dy: &Tensor, weight: &Tensor) -> Result<(usize, usize)> {
    let (rows, n) = dy.dims2()?;
    let (wn, k) = weight.dims2()?;
    if wn != n {
        bail!("linear: dy {:?} does not fit weight {:?}", dy.dims(), weight.dims());
    }
    Ok((rows, k))
}
