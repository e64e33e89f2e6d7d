//! Rotary positions: each pair of a head's columns is rotated by an angle that grows with the position.
//!
//! ```text
//! x, y [T, h·d], d even     per token at position p of its sequence (from 0), head and i < d/2:
//! angle = p · θ^(-2i/d)
//! y_i       = x_i · cos - x_(i+d/2) · sin
//! y_(i+d/2) = x_(i+d/2) · cos + x_i · sin
//! ```
//!
//! Pairs are half a head apart (`rotate_half` of Hugging Face), not neighbours as in the paper. Backward
//! is the rotation by the opposite angle. Source: Su et al. 2021.

pub(crate) mod check;
mod cpu;
#[cfg(device)]
mod device;
#[cfg(test)]
mod test;

use candle_core::{Result, Tensor, bail};

use crate::common::{Ragged, expect_shape, run};

/// Cosines and sines of every position and pair.
#[derive(Clone, Debug)]
pub struct Table {
    half: usize,
    /// `[positions, d/2]`, end to end. In f64: the angle of position 8,000 in f32 is off by 2e-4.
    cos: Vec<f64>,
    sin: Vec<f64>,
    /// The same rounded, as kernels take them.
    #[cfg(device)]
    rounded: [crate::common::Mirror<f32>; 2],
}

impl Table {
    /// For heads of `head_size` columns and sequences of up to `max_len` tokens; `theta` is the base
    /// of the frequencies (10,000 in the paper).
    ///
    /// # Errors
    /// If `head_size` is odd or zero, or `theta` is not a positive number.
    pub fn new(theta: f64, head_size: usize, max_len: usize) -> Result<Self> {
        if head_size == 0 || !head_size.is_multiple_of(2) {
            bail!("rotary: a head of {head_size} columns has no pairs");
        }
        if !(theta > 0.0 && theta.is_finite()) {
            bail!("rotary: theta is {theta}, expected a positive number");
        }
        let half = head_size / 2;
        let frequencies: Vec<f64> =
            (0..half).map(|i| theta.powf(-2.0 * i as f64 / head_size as f64)).collect();
        let angles = (0..max_len).flat_map(|p| frequencies.iter().map(move |f| p as f64 * f));
        let (sin, cos): (Vec<f64>, Vec<f64>) = angles.map(f64::sin_cos).unzip();
        Ok(Self {
            half,
            #[cfg(device)]
            rounded: [&cos, &sin].map(|of| of.iter().map(|x| *x as f32).collect::<Vec<_>>().into()),
            cos,
            sin,
        })
    }

    /// Longest sequence that the table serves.
    pub fn max_len(&self) -> usize {
        self.cos.len() / self.half
    }
}

/// `x [T, h·d]`, rotated.
///
/// # Errors
/// If the shapes do not fit, a sequence is longer than the table, or on a device without an
/// implementation.
pub fn forward(x: &Tensor, table: &Table, ragged: &Ragged, heads: usize) -> Result<Tensor> {
    check(x, table, ragged, heads)?;
    run!("rotary", x, forward(x, table, ragged))
}

/// `dx` from `dy [T, h·d]`: rotated back.
///
/// # Errors
/// As [`forward`].
pub fn backward(dy: &Tensor, table: &Table, ragged: &Ragged, heads: usize) -> Result<Tensor> {
    check(dy, table, ragged, heads)?;
    run!("rotary", dy, backward(dy, table, ragged))
}

fn check(x: &Tensor, table: &Table, ragged: &Ragged, heads: usize) -> Result<()> {
    expect_shape("rotary", "x", x, &[ragged.tokens(), heads * 2 * table.half])?;
    let longest = (0..ragged.sequences()).map(|i| ragged.range(i).len()).max().unwrap_or(0);
    if longest > table.max_len() {
        bail!("rotary: a sequence of {longest} tokens, but a table of {}", table.max_len());
    }
    Ok(())
}
