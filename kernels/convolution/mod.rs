//! Convolution over the tokens of each sequence, which beyond its ends are zero.
//!
//! ```text
//! x [T, K]   W [N, K/groups, k]   b [N]   y [T, N]     k odd, within each sequence:
//! y_t = b + Σ_j W_j·x_(t + j - (k-1)/2)                j = 0..k
//! dx_t = Σ_j W_jᵀ·dy_(t - j + (k-1)/2)
//! dW_j += Σ_t dy_t·x_(t + j - (k-1)/2)ᵀ                db += Σ_t dy
//! ```
//!
//! `conv1d` of PyTorch with padding (k-1)/2 and its layout of W; output n of group g reads the inputs
//! of group g. On the CPU each tap is one matrix product for the whole batch, over views of the rows
//! that are shifted against each other.
//!
//! On a device a group g is one product, for what each token's taps see is laid side by side first:
//!
//! ```text
//! u [T, K·k]    u_(t, c·k + j) = x_(t + j - (k-1)/2, c)       W as [N, K/groups·k]
//! y_g = u_g·W_gᵀ     du_g = dy_g·W_g     dW_g += dy_gᵀ·u_g    u_g columns, W_g rows of group g
//! dx_(t, c) = Σ_j du_(t - j + (k-1)/2, c·k + j)
//! ```
//!
//! So W and dW are used as they are stored, and dW accumulates inside its product. The price is u, or
//! du: 75 MB for DeBERTa-v2-xlarge (K 1,536, k 3) at 8,192 tokens in bf16, while the op runs; backward
//! lays out u again. du is rounded as it is stored, so dx is a sum of k rounded parts, as it would be
//! with a product for each tap.

pub(crate) mod check;
mod cpu;
#[cfg(device)]
mod device;
#[cfg(test)]
mod test;

use candle_core::{Result, Tensor, bail};

use crate::{
    common::{Ragged, expect_shape, run},
    linear,
};

/// The sizes that the operands agree on.
#[derive(Clone, Copy)]
struct Shape {
    /// K and N.
    inputs: usize,
    outputs: usize,
    taps: usize,
    groups: usize,
}

impl Shape {
    fn of(weight: &Tensor, groups: usize) -> Result<Self> {
        let (outputs, per_group, taps) = weight.dims3()?;
        if groups == 0 || outputs % groups != 0 || taps % 2 == 0 {
            bail!(
                "convolution: weight {:?} in {groups} groups; expected [N, K/groups, k] with N a \
                 multiple of the groups and an odd k",
                weight.dims()
            );
        }
        Ok(Self { inputs: per_group * groups, outputs, taps, groups })
    }
}

/// `[T, N]` from `x [T, K]`. Without `bias` the sum starts at zero.
///
/// # Errors
/// If the shapes do not fit, k is even, or on a device without an implementation.
pub fn forward(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    groups: usize,
    ragged: &Ragged,
) -> Result<Tensor> {
    let shape = Shape::of(weight, groups)?;
    expect_shape("convolution", "x", x, &[ragged.tokens(), shape.inputs])?;
    if let Some(bias) = bias {
        expect_shape("convolution", "bias", bias, &[shape.outputs])?;
    }
    run!("convolution", x, forward(x, weight, bias, shape, ragged))
}

/// `dx [T, K]` from `dy [T, N]`.
///
/// # Errors
/// As [`forward`].
pub fn backward_input(
    dy: &Tensor,
    weight: &Tensor,
    groups: usize,
    ragged: &Ragged,
) -> Result<Tensor> {
    let shape = Shape::of(weight, groups)?;
    expect_shape("convolution", "dy", dy, &[ragged.tokens(), shape.outputs])?;
    run!("convolution", dy, backward_input(dy, weight, shape, ragged))
}

/// Adds the gradients of weight `[N, K/groups, k]` and bias `[N]`, each where it is given.
///
/// # Errors
/// As [`forward`].
pub fn backward_parameters(
    dy: &Tensor,
    x: &Tensor,
    groups: usize,
    ragged: &Ragged,
    weight_grad: Option<&Tensor>,
    bias_grad: Option<&Tensor>,
) -> Result<()> {
    if let Some(weight_grad) = weight_grad {
        let shape = Shape::of(weight_grad, groups)?;
        expect_shape("convolution", "x", x, &[ragged.tokens(), shape.inputs])?;
        expect_shape("convolution", "dy", dy, &[ragged.tokens(), shape.outputs])?;
        run!("convolution", dy, backward_weight(dy, x, weight_grad, shape, ragged))?;
    }
    bias_grad.map_or(Ok(()), |bias_grad| linear::backward_bias(dy, bias_grad))
}
