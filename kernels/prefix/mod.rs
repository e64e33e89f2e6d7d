//! Attention to keys that all sequences share (prefix tuning; Li and Liang 2021), joined to attention that
//! has run over each sequence's own keys, of whatever kind. Every query sees every one of them, also where
//! attention is causal or windowed, by its content alone.
//!
//! ```text
//! q, o, o' [T, h·d]     PK, PV [n, h·d]     lse, lse' [h, T]     per head, query i and key j of the prefix:
//! s_ij = scale·q_i·PK_j     lse'_i = log(e^lse_i + Σ_j e^s_ij)     p_ij = e^(s_ij - lse'_i)
//! o'_i = e^(lse_i - lse'_i)·o_i + Σ_j drop(p_ij)·PV_j
//!
//! D_i = Σ do_i·o'_i,  g_ij = scale·p_ij (drop'(do_i·PV_j) - D_i)
//! dq_i += Σ_j g_ij PK_j     dPK_j = Σ_i g_ij q_i     dPV_j = Σ_i drop(p_ij) do_i     sums over all T rows
//! ```
//!
//! Attention's own backward is right as it is when it is given o' and lse' for o and lse: its P = e^(S - lse')
//! and its D are then those of the softmax over all keys. Dropout is keyed by (sample, head, i, j) like
//! attention's, so it needs a site of its own.

pub(crate) mod check;
mod cpu;
#[cfg(device)]
mod device;
#[cfg(test)]
mod test;

use candle_core::{Result, Tensor, bail};

use crate::common::{Dropout, Ragged, expect_shape, run};

const OP: &str = "prefix";

/// What does not change between forward and backward.
#[derive(Clone, Copy)]
pub struct Prefix<'a> {
    /// Where each sequence is.
    pub ragged: &'a Ragged,
    /// Number of heads, h; it divides the width of q.
    pub heads: usize,
    /// Factor on q·PK; that of the scores it joins.
    pub scale: f64,
    /// Dropout on the probabilities p, at a site where nothing else is dropped.
    pub dropout: Option<&'a Dropout>,
}

/// `(o' [T, h·d], lse' [h, T])` from what attention left: `o [T, h·d]` and `lse [h, T]`. `keys` and
/// `values` are PK and PV, at least one row of them, of q's dtype. The kernels take heads of up to 64 in
/// bf16; lse is f32 there.
///
/// # Errors
/// If the shapes do not fit, or on a device without an implementation.
pub fn forward(
    prefix: Prefix<'_>,
    q: &Tensor,
    [keys, values]: [&Tensor; 2],
    [o, lse]: [&Tensor; 2],
) -> Result<(Tensor, Tensor)> {
    let saved = Saved { q, keys, values, o, lse };
    check(prefix, saved)?;
    run!("prefix", q, forward(prefix, saved))
}

/// What forward read and made.
#[derive(Clone, Copy)]
pub struct Saved<'a> {
    /// Queries `[T, h·d]`.
    pub q: &'a Tensor,
    /// Keys of the prefix, PK `[n, h·d]`.
    pub keys: &'a Tensor,
    /// Values of the prefix, PV `[n, h·d]`.
    pub values: &'a Tensor,
    /// Output over all keys, o' `[T, h·d]`.
    pub o: &'a Tensor,
    /// Log-sum-exp over all keys, lse' `[h, T]`.
    pub lse: &'a Tensor,
}

/// `(dPK, dPV)`, both `[n, h·d]`; in f32 on a device. What the prefix gives the queries is added to `dq`,
/// the gradient `[T, h·d]` that attention's backward returned, or not computed at all where there is none.
///
/// # Errors
/// As [`forward`].
pub fn backward(
    prefix: Prefix<'_>,
    saved: Saved<'_>,
    d_o: &Tensor,
    dq: Option<&Tensor>,
) -> Result<(Tensor, Tensor)> {
    check(prefix, saved)?;
    expect_shape(OP, "do", d_o, saved.q.dims())?;
    if let Some(dq) = dq {
        expect_shape(OP, "dq", dq, saved.q.dims())?;
    }
    run!("prefix", saved.q, backward(prefix, saved, d_o, dq))
}

fn check(prefix: Prefix<'_>, Saved { q, keys, values, o, lse }: Saved<'_>) -> Result<()> {
    let ((t, width), tokens) = (q.dims2()?, prefix.ragged.tokens());
    if t != tokens || prefix.heads == 0 || width % prefix.heads != 0 {
        bail!("{OP}: q {:?} for {tokens} tokens and {} heads", q.dims(), prefix.heads);
    }
    let n = keys.dim(0)?;
    if n == 0 {
        bail!("{OP}: no keys; without any there is nothing to join");
    }
    expect_shape(OP, "PK", keys, &[n, width])?;
    expect_shape(OP, "PV", values, &[n, width])?;
    expect_shape(OP, "o", o, q.dims())?;
    expect_shape(OP, "lse", lse, &[prefix.heads, t])
}
