//! Launches of disentangled flash attention.

use candle_core::{DType, Result, Tensor};

use super::{Disentangled, Gradients, Saved};
use crate::{
    attention::{
        Attention, HEAD, Span,
        device::{self as attention, THREADS},
    },
    common::device::{Address, Launch, int, kernels, unwritten},
};

const OP: &str = "disentangled attention";
const FORWARD_BYTES: usize = 111104;
const BACKWARD_BYTES: usize = 103424;
const SUM_THREADS: usize = 256;
/// Blocks of a backward pass, about: two on each of the 132 multiprocessors of an H100 or H200, which is what
/// their shared memory holds. It is the same on any device, so that sums round the same. At 512 rows of the
/// tables their partial sums take 33 MiB, which those devices' 50 MB of L2 hold; more blocks would not fit.
const BLOCKS: usize = match cfg!(test) {
    true => 6, // so that tests of few tiles have blocks that take several
    false => 264,
};

/// `Positions` of position.cuh.
#[repr(C)]
struct PositionParameters {
    pk: Address,
    pq: Address,
    slots: Address,
    partials: Address,
    stride: i32,
    center: i32,
    rows: i32,
    tiles: i32,
}

#[repr(C)]
struct Parameters {
    attention: attention::Parameters,
    positions: PositionParameters,
}

#[repr(C)]
struct SumPositions {
    partials: Address,
    gradient: Address,
    parts: i32,
    heads: i32,
    rows: i32,
}

kernels!(
    Parameters, THREADS => disentangled_forward, disentangled_backward_queries,
        disentangled_backward_keys;
    SumPositions, SUM_THREADS as u32 => disentangled_sum_positions;
);

