use candle_core::Result;

use super::*;
use crate::testing::{assert_close, check_gradient, narrow, ragged, random, weighted};

const ALL: [Pool; 3] = [Pool::First, Pool::Last, Pool::Mean];

#[test]
fn values_are_candles() -> Result<()> {
    let lengths = [1usize, 97, 2, 257];
    let ragged = Ragged::new(&lengths, &[4, 3, 2, 1])?;
    let x = random(&[357, 19], 1)?;
    let small = &narrow(&[&x])?[0];
    for pool in ALL {
        let rows = (0..lengths.len()).map(|i| {
            let sequence = x.narrow(0, ragged.range(i).start, lengths[i])?;
            match pool {
                Pool::First => sequence.get(0),
                Pool::Last => sequence.get(lengths[i] - 1),
                Pool::Mean => sequence.mean(0),
            }
        });
        let want = Tensor::stack(&rows.collect::<Result<Vec<_>>>()?, 0)?;
        assert_close("y", &forward(&x, &ragged, pool)?, &want, 1e-14)?;
        // A sum of 257 f32 below 17 in magnitude, rounded after each, then divided by 257.
        assert_close("y f32", &forward(small, &ragged, pool)?, &want, 1e-6)?;
    }
    Ok(())
}

#[test]
fn gradients_match_finite_differences() -> Result<()> {
    let ragged = ragged()?;
    let (x, dy) = (random(&[15, 7], 1)?, random(&[3, 7], 2)?);
    for pool in ALL {
        let dx = backward(&dy, &ragged, pool)?;
        check_gradient("x", &x, &dx, |x| weighted(&forward(x, &ragged, pool)?, &dy))?;
        let small = backward(&narrow(&[&dy])?[0], &ragged, pool)?;
        assert_close("dx f32", &small, &dx, 1e-7)?;
    }
    Ok(())
}

#[test]
fn an_empty_batch_pools_to_nothing() -> Result<()> {
    let empty = Ragged::new(&[], &[])?;
    let nothing = random(&[0, 7], 1)?;
    for pool in ALL {
        assert_eq!(forward(&nothing, &empty, pool)?.dims(), [0, 7]);
        assert_eq!(backward(&nothing, &empty, pool)?.dims(), [0, 7]);
    }
    let error = forward(&random(&[3, 7], 1)?, &empty, Pool::First).unwrap_err();
    assert!(error.to_string().contains("pooling: x has shape [3, 7]"), "{error}");
    Ok(())
}
