//! Launches of flash attention.

use candle_core::{DType, Result, Tensor, bail};

use super::{Attention, HEAD, Saved};
use crate::common::device::{
    Address, Launch, int, kernels, parameters::DropoutParameters, unwritten,
};

const OP: &str = "attention";
/// Threads of a block, of disentangled attention too.
pub(crate) const THREADS: u32 = 128;
const SHARED_BYTES: usize = 58368;

/// `Attention` of tile.cuh.
#[repr(C)]
pub(crate) struct Parameters {
    q: Address,
    k: Address,
    v: Address,
    o: Address,
    lse: Address,
    d_o: Address,
    delta: Address,
    dq: Address,
    dk: Address,
    dv: Address,
    cu_seqlens: Address,
    samples: Address,
    work: Address,
    stride: i32,
    tokens: i32,
    causal: i32,
    window: i32,
    scale: f32,
    dropout: DropoutParameters,
}

/// What a backward pass reads.
#[derive(Clone, Copy)]
pub(crate) struct Read<'a> {
    pub(crate) q: &'a Tensor,
    pub(crate) k: &'a Tensor,
    pub(crate) v: &'a Tensor,
    pub(crate) o: &'a Tensor,
    pub(crate) lse: &'a Tensor,
    pub(crate) d_o: &'a Tensor,
}

kernels!(
    Parameters, THREADS => attention_forward, attention_backward_queries, attention_backward_keys;
);

impl Parameters {
    /// Those that every launch has; the results, and what backward reads besides, are null.
    fn new<'a>(
        launch: &mut Launch<'a>,
        attention: Attention<'a>,
        [q, k, v]: [&'a Tensor; 3],
    ) -> Result<Self> {
        let Attention { ragged, heads, scale, dropout, span } = attention;
        Ok(Self {
            q: launch.read(q, DType::BF16)?,
            k: launch.read(k, DType::BF16)?,
            v: launch.read(v, DType::BF16)?,
            o: Address::NULL,
            lse: Address::NULL,
            d_o: Address::NULL,
            delta: Address::NULL,
            dq: Address::NULL,
            dk: Address::NULL,
            dv: Address::NULL,
            cu_seqlens: launch.mirror(ragged.starts())?,
            samples: launch.mirror(&ragged.sequence_rows().sample)?,
            work: launch.mirror(ragged.tiles())?,
            stride: int(OP, heads * HEAD)?,
            tokens: int(OP, ragged.tokens())?,
            causal: i32::from(span.causal),
            window: span.window.map_or(i32::MAX, |w| i32::try_from(w).unwrap_or(i32::MAX)),
            scale: scale as f32,
            dropout: DropoutParameters::new(dropout),
        })
    }

    /// Of forward, which writes `o` and `lse`.
    pub(crate) fn forward<'a>(
        launch: &mut Launch<'a>,
        attention: Attention<'a>,
        qkv: [&'a Tensor; 3],
        [o, lse]: [&'a Tensor; 2],
    ) -> Result<Self> {
        Ok(Self {
            o: launch.write(o, DType::BF16)?,
            lse: launch.write(lse, DType::F32)?,
            ..Self::new(launch, attention, qkv)?
        })
    }

    /// Of backward's query side, which writes `delta` and `dq`, where there is one.
    pub(crate) fn queries<'a>(
        launch: &mut Launch<'a>,
        attention: Attention<'a>,
        Read { q, k, v, o, lse, d_o }: Read<'a>,
        dq: Option<&'a Tensor>,
        delta: &'a Tensor,
    ) -> Result<Self> {
        Ok(Self {
            o: launch.read(o, DType::BF16)?,
            lse: launch.read(lse, DType::F32)?,
            d_o: launch.read(d_o, DType::BF16)?,
            dq: launch.write_some(dq, DType::BF16)?,
            delta: launch.write(delta, DType::F32)?,
            ..Self::new(launch, attention, [q, k, v])?
        })
    }

    /// Of backward's key side, which reads the queries' `delta` and writes `dk` and `dv`.
    pub(crate) fn keys<'a>(
        launch: &mut Launch<'a>,
        attention: Attention<'a>,
        read: Read<'a>,
        [dk, dv]: [&'a Tensor; 2],
        delta: &'a Tensor,
    ) -> Result<Self> {
        Ok(Self {
            dk: launch.write(dk, DType::BF16)?,
            dv: launch.write(dv, DType::BF16)?,
            ..Self::key_side(launch, attention, read, delta)?
        })
    }

