//! Backward of disentangled attention: tasks are a head and a few sequences, each with sums of its own
//! over distances, which a second pass adds in a fixed order.

use std::ops::Range;

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::{
    Relative, add_positions,
    layout::{Packed, Spread, Tile, strips, tiles},
    products, write_head,
};
use crate::{
    common::{
        Dropout,
        host::{Scatter, read, tensor, unwritten},
        real::sum_by,
        simd,
        strip::{ROWS, Vector, strip},
    },
    disentangled::{Disentangled, Gradients, Positions, Saved},
    linear::add,
};

/// Tokens of the sequences of one task, unless one alone has more: enough that the sums over distances
/// are no larger than the activations they come from.
const TOKENS_PER_TASK: usize = 512;

/// One head of a few consecutive sequences.
struct Task {
    head: usize,
    sequences: Range<usize>,
    /// Tokens of the longest of them.
    longest: usize,
}

/// Cut by tokens alone, whatever the number of threads; costliest first.
fn tasks(op: Disentangled<'_>) -> Vec<Task> {
    let starts = op.ragged.cu_seqlens();
    let mut tasks = Vec::new();
    let mut first = 0;
    while first < op.ragged.sequences() {
        let mut end = first + 1;
        while end < op.ragged.sequences() && starts[end + 1] - starts[first] <= TOKENS_PER_TASK {
            end += 1;
        }
        let longest = (first..end).map(|i| op.ragged.range(i).len()).max().unwrap_or(0);
        let task = |head| Task { head, sequences: first..end, longest };
        tasks.extend((0..op.heads).map(task));
        first = end;
    }
    let cost = |task: &Task| -> usize {
        task.sequences.clone().map(|i| op.ragged.range(i).len().pow(2)).sum()
    };
    tasks.sort_by_key(|task| std::cmp::Reverse(cost(task)));
    tasks
}

/// Sums over the distances of one task, by row of PK or PQ: `first` and those after it.
struct Partial<T> {
    head: usize,
    first: usize,
    pk: Option<Vec<T>>,
    pq: Option<Vec<T>>,
}

/// What all tasks read.
struct Inputs<'a, T> {
    op: Disentangled<'a>,
    width: usize,
    d: usize,
    q: &'a [T],
    k: &'a [T],
    v: &'a [T],
    o: &'a [T],
    d_o: &'a [T],
    lse: &'a [T],
    relative: &'a [Relative<T>],
}

pub(in super::super) fn backward<T: Vector>(
    op: Disentangled<'_>,
    saved: &Saved,
    d_o: &Tensor,
    position_gradients: bool,
) -> Result<Gradients> {
    let (t, width) = d_o.dims2()?;
    let d = width / op.heads;
    let relative = Relative::of_heads(op, d, saved.pk.as_ref(), saved.pq.as_ref())?;
    let (q, k, v) = (read::<T>(&saved.q)?, read::<T>(&saved.k)?, read::<T>(&saved.v)?);
    let (o, lse, d_o) = (read::<T>(&saved.o)?, read::<T>(&saved.lse)?, read::<T>(d_o)?);
    let inputs = Inputs {
        op,
        width,
        d,
        q: &q,
        k: &k,
        v: &v,
        o: &o,
        d_o: &d_o,
        lse: &lse,
        relative: &relative,
    };
    let [mut dq, mut dk, mut dv] = std::array::from_fn(|_| unwritten::<T>(t * width));
    let out = [Scatter::new(&mut dq), Scatter::new(&mut dk), Scatter::new(&mut dv)];
    let partials: Vec<Partial<T>> = tasks(op)
        .into_par_iter()
        .with_max_len(1)
        .map(|task| run(&inputs, &task, &out, position_gradients))
        .collect();
    let table = |part: fn(&Partial<T>) -> Option<&Vec<T>>, of: &Option<Tensor>| {
        let wanted = of.as_ref().filter(|_| position_gradients);
        wanted.map(|_| gather(&partials, part, op.positions, (width, d))).transpose()
    };
    Ok(Gradients {
        q: tensor(dq, (t, width))?,
        k: tensor(dk, (t, width))?,
        v: tensor(dv, (t, width))?,
        pk: table(|partial| partial.pk.as_ref(), &saved.pk)?,
        pq: table(|partial| partial.pq.as_ref(), &saved.pq)?,
    })
}

