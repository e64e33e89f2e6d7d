//! The kernels against the CPU implementation in f64.

use candle_core::{DType, Result, Tensor};

use super::*;
use crate::{
    common::check::{Checker, HIDDEN, Sizes, random, wide},
    linear,
};

/// What weights are kept in.
#[derive(Clone, Copy, Debug)]
enum Format {
    Int8,
    FourBit(Kind),
}

/// Products with each format, of few tokens and of many.
pub(crate) fn check(c: &mut Checker, sizes: Sizes) -> Result<()> {
    // (T, K, N): few tokens and many; rows of one block and of several; widths of int8 that divide nothing.
    let sizes = match sizes {
        Sizes::Odd => &[
            (1, 64, 1),
            (9, 192, 97),
            (16, 320, 6),
            (17, 64, 150),
            (37, 192, 97),
            (5, 19, 7),
            (23, 19, 131),
            (18, 232, 50),
        ][..],
        Sizes::Real => &[(8, HIDDEN, 4 * HIDDEN), (4096, HIDDEN, HIDDEN)][..],
    };
    for (t, k, n) in sizes {
        for format in [Format::Int8, Format::FourBit(Kind::Nf4), Format::FourBit(Kind::Fp4)] {
            if matches!(format, Format::FourBit(_)) && !k.is_multiple_of(BLOCK) {
                continue;
            }
            for dtype in c.stored() {
                compare(c, (*t, *k, *n), format, dtype)?;
            }
        }
    }
    Ok(())
}

fn compare(
    c: &mut Checker,
    (t, k, n): (usize, usize, usize),
    format: Format,
    dtype: DType,
) -> Result<()> {
    c.case(format!("{t} x {k} to {n}, {format:?}, {dtype:?}"));
    // Not from its first row on: a part of a wider matrix.
    let whole = random(&[n + 3, k], 2)?.to_dtype(DType::F32)?;
    let whole: Quantized = match format {
        Format::Int8 => Int8::quantize(&whole)?.into(),
        Format::FourBit(kind) => FourBit::quantize(&whole, kind)?.into(),
    };
    let full = wide(&whole.rows(3, n)?.dequantize()?)?;
    // A naive implementation multiplies by a weight that is stored as x is.
    let stored = wide(&full.to_dtype(dtype)?)?;
    let weight = whole.to_device(c.device())?.rows(3, n)?;
    c.check("weight", &weight.dequantize()?, &full, 0.0)?;

    let (x, dy) = (c.random(&[t, k], 1, dtype)?, c.random(&[t, n], 4, dtype)?);
    let bias = c.random(&[n], 3, DType::F32)?;
    let (wide_x, wide_dy, wide_bias) = (wide(&x)?, wide(&dy)?, wide(&bias)?);
    let laid = wide(&wide_bias.to_dtype(dtype)?)?;
    let both = |c: &mut Checker, what: &str, got: &Tensor, exact: &Tensor, naive: Tensor, terms| {
        c.check_against(what, got, exact, &naive.to_dtype(dtype)?, c.of_sums(terms))
    };
    let y = forward(&x, &weight, None)?;
    let exact = linear::forward(&wide_x, &full, None)?;
    both(c, "y", &y, &exact, linear::forward(&wide_x, &stored, None)?, k)?;
    let y = forward(&x, &weight, Some(&bias))?;
    let exact = linear::forward(&wide_x, &full, Some(&wide_bias))?;
    both(c, "y with bias", &y, &exact, linear::forward(&wide_x, &stored, Some(&laid))?, k)?;

    let dx = backward_input(&dy, &weight)?;
    let (exact, naive) =
        (linear::backward_input(&wide_dy, &full)?, linear::backward_input(&wide_dy, &stored)?);
    both(c, "dx", &dx, &exact, naive.clone(), n)?;
    let into = c.random(&[t, k], 5, dtype)?;
    let before = wide(&into)?;
    backward_input_into(&dy, &weight, &into)?;
    both(c, "dx +=", &into, &(&before + exact)?, (&before + naive)?, n)
}

#[cfg(all(test, feature = "host-kernels"))]
mod host {
    use candle_core::Device;

    use super::*;
    use crate::{
        common::{check::numbers, host_run::in_every_order},
        testing::on_host,
    };

    #[test]
    fn host_quantized_products_match_the_cpu() -> Result<()> {
        on_host(|c| check(c, Sizes::Odd))
    }

    #[test]
    fn host_weights_are_dequantized_to_the_bit() -> Result<()> {
        let values = random(&[40, 192], 2)?.to_dtype(DType::F32)?;
        let odd = random(&[40, 19], 2)?.to_dtype(DType::F32)?;
        let weights: [(Quantized, _); 4] = [
            (Int8::quantize(&odd)?.into(), 8..19),
            (Int8::quantize(&values)?.into(), 64..192),
            (FourBit::quantize(&values, Kind::Nf4)?.into(), 64..128),
            (FourBit::quantize(&values, Kind::Fp4)?.into(), 0..192),
        ];
        in_every_order(|| {
            for (weight, columns) in &weights {
                for dtype in [DType::F32, DType::BF16] {
                    let columns = columns.clone();
                    let got =
                        device::dequantize(weight, 7..36, columns.clone(), &Device::Cpu, dtype)?;
                    let want = weight.dequantize()?.narrow(0, 7, 29)?;
                    let want = want.narrow(1, columns.start, columns.len())?.to_dtype(dtype)?;
                    assert_eq!(numbers(&got)?, numbers(&want)?, "{columns:?} in {dtype:?}");
                }
            }
            Ok(())
        })
    }
}