    /// What a key side reads; where it writes is for its caller to say.
    pub(crate) fn key_side<'a>(
        launch: &mut Launch<'a>,
        attention: Attention<'a>,
        Read { q, k, v, lse, d_o, .. }: Read<'a>,
        delta: &'a Tensor,
    ) -> Result<Self> {
        Ok(Self {
            lse: launch.read(lse, DType::F32)?,
            d_o: launch.read(d_o, DType::BF16)?,
            delta: launch.read(delta, DType::F32)?,
            ..Self::new(launch, attention, [q, k, v])?
        })
    }
}

/// Size of the heads, if the kernels take it and queries of this dtype.
pub(crate) fn head_size(op: &str, q: &Tensor, heads: usize) -> Result<usize> {
    let head = q.dim(1)? / heads;
    if head > HEAD {
        bail!("{op}: heads of {head}; the CUDA kernels take heads of up to {HEAD}");
    }
    if q.dtype() != DType::BF16 {
        bail!("{op}: q of {:?}; the CUDA kernels take BF16", q.dtype());
    }
    Ok(head)
}

/// `[rows, h·64]` from `[rows, h·d]`: zeros behind each head.
pub(crate) fn widened(x: &Tensor, heads: usize) -> Result<Tensor> {
    let (rows, width) = x.dims2()?;
    let head = width / heads;
    let padded = x.reshape((rows, heads, head))?.pad_with_zeros(2, 0, HEAD - head)?;
    padded.reshape((rows, heads * HEAD))
}

/// `[rows, h·d]` from `[rows, h·64]`: [`widened`] undone.
pub(crate) fn narrowed(x: &Tensor, heads: usize, head: usize) -> Result<Tensor> {
    let rows = x.dim(0)?;
    let kept = x.reshape((rows, heads, HEAD))?.narrow(2, 0, head)?;
    kept.contiguous()?.reshape((rows, heads * head))
}

/// One block a tile of the batch and head.
pub(crate) fn grid(attention: Attention<'_>) -> [usize; 3] {
    [attention.ragged.tiles().len(), attention.heads, 1]
}

pub(super) fn forward(
    attention: Attention<'_>,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
) -> Result<(Tensor, Tensor)> {
    let (heads, head) = (attention.heads, head_size(OP, q, attention.heads)?);
    if head < HEAD {
        let wide = |x| widened(x, heads);
        let (o, lse) = forward(attention, &wide(q)?, &wide(k)?, &wide(v)?)?;
        return Ok((narrowed(&o, heads, head)?, lse));
    }
    let o = unwritten(q.device(), q.dims(), DType::BF16)?;
    let lse = unwritten(q.device(), (attention.heads, q.dim(0)?), DType::F32)?;
    let mut launch = Launch::on(OP, q)?;
    let parameters = Parameters::forward(&mut launch, attention, [q, k, v], [&o, &lse])?;
    launch.run(attention_forward, grid(attention), SHARED_BYTES, &parameters)?;
    Ok((o, lse))
}

pub(super) fn backward(
    attention: Attention<'_>,
    saved: &Saved,
    d_o: &Tensor,
) -> Result<(Tensor, Tensor, Tensor)> {
    let Saved { q, k, v, o, lse } = saved;
    let (heads, head) = (attention.heads, head_size(OP, q, attention.heads)?);
    if head < HEAD {
        let wide = |x| widened(x, heads);
        let lse = lse.clone();
        let saved = Saved { q: wide(q)?, k: wide(k)?, v: wide(v)?, o: wide(o)?, lse };
        let (dq, dk, dv) = backward(attention, &saved, &wide(d_o)?)?;
        let narrow = |x| narrowed(x, heads, head);
        return Ok((narrow(&dq)?, narrow(&dk)?, narrow(&dv)?));
    }
    let like = |x: &Tensor| unwritten(x.device(), x.dims(), x.dtype());
    let (dq, dk, dv, delta) = (like(q)?, like(q)?, like(q)?, like(lse)?);
    let read = Read { q, k, v, o, lse, d_o };
    let mut launch = Launch::on(OP, q)?;
    let queries = Parameters::queries(&mut launch, attention, read, Some(&dq), &delta)?;
    launch.run(attention_backward_queries, grid(attention), SHARED_BYTES, &queries)?;
    let mut launch = Launch::on(OP, q)?;
    let keys = Parameters::keys(&mut launch, attention, read, [&dk, &dv], &delta)?;
    launch.run(attention_backward_keys, grid(attention), SHARED_BYTES, &keys)?;
    Ok((dq, dk, dv))
}