/// What both kinds of attention have.
fn plain(op: Disentangled<'_>) -> Attention<'_> {
    let Disentangled { ragged, heads, scale, dropout, .. } = op;
    Attention { ragged, heads, scale, dropout, span: Span::default() }
}

impl PositionParameters {
    fn new<'a>(
        launch: &mut Launch<'a>,
        op: Disentangled<'a>,
        [pk, pq]: [Option<&'a Tensor>; 2],
        partials: Option<&'a Tensor>,
    ) -> Result<Self> {
        Ok(Self {
            pk: launch.read_some(pk, DType::BF16)?,
            pq: launch.read_some(pq, DType::BF16)?,
            slots: launch.mirror(op.positions.places())?,
            partials: launch.write_some(partials, DType::F32)?,
            stride: int(OP, op.heads * HEAD)?,
            center: int(OP, op.positions.max_len() - 1)?,
            rows: int(OP, op.positions.rows().len())?,
            tiles: int(OP, op.ragged.tiles().len())?,
        })
    }
}

pub(super) fn forward(
    op: Disentangled<'_>,
    [q, k, v]: [&Tensor; 3],
    pk: Option<&Tensor>,
    pq: Option<&Tensor>,
) -> Result<(Tensor, Tensor)> {
    let head = attention::head_size(OP, q, op.heads)?;
    if head < HEAD {
        let wide = |x: &Tensor| attention::widened(x, op.heads);
        let (pk, pq) = (pk.map(wide).transpose()?, pq.map(wide).transpose()?);
        let (q, k, v) = (wide(q)?, wide(k)?, wide(v)?);
        let (o, lse) = forward(op, [&q, &k, &v], pk.as_ref(), pq.as_ref())?;
        return Ok((attention::narrowed(&o, op.heads, head)?, lse));
    }
    let o = unwritten(q.device(), q.dims(), DType::BF16)?;
    let lse = unwritten(q.device(), (op.heads, q.dim(0)?), DType::F32)?;
    let mut launch = Launch::on(OP, q)?;
    let parameters = Parameters {
        attention: attention::Parameters::forward(&mut launch, plain(op), [q, k, v], [&o, &lse])?,
        positions: PositionParameters::new(&mut launch, op, [pk, pq], None)?,
    };
    launch.run(disentangled_forward, attention::grid(plain(op)), FORWARD_BYTES, &parameters)?;
    Ok((o, lse))
}

/// Blocks a head of a backward pass: as many partial sums of a table's gradient, or one a tile where none
/// is wanted.
fn parts(op: Disentangled<'_>, gradient: bool) -> usize {
    let tiles = op.ragged.tiles().len();
    if gradient { tiles.min(BLOCKS.div_ceil(op.heads)) } else { tiles }
}

pub(super) fn backward(
    op: Disentangled<'_>,
    saved: &Saved,
    d_o: &Tensor,
    position_gradients: bool,
) -> Result<Gradients> {
    let Saved { q, k, v, pk, pq, o, lse } = saved;
    let head = attention::head_size(OP, q, op.heads)?;
    if head < HEAD {
        return backward_narrow(op, saved, d_o, position_gradients, head);
    }
    let tables = [pk.as_ref(), pq.as_ref()];
    let [to_pk, to_pq] = tables.map(|table| table.is_some() && position_gradients);
    let like = |x: &Tensor| unwritten(x.device(), x.dims(), x.dtype());
    let (dq, dk, dv, delta) = (like(q)?, like(q)?, like(q)?, like(lse)?);
    let read = attention::Read { q, k, v, o, lse, d_o };

    let pk_partials = to_pk.then(|| partials(op, q)).transpose()?;
    let mut launch = Launch::on(OP, q)?;
    let queries = Parameters {
        attention: attention::Parameters::queries(&mut launch, plain(op), read, Some(&dq), &delta)?,
        positions: PositionParameters::new(&mut launch, op, tables, pk_partials.as_ref())?,
    };
    let grid = [parts(op, to_pk), op.heads, 1];
    launch.run(disentangled_backward_queries, grid, BACKWARD_BYTES, &queries)?;
    let pk = pk_partials.map(|partials| sum_positions(&partials)).transpose()?;

    let pq_partials = to_pq.then(|| partials(op, q)).transpose()?;
    let mut launch = Launch::on(OP, q)?;
    let keys = Parameters {
        attention: attention::Parameters::keys(&mut launch, plain(op), read, [&dk, &dv], &delta)?,
        positions: PositionParameters::new(&mut launch, op, tables, pq_partials.as_ref())?,
    };
    let grid = [parts(op, to_pq), op.heads, 1];
    launch.run(disentangled_backward_keys, grid, BACKWARD_BYTES, &keys)?;
    let pq = pq_partials.map(|partials| sum_positions(&partials)).transpose()?;
    Ok(Gradients { q: dq, k: dk, v: dv, pk, pq })
}

/// [`backward`] of heads narrower than the kernels take.
fn backward_narrow(
    op: Disentangled<'_>,
    saved: &Saved,
    d_o: &Tensor,
    position_gradients: bool,
    head: usize,
) -> Result<Gradients> {
    let wide = |x: &Tensor| attention::widened(x, op.heads);
    let saved = Saved {
        q: wide(&saved.q)?,
        k: wide(&saved.k)?,
        v: wide(&saved.v)?,
        pk: saved.pk.as_ref().map(wide).transpose()?,
        pq: saved.pq.as_ref().map(wide).transpose()?,
        o: wide(&saved.o)?,
        lse: saved.lse.clone(),
    };
    let Gradients { q, k, v, pk, pq } = backward(op, &saved, &wide(d_o)?, position_gradients)?;
    let narrow = |x: Tensor| attention::narrowed(&x, op.heads, head);
    Ok(Gradients {
        q: narrow(q)?,
        k: narrow(k)?,
        v: narrow(v)?,
        pk: pk.map(narrow).transpose()?,
        pq: pq.map(narrow).transpose()?,
    })
}

/// Memory for every block's sums of a table's gradient, `[parts, h, R, 64]`.
fn partials(op: Disentangled<'_>, q: &Tensor) -> Result<Tensor> {
    let shape = (parts(op, true), op.heads, op.positions.rows().len(), HEAD);
    unwritten(q.device(), shape, DType::F32)
}

/// The gradient of a table, `[R, 64h]` in bf16: rounded once, for it goes through a linear like any other.
fn sum_positions(partials: &Tensor) -> Result<Tensor> {
    let (parts, heads, rows, _) = partials.dims4()?;
    let gradient = unwritten(partials.device(), (rows, heads * HEAD), DType::BF16)?;
    let mut launch = Launch::on(OP, partials)?;
    let parameters = SumPositions {
        partials: launch.read(partials, DType::F32)?,
        gradient: launch.write(&gradient, DType::BF16)?,
        parts: int(OP, parts)?,
        heads: int(OP, heads)?,
        rows: int(OP, rows)?,
    };
    let grid = [(rows * heads * HEAD).div_ceil(SUM_THREADS), 1, 1];
    launch.run(disentangled_sum_positions, grid, 0, &parameters)?;
    Ok(gradient)
}
