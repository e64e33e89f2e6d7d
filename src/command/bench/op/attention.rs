//! Attention on its own, and as a layer with its projections.

use allreel_kernels::attention::{self, Attention, Saved, Span};
use candle_core::Result;

use super::{Case, Pass, Setup, Sizes, Work, projections, projections::Projections};
use crate::command::bench::measure::Body;

/// Every length, forward and both, without and with the projections.
pub fn cases(setup: &Setup) -> Vec<Case> {
    let each = |&length: &usize| {
        let own = Pass::ALL.map(|pass| op("attention", setup, length, pass));
        let layers = Pass::ALL.map(|pass| layer("attention", setup, length, pass));
        own.into_iter().chain(layers)
    };
    setup.sizes.lengths.iter().flat_map(each).collect()
}

/// q, k, v to o.
pub fn op(name: &str, setup: &Setup, length: usize, pass: Pass) -> Case {
    let name = format!("{name} {}", pass.name());
    let work = work(&setup.sizes, setup.element(), length, pass);
    Case::new(name, setup.sizes.attention(length), work, move |setup| run(setup, length, pass))
}

/// x to o.
pub fn layer(name: &str, setup: &Setup, length: usize, pass: Pass) -> Case {
    let name = format!("{name} + projections {}", pass.name());
    let sizes = &setup.sizes;
    let work = work(sizes, setup.element(), length, pass)
        + projections::work(sizes.tokens, sizes.width(), setup.element(), pass);
    Case::new(name, sizes.attention(length), work, move |setup| run_layer(setup, length, pass))
}

/// Two products of `[L, L, d]` forward, five backward, for each head and sequence. Read and written
/// are q, k, v, o and lse; then those and do, dq, dk, dv.
pub fn work(sizes: &Sizes, element: f64, length: usize, pass: Pass) -> Work {
    let (tokens, width) = (sizes.tokens as f64, sizes.width() as f64);
    let product = 2.0 * tokens * length as f64 * width;
    let lse = 4.0 * tokens * sizes.heads as f64;
    let operand = element * tokens * width;
    pass.work(
        Work { bytes: 4.0 * operand + lse, flops: 2.0 * product },
        Work { bytes: 8.0 * operand + lse, flops: 5.0 * product },
    )
}

fn run(setup: &Setup, length: usize, pass: Pass) -> Result<Body> {
    let (ragged, dropout) = (setup.ragged(length)?, setup.dropout());
    let Sizes { tokens, heads, head_size, .. } = setup.sizes;
    let operand = || setup.normal((tokens, heads * head_size));
    let (q, k, v, d_o) = (operand()?, operand()?, operand()?, operand()?);
    let scale = 1.0 / (head_size as f64).sqrt();
    Ok(Box::new(move || {
        let (ragged, dropout) = (&ragged, dropout.as_ref());
        let op = Attention { ragged, heads, scale, dropout, span: Span::default() };
        let (o, lse) = attention::forward(op, &q, &k, &v)?;
        if pass == Pass::Both {
            let saved = Saved { q: q.clone(), k: k.clone(), v: v.clone(), o, lse };
            attention::backward(op, &saved, &d_o)?;
        }
        Ok(())
    }))
}

fn run_layer(setup: &Setup, length: usize, pass: Pass) -> Result<Body> {
    let (ragged, dropout) = (setup.ragged(length)?, setup.dropout());
    let Sizes { tokens, heads, head_size, .. } = setup.sizes;
    let projections = Projections::new(setup)?;
    let d_o = setup.normal((tokens, heads * head_size))?;
    let scale = 1.0 / (head_size as f64).sqrt();
    Ok(Box::new(move || {
        let (ragged, dropout) = (&ragged, dropout.as_ref());
        let op = Attention { ragged, heads, scale, dropout, span: Span::default() };
        let [q, k, v] = projections.forward()?;
        let (o, lse) = attention::forward(op, &q, &k, &v)?;
        if pass == Pass::Both {
            let saved = Saved { q, k, v, o, lse };
            let (dq, dk, dv) = attention::backward(op, &saved, &d_o)?;
            projections.backward([&dq, &dk, &dv])?;
        }
        Ok(())
    }))
}
