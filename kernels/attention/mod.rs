//! Ragged multi-head attention: every sequence attends within itself, nothing is padded.
//!
//! ```text
//! q, k, v, o [T, h·d]     lse [h, T]     scale = 1/√d     per sequence and head:
//! S = scale·q·kᵀ    P = softmax(S)    o = drop(P)·v        lse_i = log Σ_j e^(S_ij)
//!
//! P recomputed as e^(S - lse),  D_i = Σ do_i·o_i,  dS = P ∘ (drop'(do·vᵀ) - D)
//! dq = scale·dS·k    dk = scale·dSᵀ·q    dv = drop(P)ᵀ·do
//!
//! j ≤ i if causal    |i - j| ≤ w if windowed: S_ij exists for no other pair
//! ```
//!
//! Scores exist for one tile of query rows at a time (Dao et al. 2022). Dropout is keyed by (sample,
//! head, i, j). Saved are `q, k, v, o, lse`.

pub(crate) mod check;
mod cpu;
#[cfg(device)]
pub(crate) mod device;
pub(crate) mod naive;
#[cfg(test)]
mod test;

use std::ops::Range;

use candle_core::{Result, Tensor, bail};

use crate::common::{Dropout, Ragged, expect_shape, run};

/// The only size of heads that the kernels take.
pub(crate) const HEAD: usize = 64;

/// What does not change between forward and backward.
#[derive(Clone, Copy)]
pub struct Attention<'a> {
    /// Where each sequence is.
    pub ragged: &'a Ragged,
    /// Number of heads, h; it divides the width of q.
    pub heads: usize,
    /// Factor on q·k.
    pub scale: f64,
    /// Dropout on the probabilities.
    pub dropout: Option<&'a Dropout>,
    /// Which keys a query sees.
    pub span: Span,
}

/// Which keys of its own sequence a query sees. `Default` is all of them. What no query of a tile
/// sees is not computed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Span {
    /// Query i sees only keys j ≤ i.
    pub causal: bool,
    /// Query i sees only keys |i - j| ≤ this.
    pub window: Option<usize>,
}

impl Span {
    /// The keys that query `i` of a sequence of `len` tokens sees: itself at least.
    #[inline(always)]
    fn keys(self, i: usize, len: usize) -> Range<usize> {
        let reach = self.window.unwrap_or(len);
        let last = if self.causal { i } else { i.saturating_add(reach) };
        i.saturating_sub(reach)..last.saturating_add(1).min(len)
    }
}

/// `(o [T, h·d], lse [h, T])`. The kernels take heads of up to 64 in bf16; their lse is f32.
///
/// # Errors
/// If the shapes do not fit, or on a device without an implementation.
pub fn forward(
    attention: Attention<'_>,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
) -> Result<(Tensor, Tensor)> {
    check(attention, q, &[k, v])?;
    run!("attention", q, forward(attention, q, k, v))
}

/// What forward read and made.
#[derive(Clone)]
pub struct Saved {
    /// Queries `[T, h·d]`.
    pub q: Tensor,
    /// Keys `[T, h·d]`.
    pub k: Tensor,
    /// Values `[T, h·d]`.
    pub v: Tensor,
    /// Output `[T, h·d]`.
    pub o: Tensor,
    /// Log-sum-exp of each score row, `[h, T]`.
    pub lse: Tensor,
}

/// `(dq, dk, dv)`.
///
/// # Errors
/// As [`forward`].
pub fn backward(
    attention: Attention<'_>,
    saved: &Saved,
    d_o: &Tensor,
) -> Result<(Tensor, Tensor, Tensor)> {
    let Saved { q, k, v, o, lse } = saved;
    check(attention, q, &[k, v, o, d_o])?;
    expect_shape("attention", "lse", lse, &[attention.heads, attention.ragged.tokens()])?;
    run!("attention", q, backward(attention, saved, d_o))
}

fn check(attention: Attention<'_>, q: &Tensor, others: &[&Tensor]) -> Result<()> {
    let (t, width) = q.dims2()?;
    if t != attention.ragged.tokens() || attention.heads == 0 || width % attention.heads != 0 {
        bail!(
            "attention: q {:?} for {} tokens and {} heads",
            q.dims(),
            attention.ragged.tokens(),
            attention.heads
        );
    }
    others.iter().try_for_each(|other| expect_shape("attention", "an operand", other, q.dims()))
}
