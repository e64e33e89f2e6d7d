//! The kernels of op.cu, run on the host, against the CPU implementation in f64.

use candle_core::Result;
use half::bf16;

use super::*;
use crate::{
    common::host_run::{
        Address, Buffer, Kernel, Storage, check, in_every_order, kernels, launch, rounded, seqlens,
    },
    testing::random,
};

#[repr(C)]
struct Pooling {
    from: Address,
    to: Address,
    cu_seqlens: Address,
    columns: i32,
    pool: i32,
}

kernels!(
    Pooling: host_pooling_forward_f32, host_pooling_forward_bf16, host_pooling_backward_f32,
        host_pooling_backward_bf16;
);

fn run<S: Storage>(
    kernel: Kernel<Pooling>,
    from: &Tensor,
    rows: usize,
    ragged: &Ragged,
    pool: Pool,
) -> Result<Buffer<S>> {
    let columns = from.dim(1)?;
    let (from, to) = (Buffer::<S>::tensor(from)?, Buffer::poisoned(rows * columns));
    let cu_seqlens = seqlens(ragged);
    let parameters = Pooling {
        from: from.address(),
        to: to.address(),
        cu_seqlens: cu_seqlens.address(),
        columns: columns as i32,
        pool: pool as i32,
    };
    launch(kernel, [columns.div_ceil(256), ragged.sequences(), 1], 0, &parameters);
    Ok(to)
}

fn compare<S: Storage>(ragged: &Ragged, h: usize, pool: Pool) -> Result<()> {
    let (forward_kernel, backward_kernel): (Kernel<Pooling>, Kernel<Pooling>) = if S::BF16 {
        (host_pooling_forward_bf16, host_pooling_backward_bf16)
    } else {
        (host_pooling_forward_f32, host_pooling_backward_f32)
    };
    let x = rounded::<S>(&random(&[ragged.tokens(), h], 1)?)?;
    let y = run::<S>(forward_kernel, &x, ragged.sequences(), ragged, pool)?;
    // A mean of 97 terms in f32.
    check("y", &y, &forward(&x, ragged, pool)?, 1e-6)?;
    let dy = rounded::<S>(&random(&[ragged.sequences(), h], 2)?)?;
    let dx = run::<S>(backward_kernel, &dy, ragged.tokens(), ragged, pool)?;
    check("dx", &dx, &backward(&dy, ragged, pool)?, 1e-7)
}

#[test]
fn host_pooling_matches_the_cpu() -> Result<()> {
    let ragged = Ragged::new(&[1, 97, 2, 13], &[4, 3, 2, 1])?;
    in_every_order(|| {
        for h in [1, 19, 264] {
            for pool in [Pool::First, Pool::Last, Pool::Mean] {
                compare::<f32>(&ragged, h, pool)?;
                compare::<bf16>(&ragged, h, pool)?;
            }
        }
        Ok(())
    })
}
