//! Bias + activation, elementwise, and its gated form.
//!
//! ```text
//! h, y [T, N]   b [N]          y = act(h + b)
//! dh = dy · act'(h + b)        db += Σ_t dh
//!
//! h [T, 2N] = [input | gate]   b [2N] likewise   y [T, N] = act(input + b₁) · (gate + b₂)
//! d_input = dy · (gate + b₂) · act'(input + b₁)  d_gate = dy · act(input + b₁)
//!
//! gelu (erf)   u·Φ(u),  Φ(u) = (1 + erf(u/√2)) / 2         Hendrycks & Gimpel 2016
//! gelu (tanh)  u/2 · (1 + tanh(√(2/π)·(u + 0.044715 u³)))
//! silu         u·σ(u),  σ(u) = 1 / (1 + e^-u)
//! ```
//!
//! Gated GELU is the GeGLU of Shazeer 2020 in ModernBERT's order. Saved for backward is `h`, before
//! the bias: the matrix product writes it anyway.

pub(crate) mod check;
mod cpu;
#[cfg(device)]
mod device;
mod functions;
#[cfg(test)]
mod test;

use candle_core::{Result, Tensor, bail};

use crate::common::{expect_shape, run};

/// The activation functions of the encoders.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// GELU by the error function (`gelu`).
    Gelu,
    /// GELU by tanh (`gelu_new`, `gelu_pytorch_tanh`).
    GeluTanh,
    /// max(u, 0).
    Relu,
    /// u·σ(u) (`silu`, `swish`).
    Silu,
    /// Hyperbolic tangent.
    Tanh,
}

/// `act(h + bias)`, `[T, N]`.
///
/// # Errors
/// If the shapes do not fit, or on a device without an implementation.
pub fn forward(h: &Tensor, bias: Option<&Tensor>, activation: Activation) -> Result<Tensor> {
    check_bias(h, bias)?;
    run!("activation", h, forward(h, bias, activation))
}

/// `dh`; adds its column sums to `bias_grad` when given.
///
/// # Errors
/// As [`forward`].
pub fn backward(
    dy: &Tensor,
    h: &Tensor,
    bias: Option<&Tensor>,
    activation: Activation,
    bias_grad: Option<&Tensor>,
) -> Result<Tensor> {
    check_bias(h, bias)?;
    expect_shape("activation", "dy", dy, h.dims())?;
    run!("activation", h, backward(dy, h, bias, activation, bias_grad))
}

/// `act(input + b₁) · (gate + b₂)`, `[T, N]`, where `h [T, 2N]` and `bias [2N]` are input beside gate.
///
/// # Errors
/// If the shapes do not fit, or on a device without an implementation.
pub fn gated_forward(h: &Tensor, bias: Option<&Tensor>, activation: Activation) -> Result<Tensor> {
    gated_shape(h)?;
    check_bias(h, bias)?;
    run!("activation", h, gated_forward(h, bias, activation))
}

/// `dh [T, 2N]` from `dy [T, N]`; adds its column sums to `bias_grad [2N]` when given.
///
/// # Errors
/// As [`gated_forward`].
pub fn gated_backward(
    dy: &Tensor,
    h: &Tensor,
    bias: Option<&Tensor>,
    activation: Activation,
    bias_grad: Option<&Tensor>,
) -> Result<Tensor> {
    check_bias(h, bias)?;
    expect_shape("activation", "dy", dy, &gated_shape(h)?)?;
    run!("activation", h, gated_backward(dy, h, bias, activation, bias_grad))
}

fn check_bias(h: &Tensor, bias: Option<&Tensor>) -> Result<()> {
    let (_, n) = h.dims2()?;
    bias.map_or(Ok(()), |bias| expect_shape("activation", "bias", bias, &[n]))
}

/// `[T, N]` for h `[T, 2N]`.
fn gated_shape(h: &Tensor) -> Result<[usize; 2]> {
    let (t, both) = h.dims2()?;
    if both % 2 != 0 {
        bail!("activation: {:?} is not an input beside a gate of the same width", h.dims());
    }
    Ok([t, both / 2])
}
