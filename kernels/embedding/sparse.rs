//! Rows of a large table's gradient: which, and their values.

use crate::{common::simd, linear::add};

/// The gradient of a `[V, width]` table where only some rows are not zero. Ids are ascending and
/// unique.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SparseRows {
    /// Row numbers, ascending.
    pub ids: Vec<u32>,
    /// `ids.len() * width` values.
    pub values: Vec<f32>,
    /// Elements of one row.
    pub width: usize,
}

impl SparseRows {
    /// No rows yet.
    pub fn empty(width: usize) -> Self {
        Self { width, ..Self::default() }
    }

    /// Adds `other`, row by row.
    pub fn merge(&mut self, other: &Self) {
        debug_assert_eq!(self.width, other.width);
        if self.ids.is_empty() {
            self.clone_from(other);
            return;
        }
        let width = self.width;
        let mut ids = Vec::with_capacity(self.ids.len() + other.ids.len());
        let mut values = Vec::with_capacity((self.ids.len() + other.ids.len()) * width);
        let (mut a, mut b) = (0, 0);
        while a < self.ids.len() || b < other.ids.len() {
            let left = self.ids.get(a).copied().unwrap_or(u32::MAX);
            let right = other.ids.get(b).copied().unwrap_or(u32::MAX);
            ids.push(left.min(right));
            if left <= right {
                values.extend_from_slice(&self.values[a * width..][..width]);
                a += 1;
                if left == right {
                    let start = values.len() - width;
                    let row = &other.values[b * width..][..width];
                    simd(
                        #[inline(always)]
                        || add(&mut values[start..], row),
                    );
                    b += 1;
                }
            } else {
                values.extend_from_slice(&other.values[b * width..][..width]);
                b += 1;
            }
        }
        (self.ids, self.values) = (ids, values);
    }

    /// The same gradient with a row for each of `ids`, which are ascending, unique and include all of
    /// its own.
    pub fn spread(&self, ids: &[u32]) -> Self {
        let mut values = vec![0.0; ids.len() * self.width];
        let mut next = 0;
        for (id, row) in ids.iter().zip(values.chunks_exact_mut(self.width)) {
            if self.ids.get(next) == Some(id) {
                row.copy_from_slice(&self.values[next * self.width..][..self.width]);
                next += 1;
            }
        }
        debug_assert_eq!(next, self.ids.len());
        Self { ids: ids.to_vec(), values, width: self.width }
    }

    /// The row of `id`, if it has one.
    pub fn row(&self, id: u32) -> Option<&[f32]> {
        let at = self.ids.binary_search(&id).ok()?;
        Some(&self.values[at * self.width..][..self.width])
    }
}
