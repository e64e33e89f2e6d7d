use candle_core::Result;

use super::*;
use crate::testing::{assert_close, check_gradient, narrow, ragged, random, weighted};

const ALL: [Pool; 3] = [Pool::First, Pool::Last, Pool::Mean];

#[test]
fn values_are_candles() -> Result<()> {
    let own = [1usize, 97, 2, 257];
    for (pool, skip) in ALL.into_iter().flat_map(|pool| [(pool, 0), (pool, 5)]) {
        let ragged = Ragged::new(&own.map(|own| skip + own), &[4, 3, 2, 1])?;
        let x = random(&[ragged.tokens(), 19], 1)?;
        let rows = (0..own.len()).map(|i| {
            let sequence = x.narrow(0, ragged.range(i).start + skip, own[i])?;
            match pool {
                Pool::First => sequence.get(0),
                Pool::Last => sequence.get(own[i] - 1),
                Pool::Mean => sequence.mean(0),
            }
        });
        let want = Tensor::stack(&rows.collect::<Result<Vec<_>>>()?, 0)?;
        assert_close("y", &forward(&x, &ragged, pool, skip)?, &want, 1e-14)?;
        // A sum of 257 f32 below 17 in magnitude, rounded after each, then divided by 257.
        let small = &narrow(&[&x])?[0];
        assert_close("y f32", &forward(small, &ragged, pool, skip)?, &want, 1e-6)?;
    }
    Ok(())
}

#[test]
fn gradients_match_finite_differences() -> Result<()> {
    let (whole, longer) = (ragged()?, Ragged::new(&[5, 3, 7], &[31, 4, 15])?);
    let (x, dy) = (random(&[15, 7], 1)?, random(&[3, 7], 2)?);
    for (pool, ragged, skip) in ALL.into_iter().flat_map(|p| [(p, &whole, 0), (p, &longer, 2)]) {
        let dx = backward(&dy, ragged, pool, skip)?;
        check_gradient("x", &x, &dx, |x| weighted(&forward(x, ragged, pool, skip)?, &dy))?;
        let small = backward(&narrow(&[&dy])?[0], ragged, pool, skip)?;
        assert_close("dx f32", &small, &dx, 1e-7)?;
    }
    Ok(())
}

#[test]
fn an_empty_batch_pools_to_nothing() -> Result<()> {
    let empty = Ragged::new(&[], &[])?;
    let nothing = random(&[0, 7], 1)?;
    for pool in ALL {
        assert_eq!(forward(&nothing, &empty, pool, 1)?.dims(), [0, 7]);
        assert_eq!(backward(&nothing, &empty, pool, 1)?.dims(), [0, 7]);
    }
    let error = forward(&random(&[3, 7], 1)?, &empty, Pool::First, 0).unwrap_err();
    assert!(error.to_string().contains("pooling: x has shape [3, 7]"), "{error}");
    Ok(())
}

#[test]
fn a_sequence_without_rows_of_its_own_is_an_error() -> Result<()> {
    let errors = [
        forward(&random(&[15, 7], 1)?, &ragged()?, Pool::Last, 1).unwrap_err(),
        backward(&random(&[3, 7], 1)?, &ragged()?, Pool::Mean, 1).unwrap_err(),
    ];
    for error in errors {
        let said = "pooling: sequence 1 has 1 rows, none behind the 1 that are not its own";
        assert!(error.to_string().contains(said), "{error}");
    }
    Ok(())
}
