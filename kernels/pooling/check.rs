//! The kernels against the CPU implementation in f64.

use candle_core::{DType, Result};

use super::*;
use crate::common::check::{Checker, HIDDEN, LENGTHS, Sizes, batch, wide};

/// Every way of pooling, of sequences of one token and of more than a block's rows, whole and behind others'.
pub(crate) fn check(c: &mut Checker, sizes: Sizes) -> Result<()> {
    let (lengths, widths) = match sizes {
        Sizes::Odd => (&[1, 97, 2, 13][..], &[1, 19, 264][..]),
        Sizes::Real => (&LENGTHS[..], &[HIDDEN][..]),
    };
    for skip in [0, 11] {
        let longer: Vec<usize> = lengths.iter().map(|length| length + skip).collect();
        let ragged = batch(&longer)?;
        for h in widths {
            for pool in [Pool::First, Pool::Last, Pool::Mean] {
                for dtype in c.stored() {
                    compare(c, &ragged, *h, dtype, (pool, skip))?;
                }
            }
        }
    }
    Ok(())
}

fn compare(
    c: &mut Checker,
    ragged: &Ragged,
    h: usize,
    dtype: DType,
    (pool, skip): (Pool, usize),
) -> Result<()> {
    c.case(format!("{pool:?} but {skip}, {} x {h}, {dtype:?}", ragged.tokens()));
    let x = c.random(&[ragged.tokens(), h], 1, dtype)?;
    // Means of up to 512 terms below 1 in f32.
    let exact = forward(&wide(&x)?, ragged, pool, skip)?;
    c.check("y", &forward(&x, ragged, pool, skip)?, &exact, 1e-6)?;
    let dy = c.random(&[ragged.sequences(), h], 2, dtype)?;
    let exact = backward(&wide(&dy)?, ragged, pool, skip)?;
    c.check("dx", &backward(&dy, ragged, pool, skip)?, &exact, 1e-7)
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
