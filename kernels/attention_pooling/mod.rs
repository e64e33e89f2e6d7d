//! Attention pooling: one row per sequence, a mean of its tokens weighted by how much each counts.
//!
//! ```text
//! x, dx [T, H]   u, du [T, A]   v [A]   a [T]   y, dy [B, H]     sequence s, whose rows are t
//! score_t = u_t·v         a = softmax of the scores over the rows of s       y_s = Σ_t a_t·x_t
//!
//! dx_t = a_t·dy_s         dscore_t = a_t·(x_t·dy_s - Σ_r a_r·x_r·dy_s)
//! du_t = dscore_t·v       dv += Σ_t dscore_t·u_t
//! ```
//!
//! u is `tanh(x·Wᵀ + b)`, by `linear` and `activation`, and v the context that its rows are compared with.
//! Saved are the weights a, f32 on a device: T numbers, and worth showing. Source: Yang et al. 2016, the
//! attention over words of a hierarchical attention network.

pub(crate) mod check;
mod cpu;
#[cfg(device)]
mod device;
#[cfg(test)]
mod test;

use candle_core::{Result, Tensor};

use crate::common::{Ragged, expect_shape, run};

const OP: &str = "attention_pooling";

/// What is pooled, and by what.
#[derive(Clone, Copy, Debug)]
pub struct Operands<'a> {
    /// `[T, H]`.
    pub x: &'a Tensor,
    /// `[T, A]`: of each row what is compared with the context.
    pub u: &'a Tensor,
    /// `[A]`, the context. A parameter: f32 on a device.
    pub v: &'a Tensor,
}

/// The gradients of what was pooled.
#[derive(Debug)]
pub struct Gradients {
    /// `[T, H]`.
    pub x: Tensor,
    /// `[T, A]`.
    pub u: Tensor,
}

/// `(y, a)`: `y [B, H]` and the weights `a [T]`, which add up to 1 in each sequence and which backward needs.
///
/// # Errors
/// If the shapes do not fit, or on a device without an implementation.
pub fn forward(operands: Operands<'_>, ragged: &Ragged) -> Result<(Tensor, Tensor)> {
    let Operands { x, u, v } = operands;
    expect_shape(OP, "x", x, &[ragged.tokens(), x.dims2()?.1])?;
    let a = weights(u, v, ragged)?;
    let y = run!("attention_pooling", x, pool(x, &a, ragged))?;
    Ok((y, a))
}

/// The weights alone, `a [T]`: what each row of `u` counts in its sequence.
///
/// # Errors
/// As [`forward`].
pub fn weights(u: &Tensor, v: &Tensor, ragged: &Ragged) -> Result<Tensor> {
    expect_shape(OP, "u", u, &[ragged.tokens(), u.dims2()?.1])?;
    expect_shape(OP, "v", v, &u.dims()[1..])?;
    run!("attention_pooling", u, weights(u, v, ragged))
}

/// The gradients, from `dy [B, H]` and the weights `a` of [`forward`]; adds that of `v` to `v_grad [A]` when
/// given.
///
/// # Errors
/// As [`forward`].
pub fn backward(
    operands: Operands<'_>,
    a: &Tensor,
    dy: &Tensor,
    ragged: &Ragged,
    v_grad: Option<&Tensor>,
) -> Result<Gradients> {
    let Operands { x, u, v } = operands;
    let (t, h) = (ragged.tokens(), x.dims2()?.1);
    expect_shape(OP, "x", x, &[t, h])?;
    expect_shape(OP, "u", u, &[t, u.dims2()?.1])?;
    expect_shape(OP, "v", v, &u.dims()[1..])?;
    expect_shape(OP, "the weights", a, &[t])?;
    expect_shape(OP, "dy", dy, &[ragged.sequences(), h])?;
    if let Some(v_grad) = v_grad {
        expect_shape(OP, "the gradient of v", v_grad, v.dims())?;
    }
    run!("attention_pooling", dy, backward(operands, a, dy, ragged, v_grad))
}
