//! The kernels against the CPU implementation in f64.

use candle_core::{DType, Result};

use super::*;
use crate::common::check::{Checker, LENGTHS, Sizes, batch, random, wide};

/// Sequences of one token and of more than a block's rows, rows wider and narrower than a warp's chunks.
pub(crate) fn check(c: &mut Checker, sizes: Sizes) -> Result<()> {
    let (lengths, widths) = match sizes {
        Sizes::Odd => (&[1, 97, 2, 313][..], &[(1, 1), (19, 37), (264, 40), (40, 264)][..]),
        // What the models over word vectors run.
        Sizes::Real => (&LENGTHS[..], &[(256, 256)][..]),
    };
    let ragged = batch(lengths)?;
    for (h, width) in widths {
        for dtype in c.stored() {
            compare(c, &ragged, (*h, *width), dtype)?;
        }
    }
    Ok(())
}

fn compare(
    c: &mut Checker,
    ragged: &Ragged,
    (h, width): (usize, usize),
    dtype: DType,
) -> Result<()> {
    let (t, b) = (ragged.tokens(), ragged.sequences());
    c.case(format!("{t} x {h}, by {width}, {dtype:?}"));
    let (x, u) = (c.random(&[t, h], 1, dtype)?, c.random(&[t, width], 2, dtype)?);
    // Scores stay about 1, so that the sums over A do.
    let v = c.rounded(&(random(&[width], 3)? * (3.0 / (width as f64).sqrt()))?, DType::F32)?;
    let (exact_x, exact_u, exact_v) = (wide(&x)?, wide(&u)?, wide(&v)?);
    let operands = Operands { x: &x, u: &u, v: &v };
    let exact = Operands { x: &exact_x, u: &exact_u, v: &exact_v };
    let (y, a) = forward(operands, ragged)?;
    let (_, exact_a) = forward(exact, ragged)?;
    // A weight, at most 1, is off by as much as its score is, by the functions and by the sum over the rows.
    let rows = (0..b).map(|i| ragged.range(i).len()).max().unwrap_or(0);
    let arithmetic = c.of_sums(width) + c.of_sums(rows) + 3e-7;
    c.check("a", &a, &exact_a, arithmetic)?;

    // What follows is of the weights as they are.
    let exact_a = wide(&a)?;
    c.check("y", &y, &cpu::pool::<f64>(&exact_x, &exact_a, ragged)?, c.of_sums(rows))?;
    let dy = c.random(&[b, h], 4, dtype)?;
    let dv = c.random(&[width], 5, DType::F32)?;
    let exact_dv = wide(&dv)?;
    let got = backward(operands, &a, &dy, ragged, Some(&dv))?;
    let exact = backward(exact, &exact_a, &wide(&dy)?, ragged, Some(&exact_dv))?;
    c.check("dx", &got.x, &exact.x, 1e-7)?;
    // A score's gradient is a·(1 - a) times differences of sums over H, which grow as the root of H: at most
    // a quarter, and less the more rows there are. Measured on the host: up to 0.06 of this.
    let of_scores = c.of_sums(h) + c.of_sums(rows);
    c.check("du", &got.u, &exact.u, of_scores)?;
    c.check("dv", &dv, &exact_dv, of_scores + c.of_sums(t))?;
    let got = backward(operands, &a, &dy, ragged, None)?;
    c.check("du without dv", &got.u, &exact.u, of_scores)
}

#[cfg(all(test, feature = "host-kernels"))]
mod host {
    use super::*;
    use crate::{common::check::numbers, testing::on_host};

    #[test]
    fn host_attention_pooling_matches_the_cpu() -> Result<()> {
        on_host(|c| check(c, Sizes::Odd))
    }

    #[test]
    fn host_what_is_not_a_number_stays_in_its_sequence() -> Result<()> {
        on_host(|c| {
            let ragged = batch(&[3, 40, 2])?;
            let row = random(&[1, 19], 1)?;
            let u =
                Tensor::cat(&[random(&[10, 19], 2)?, (row * f64::NAN)?, random(&[34, 19], 3)?], 0)?;
            let v = c.random(&[19], 4, DType::F32)?;
            for dtype in c.stored() {
                let a = numbers(&weights(&c.rounded(&u, dtype)?, &v, &ragged)?)?;
                let finite: Vec<bool> = a.iter().map(|a| a.is_finite()).collect();
                c.same("finite", finite, (0..45).map(|row| !(3..43).contains(&row)).collect());
            }
            Ok(())
        })
    }
}
