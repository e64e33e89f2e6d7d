//! The kernel of op.cu, run on the host: it drops what the CPU drops, bit for bit.

use candle_core::Result;
use half::bf16;

use super::*;
use crate::{
    Ragged,
    common::{
        DropoutKey,
        host_run::{
            Address, Buffer, DropoutParameters, RowIdBuffers, RowIdParameters, Storage,
            in_every_order, kernels, launch, rounded,
        },
    },
    testing::random,
};

#[repr(C)]
struct Apply {
    x: Address,
    y: Address,
    dropout: DropoutParameters,
    ids: RowIdParameters,
    rows: i32,
    columns: i32,
}
kernels!(Apply: host_dropout_apply_f32, host_dropout_apply_bf16;);

fn run<S: Storage>(x: &Tensor, dropout: &Dropout, rows: &RowIds) -> Result<Buffer<S>> {
    let (t, n) = x.dims2()?;
    let (x, y, ids) = (Buffer::<S>::tensor(x)?, Buffer::poisoned(t * n), RowIdBuffers::new(rows));
    let parameters = Apply {
        x: x.address(),
        y: y.address(),
        dropout: DropoutParameters::new(Some(dropout)),
        ids: ids.parameters(),
        rows: t as i32,
        columns: n as i32,
    };
    let kernel = if S::BF16 { host_dropout_apply_bf16 } else { host_dropout_apply_f32 };
    launch(kernel, [(t * n.div_ceil(8)).div_ceil(256), 1, 1], 0, &parameters);
    Ok(y)
}

#[test]
fn host_kernel_drops_what_the_cpu_drops() -> Result<()> {
    let key = DropoutKey { seed: 7 << 40 | 3, step: 5, stream: 1 };
    in_every_order(|| {
        for (lengths, columns) in [(vec![5usize, 1, 91], 19), (vec![1], 1), (vec![30, 34], 264)] {
            let samples: Vec<u32> = (0..lengths.len() as u32).map(|i| 1000 * i + 31).collect();
            let ragged = Ragged::new(&lengths, &samples)?;
            for p in [0.1, 0.5] {
                let dropout = Dropout::new(p, key, 9).expect("p > 0");
                let x = random(&[ragged.tokens(), columns], 1)?;
                let exact = apply(
                    &rounded::<f32>(&x)?.to_dtype(candle_core::DType::F32)?,
                    Some(&dropout),
                    ragged.token_rows(),
                )?;
                let got = run::<f32>(&x, &dropout, ragged.token_rows())?;
                assert_eq!(got.values(), exact.flatten_all()?.to_vec1::<f32>()?);
                // In bf16 the product of the same two f32 numbers is rounded once.
                let wide = rounded::<bf16>(&x)?.to_dtype(candle_core::DType::F32)?;
                let exact = apply(&wide, Some(&dropout), ragged.token_rows())?;
                let got = run::<bf16>(&x, &dropout, ragged.token_rows())?;
                let exact = exact.flatten_all()?.to_vec1::<f32>()?;
                assert_eq!(got.values(), exact.into_iter().map(bf16::from_f32).collect::<Vec<_>>());
            }
        }
        Ok(())
    })
}
