//! Launches of a prefix: attention's tiles and parameters, with keys that no sequence owns.

use candle_core::{DType, Result, Tensor};

use super::{OP, Prefix, Saved};
use crate::{
    attention::{
        Attention, HEAD, Span,
        device::{self as attention, THREADS},
    },
    common::{
        device::{Address, Launch, int, kernels, parameters::add_partials, unwritten},
        ragged::TILE,
    },
};

const SHARED_BYTES: usize = 41472;
/// Blocks of the key side, about: as disentangled attention's, two on each multiprocessor of an H200 and
/// the same on any device, so that sums round the same.
const BLOCKS: usize = match cfg!(test) {
    true => 6, // so that tests of few tiles have blocks that take several
    false => 264,
};

/// `Prefix` of op.cu.
#[repr(C)]
struct Parameters {
    attention: attention::Parameters,
    own_o: Address,
    own_lse: Address,
    d_keys: Address,
    d_values: Address,
    keys: i32,
    tiles: i32,
}

kernels!(
    Parameters, THREADS => prefix_forward, prefix_backward_queries, prefix_backward_keys;
);

impl Parameters {
    /// With what every launch has; forward's operands and the partial sums are null.
    fn new(attention: attention::Parameters, prefix: Prefix<'_>, keys: &Tensor) -> Result<Self> {
        Ok(Self {
            attention,
            own_o: Address::NULL,
            own_lse: Address::NULL,
            d_keys: Address::NULL,
            d_values: Address::NULL,
            keys: int(OP, keys.dim(0)?)?,
            tiles: int(OP, prefix.ragged.tiles().len())?,
        })
    }
}

/// What the attention kernels' parameters are made of.
fn plain(prefix: Prefix<'_>) -> Attention<'_> {
    let Prefix { ragged, heads, scale, dropout } = prefix;
    Attention { ragged, heads, scale, dropout, span: Span::default() }
}

pub(super) fn forward(prefix: Prefix<'_>, saved: Saved<'_>) -> Result<(Tensor, Tensor)> {
    let Saved { q, keys, values, o: own_o, lse: own_lse } = saved;
    let (heads, head) = (prefix.heads, attention::head_size(OP, q, prefix.heads)?);
    if head < HEAD {
        let wide = |x| attention::widened(x, heads);
        let (q, keys, values, o) = (wide(q)?, wide(keys)?, wide(values)?, wide(own_o)?);
        let saved = Saved { q: &q, keys: &keys, values: &values, o: &o, lse: own_lse };
        let (o, lse) = forward(prefix, saved)?;
        return Ok((attention::narrowed(&o, heads, head)?, lse));
    }
    let o = unwritten(q.device(), q.dims(), DType::BF16)?;
    let lse = unwritten(q.device(), own_lse.dims(), DType::F32)?;
    let (mut launch, plain) = (Launch::on(OP, q)?, plain(prefix));
    let of_tiles =
        attention::Parameters::forward(&mut launch, plain, [q, keys, values], [&o, &lse])?;
    let parameters = Parameters {
        own_o: launch.read(own_o, DType::BF16)?,
        own_lse: launch.read(own_lse, DType::F32)?,
        ..Parameters::new(of_tiles, prefix, keys)?
    };
    launch.run(prefix_forward, attention::grid(plain), SHARED_BYTES, &parameters)?;
    Ok((o, lse))
}

pub(super) fn backward(
    prefix: Prefix<'_>,
    saved: Saved<'_>,
    d_o: &Tensor,
    dq: Option<&Tensor>,
) -> Result<(Tensor, Tensor)> {
    let Saved { q, keys, values, o, lse } = saved;
    let head = attention::head_size(OP, q, prefix.heads)?;
    if head < HEAD {
        return backward_narrow(prefix, saved, d_o, dq, head);
    }
    let read = attention::Read { q, k: keys, v: values, o, lse, d_o };
    let delta = unwritten(q.device(), lse.dims(), DType::F32)?;
    let (mut launch, plain) = (Launch::on(OP, q)?, plain(prefix));
    let queries = attention::Parameters::queries(&mut launch, plain, read, dq, &delta)?;
    let queries = Parameters::new(queries, prefix, keys)?;
    launch.run(prefix_backward_queries, attention::grid(plain), SHARED_BYTES, &queries)?;

    let zeros = || Tensor::zeros(keys.dims(), DType::F32, q.device());
    let (d_keys, d_values) = (zeros()?, zeros()?);
    let key_tiles = keys.dim(0)?.div_ceil(TILE);
    let parts = prefix.ragged.tiles().len().min(BLOCKS.div_ceil(prefix.heads * key_tiles));
    if parts == 0 {
        return Ok((d_keys, d_values));
    }
    let partials = || unwritten(q.device(), (parts, keys.elem_count()), DType::F32);
    let (of_keys, of_values) = (partials()?, partials()?);
    let mut launch = Launch::on(OP, q)?;
    let key_side = attention::Parameters::key_side(&mut launch, plain, read, &delta)?;
    let parameters = Parameters {
        d_keys: launch.write(&of_keys, DType::F32)?,
        d_values: launch.write(&of_values, DType::F32)?,
        ..Parameters::new(key_side, prefix, keys)?
    };
    launch.run(
        prefix_backward_keys,
        [parts, prefix.heads, key_tiles],
        SHARED_BYTES,
        &parameters,
    )?;
    add_partials(OP, &of_keys, &d_keys)?;
    add_partials(OP, &of_values, &d_values)?;
    Ok((d_keys, d_values))
}

/// [`backward`] of heads narrower than the kernels take.
fn backward_narrow(
    prefix: Prefix<'_>,
    saved: Saved<'_>,
    d_o: &Tensor,
    dq: Option<&Tensor>,
    head: usize,
) -> Result<(Tensor, Tensor)> {
    let heads = prefix.heads;
    let wide = |x| attention::widened(x, heads);
    let narrow = |x| attention::narrowed(x, heads, head);
    let (q, keys, values) = (wide(saved.q)?, wide(saved.keys)?, wide(saved.values)?);
    let (o, lse) = (wide(saved.o)?, saved.lse);
    let saved = Saved { q: &q, keys: &keys, values: &values, o: &o, lse };
    let wide_dq = dq.map(wide).transpose()?;
    let (d_keys, d_values) = backward(prefix, saved, &wide(d_o)?, wide_dq.as_ref())?;
    if let (Some(dq), Some(wide_dq)) = (dq, &wide_dq) {
        dq.slice_set(&narrow(wide_dq)?, 0, 0)?;
    }
    Ok((narrow(&d_keys)?, narrow(&d_values)?))
}
