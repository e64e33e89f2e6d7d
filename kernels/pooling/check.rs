//! The kernels against the CPU implementation in f64.

use candle_core::{DType, Result};

use super::*;
use crate::common::check::{Checker, HIDDEN, LENGTHS, Sizes, batch, numbers, random, wide};

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
            for pool in [Pool::First, Pool::Last, Pool::Mean, Pool::Max, Pool::Ends] {
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
    // Halves of every width.
    let h = if pool == Pool::Ends { 2 * h } else { h };
    c.case(format!("{pool:?} but {skip}, {} x {h}, {dtype:?}", ragged.tokens()));
    let x = random(&[ragged.tokens(), h], 1)?;
    // Of few values, so that most maxima are several rows'.
    let x = if pool == Pool::Max { ((x * 4.0)?.round()? / 4.0)? } else { x };
    let x = c.rounded(&x, dtype)?;
    let (y, saved) = forward(&x, ragged, pool, skip)?;
    let (exact, exact_saved) = forward(&wide(&x)?, ragged, pool, skip)?;
    // Means of up to 512 terms below 1 in f32.
    c.check("y", &y, &exact, 1e-6)?;
    let rows = |saved: &Saved| saved.rows.as_ref().map(numbers).transpose();
    c.same("rows", rows(&saved)?, rows(&exact_saved)?);
    let dy = c.random(&[ragged.sequences(), h], 2, dtype)?;
    let exact = backward(&wide(&dy)?, ragged, &exact_saved)?;
    c.check("dx", &backward(&dy, ragged, &saved)?, &exact, 1e-7)
}

#[cfg(all(test, feature = "host-kernels"))]
mod host {
    use candle_core::Device;

    use super::*;
    use crate::testing::on_host;

    #[test]
    fn host_pooling_matches_the_cpu() -> Result<()> {
        on_host(|c| check(c, Sizes::Odd))
    }

    /// In a row of each warp, in two, in none, and -inf alone.
    #[test]
    fn host_maxima_are_the_cpus_whatever_is_no_number() -> Result<()> {
        on_host(|c| {
            let ragged = batch(&[1, 19, 3])?;
            let mut values = vec![vec![f32::NEG_INFINITY; 9]; 23];
            (0..23).for_each(|row| values[row][row % 8] = f32::NAN);
            (values[5][2], values[13][2], values[8][3]) = (f32::NAN, f32::NAN, f32::INFINITY);
            for dtype in c.stored() {
                let x = c.rounded(&Tensor::new(values.clone(), &Device::Cpu)?, dtype)?;
                let (y, saved) = forward(&x, &ragged, Pool::Max, 0)?;
                let (exact, exact_saved) = forward(&wide(&x)?, &ragged, Pool::Max, 0)?;
                let bits = |y: &Tensor| {
                    let bits = |y: f64| if y.is_nan() { None } else { Some(y.to_bits()) };
                    Ok::<_, candle_core::Error>(numbers(y)?.into_iter().map(bits).collect())
                };
                c.same::<Vec<_>>("y", bits(&y)?, bits(&exact)?);
                let rows = |saved: Saved| numbers(&saved.rows.expect("of a maximum"));
                c.same("rows", rows(saved)?, rows(exact_saved)?);
            }
            Ok(())
        })
    }
}
