//! Products of a few rows with a matrix that stays: laid out once so that each piece of it is read front to
//! back and fits the first cache while all the rows pass by.

use rayon::prelude::*;

use crate::common::{
    real::LANES,
    strip::{ROWS, Rows, Vector, Walk, strip},
};

/// Columns of a panel: the four f32 registers of a row that a strip sums at once.
const COLUMNS: usize = 4 * LANES;
/// Rows of a panel that are used together: 32 KiB of f32.
const DEPTH: usize = 128;

/// A matrix in panels of [`COLUMNS`] columns, each contiguous.
pub(super) struct Panels<T> {
    values: Vec<T>,
    depth: usize,
    /// Columns, rounded up to whole vectors; those added are zero.
    width: usize,
}

impl<T: Vector> Panels<T> {
    /// `depth · columns` elements, (k, c) being at `k·down + c·along` of `matrix`.
    pub(super) fn new(
        matrix: &[T],
        (depth, columns): (usize, usize),
        (down, along): (usize, usize),
    ) -> Self {
        let width = columns.next_multiple_of(LANES);
        let mut values = vec![T::ZERO; depth * width];
        values.par_chunks_mut(depth * COLUMNS).enumerate().for_each(|(i, panel)| {
            let first = i * COLUMNS;
            for (k, row) in panel.chunks_exact_mut(panel.len() / depth).enumerate() {
                for (c, value) in (first..columns).zip(row) {
                    *value = matrix[k * down + c * along];
                }
            }
        });
        Self { values, depth, width }
    }

    /// Elements of a row of the product.
    pub(super) fn width(&self) -> usize {
        self.width
    }

    /// Rows that a product computes for `count`: whole strips.
    pub(super) fn rows(count: usize) -> usize {
        count.next_multiple_of(ROWS)
    }

    /// `to = rows · self` for [`rows`](Self::rows)`(count)` rows, which both must have. A row's sums do not
    /// depend on where it is or on the others.
    pub(super) fn product(&self, rows: &[T], count: usize, to: &mut [T]) {
        for first in (0..self.width).step_by(COLUMNS) {
            let columns = COLUMNS.min(self.width - first);
            for k in (0..self.depth).step_by(DEPTH) {
                let depth = DEPTH.min(self.depth - k);
                let at = (first * self.depth + k * columns) as isize;
                let panel = Walk { values: &self.values, at, stride: 0, step: columns as isize };
                for row in (0..count).step_by(ROWS) {
                    let to = Rows {
                        values: &mut *to,
                        at: (row * self.width + first) as isize,
                        stride: self.width,
                        accumulate: k > 0,
                    };
                    let at = (row * self.depth + k) as isize;
                    let rows = Walk { values: rows, at, stride: self.depth as isize, step: 1 };
                    strip(to, rows, panel, depth, columns);
                }
            }
        }
    }
}
