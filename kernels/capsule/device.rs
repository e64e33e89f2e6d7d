//! Launches of capsules.

use candle_core::{DType, Result, Tensor, bail};

use super::{OP, Routing};
use crate::common::{
    Ragged,
    device::{Address, Launch, int, kernels, of_dtype, unwritten},
};

const THREADS: u32 = 256;
/// J·D at most: vectors of that length are in a block's shared memory, up to three.
const WIDEST: usize = 2048;

#[repr(C)]
struct RoutingParameters {
    capsules: i32,
    size: i32,
    iterations: i32,
}

#[repr(C)]
struct Forward {
    u: Address,
    v: Address,
    sums: Address,
    couplings: Address,
    cu_seqlens: Address,
    routing: RoutingParameters,
}

#[repr(C)]
struct Backward {
    u: Address,
    dv: Address,
    sums: Address,
    du: Address,
    couplings: Address,
    logits: Address,
    vectors: Address,
    cu_seqlens: Address,
    routing: RoutingParameters,
    rows: i32,
}

kernels!(
    Forward, THREADS => capsule_forward_f32, capsule_forward_bf16;
    Backward, THREADS => capsule_backward_f32, capsule_backward_bf16;
);

fn parameters(routing: Routing, rows: usize) -> Result<RoutingParameters> {
    let Routing { capsules, size, iterations } = routing;
    if routing.columns() > WIDEST {
        bail!("{OP}: {capsules} capsules of {size} columns, the kernels take {WIDEST} in all");
    }
    int(OP, rows * capsules)?;
    Ok(RoutingParameters {
        capsules: int(OP, capsules)?,
        size: int(OP, size)?,
        iterations: int(OP, iterations)?,
    })
}

/// Shared memory of vectors.
fn shared(vectors: usize, routing: Routing) -> usize {
    vectors * routing.columns() * size_of::<f32>()
}

/// v and s of every iteration, f32.
pub(super) fn forward(u: &Tensor, ragged: &Ragged, routing: Routing) -> Result<(Tensor, Tensor)> {
    let kernel = of_dtype(OP, u, capsule_forward_f32, capsule_forward_bf16)?;
    let (rows, columns) = u.dims2()?;
    let sequences = ragged.sequences();
    let v = unwritten(u.device(), (sequences, columns), u.dtype())?;
    let sums = unwritten(u.device(), (sequences, routing.iterations * columns), DType::F32)?;
    let couplings = unwritten(u.device(), (rows, routing.capsules), DType::F32)?;
    let mut launch = Launch::on(OP, u)?;
    let parameters = Forward {
        u: launch.read(u, u.dtype())?,
        v: launch.write(&v, u.dtype())?,
        sums: launch.write(&sums, DType::F32)?,
        couplings: launch.write(&couplings, DType::F32)?,
        cu_seqlens: launch.mirror(ragged.starts())?,
        routing: parameters(routing, rows)?,
    };
    launch.run(kernel, [sequences, 1, 1], shared(2, routing), &parameters)?;
    Ok((v, sums))
}

pub(super) fn backward(
    u: &Tensor,
    sums: &Tensor,
    dv: &Tensor,
    ragged: &Ragged,
    routing: Routing,
) -> Result<Tensor> {
    let kernel = of_dtype(OP, dv, capsule_backward_f32, capsule_backward_bf16)?;
    let ((rows, columns), dtype, sequences) = (u.dims2()?, dv.dtype(), ragged.sequences());
    let du = unwritten(dv.device(), (rows, columns), dtype)?;
    // All votes count alike in the first iteration; a routing of one alone leaves this unread.
    let of_rows = ((routing.iterations - 1).max(1), rows, routing.capsules);
    let couplings = unwritten(dv.device(), of_rows, DType::F32)?;
    let logits = unwritten(dv.device(), of_rows, DType::F32)?;
    let of_sequences = (sequences, routing.iterations, 2 * columns);
    let vectors = unwritten(dv.device(), of_sequences, DType::F32)?;
    let mut launch = Launch::on(OP, dv)?;
    let parameters = Backward {
        u: launch.read(u, dtype)?,
        dv: launch.read(dv, dtype)?,
        sums: launch.read(sums, DType::F32)?,
        du: launch.write(&du, dtype)?,
        couplings: launch.write(&couplings, DType::F32)?,
        logits: launch.write(&logits, DType::F32)?,
        vectors: launch.write(&vectors, DType::F32)?,
        cu_seqlens: launch.mirror(ragged.starts())?,
        routing: parameters(routing, rows)?,
        rows: int(OP, rows)?,
    };
    launch.run(kernel, [sequences, 1, 1], shared(3, routing), &parameters)?;
    Ok(du)
}
