//! The kernels, and the products between them, against the CPU implementation in f64.

use candle_core::{DType, Device, Result};

use super::*;
use crate::common::check::{Checker, HIDDEN, LENGTHS, Sizes, batch, wide};

/// (inputs, outputs, taps, groups).
type Dimensions = (usize, usize, usize, usize);

/// Lengths below every kernel's reach and above it, one group and several.
pub(crate) fn check(c: &mut Checker, sizes: Sizes) -> Result<()> {
    let (lengths, shapes): (&[usize], &[Dimensions]) = match sizes {
        Sizes::Odd => {
            (&[1, 97, 2, 13, 3], &[(5, 7, 1, 1), (24, 17, 3, 1), (6, 9, 5, 3), (4, 4, 11, 4)])
        }
        // 849 tokens: the naive products in f64 would take long for more.
        Sizes::Real => (&LENGTHS[..4], &[(HIDDEN, HIDDEN, 3, 1)]),
    };
    let ragged = batch(lengths)?;
    for shape in shapes {
        for dtype in c.stored() {
            compare(c, *shape, &ragged, dtype)?;
        }
    }
    Ok(())
}

/// dx as a plain implementation has it: a product of each tap alone, stored, and their sum.
fn naive(
    dy: &Tensor,
    weight: &Tensor,
    groups: usize,
    ragged: &Ragged,
    dtype: DType,
) -> Result<Tensor> {
    let taps = weight.dim(2)?;
    let shape = (ragged.tokens(), weight.dim(1)? * groups);
    let mut sum = Tensor::zeros(shape, DType::F64, &Device::Cpu)?;
    for tap in Tensor::eye(taps, DType::F64, &Device::Cpu)?.chunk(taps, 0)? {
        let alone = backward_input(dy, &weight.broadcast_mul(&tap)?, groups, ragged)?;
        sum = wide(&(sum + wide(&alone.to_dtype(dtype)?)?)?.to_dtype(dtype)?)?;
    }
    Ok(sum)
}

fn compare(
    c: &mut Checker,
    (inputs, outputs, taps, groups): Dimensions,
    ragged: &Ragged,
    dtype: DType,
) -> Result<()> {
    let t = ragged.tokens();
    c.case(format!("{t} x {inputs} to {outputs}, {taps} taps, {groups} groups, {dtype:?}"));
    let x = c.random(&[t, inputs], 1, dtype)?;
    let weight = c.random(&[outputs, inputs / groups, taps], 2, dtype)?;
    let dy = c.random(&[t, outputs], 3, dtype)?;
    let (wide_x, wide_weight, wide_dy) = (wide(&x)?, wide(&weight)?, wide(&dy)?);

    let bias = c.random(&[outputs], 4, DType::F32)?;
    for bias in [None, Some(&bias)] {
        let y = forward(&x, &weight, bias, groups, ragged)?;
        let laid = bias.map(|bias| wide(&bias.to_dtype(dtype)?)).transpose()?;
        let exact = forward(&wide_x, &wide_weight, laid.as_ref(), groups, ragged)?;
        c.check("y", &y, &exact, c.of_sums(inputs / groups * taps))?;
    }
    let dw = c.random(weight.dims(), 5, DType::F32)?;
    let db = c.random(&[outputs], 6, DType::F32)?;
    let (exact_dw, exact_db) = (wide(&dw)?, wide(&db)?);
    backward_parameters(&dy, &x, groups, ragged, Some(&dw), Some(&db))?;
    backward_parameters(&wide_dy, &wide_x, groups, ragged, Some(&exact_dw), Some(&exact_db))?;
    c.check("dw", &dw, &exact_dw, c.of_sums(t))?;
    c.check("db", &db, &exact_db, c.of_sums(t))?;
    let dx = backward_input(&dy, &weight, groups, ragged)?;
    let exact = backward_input(&wide_dy, &wide_weight, groups, ragged)?;
    let naive = naive(&wide_dy, &wide_weight, groups, ragged, dtype)?;
    c.check_against("dx", &dx, &exact, &naive, c.of_sums(outputs / groups * taps))
}

#[cfg(all(test, feature = "host-kernels"))]
mod host {
    use super::*;
    use crate::testing::on_host;

    #[test]
    fn host_convolution_matches_the_cpu() -> Result<()> {
        on_host(|c| check(c, Sizes::Odd))
    }

    /// Unfolding is a convolution itself: every channel a group, of k outputs, and output j sees tap j.
    #[test]
    fn host_unfolded_rows_are_what_taps_see() -> Result<()> {
        let ragged = batch(&[1, 97, 2, 13, 3])?;
        on_host(|c| {
            for (columns, taps) in [(1, 1), (5, 3), (24, 3), (7, 11), (264, 5)] {
                let identity = Tensor::eye(taps, DType::F64, &Device::Cpu)?.unsqueeze(1)?;
                let identity = identity.repeat((columns, 1, 1))?;
                for dtype in c.stored() {
                    let x = c.random(&[ragged.tokens(), columns], 1, dtype)?;
                    let shape = Shape { inputs: columns, outputs: 1, taps, groups: 1 };
                    let u = device::unfold(&x, shape, &ragged)?;
                    // Elements are moved, so they are what they were.
                    let exact = forward(&wide(&x)?, &identity, None, columns, &ragged)?;
                    c.check("u", &u, &exact, 0.0)?;
                }
            }
            Ok(())
        })
    }
}
