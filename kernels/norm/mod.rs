//! Bias + dropout + residual + LayerNorm, the junction between the parts of every encoder block.
//!
//! ```text
//! z = drop(x + b) + r                       x, r, z, y [T, H]   b, γ, β [H]
//! y = γ·ẑ + β,  ẑ = (z - mean) · rstd       rstd = 1 / √(var + eps)
//!
//! g = dy·γ                                  dγ += Σ_t dy·ẑ      dβ += Σ_t dy
//! dz' = rstd · (g - mean(g) - ẑ·mean(g·ẑ)) + dz
//! dr = dz'   dx = drop'(dz')                db += Σ_t dx
//! ```
//!
//! Post-LN blocks pass on `y` alone. Pre-LN blocks also carry `z` past the norm ([`Saved::z`]), and
//! its gradient comes back as `dz`; where a block ends before the norm, [`add`] is the junction
//! without one.
//!
//! The variance takes a second pass over the row (in cache): E(z²) - mean² would cancel.
//! Saved are `z`, `mean` and `rstd`. Source: Ba, Kiros & Hinton 2016.

pub(crate) mod check;
mod cpu;
#[cfg(device)]
mod device;
#[cfg(test)]
mod test;

use candle_core::{Result, Tensor, bail};

use crate::{
    common::{Dropout, RowIds, expect_shape, run},
    dropout, linear,
};

/// The scale and shift of a LayerNorm, and what is added to the variance.
#[derive(Clone, Copy)]
pub struct LayerNorm<'a> {
    /// Scale `[H]`.
    pub gamma: &'a Tensor,
    /// Shift `[H]`, if the norm has one.
    pub beta: Option<&'a Tensor>,
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
    /// Of the shift, `[H]`, if it has one that trains.
    pub beta: Option<&'a Tensor>,
    /// Of the junction's bias, `[H]`, if it has one that trains.
    pub bias: Option<&'a Tensor>,
}

/// What backward needs.
#[derive(Clone)]
pub struct Saved {
    z: Tensor,
    /// `[T, 2]`: mean and rstd of each row.
    moments: Tensor,
}

impl Saved {
    /// What was normalised, `drop(x + b) + r`, `[T, H]`: the residual stream of a pre-LN block. Its
    /// gradient, apart from that through the norm, is `dz` of [`backward`].
    pub fn z(&self) -> &Tensor {
        &self.z
    }
}

/// `(y, saved)`.
///
/// # Errors
/// If the shapes do not fit, or on a device without an implementation.
pub fn forward(x: &Tensor, junction: Junction<'_>, norm: LayerNorm<'_>) -> Result<(Tensor, Saved)> {
    check_junction(x, junction)?;
    check_norm(x, norm)?;
    run!("norm", x, forward(x, junction, norm))
}

/// `(dx, dresidual)`; the two share memory where no dropout sets them apart. `dz [T, H]` is what
/// reaches [`Saved::z`] past the norm, if anything does. Only the dropout of `junction` is read.
///
/// # Errors
/// As [`forward`].
pub fn backward(
    dy: &Tensor,
    saved: &Saved,
    dz: Option<&Tensor>,
    junction: Junction<'_>,
    norm: LayerNorm<'_>,
    gradients: Option<Gradients<'_>>,
) -> Result<(Tensor, Tensor)> {
    check_junction(&saved.z, junction)?;
    check_norm(&saved.z, norm)?;
    expect_shape("norm", "dy", dy, saved.z.dims())?;
    if let Some(dz) = dz {
        expect_shape("norm", "dz", dz, saved.z.dims())?;
    }
    run!("norm", dy, backward(dy, saved, dz, junction, norm, gradients))
}

/// The junction without a norm: `z = drop(x + b) + r`, `[T, H]`, where a pre-LN block ends.
///
/// # Errors
/// As [`forward`].
pub fn add(x: &Tensor, junction: Junction<'_>) -> Result<Tensor> {
    check_junction(x, junction)?;
    run!("norm", x, add(x, junction))
}

/// `dx` of [`add`]; adds its column sums to `bias_grad` when given. The residual's gradient is `dz`
/// itself, and without dropout `dx` shares its memory. Only the dropout of `junction` is read.
///
/// # Errors
/// As [`forward`].
pub fn add_backward(
    dz: &Tensor,
    junction: Junction<'_>,
    bias_grad: Option<&Tensor>,
) -> Result<Tensor> {
    check_junction(dz, junction)?;
    #[cfg(device)]
    if crate::common::device::takes(dz.device(), dz.dtype()) {
        return device::add_backward(dz, junction.dropout, bias_grad);
    }
    let dx = match junction.dropout {
        Some((dropout, rows)) => dropout::apply(dz, Some(dropout), rows)?,
        None => dz.clone(),
    };
    if let Some(bias_grad) = bias_grad {
        linear::backward_bias(&dx, bias_grad)?;
    }
    Ok(dx)
}

fn check_norm(x: &Tensor, norm: LayerNorm<'_>) -> Result<()> {
    let (_, h) = x.dims2()?;
    expect_shape("norm", "gamma", norm.gamma, &[h])?;
    norm.beta.map_or(Ok(()), |beta| expect_shape("norm", "beta", beta, &[h]))
}

fn check_junction(x: &Tensor, junction: Junction<'_>) -> Result<()> {
    let (t, h) = x.dims2()?;
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
