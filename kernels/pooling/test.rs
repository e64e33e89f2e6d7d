use candle_core::{DType, Device, Result};

use super::*;
use crate::testing::{assert_close, check_gradient, narrow, ragged, random, weighted};

const ALL: [Pool; 5] = [Pool::First, Pool::Last, Pool::Mean, Pool::Max, Pool::Ends];

#[test]
fn values_are_candles() -> Result<()> {
    let own = [1usize, 97, 2, 257];
    for (pool, skip) in ALL.into_iter().flat_map(|pool| [(pool, 0), (pool, 5)]) {
        let ragged = Ragged::new(&own.map(|own| skip + own), &[4, 3, 2, 1])?;
        let x = random(&[ragged.tokens(), 22], 1)?;
        let rows = (0..own.len()).map(|i| {
            let sequence = x.narrow(0, ragged.range(i).start + skip, own[i])?;
            match pool {
                Pool::First => sequence.get(0),
                Pool::Last => sequence.get(own[i] - 1),
                Pool::Mean => sequence.mean(0),
                Pool::Max => sequence.max(0),
                Pool::Ends => {
                    let [first, last] = [sequence.get(0)?, sequence.get(own[i] - 1)?];
                    Tensor::cat(&[last.narrow(0, 0, 11)?, first.narrow(0, 11, 11)?], 0)
                }
            }
        });
        let want = Tensor::stack(&rows.collect::<Result<Vec<_>>>()?, 0)?;
        assert_close("y", &forward(&x, &ragged, pool, skip)?.0, &want, 1e-14)?;
        // A sum of 257 f32 below 17 in magnitude, rounded after each, then divided by 257.
        let small = &narrow(&[&x])?[0];
        assert_close("y f32", &forward(small, &ragged, pool, skip)?.0, &want, 1e-6)?;
    }
    Ok(())
}

#[test]
fn gradients_match_finite_differences() -> Result<()> {
    let (whole, longer) = (ragged()?, Ragged::new(&[5, 3, 7], &[31, 4, 15])?);
    let (x, dy) = (random(&[15, 10], 1)?, random(&[3, 10], 2)?);
    for (pool, ragged, skip) in ALL.into_iter().flat_map(|p| [(p, &whole, 0), (p, &longer, 2)]) {
        let (_, saved) = forward(&x, ragged, pool, skip)?;
        let dx = backward(&dy, ragged, &saved)?;
        check_gradient("x", &x, &dx, |x| weighted(&forward(x, ragged, pool, skip)?.0, &dy))?;
        let small = backward(&narrow(&[&dy])?[0], ragged, &saved)?;
        assert_close("dx f32", &small, &dx, 1e-7)?;
    }
    Ok(())
}

#[test]
fn an_empty_batch_pools_to_nothing() -> Result<()> {
    let empty = Ragged::new(&[], &[])?;
    let nothing = random(&[0, 6], 1)?;
    for pool in ALL {
        let (y, saved) = forward(&nothing, &empty, pool, 1)?;
        assert_eq!(y.dims(), [0, 6]);
        assert_eq!(backward(&nothing, &empty, &saved)?.dims(), [0, 6]);
    }
    let error = forward(&random(&[3, 7], 1)?, &empty, Pool::First, 0).unwrap_err();
    assert!(error.to_string().contains("pooling: x has shape [3, 7]"), "{error}");
    Ok(())
}

#[test]
fn a_sequence_without_rows_of_its_own_is_an_error() -> Result<()> {
    let longer = Ragged::new(&[5, 2, 9], &[31, 4, 15])?;
    let (_, saved) = forward(&random(&[16, 7], 1)?, &longer, Pool::Mean, 1)?;
    let errors = [
        forward(&random(&[15, 7], 1)?, &ragged()?, Pool::Last, 1).unwrap_err(),
        backward(&random(&[3, 7], 1)?, &ragged()?, &saved).unwrap_err(),
    ];
    for error in errors {
        let said = "pooling: sequence 1 has 1 rows, none behind the 1 that are not its own";
        assert!(error.to_string().contains(said), "{error}");
    }
    let error = forward(&random(&[15, 7], 1)?, &ragged()?, Pool::Ends, 0).unwrap_err();
    assert!(error.to_string().contains("x [15, 7] has no two halves of columns"), "{error}");
    Ok(())
}

/// Columns: one maximum, two, all alike, none below infinity, NaN first, last and before a larger number.
#[test]
fn the_first_of_equal_maxima_wins_and_nan_is_not_hidden() -> Result<()> {
    const INF: f64 = f64::INFINITY;
    let nan = f64::NAN;
    let x = Tensor::new(
        &[
            [9.0, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0], // another sequence's
            [0.0, 2.0, 1.0, -INF, nan, 3.0, 1.0],
            [3.0, 3.0, 1.0, -INF, 4.0, 2.0, nan],
            [1.0, 3.0, 1.0, -INF, nan, nan, INF],
        ],
        &Device::Cpu,
    )?;
    let ragged = Ragged::new(&[1, 3], &[3, 5])?;
    for x in [&x, &narrow(&[&x])?[0]] {
        let (y, saved) = forward(x, &ragged, Pool::Max, 0)?;
        let y = y.to_dtype(DType::F64)?.to_vec2::<f64>()?;
        assert_eq!(y[1][..4], [3.0, 3.0, 1.0, -INF]);
        assert!(y[1][4..].iter().all(|y| y.is_nan()), "{y:?}");
        let dy = random(&[2, 7], 1)?.to_dtype(x.dtype())?;
        let dx = backward(&dy, &ragged, &saved)?.to_dtype(DType::F64)?.to_vec2::<f64>()?;
        let dy = dy.to_dtype(DType::F64)?.to_vec2::<f64>()?;
        assert_eq!(dx[0], dy[0]);
        for (j, row) in [2, 2, 1, 1, 1, 3, 2].into_iter().enumerate() {
            for other in 1..4 {
                assert_eq!(dx[other][j], if other == row { dy[1][j] } else { 0.0 }, "{other}, {j}");
            }
        }
    }
    Ok(())
}
