//! Bias + activation: `y = act(h + b)`, elementwise.
//!
//! ```text
//! h, y [T, N]   b [N]          dh = dy · act'(h + b)       db += Σ_t dh
//! gelu (erf)   u·Φ(u),  Φ(u) = (1 + erf(u/√2)) / 2         Hendrycks & Gimpel 2016
//! gelu (tanh)  u/2 · (1 + tanh(√(2/π)·(u + 0.044715 u³)))
//! ```
//!
//! Saved for backward is `h`, before the bias: the matrix product writes it anyway.

mod cpu;
#[cfg(test)]
mod test;

use candle_core::{Device, Result, Tensor, bail};

use crate::common::{by_dtype, expect_shape};

/// The activation functions of the encoders.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// GELU by the error function (`gelu`).
    Gelu,
    /// GELU by tanh (`gelu_new`, `gelu_pytorch_tanh`).
    GeluTanh,
    /// max(u, 0).
    Relu,
    /// Hyperbolic tangent.
    Tanh,
}

/// `act(h + bias)`, `[T, N]`.
///
/// # Errors
/// If the shapes do not fit, or on a device without an implementation.
pub fn forward(h: &Tensor, bias: &Tensor, activation: Activation) -> Result<Tensor> {
    expect_shape("activation", "bias", bias, &[h.dims2()?.1])?;
    match h.device() {
        Device::Cpu => by_dtype!("activation", h, (cpu::forward)(h, bias, activation)),
        other => bail!("activation: no implementation for {other:?}"),
    }
}

/// `dh`; adds its column sums to `bias_grad` when given.
///
/// # Errors
/// As [`forward`].
pub fn backward(
    dy: &Tensor,
    h: &Tensor,
    bias: &Tensor,
    activation: Activation,
    bias_grad: Option<&Tensor>,
) -> Result<Tensor> {
    expect_shape("activation", "bias", bias, &[h.dims2()?.1])?;
    expect_shape("activation", "dy", dy, h.dims())?;
    match h.device() {
        Device::Cpu => {
            by_dtype!("activation", h, (cpu::backward)(dy, h, bias, activation, bias_grad))
        }
        other => bail!("activation: no implementation for {other:?}"),
    }
}
