//! The kernels against the CPU implementation in f64.

use candle_core::{DType, Result};

use super::*;
use crate::common::check::{Checker, HIDDEN, Sizes, random, wide};

const ALL: [Activation; 5] =
    [Activation::Gelu, Activation::GeluTanh, Activation::Relu, Activation::Silu, Activation::Tanh];

/// Every function, plain and gated, with a bias and without.
pub(crate) fn check(c: &mut Checker, sizes: Sizes) -> Result<()> {
    let (sizes, functions) = match sizes {
        Sizes::Odd => (&[(1, 1), (97, 17), (3, 264), (50, 24)][..], &ALL[..]),
        // What the feed-forward part runs; the gated one is as wide.
        Sizes::Real => (&[(4096, 4 * HIDDEN)][..], &ALL[..1]),
    };
    for (rows, columns) in sizes {
        for gated in [false, true] {
            for dtype in c.stored() {
                let columns = if gated { columns.div_ceil(2) } else { *columns };
                compare(c, functions, *rows, columns, gated, dtype)?;
            }
        }
    }
    Ok(())
}

fn compare(
    c: &mut Checker,
    functions: &[Activation],
    rows: usize,
    columns: usize,
    gated: bool,
    dtype: DType,
) -> Result<()> {
    let width = if gated { 2 * columns } else { columns };
    let h = c.rounded(&(random(&[rows, width], 1)? * 4.0)?, dtype)?;
    let dy = c.random(&[rows, columns], 2, dtype)?;
    let bias = c.random(&[width], 3, DType::F32)?;
    let (wide_h, wide_dy, wide_bias) = (wide(&h)?, wide(&dy)?, wide(&bias)?);
    let (forward, backward): (Forward, Backward) =
        if gated { (gated_forward, gated_backward) } else { (forward, backward) };
    for (function, biased) in functions.iter().flat_map(|f| [(*f, false), (*f, true)]) {
        c.case(format!(
            "{function:?}, {rows} x {columns}, gated {gated}, bias {biased}, {dtype:?}"
        ));
        let (bias, wide_bias) = (biased.then_some(&bias), biased.then_some(&wide_bias));
        let db = c.random(&[width], 4, DType::F32)?;
        let exact_db = wide(&db)?;
        // f32 functions, measured: 2e-7 of the largest value.
        let y = forward(&h, bias, function)?;
        c.check("y", &y, &forward(&wide_h, wide_bias, function)?, 1e-6)?;
        let dh = backward(&dy, &h, bias, function, Some(&db))?;
        let exact = backward(&wide_dy, &wide_h, wide_bias, function, Some(&exact_db))?;
        c.check("dh", &dh, &exact, 1e-6)?;
        c.check("db", &db, &exact_db, c.of_sums(rows).max(1e-6))?;
    }
    Ok(())
}

type Forward = fn(&Tensor, Option<&Tensor>, Activation) -> Result<Tensor>;
type Backward =
    fn(&Tensor, &Tensor, Option<&Tensor>, Activation, Option<&Tensor>) -> Result<Tensor>;

#[cfg(all(test, feature = "host-kernels"))]
mod host {
    use candle_core::Device;

    use super::*;
    use crate::testing::on_host;

    #[test]
    fn host_kernels_match_the_cpu() -> Result<()> {
        on_host(|c| check(c, Sizes::Odd))
    }

    #[test]
    fn host_relu_keeps_nan() -> Result<()> {
        let nan = Tensor::new(&[[f32::NAN, -1.0, 2.0]], &Device::Cpu)?;
        let y = device::forward(&nan, None, Activation::Relu)?.to_vec2::<f32>()?;
        assert!(y[0][0].is_nan());
        assert_eq!(y[0][1..], [0.0, 2.0]);
        Ok(())
    }

    #[test]
    fn host_bf16_on_the_cpu_takes_the_kernels() -> Result<()> {
        let h = random(&[3, 5], 1)?.to_dtype(DType::BF16)?;
        assert_eq!(forward(&h, None, Activation::Gelu)?.dtype(), DType::BF16);
        let wrong = device::forward(&h, Some(&h.flatten_all()?), Activation::Gelu);
        assert!(wrong.unwrap_err().to_string().contains("BF16 where the kernel takes F32"));
        Ok(())
    }
}
