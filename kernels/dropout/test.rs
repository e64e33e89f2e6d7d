use candle_core::Result;

use super::*;
use crate::testing::{check_gradient, dropout, ragged, random, weighted};

#[test]
fn backward_is_the_same_mask() -> Result<()> {
    let (x, dy) = (random(&[15, 20], 1)?, random(&[15, 20], 2)?);
    let (ragged, dropout) = (ragged()?, dropout());
    let dx = apply(&dy, Some(&dropout), ragged.token_rows())?;
    check_gradient("x", &x, &dx, |x| weighted(&apply(x, Some(&dropout), ragged.token_rows())?, &dy))
}

#[test]
fn packing_does_not_change_the_mask() -> Result<()> {
    let x = random(&[15, 20], 1)?;
    let (together, dropout) = (ragged()?, dropout());
    let packed = apply(&x, Some(&dropout), together.token_rows())?;
    let alone = crate::Ragged::new(&[9], &[15])?;
    let last = apply(&x.narrow(0, 6, 9)?.contiguous()?, Some(&dropout), alone.token_rows())?;
    assert_eq!(packed.narrow(0, 6, 9)?.to_vec2::<f64>()?, last.to_vec2::<f64>()?);
    Ok(())
}
