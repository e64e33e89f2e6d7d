//! The kernel of op.cu, run on the host, against the CPU implementation in f64.

use candle_core::{DType, Result};

use super::*;
use crate::{
    common::host_run::in_every_order,
    testing::{STORED, check, random, rounded, wide},
};

fn compare(table: &Table, ragged: &Ragged, heads: usize, dtype: DType) -> Result<()> {
    let x = rounded(&random(&[ragged.tokens(), heads * 2 * table.half], 1)?, dtype)?;
    let exact = forward(&wide(&x)?, table, ragged, heads)?;
    check("y", &device::forward(&x, table, ragged)?, &exact, 2e-7)?;
    let exact = backward(&wide(&x)?, table, ragged, heads)?;
    check("dx", &device::backward(&x, table, ragged)?, &exact, 2e-7)
}

#[test]
fn host_rotation_matches_the_cpu() -> Result<()> {
    let ragged = Ragged::new(&[5, 1, 97], &[4, 3, 2])?;
    in_every_order(|| {
        for (heads, size) in [(1, 2), (3, 6), (2, 64)] {
            let table = Table::new(10_000.0, size, 97)?;
            for dtype in STORED {
                compare(&table, &ragged, heads, dtype)?;
            }
        }
        Ok(())
    })
}
