//! The kernels against the CPU implementation in f64.

use candle_core::{DType, Result};

use super::*;
use crate::common::check::{Checker, HIDDEN, LENGTHS, Sizes, batch, wide};

/// Every way of pooling, of sequences of one token and of more than a block's rows.
pub(crate) fn check(c: &mut Checker, sizes: Sizes) -> Result<()> {
    let (lengths, widths) = match sizes {
        Sizes::Odd => (&[1, 97, 2, 13][..], &[1, 19, 264][..]),
        Sizes::Real => (&LENGTHS[..], &[HIDDEN][..]),
    };
    let ragged = batch(lengths)?;
    for h in widths {
        for pool in [Pool::First, Pool::Last, Pool::Mean] {
            for dtype in c.stored() {
                compare(c, &ragged, *h, dtype, pool)?;
            }
        }
    }
    Ok(())
}

fn compare(c: &mut Checker, ragged: &Ragged, h: usize, dtype: DType, pool: Pool) -> Result<()> {
    c.case(format!("{pool:?}, {} x {h}, {dtype:?}", ragged.tokens()));
    let x = c.random(&[ragged.tokens(), h], 1, dtype)?;
    // Means of up to 512 terms below 1 in f32.
    c.check("y", &forward(&x, ragged, pool)?, &forward(&wide(&x)?, ragged, pool)?, 1e-6)?;
    let dy = c.random(&[ragged.sequences(), h], 2, dtype)?;
    c.check("dx", &backward(&dy, ragged, pool)?, &backward(&wide(&dy)?, ragged, pool)?, 1e-7)
}

#[cfg(all(test, feature = "host-kernels"))]
mod host {
    use super::*;
    use crate::testing::on_host;

    #[test]
    fn host_pooling_matches_the_cpu() -> Result<()> {
        on_host(|c| check(c, Sizes::Odd))
    }
}
