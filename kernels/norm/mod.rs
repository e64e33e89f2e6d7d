//! Bias + dropout + residual + LayerNorm, the junction of every post-LN encoder block.
//!
//! ```text
//! z = drop(x + b) + r                       x, r, z, y [T, H]   b, γ, β [H]
//! y = γ·ẑ + β,  ẑ = (z - mean) · rstd       rstd = 1 / √(var + eps)
//!
//! g = dy·γ                                  dγ += Σ_t dy·ẑ      dβ += Σ_t dy
//! dz = rstd · (g - mean(g) - ẑ·mean(g·ẑ))   dr = dz   dx = drop'(dz)   db += Σ_t dx
//! ```
//!
//! The variance takes a second pass over the row (in cache): E(z²) - mean² would cancel.
//! Saved are `z`, `mean` and `rstd`. Source: Ba, Kiros & Hinton 2016.

mod cpu;
#[cfg(test)]
mod test;

use candle_core::{Device, Result, Tensor, bail};

use crate::common::{Dropout, RowIds, by_dtype, expect_shape};

/// The scale and shift of a LayerNorm, and what is added to the variance.
#[derive(Clone, Copy)]
pub struct LayerNorm<'a> {
    /// Scale `[H]`.
    pub gamma: &'a Tensor,
    /// Shift `[H]`.
    pub beta: &'a Tensor,
    /// Added to the variance.
    pub eps: f64,
}

/// What is added and dropped before the norm. `Default` is a plain LayerNorm.
#[derive(Clone, Copy, Default)]
pub struct Junction<'a> {
    /// Bias `[H]` of the linear that made `x`.
    pub bias: Option<&'a Tensor>,
    /// Dropout after the bias, with the keys of the rows.
    pub dropout: Option<(&'a Dropout, &'a RowIds)>,
    /// Residual `[T, H]`.
    pub residual: Option<&'a Tensor>,
}

/// Where gradients of the parameters are added.
#[derive(Clone, Copy)]
pub struct Gradients<'a> {
    /// Of the scale, `[H]`.
    pub gamma: &'a Tensor,
    /// Of the shift, `[H]`.
    pub beta: &'a Tensor,
    /// Of the junction's bias, `[H]`, if it has one.
    pub bias: Option<&'a Tensor>,
}

/// What backward needs.
#[derive(Clone)]
pub struct Saved {
    z: Tensor,
    /// `[T, 2]`: mean and rstd of each row.
    moments: Tensor,
}

/// `(y, saved)`.
///
/// # Errors
/// If the shapes do not fit, or on a device without an implementation.
pub fn forward(x: &Tensor, junction: Junction<'_>, norm: LayerNorm<'_>) -> Result<(Tensor, Saved)> {
    check(x, junction, norm)?;
    match x.device() {
        Device::Cpu => by_dtype!("norm", x, (cpu::forward)(x, junction, norm)),
        other => bail!("norm: no implementation for {other:?}"),
    }
}

/// `(dx, dresidual)`; the two share memory where no dropout sets them apart. Only the dropout of
/// `junction` is read.
///
/// # Errors
/// As [`forward`].
pub fn backward(
    dy: &Tensor,
    saved: &Saved,
    junction: Junction<'_>,
    norm: LayerNorm<'_>,
    gradients: Option<Gradients<'_>>,
) -> Result<(Tensor, Tensor)> {
    check(&saved.z, junction, norm)?;
    expect_shape("norm", "dy", dy, saved.z.dims())?;
    match dy.device() {
        Device::Cpu => by_dtype!("norm", dy, (cpu::backward)(dy, saved, junction, norm, gradients)),
        other => bail!("norm: no implementation for {other:?}"),
    }
}

fn check(x: &Tensor, junction: Junction<'_>, norm: LayerNorm<'_>) -> Result<()> {
    let (t, h) = x.dims2()?;
    expect_shape("norm", "gamma", norm.gamma, &[h])?;
    expect_shape("norm", "beta", norm.beta, &[h])?;
    if let Some(bias) = junction.bias {
        expect_shape("norm", "bias", bias, &[h])?;
    }
    if let Some(residual) = junction.residual {
        expect_shape("norm", "residual", residual, &[t, h])?;
    }
    if let Some((_, rows)) = junction.dropout
        && rows.len() != t
    {
        bail!("norm: {} row ids for {t} rows", rows.len());
    }
    Ok(())
}
