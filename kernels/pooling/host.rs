//! The kernels of op.cu, run on the host, against the CPU implementation in f64.

use candle_core::{DType, Result};

use super::*;
use crate::{
    common::host_run::in_every_order,
    testing::{STORED, check, random, rounded, wide},
};

fn compare(ragged: &Ragged, h: usize, dtype: DType, pool: Pool) -> Result<()> {
    let x = rounded(&random(&[ragged.tokens(), h], 1)?, dtype)?;
    // A mean of 97 terms in f32.
    let exact = forward(&wide(&x)?, ragged, pool)?;
    check("y", &device::forward(&x, ragged, pool)?, &exact, 1e-6)?;
    let dy = rounded(&random(&[ragged.sequences(), h], 2)?, dtype)?;
    let exact = backward(&wide(&dy)?, ragged, pool)?;
    check("dx", &device::backward(&dy, ragged, pool)?, &exact, 1e-7)
}

#[test]
fn host_pooling_matches_the_cpu() -> Result<()> {
    let ragged = Ragged::new(&[1, 97, 2, 13], &[4, 3, 2, 1])?;
    in_every_order(|| {
        for h in [1, 19, 264] {
            for pool in [Pool::First, Pool::Last, Pool::Mean] {
                for dtype in STORED {
                    compare(&ragged, h, dtype, pool)?;
                }
            }
        }
        Ok(())
    })
}
