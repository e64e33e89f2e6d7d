//! The products and the kernels around them against the CPU implementation in f64.

use candle_core::{DType, Result};

use super::*;
use crate::common::check::{Checker, HIDDEN, Sizes, random, wide};

/// Every function of the room at each size.
pub(crate) fn check(c: &mut Checker, sizes: Sizes) -> Result<()> {
    let sizes = match sizes {
        Sizes::Odd => &[(1, 1, 1), (97, 5, 17), (257, 3, 264), (50, 33, 24)][..],
        // The rows of a whole batch, and the sums of the feed-forward part.
        Sizes::Real => &[(4096, HIDDEN, HIDDEN), (512, 4 * HIDDEN, HIDDEN)][..],
    };
    for (t, k, n) in sizes {
        for dtype in c.stored() {
            compare(c, *t, *k, *n, dtype)?;
        }
    }
    Ok(())
}

fn compare(c: &mut Checker, t: usize, k: usize, n: usize, dtype: DType) -> Result<()> {
    c.case(format!("{t} x {k} to {n}, {dtype:?}"));
    let (x, weight) = (c.random(&[t, k], 1, dtype)?, c.random(&[n, k], 2, dtype)?);
    let (bias, dy) = (c.random(&[n], 3, DType::F32)?, c.random(&[t, n], 4, dtype)?);
    let (wide_x, wide_weight, wide_dy) = (wide(&x)?, wide(&weight)?, wide(&dy)?);
    let y = forward(&x, &weight, None)?;
    c.check("y", &y, &forward(&wide_x, &wide_weight, None)?, c.of_sums(k))?;
    let (dx, exact_dx) = (backward_input(&dy, &weight)?, backward_input(&wide_dy, &wide_weight)?);
    c.check("dx", &dx, &exact_dx, c.of_sums(n))?;

    // Added to what is there: weights' gradients in f32 whatever the rest is stored as.
    let into = c.random(&[t, n], 8, dtype)?;
    let exact = (wide(&into)? + forward(&wide_x, &wide_weight, None)?)?;
    forward_into(&x, &weight, &into)?;
    c.check("y +=", &into, &exact, c.of_sums(k))?;
    let into = c.random(&[t, k], 5, dtype)?;
    let exact = (wide(&into)? + exact_dx)?;
    backward_input_into(&dy, &weight, &into)?;
    c.check("dx +=", &into, &exact, c.of_sums(n))?;
    let dw = c.random(&[n, k], 6, DType::F32)?;
    let exact = wide(&dw)?;
    backward_weight(&dy, &x, &dw)?;
    backward_weight(&wide_dy, &wide_x, &exact)?;
    c.check("dw", &dw, &exact, c.of_sums(t))?;
    let db = c.random(&[n], 7, DType::F32)?;
    let exact = wide(&db)?;
    backward_bias(&dy, &db)?;
    backward_bias(&wide_dy, &exact)?;
    c.check("db", &db, &exact, c.of_sums(t))?;

    // The bias is rounded where it lies under y, so a product of zeros leaves exactly that.
    let laid = wide(&bias.to_dtype(dtype)?)?;
    let y = forward(&x, &c.rounded(&(random(&[n, k], 2)? * 0.0)?, dtype)?, Some(&bias))?;
    c.check("bias", &y, &laid.broadcast_as((t, n))?, 0.0)?;
    let y = forward(&x, &weight, Some(&bias))?;
    c.check("y with bias", &y, &forward(&wide_x, &wide_weight, Some(&laid))?, c.of_sums(k))
}

#[cfg(all(test, feature = "host-kernels"))]
mod host {
    use super::*;
    use crate::testing::on_host;

    #[test]
    fn host_linear_matches_the_cpu() -> Result<()> {
        on_host(|c| check(c, Sizes::Odd))
    }
}
