//! The kernel drops what the CPU drops, bit for bit.

use candle_core::{DType, Device, Result};

use super::*;
use crate::common::{
    DropoutKey,
    check::{Checker, HIDDEN, LENGTHS, Sizes, batch, wide},
};

/// Several shares dropped, of rows keyed by other samples than their own number.
pub(crate) fn check(c: &mut Checker, sizes: Sizes) -> Result<()> {
    let sizes = match sizes {
        Sizes::Odd => &[(&[5usize, 1, 91][..], 19), (&[1], 1), (&[30, 34], 264)][..],
        Sizes::Real => &[(&LENGTHS[..], HIDDEN)][..],
    };
    for (lengths, columns) in sizes {
        for p in [0.1, 0.5] {
            for dtype in c.stored() {
                compare(c, lengths, *columns, p, dtype)?;
            }
        }
    }
    Ok(())
}

fn compare(c: &mut Checker, lengths: &[usize], columns: usize, p: f64, dtype: DType) -> Result<()> {
    let ragged = batch(lengths)?;
    c.case(format!("{} x {columns}, p {p}, {dtype:?}", ragged.tokens()));
    let key = DropoutKey { seed: 7 << 40 | 3, step: 5, stream: 1 };
    let (dropout, rows) = (Dropout::new(p, key, 9), ragged.token_rows());
    let x = c.random(&[ragged.tokens(), columns], 1, dtype)?;
    let y = apply(&x, dropout.as_ref(), rows)?;
    // One product in f32 of a factor rounded to it.
    c.check("y", &y, &apply(&wide(&x)?, dropout.as_ref(), rows)?, 2e-7)?;
    if let Some(dropout) = &dropout {
        // In bf16 the product of the same two f32 numbers is rounded once.
        let x = x.to_device(&Device::Cpu)?.to_dtype(DType::F32)?;
        let bits = cpu::apply::<f32>(&x, dropout, rows)?.to_dtype(dtype)?;
        c.check_against("bits", &y, &bits, &bits, 0.0)?;
    }
    Ok(())
}

#[cfg(all(test, feature = "host-kernels"))]
mod host {
    use super::*;
    use crate::testing::on_host;

    #[test]
    fn host_kernel_drops_what_the_cpu_drops() -> Result<()> {
        on_host(|c| check(c, Sizes::Odd))
    }
}
