//! Disentangled attention beside plain attention of the same shape, in turn: what the position terms
//! cost. DeBERTa-v3's positions: 256 buckets that end at distance 512, keys and queries of positions by
//! the projections of the content.

use allreel_kernels::disentangled::{self, Disentangled, Gradients, Positions, Saved};
use candle_core::Result;

use super::{Case, Pass, Setup, Sizes, Work, attention, projections};
use crate::command::bench::measure::Body;
use projections::{Projections, To};

const BUCKETS: usize = 256;
const MAX_RELATIVE: usize = 512;
/// Plain attention, where it is what the rest of a group is compared with.
const PLAIN: &str = "disentangled: plain";

/// For every length and pass plain attention and then ours, without and with the projections.
pub fn groups(setup: &Setup) -> Vec<Vec<Case>> {
    let each = |&length: &usize| {
        let own = Pass::ALL
            .map(|pass| vec![attention::op(PLAIN, setup, length, pass), op(setup, length, pass)]);
        let layers = Pass::ALL.map(|pass| {
            vec![attention::layer(PLAIN, setup, length, pass), layer(setup, length, pass)]
        });
        own.into_iter().chain(layers)
    };
    setup.sizes.lengths.iter().flat_map(each).collect()
}

fn positions(length: usize) -> Positions {
    Positions::new(Some(BUCKETS), MAX_RELATIVE, length)
}

fn op(setup: &Setup, length: usize, pass: Pass) -> Case {
    let name = format!("disentangled {}", pass.name());
    let sizes = setup.sizes.attention(length);
    let work = work(&setup.sizes, setup.element(), length, &positions(length), pass);
    Case::new(name, sizes, work, move |setup| run(setup, length, pass))
}

fn layer(setup: &Setup, length: usize, pass: Pass) -> Case {
    let name = format!("disentangled + projections {}", pass.name());
    let (sizes, element) = (&setup.sizes, setup.element());
    let (width, positions) = (sizes.width(), positions(length));
    let work = work(sizes, element, length, &positions, pass)
        + projections::work(sizes.tokens, width, element, pass)
        + projections::work_of_rows(positions.rows().len(), width, element, pass);
    Case::new(name, sizes.attention(length), work, move |setup| run_layer(setup, length, pass))
}

/// That of plain attention, and for each of PK and PQ a product of each token with every row that its
/// sequence makes it read, three backward (again, the token's gradient, the row's). PK and PQ are read,
/// and read again backward, and their gradients written.
pub fn work(sizes: &Sizes, element: f64, length: usize, positions: &Positions, pass: Pass) -> Work {
    let sequences = (sizes.tokens / length) as f64;
    let width = sizes.width() as f64;
    let products = 2.0 * 2.0 * sequences * rows_read(positions, length) as f64 * width;
    let tables = 2.0 * element * positions.rows().len() as f64 * width;
    let extra = pass.work(
        Work { bytes: tables, flops: products },
        Work { bytes: 2.0 * tables, flops: 3.0 * products },
    );
    attention::work(sizes, element, length, pass) + extra
}

/// Pairs of a query and a row of PK that the query reads, in a sequence of `length`. Buckets are odd in
/// the distance, so keys and PQ make as many.
pub fn rows_read(positions: &Positions, length: usize) -> usize {
    let last = length as isize - 1;
    // Slots never fall with the distance: at each of these a query's last one ends.
    let rises: Vec<usize> = (1 - last..=last)
        .map(|delta| usize::from(positions.slot(delta) != positions.slot(delta - 1)))
        .collect();
    // Query i sees distances i - last ..= i, between which there are length - 1 steps.
    (0..length).map(|i| 1 + rises[i..i + length - 1].iter().sum::<usize>()).sum()
}

fn run(setup: &Setup, length: usize, pass: Pass) -> Result<Body> {
    let (ragged, dropout) = (setup.ragged(length)?, setup.dropout());
    let Sizes { tokens, heads, head_size, .. } = setup.sizes;
    let width = heads * head_size;
    let positions = positions(length);
    let operand = |rows: usize| setup.normal((rows, width));
    let (q, k, v, d_o) = (operand(tokens)?, operand(tokens)?, operand(tokens)?, operand(tokens)?);
    let rows = positions.rows().len();
    let (pk, pq) = (operand(rows)?, operand(rows)?);
    let scale = 1.0 / (3.0 * head_size as f64).sqrt();
    Ok(Box::new(move || {
        let (ragged, dropout, positions) = (&ragged, dropout.as_ref(), &positions);
        let op = Disentangled { ragged, heads, scale, dropout, positions };
        let (o, lse) = disentangled::forward(op, &q, &k, &v, Some(&pk), Some(&pq))?;
        if pass == Pass::Both {
            let [q, k, v] = [&q, &k, &v].map(Clone::clone);
            let [pk, pq] = [&pk, &pq].map(|table| Some(table.clone()));
            let saved = Saved { q, k, v, pk, pq, o, lse };
            disentangled::backward(op, &saved, &d_o, true)?;
        }
        Ok(())
    }))
}

fn run_layer(setup: &Setup, length: usize, pass: Pass) -> Result<Body> {
    let (ragged, dropout) = (setup.ragged(length)?, setup.dropout());
    let Sizes { tokens, heads, head_size, .. } = setup.sizes;
    let width = heads * head_size;
    let positions = positions(length);
    let projections = Projections::new(setup)?;
    let relative = setup.normal((positions.rows().len(), width))?;
    let d_o = setup.normal((tokens, width))?;
    let scale = 1.0 / (3.0 * head_size as f64).sqrt();
    Ok(Box::new(move || {
        let (ragged, dropout, positions) = (&ragged, dropout.as_ref(), &positions);
        let op = Disentangled { ragged, heads, scale, dropout, positions };
        let [q, k, v] = projections.forward()?;
        let pk = projections.project(To::Key, &relative)?;
        let pq = projections.project(To::Query, &relative)?;
        let (o, lse) = disentangled::forward(op, &q, &k, &v, Some(&pk), Some(&pq))?;
        if pass == Pass::Both {
            let saved = Saved { q, k, v, pk: Some(pk), pq: Some(pq), o, lse };
            let Gradients { q, k, v, pk, pq } = disentangled::backward(op, &saved, &d_o, true)?;
            projections.backward([&q, &k, &v])?;
            for (to, dy) in [(To::Key, pk), (To::Query, pq)] {
                let Some(dy) = dy else { candle_core::bail!("a gradient of positions is missing") };
                projections.backward_parameters(to, &dy, &relative)?;
            }
        }
        Ok(())
    }))
}
