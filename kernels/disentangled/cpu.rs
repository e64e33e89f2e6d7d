//! Disentangled attention on the CPU: query rows in tiles, the position terms as products with a band
//! of the relative table.
//!
//! Within a strip of rows, the table's rows that belong to it are contiguous once the table is spread
//! out by distance, one strip's width longer than the keys; and moving down a row in (query, distance)
//! is moving along a diagonal in (query, key). So a strip of q·PKᵀ is added to the scores by writing
//! its rows one element further each, and k·PQᵀ by reading the table so. Nothing is gathered.

mod backward;
mod layout;

use candle_core::{Result, Tensor};
use rayon::prelude::*;

pub(super) use backward::backward;
use layout::{Packed, Spread, Tile, panels, strips, tiles};

use super::{Disentangled, longest};
use crate::common::{
    Dropout,
    host::{Scatter, read, tensor, unwritten},
    real::softmax,
    simd,
    strip::{ROWS, Vector, Walk, slide, strip},
};

/// The relative tables of one head: of content-to-position and of position-to-content.
struct Relative<T> {
    pk: Option<Spread<T>>,
    pq: Option<Spread<T>>,
}

impl<T: Vector> Relative<T> {
    /// One for each head.
    fn of_heads(
        op: Disentangled<'_>,
        d: usize,
        pk: Option<&Tensor>,
        pq: Option<&Tensor>,
    ) -> Result<Vec<Self>> {
        let (width, longest) = (op.heads * d, longest(op.ragged).max(1));
        let (pk, pq) = (pk.map(read::<T>).transpose()?, pq.map(read::<T>).transpose()?);
        let (pk, pq) = (pk.as_deref(), pq.as_deref());
        let spread =
            |table: &[T], head| Spread::new(table, width, op.positions, longest, (head, d));
        let of_head = |head| Self {
            pk: pk.map(|table| spread(table, head)),
            pq: pq.map(|table| spread(table, head)),
        };
        Ok((0..op.heads).into_par_iter().map(of_head).collect())
    }
}

/// One head of one sequence.
struct Task {
    sequence: usize,
    head: usize,
}

/// All heads of all sequences, longest first, so that the last tasks to start are short ones.
fn tasks(op: Disentangled<'_>) -> Vec<Task> {
    let sequences = 0..op.ragged.sequences();
    let mut tasks: Vec<Task> = sequences
        .flat_map(|sequence| (0..op.heads).map(move |head| Task { sequence, head }))
        .collect();
    tasks.sort_by_key(|task| std::cmp::Reverse(op.ragged.range(task.sequence).len()));
    tasks
}

pub(super) fn forward<T: Vector>(
    op: Disentangled<'_>,
    [q, k, v]: [&Tensor; 3],
    pk: Option<&Tensor>,
    pq: Option<&Tensor>,
) -> Result<(Tensor, Tensor)> {
    let (t, width) = q.dims2()?;
    let d = width / op.heads;
    let relative = Relative::<T>::of_heads(op, d, pk, pq)?;
    let (q, k, v) = (read::<T>(q)?, read::<T>(k)?, read::<T>(v)?);
    let (q, k, v) = (&*q, &*k, &*v);
    let (mut o, mut lse) = (unwritten::<T>(t * width), unwritten::<T>(op.heads * t));
    let (o_out, lse_out) = (Scatter::new(&mut o), Scatter::new(&mut lse));
    let scale = T::of(op.scale);
    tasks(op).into_par_iter().with_max_len(1).for_each(|Task { sequence, head }| {
        let range = op.ragged.range(sequence);
        let len = range.len();
        let [q, k, v] = [q, k, v].map(|x| Packed::head(x, width, range.clone(), head, d));
        let keys = k.transposed(len, d);
        let (mut p, mut o) = (Tile::zeros(len), Packed::zeros(len, d));
        let drop = op.dropout.map(|dropout| (dropout.head(head), op.ragged.sample(sequence)));
        // SAFETY: these rows of lse belong to this head of this sequence, which is this task alone.
        let lse = unsafe { lse_out.slice(head * t + range.start, len) };
        for (row, rows) in tiles(len) {
            products(&mut p, &q, &keys, (row, rows), (len, d));
            add_positions(&mut p, (&q, &keys), &relative[head], (row, rows), (len, d));
            probabilities(&mut p, scale, drop, row, &mut lse[row..row + rows]);
            for i in strips(rows) {
                let p = p.walk((i as isize, 0), (1, 0), (0, 1));
                strip(o.rows(row + i, false), p, v.walk(0, 0), len, v.stride);
            }
        }
        write_head(&o_out, &o, width, range, (head, d));
    });
    Ok((tensor(o, (t, width))?, tensor(lse, (op.heads, t))?))
}

