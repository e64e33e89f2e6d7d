//! The kernel against the CPU implementation in f64.

use candle_core::{DType, Result};

use super::*;
use crate::common::check::{Checker, HEADS, LENGTHS, Sizes, batch, wide};

/// Heads of one pair, of an odd number of pairs and of 64 columns.
pub(crate) fn check(c: &mut Checker, sizes: Sizes) -> Result<()> {
    let (lengths, heads) = match sizes {
        Sizes::Odd => (&[5, 1, 97][..], &[(1, 2), (3, 6), (2, 64)][..]),
        Sizes::Real => (&LENGTHS[..], &[(HEADS, 64)][..]),
    };
    let ragged = batch(lengths)?;
    let longest = lengths.iter().copied().max().unwrap_or(0);
    for (heads, size) in heads {
        let table = Table::new(10_000.0, *size, longest)?;
        for dtype in c.stored() {
            compare(c, &table, &ragged, *heads, dtype)?;
        }
    }
    Ok(())
}

fn compare(
    c: &mut Checker,
    table: &Table,
    ragged: &Ragged,
    heads: usize,
    dtype: DType,
) -> Result<()> {
    let width = heads * 2 * table.half;
    c.case(format!("{} x {width}, {heads} heads, {dtype:?}", ragged.tokens()));
    let x = c.random(&[ragged.tokens(), width], 1, dtype)?;
    let exact = wide(&x)?;
    let y = forward(&x, table, ragged, heads)?;
    c.check("y", &y, &forward(&exact, table, ragged, heads)?, 2e-7)?;
    let dx = backward(&x, table, ragged, heads)?;
    c.check("dx", &dx, &backward(&exact, table, ragged, heads)?, 2e-7)
}

#[cfg(all(test, feature = "host-kernels"))]
mod host {
    use super::*;
    use crate::testing::on_host;

    #[test]
    fn host_rotation_matches_the_cpu() -> Result<()> {
        on_host(|c| check(c, Sizes::Odd))
    }
}
