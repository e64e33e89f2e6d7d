//! Where a task keeps its operands: rows of whole vectors, with margins that strips may run into.

use std::ops::Range;

use crate::{
    common::{
        real::LANES,
        simd,
        strip::{ROWS, Rows, Vector, Walk},
    },
    disentangled::Positions,
};

/// Query rows of one tile: a multiple of [`ROWS`]. With 512 keys a tile of f32 scores takes 240 KiB; half as
/// many rows were no faster.
const TILE: usize = 96;
/// Columns of one panel: of a right operand of depth 64 it is 16 KiB of f32, a part of L1.
const PANEL: usize = 4 * LANES;
/// Columns right of a tile's scores that a strip along a diagonal may write: it starts up to
/// `ROWS - 1` columns early and ends on a whole vector.
const OVERHANG: usize = ROWS - 1 + LANES - 1;

/// The tiles of a sequence, about equal: first query row and number of rows. Full strips but for the
/// last tile's last.
pub(super) fn tiles(len: usize) -> impl Iterator<Item = (usize, usize)> {
    let tile = len.div_ceil(len.div_ceil(TILE)).next_multiple_of(ROWS);
    (0..len).step_by(tile).map(move |row| (row, tile.min(len - row)))
}

/// The strips of `rows` rows: the first row of each.
pub(super) fn strips(rows: usize) -> impl Iterator<Item = usize> {
    (0..rows).step_by(ROWS)
}

/// Panels that cover `columns` columns, all about as wide, so that the last is no sliver: first
/// column and number of columns, in whole vectors.
pub(super) fn panels(columns: usize) -> impl Iterator<Item = (usize, usize)> {
    let vectors = columns.div_ceil(LANES);
    let panels = columns.div_ceil(PANEL);
    let edge = move |i: usize| vectors * i / panels * LANES;
    (0..panels).map(move |i| (edge(i), edge(i + 1) - edge(i)))
}

/// `columns` elements or more, in whole vectors.
fn whole(columns: usize) -> usize {
    columns.next_multiple_of(LANES)
}

/// As [`whole`], and an odd number of vectors: rows a power of two apart would share cache sets.
fn odd(columns: usize) -> usize {
    (columns.div_ceil(LANES) | 1) * LANES
}

/// Rows of one head end to end, zero where they are padded; [`ROWS`] more than asked for.
pub(super) struct Packed<T> {
    pub(super) values: Vec<T>,
    /// Elements from one row to the next.
    pub(super) stride: usize,
}

impl<T: Vector> Packed<T> {
    pub(super) fn zeros(rows: usize, columns: usize) -> Self {
        let stride = whole(columns);
        Self { values: vec![T::ZERO; (rows + ROWS) * stride], stride }
    }

    /// Columns `head·d..` of the given rows of a `[T, width]` buffer.
    pub(super) fn head(x: &[T], width: usize, rows: Range<usize>, head: usize, d: usize) -> Self {
        let mut packed = Self::zeros(rows.len(), d);
        for (to, row) in packed.values.chunks_exact_mut(packed.stride).zip(rows) {
            to[..d].copy_from_slice(&x[row * width + head * d..][..d]);
        }
        packed
    }

    /// The first `rows` rows and `columns` columns, as columns and rows.
    pub(super) fn transposed(&self, rows: usize, columns: usize) -> Self {
        let stride = odd(rows);
        let mut values = vec![T::ZERO; columns * stride];
        let from = &self.values;
        simd(
            #[inline(always)]
            || {
                // Blocks of rows: their lines stay in L1 while each column picks from them.
                for first in (0..rows).step_by(LANES) {
                    let rows = first..rows.min(first + LANES);
                    for column in 0..columns {
                        let to = &mut values[column * stride..][rows.clone()];
                        for (to, row) in to.iter_mut().zip(rows.clone()) {
                            *to = from[row * self.stride + column];
                        }
                    }
                }
            },
        );
        Self { values, stride }
    }