/// One task: writes its rows of dq, dk and dv, and returns its sums over distances.
fn run<T: Vector>(
    inputs: &Inputs<'_, T>,
    task: &Task,
    out: &[Scatter<'_, T>; 3],
    position_gradients: bool,
) -> Partial<T> {
    let &Inputs { op, width, d, .. } = inputs;
    let relative = &inputs.relative[task.head];
    let sums = |table: &Option<Spread<T>>| {
        let wanted = table.as_ref().filter(|_| position_gradients);
        wanted.map(|_| Packed::zeros(2 * task.longest - 1, d))
    };
    let mut sums = Sums { longest: task.longest, pk: sums(&relative.pk), pq: sums(&relative.pq) };
    for sequence in task.sequences.clone() {
        let range = op.ragged.range(sequence);
        let gradients = sequence_gradients(inputs, task.head, sequence, &mut sums);
        for (out, gradient) in out.iter().zip(&gradients) {
            write_head(out, gradient, width, range.clone(), (task.head, d));
        }
    }
    sums.by_row(op.positions, task.head, d)
}

/// `[dq, dk, dv]` of one head of one sequence; adds to the sums over distances.
fn sequence_gradients<T: Vector>(
    inputs: &Inputs<'_, T>,
    head: usize,
    sequence: usize,
    sums: &mut Sums<T>,
) -> [Packed<T>; 3] {
    let &Inputs { op, width, d, .. } = inputs;
    let range = op.ragged.range(sequence);
    let len = range.len();
    let [q, k, v, d_o] = [inputs.q, inputs.k, inputs.v, inputs.d_o]
        .map(|x| Packed::head(x, width, range.clone(), head, d));
    let (keys, values) = (k.transposed(len, d), v.transposed(len, d));
    let relative = &inputs.relative[head];
    let [mut p, mut g] = [Tile::zeros(len), Tile::zeros(len)];
    let [mut dq, mut dk, mut dv] = std::array::from_fn(|_| Packed::zeros(len, d));
    for tile in tiles(len) {
        products(&mut p, &q, &keys, tile, (len, d));
        add_positions(&mut p, (&q, &keys), relative, tile, (len, d));
        products(&mut g, &d_o, &values, tile, (len, d));
        score_gradients(inputs, (head, sequence), tile, &mut p, &mut g);
        add_to_rows(&mut dq, &g, &k, tile, len);
        add_to_keys(&mut dk, &g, &q, tile, len);
        add_to_keys(&mut dv, &p, &d_o, tile, len);
        if let Some(pk) = &relative.pk {
            queries_from_positions(&mut dq, &g, pk, tile, len);
        }
        if let Some(pq) = &relative.pq {
            keys_from_positions(&mut dk, &g, pq, tile, len);
        }
        sums.add(&g, &q, &k, tile, len);
    }
    [dq, dk, dv]
}

/// From scores in `p` and do·vᵀ in `g`: dropped probabilities in `p`, gradients of the unscaled scores
/// in `g`, with zeros around them.
fn score_gradients<T: Vector>(
    inputs: &Inputs<'_, T>,
    (head, sequence): (usize, usize),
    (row, rows): (usize, usize),
    p: &mut Tile<T>,
    g: &mut Tile<T>,
) {
    let &Inputs { op, width, d, o, d_o, lse, .. } = inputs;
    let range = op.ragged.range(sequence);
    let drop: Option<Dropout> = op.dropout.map(|dropout| dropout.head(head));
    let sample = op.ragged.sample(sequence);
    let scale = T::of(op.scale);
    let mut factors = vec![T::ONE; range.len()];
    simd(
        #[inline(always)]
        || {
            for i in 0..rows {
                let token = range.start + row + i;
                let at = token * width + head * d;
                let (o, d_o) = (&o[at..][..d], &d_o[at..][..d]);
                let delta = sum_by(d, |j| o[j] * d_o[j]);
                if let Some(dropout) = &drop {
                    dropout.factors(sample, (row + i) as u32, &mut factors);
                }
                let lse = lse[head * op.ragged.tokens() + token];
                for ((p, g), factor) in p.row(i).iter_mut().zip(g.row(i)).zip(&factors) {
                    let probability = p.fma(scale, -lse).exp();
                    *g = scale * probability * (*g * *factor - delta);
                    *p = probability * *factor;
                }
            }
        },
    );
    g.clear_margins(rows);
}

/// `dq_i = Σ_j g_ij·k_j`.
fn add_to_rows<T: Vector>(
    dq: &mut Packed<T>,
    g: &Tile<T>,
    k: &Packed<T>,
    (row, rows): (usize, usize),
    len: usize,
) {
    for i in strips(rows) {
        let g = g.walk((i as isize, 0), (1, 0), (0, 1));
        strip(dq.rows(row + i, false), g, k.walk(0, 0), len, k.stride);
    }
}

/// `dk_j += Σ_i g_ij·q_i` (and dv, of p and do).
fn add_to_keys<T: Vector>(
    dk: &mut Packed<T>,
    g: &Tile<T>,
    q: &Packed<T>,
    (row, rows): (usize, usize),
    len: usize,
) {
    for j in strips(len) {
        let g = g.walk((0, j as isize), (0, 1), (1, 0));
        strip(dk.rows(j, true), g, q.walk(row, 0), rows, q.stride);
    }
}

/// Rows of a strip beyond the first, which is how much longer than its rows its diagonals are.
const MORE: usize = ROWS - 1;

/// `dq_i += Σ_j g_ij·PK[i-j]`, distances ascending with the key.
fn queries_from_positions<T: Vector>(
    dq: &mut Packed<T>,
    g: &Tile<T>,
    pk: &Spread<T>,
    (row, rows): (usize, usize),
    len: usize,
) {
    for i in strips(rows) {
        let g = g.walk((i as isize, -(MORE as isize)), (1, 1), (0, 1));
        let table = pk.rows.walk(pk.origin - (row + i + MORE), 0);
        strip(dq.rows(row + i, true), g, table, len + MORE, pk.rows.stride);
    }
}

/// `dk_j += Σ_i g_ij·PQ[i-j]`, distances descending with the query.
fn keys_from_positions<T: Vector>(
    dk: &mut Packed<T>,
    g: &Tile<T>,
    pq: &Spread<T>,
    (row, rows): (usize, usize),
    len: usize,
) {
    for j in strips(len) {
        let g = g.walk((rows as isize - 1, j as isize), (1, 1), (-1, 0));
        let table = pq.rows.walk(pq.origin + j - (row + rows - 1), 0);
        strip(dk.rows(j, true), g, table, rows + MORE, pq.rows.stride);
    }
}

/// Sums over distances of the sequences of one task: row `y` belongs to distance `longest - 1 - y`.
struct Sums<T> {
    longest: usize,
    pk: Option<Packed<T>>,
    pq: Option<Packed<T>>,
}

impl<T: Vector> Sums<T> {
    /// `dPK[i-j] += g_ij·q_i` and `dPQ[i-j] += g_ij·k_j` over one tile.
    fn add(
        &mut self,
        g: &Tile<T>,
        q: &Packed<T>,
        k: &Packed<T>,
        (row, rows): (usize, usize),
        len: usize,
    ) {
        let (len, rows) = (len as isize, rows as isize);
        let (more, columns) = (MORE as isize, q.stride);
        for strip_of_distances in strips((len + rows - 1) as usize) {
            // Of the strip's first row, query (from the tile's first) minus key; then one less each.
            let delta = rows - 1 - strip_of_distances as isize;
            let y = (self.longest as isize - 1 - row as isize - delta) as usize;
            if let Some(sums) = &mut self.pk {
                let (first, last) = ((delta - more).max(0), (rows - 1).min(len - 1 + delta));
                let g = g.walk((first, first - delta), (0, 1), (1, 1));
                let q = q.walk(row + first as usize, 0);
                strip(sums.rows(y, true), g, q, (last - first + 1) as usize, columns);
            }
            if let Some(sums) = &mut self.pq {
                let (first, last) = ((-delta).max(0), (len - 1).min(rows - 1 + more - delta));
                let g = g.walk((first + delta, first), (-1, 0), (1, 1));
                let k = k.walk(first as usize, 0);
                strip(sums.rows(y, true), g, k, (last - first + 1) as usize, columns);
            }
        }
    }

    /// Sums over the distances that share a row of the table.
    fn by_row(self, positions: &Positions, head: usize, d: usize) -> Partial<T> {
        let farthest = self.longest as isize - 1;
        let first = positions.slot(-farthest);
        let rows = positions.slot(farthest) + 1 - first;
        let gather = |sums: Packed<T>| {
            let mut by_row = vec![T::ZERO; rows * d];
            simd(
                #[inline(always)]
                || {
                    let distances = (-farthest..=farthest).rev();
                    for (sum, delta) in sums.values.chunks_exact(sums.stride).zip(distances) {
                        let row = positions.slot(delta) - first;
                        add(&mut by_row[row * d..][..d], &sum[..d]);
                    }
                },
            );
            by_row
        };
        let first = first - positions.rows().start;
        Partial { head, first, pk: self.pk.map(gather), pq: self.pq.map(gather) }
    }
}

/// One gradient of a table `[positions.rows(), width]` from all tasks' sums, in the order of tasks.
fn gather<T: Vector>(
    partials: &[Partial<T>],
    part: fn(&Partial<T>) -> Option<&Vec<T>>,
    positions: &Positions,
    (width, d): (usize, usize),
) -> Result<Tensor> {
    let rows = positions.rows().len();
    let mut gradient = vec![T::ZERO; rows * width];
    gradient.par_chunks_exact_mut(width).enumerate().for_each(|(row, gradient)| {
        for partial in partials {
            let Some(i) = row.checked_sub(partial.first) else { continue };
            if let Some(sums) = part(partial).and_then(|sums| sums.chunks_exact(d).nth(i)) {
                add(&mut gradient[partial.head * d..][..d], sums);
            }
        }
    });
    tensor(gradient, (rows, width))
}
