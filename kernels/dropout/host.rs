//! The kernel of op.cu, run on the host: it drops what the CPU drops, bit for bit.

use candle_core::{DType, Result};
use half::bf16;

use super::*;
use crate::{
    Ragged,
    common::{DropoutKey, host_run::in_every_order},
    testing::{random, rounded},
};

#[test]
fn host_kernel_drops_what_the_cpu_drops() -> Result<()> {
    let key = DropoutKey { seed: 7 << 40 | 3, step: 5, stream: 1 };
    in_every_order(|| {
        for (lengths, columns) in [(vec![5usize, 1, 91], 19), (vec![1], 1), (vec![30, 34], 264)] {
            let samples: Vec<u32> = (0..lengths.len() as u32).map(|i| 1000 * i + 31).collect();
            let ragged = Ragged::new(&lengths, &samples)?;
            let rows = ragged.token_rows();
            for p in [0.1, 0.5] {
                let dropout = Dropout::new(p, key, 9).expect("p > 0");
                let x = rounded(&random(&[ragged.tokens(), columns], 1)?, DType::F32)?;
                let got = device::apply(&x, &dropout, rows)?;
                let exact = apply(&x, Some(&dropout), rows)?;
                assert_eq!(got.to_vec2::<f32>()?, exact.to_vec2::<f32>()?);
                // In bf16 the product of the same two f32 numbers is rounded once.
                let x = rounded(&x, DType::BF16)?;
                let got = device::apply(&x, &dropout, rows)?;
                let exact = apply(&rounded(&x, DType::F32)?, Some(&dropout), rows)?;
                let exact = rounded(&exact, DType::BF16)?;
                assert_eq!(got.to_vec2::<bf16>()?, exact.to_vec2::<bf16>()?);
            }
        }
        Ok(())
    })
}