    /// As a right operand from row `row` on, or as a left one whose rows are a strip's rows.
    pub(super) fn walk(&self, row: usize, column: usize) -> Walk<'_, T> {
        let at = (row * self.stride + column) as isize;
        Walk { values: &self.values, at, stride: self.stride as isize, step: self.stride as isize }
    }

    /// Rows `row..row + ROWS`, to write.
    pub(super) fn rows(&mut self, row: usize, accumulate: bool) -> Rows<'_, T> {
        let (at, stride) = ((row * self.stride) as isize, self.stride);
        Rows { values: &mut self.values, at, stride, accumulate }
    }
}

/// Scores of one tile of query rows against all keys, with margins all around.
pub(super) struct Tile<T> {
    values: Vec<T>,
    stride: usize,
    len: usize,
}

impl<T: Vector> Tile<T> {
    /// All zero, for sequences of `len` tokens.
    pub(super) fn zeros(len: usize) -> Self {
        let stride = odd(LANES + len + OVERHANG);
        let rows = TILE.min(len.next_multiple_of(ROWS)) + 2 * ROWS;
        Self { values: vec![T::ZERO; rows * stride], stride, len }
    }

    /// Elements from (i, j) to (i + di, j + dj).
    fn step(&self, (di, dj): (isize, isize)) -> isize {
        di * self.stride as isize + dj
    }

    fn at(&self, (i, j): (isize, isize)) -> isize {
        self.step((i + ROWS as isize, j + LANES as isize))
    }

    /// The scores of row `i`.
    pub(super) fn row(&mut self, i: usize) -> &mut [T] {
        let at = self.at((i as isize, 0)) as usize;
        &mut self.values[at..][..self.len]
    }

    /// As a left operand: element (0, 0) of the strip is score `start`; `row` and `depth` say which
    /// way its rows and its depth go.
    pub(super) fn walk(
        &self,
        start: (isize, isize),
        row: (isize, isize),
        depth: (isize, isize),
    ) -> Walk<'_, T> {
        let (stride, step) = (self.step(row), self.step(depth));
        Walk { values: &self.values, at: self.at(start), stride, step }
    }

    /// [`ROWS`] rows to write from score `start` on, straight down or (`skew` 1) down a diagonal.
    pub(super) fn rows(&mut self, start: (isize, isize), skew: usize, add: bool) -> Rows<'_, T> {
        let (at, stride) = (self.at(start), self.stride + skew);
        Rows { values: &mut self.values, at, stride, accumulate: add }
    }

    /// Zeroes what a walk along a diagonal reads beyond `rows` rows of scores.
    pub(super) fn clear_margins(&mut self, rows: usize) {
        for i in 0..rows {
            let end = self.at((i as isize, self.len as isize)) as usize;
            self.values[end..][..ROWS].fill(T::ZERO);
        }
        let below = self.at((rows as isize, -(ROWS as isize))) as usize;
        let end = self.values.len().min(below + ROWS * self.stride);
        self.values[below..end].fill(T::ZERO);
    }
}

/// A projected relative table of one head, spread out by distance: row (column) `x` belongs to query
/// position minus key position = `origin - x`, so that it grows with the key.
pub(super) struct Spread<T> {
    pub(super) origin: usize,
    pub(super) rows: Packed<T>,
    pub(super) columns: Packed<T>,
}

impl<T: Vector> Spread<T> {
    /// From a table `[positions.rows(), width]`, for sequences of up to `longest` tokens.
    pub(super) fn new(
        table: &[T],
        width: usize,
        positions: &Positions,
        longest: usize,
        (head, d): (usize, usize),
    ) -> Self {
        let origin = LANES + longest - 1;
        let end = origin + longest + LANES + ROWS;
        let first = positions.rows().start;
        let mut rows = Packed::zeros(end, d);
        let used = LANES..LANES + 2 * longest - 1;
        for (to, x) in rows.values[LANES * rows.stride..].chunks_exact_mut(rows.stride).zip(used) {
            let row = positions.slot(origin as isize - x as isize) - first;
            to[..d].copy_from_slice(&table[row * width + head * d..][..d]);
        }
        let columns = rows.transposed(end, d);
        Self { origin, rows, columns }
    }
}
