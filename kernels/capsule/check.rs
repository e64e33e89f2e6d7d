//! The kernels against the CPU implementation in f64.

use candle_core::{DType, Result};

use super::*;
use crate::common::check::{Checker, LENGTHS, Sizes, batch, wide};

/// Sequences of one token and of more than a block's rows, one capsule and many, in one strip and in two.
pub(crate) fn check(c: &mut Checker, sizes: Sizes) -> Result<()> {
    let (lengths, routings) = match sizes {
        Sizes::Odd => {
            (&[1, 97, 2, 313][..], &[(1, 1, 2), (3, 5, 1), (5, 8, 2), (10, 16, 3), (33, 9, 4)][..])
        }
        // What the models over word vectors run.
        Sizes::Real => (&LENGTHS[..], &[(10, 16, 3)][..]),
    };
    let ragged = batch(lengths)?;
    for (capsules, size, iterations) in routings {
        let routing = Routing { capsules: *capsules, size: *size, iterations: *iterations };
        for dtype in c.stored() {
            compare(c, &ragged, routing, dtype)?;
        }
    }
    Ok(())
}

fn compare(c: &mut Checker, ragged: &Ragged, routing: Routing, dtype: DType) -> Result<()> {
    let (t, b, columns) = (ragged.tokens(), ragged.sequences(), routing.columns());
    c.case(format!("{t} tokens, {routing:?}, {dtype:?}"));
    let u = c.random(&[t, columns], 1, dtype)?;
    let (v, saved) = forward(&u, ragged, routing)?;
    let (exact, exact_saved) = forward(&wide(&u)?, ragged, routing)?;
    // Each iteration sums over a sequence's rows and over a capsule's columns, of votes below 1.
    let rows = (0..b).map(|i| ragged.range(i).len()).max().unwrap_or(0);
    let once = c.of_sums(rows) + c.of_sums(routing.size) + 3e-7;
    let arithmetic = once * routing.iterations as f64;
    c.check("v", &v, &exact, arithmetic)?;
    c.check("s", &saved.sums, &exact_saved.sums, arithmetic)?;

    // Backward starts from what forward left.
    let dv = c.random(&[b, columns], 2, dtype)?;
    let left = Saved { sums: wide(&saved.sums)? };
    // It adds up over the rows only on the way from one iteration to the one before.
    let exact = backward(&wide(&u)?, &left, &wide(&dv)?, ragged, routing)?;
    c.check("du", &backward(&u, &saved, &dv, ragged, routing)?, &exact, once)
}

#[cfg(all(test, feature = "host-kernels"))]
mod host {
    use candle_core::Device;

    use super::*;
    use crate::{
        common::check::{numbers, random},
        testing::on_host,
    };

    #[test]
    fn host_capsule_matches_the_cpu() -> Result<()> {
        on_host(|c| check(c, Sizes::Odd))
    }

    /// A sequence of zeros beside one with a NaN, and a third.
    #[test]
    fn host_zeros_stay_zeros_and_nan_stays_in_its_sequence() -> Result<()> {
        on_host(|c| {
            let (ragged, routing) =
                (batch(&[3, 40, 2])?, Routing { capsules: 3, size: 5, iterations: 3 });
            let mut values = random(&[45, 15], 1)?.to_vec2::<f64>()?;
            values[..3].iter_mut().for_each(|row| row.fill(0.0));
            values[20][7] = f64::NAN;
            let u = Tensor::new(values, &Device::Cpu)?;
            for dtype in c.stored() {
                let u = c.rounded(&u, dtype)?;
                let (v, saved) = forward(&u, &ragged, routing)?;
                let du = backward(&u, &saved, &c.random(&[3, 15], 2, dtype)?, &ragged, routing)?;
                let (v, du) = (numbers(&v)?, numbers(&du)?);
                c.same("zeros", (&v[..15], &du[..45]), (&[0.0; 15][..], &[0.0; 45][..]));
                let all_nan = |values: &[f64]| values.iter().all(|x| x.is_nan());
                c.same("NaN", all_nan(&v[15..30]) && all_nan(&du[45..645]), true);
                let finite = v[30..].iter().chain(&du[645..]).all(|x| x.is_finite());
                c.same("finite", finite, true);
            }
            Ok(())
        })
    }

    #[test]
    fn host_more_columns_than_a_block_holds_are_refused() -> Result<()> {
        let routing = Routing { capsules: 129, size: 16, iterations: 1 };
        let u = Tensor::zeros((1, 2064), DType::BF16, &Device::Cpu)?;
        let error = forward(&u, &batch(&[1])?, routing).unwrap_err().to_string();
        let said = "capsule: 129 capsules of 16 columns, the kernels take 2048 in all";
        assert!(error.contains(said), "{error}");
        Ok(())
    }
}
