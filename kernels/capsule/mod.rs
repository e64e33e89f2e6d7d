//! Capsules: each sequence's rows vote for J vectors of length below 1, and votes that agree count more.
//!
//! ```text
//! û, dû [T, J·D]   b, c [T, J]   s, v, dv [B, J·D]     rows t of a sequence, capsules j of D columns
//! b = 0, then R times
//!     c_t = softmax of b_t over j        s_j = Σ_t c_tj·û_tj        v_j = f·s_j,  f = |s_j| / (1 + |s_j|²)
//!     b_tj += û_tj·v_j, but not after the last
//!
//! from the last iteration to the first, dv being at first what reaches the result, db = 0
//!     ds_j = f·dv_j + f'·(s_j·dv_j)/|s_j|·s_j,  f' = (1 - |s_j|²) / (1 + |s_j|²)²        zero where s_j is
//!     dc_tj = û_tj·ds_j                  db_tj += c_tj·(dc_tj - Σ_k c_tk·dc_tk)
//!     dû_tj += c_tj·ds_j + db_tj·v_j of the iteration before, whose dv_j = Σ_t db_tj·û_tj
//! ```
//!
//! û, a row's prediction of each capsule, is a `linear`'s. Saved are the s of every iteration, `[B, R·J·D]`, f32
//! on a device; v is computed from them again, c from b, and b as û times the sum of the v before.
//!
//! s is divided by nothing, as published. It grows with the rows that agree, and |v| with it towards 1: at
//! |s| = 10 it is .99, and the gradient has a tenth left across s, 2e-3 along it. What a length says is lost
//! first, the direction stays; û that is small at the start keeps |s| near 1. Source: Sabour, Frosst & Hinton 2017.

pub(crate) mod check;
mod cpu;
#[cfg(device)]
mod device;
#[cfg(test)]
mod test;

use candle_core::{Result, Tensor, bail};

use crate::common::{Ragged, expect_shape, run};

const OP: &str = "capsule";

/// What is voted for, and how often votes are weighed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Routing {
    /// J.
    pub capsules: usize,
    /// D, columns of a capsule.
    pub size: usize,
    /// R. Of one, all votes count alike.
    pub iterations: usize,
}

impl Routing {
    /// J·D.
    pub fn columns(self) -> usize {
        self.capsules * self.size
    }
}

/// What backward needs.
#[derive(Clone, Debug)]
pub struct Saved {
    /// `[B, R·J·D]`: s of every iteration.
    sums: Tensor,
}

/// `v [B, J·D]`, from the votes `u [T, J·D]` (û above).
///
/// # Errors
/// If the shapes do not fit, or on a device without an implementation.
pub fn forward(u: &Tensor, ragged: &Ragged, routing: Routing) -> Result<(Tensor, Saved)> {
    check_votes(u, ragged, routing)?;
    let (v, sums) = run!("capsule", u, forward(u, ragged, routing))?;
    Ok((v, Saved { sums }))
}

/// `du [T, J·D]`, from `dv [B, J·D]`.
///
/// # Errors
/// As [`forward`].
pub fn backward(
    u: &Tensor,
    saved: &Saved,
    dv: &Tensor,
    ragged: &Ragged,
    routing: Routing,
) -> Result<Tensor> {
    check_votes(u, ragged, routing)?;
    let (b, columns) = (ragged.sequences(), routing.columns());
    expect_shape(OP, "the saved sums", &saved.sums, &[b, routing.iterations * columns])?;
    expect_shape(OP, "dv", dv, &[b, columns])?;
    run!("capsule", dv, backward(u, &saved.sums, dv, ragged, routing))
}

fn check_votes(u: &Tensor, ragged: &Ragged, routing: Routing) -> Result<()> {
    let Routing { capsules, size, iterations } = routing;
    if [capsules, size, iterations].contains(&0) {
        bail!("{OP}: {capsules} capsules of {size} columns by {iterations} iterations are none");
    }
    expect_shape(OP, "u", u, &[ragged.tokens(), routing.columns()])
}