/// `tile = a·bᵀ` for rows `row..row + rows` of a; `columns` is b as columns.
fn products<T: Vector>(
    tile: &mut Tile<T>,
    a: &Packed<T>,
    columns: &Packed<T>,
    (row, rows): (usize, usize),
    (len, d): (usize, usize),
) {
    for (first, width) in panels(len) {
        for i in strips(rows) {
            let a = Walk { step: 1, ..a.walk(row + i, 0) };
            let to = tile.rows((i as isize, first as isize), 0, false);
            strip(to, a, columns.walk(0, first), d, width);
        }
    }
}

/// `tile_ij += q_i·PK[i-j] + k_j·PQ[i-j]`.
fn add_positions<T: Vector>(
    tile: &mut Tile<T>,
    (q, keys): (&Packed<T>, &Packed<T>),
    relative: &Relative<T>,
    (row, rows): (usize, usize),
    (len, d): (usize, usize),
) {
    const EARLY: usize = ROWS - 1;
    if let Some(Spread { origin, columns, .. }) = &relative.pk {
        // The last row of a strip meets key 0 first; the rows above it start before their key 0.
        for (first, width) in panels(len + EARLY) {
            for i in strips(rows) {
                let q = Walk { step: 1, ..q.walk(row + i, 0) };
                let to = tile.rows((i as isize, first as isize - EARLY as isize), 1, true);
                strip(to, q, columns.walk(0, origin - (row + i + EARLY) + first), d, width);
            }
        }
    }
    if let Some(Spread { origin, columns, .. }) = &relative.pq {
        for (first, width) in panels(len) {
            let to = tile.rows((0, first as isize), 0, true);
            let table = columns.walk(0, origin - row + first);
            slide(to, keys.walk(0, first), table, d, (rows, width));
        }
    }
}

/// Scores become dropped probabilities; `lse` takes the log-sum-exp of each row.
fn probabilities<T: Vector>(
    tile: &mut Tile<T>,
    scale: T,
    drop: Option<(Dropout, u32)>,
    row: usize,
    lse: &mut [T],
) {
    let mut factors = vec![T::ZERO; if drop.is_some() { tile.row(0).len() } else { 0 }];
    simd(
        #[inline(always)]
        || {
            for (i, lse) in lse.iter_mut().enumerate() {
                let scores = tile.row(i);
                for score in scores.iter_mut() {
                    *score *= scale;
                }
                *lse = softmax(scores);
                if let Some((dropout, sample)) = &drop {
                    dropout.factors(*sample, (row + i) as u32, &mut factors);
                    for (p, factor) in scores.iter_mut().zip(&factors) {
                        *p *= *factor;
                    }
                }
            }
        },
    );
}

/// Copies one head's rows of one sequence to where they belong in a `[T, h·d]` buffer.
fn write_head<T: Vector>(
    out: &Scatter<'_, T>,
    packed: &Packed<T>,
    width: usize,
    rows: std::ops::Range<usize>,
    (head, d): (usize, usize),
) {
    for (from, row) in packed.values.chunks_exact(packed.stride).zip(rows) {
        // SAFETY: only the task of this head and sequence writes these columns of these rows.
        let to = unsafe { out.slice(row * width + head * d, d) };
        to.copy_from_slice(&from[..d]);
    }
}
