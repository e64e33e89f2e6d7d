//! Disentangled attention (He et al. 2021): scores by content, and by content against relative
//! position in both directions.
//!
//! ```text
//! q, k, v, o [T, h·d]     lse [h, T]     PK, PQ [positions.rows(), h·d]     per sequence and head:
//! S_ij = scale·(q_i·k_j + q_i·PK[slot(i-j)] + k_j·PQ[slot(i-j)])
//! P = softmax(S)    o = drop(P)·v    lse_i = log Σ_j e^(S_ij)
//!
//! P recomputed as e^(S - lse),  D_i = Σ do_i·o_i,  g = scale·P ∘ (drop'(do·vᵀ) - D)
//! dq_i = Σ_j g_ij (k_j + PK[slot])     dPK[r] = Σ_{slot(i-j) = r} g_ij q_i
//! dk_j = Σ_i g_ij (q_i + PQ[slot])     dPQ[r] = Σ_{slot(i-j) = r} g_ij k_j     dv = drop(P)ᵀ·do
//! ```
//!
//! PK belongs to content-to-position, PQ to position-to-content; a model may lack either. Both use the
//! same slot because buckets are odd in the distance. Dropout is keyed by (sample, head, i, j).

pub(crate) mod check;
mod cpu;
#[cfg(device)]
mod device;
mod positions;
#[cfg(test)]
mod test;

use candle_core::{Result, Tensor, bail};

use crate::common::{Dropout, Ragged, expect_shape, run};

pub use positions::Positions;

/// What does not change between forward and backward.
#[derive(Clone, Copy)]
pub struct Disentangled<'a> {
    /// Where each sequence is.
    pub ragged: &'a Ragged,
    /// Number of heads, h; it divides the width of q.
    pub heads: usize,
    /// Factor on the sum of the scores.
    pub scale: f64,
    /// Dropout on the probabilities.
    pub dropout: Option<&'a Dropout>,
    /// Which row of PK and PQ each distance reads.
    pub positions: &'a Positions,
}

/// `(o [T, h·d], lse [h, T])`. `pk` and `pq` hold the rows [`Positions::rows`] of the projected
/// relative table. The kernels take heads of up to 64 in bf16; their lse is f32.
///
/// # Errors
/// If the shapes do not fit, a sequence is longer than `positions` covers, or on a device without an
/// implementation.
pub fn forward(
    op: Disentangled<'_>,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    pk: Option<&Tensor>,
    pq: Option<&Tensor>,
) -> Result<(Tensor, Tensor)> {
    check(op, q, &[k, v], [pk, pq])?;
    run!("disentangled attention", q, forward(op, [q, k, v], pk, pq))
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
    /// Keys of the relative positions (content-to-position).
    pub pk: Option<Tensor>,
    /// Queries of the relative positions (position-to-content).
    pub pq: Option<Tensor>,
    /// Output `[T, h·d]`.
    pub o: Tensor,
    /// Log-sum-exp of each score row, `[h, T]`.
    pub lse: Tensor,
}

/// What [`backward`] returns, each of the shape and dtype of what it is the gradient of.
pub struct Gradients {
    /// Of the queries.
    pub q: Tensor,
    /// Of the keys.
    pub k: Tensor,
    /// Of the values.
    pub v: Tensor,
    /// Of the positions' keys, if there are any and it was asked for.
    pub pk: Option<Tensor>,
    /// Of the positions' queries, likewise.
    pub pq: Option<Tensor>,
}

/// All gradients. Without `position_gradients` (frozen projections and table) those of PK and PQ are
/// not computed at all.
///
/// # Errors
/// As [`forward`].
pub fn backward(
    op: Disentangled<'_>,
    saved: &Saved,
    d_o: &Tensor,
    position_gradients: bool,
) -> Result<Gradients> {
    let Saved { q, k, v, pk, pq, o, lse } = saved;
    check(op, q, &[k, v, o, d_o], [pk.as_ref(), pq.as_ref()])?;
    expect_shape("disentangled attention", "lse", lse, &[op.heads, op.ragged.tokens()])?;
    run!("disentangled attention", q, backward(op, saved, d_o, position_gradients))
}

fn check(
    op: Disentangled<'_>,
    q: &Tensor,
    others: &[&Tensor],
    tables: [Option<&Tensor>; 2],
) -> Result<()> {
    let (t, width) = q.dims2()?;
    if t != op.ragged.tokens() || op.heads == 0 || width % op.heads != 0 {
        bail!(
            "disentangled attention: q {:?} for {} tokens and {} heads",
            q.dims(),
            op.ragged.tokens(),
            op.heads
        );
    }
    let longest = longest(op.ragged);
    if longest > op.positions.max_len() {
        bail!(
            "disentangled attention: a sequence of {longest} tokens, but positions cover {}",
            op.positions.max_len()
        );
    }
    let table = [op.positions.rows().len(), width];
    for tensor in tables.into_iter().flatten() {
        expect_shape("disentangled attention", "PK or PQ", tensor, &table)?;
    }
    others
        .iter()
        .try_for_each(|other| expect_shape("disentangled attention", "an operand", other, q.dims()))
}

/// Tokens of the longest sequence; 0 in an empty batch.
fn longest(ragged: &Ragged) -> usize {
    (0..ragged.sequences()).map(|i| ragged.range(i).len()).max().unwrap_or(0)
}
