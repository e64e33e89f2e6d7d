//! A matrix that threads read and write at once, each cell whole: two numbers in 64 bits, so that a row
//! moves in half as many steps.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use rand::Rng;
use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};

/// Numbers of a row are a multiple of this, the lanes of the widest vector unit; what is beyond the
/// dimensions is zero and stays so.
const LANES: usize = 16;

/// The matrix.
pub(super) struct Shared {
    cells: Vec<AtomicU64>,
    dimensions: usize,
}

/// The length of a row in memory.
pub(super) fn width(dimensions: usize) -> usize {
    dimensions.next_multiple_of(LANES)
}

impl Shared {
    pub(super) fn zeros(rows: usize, dimensions: usize) -> Self {
        let cells = rows * width(dimensions) / 2;
        Self { cells: (0..cells).map(|_| AtomicU64::new(0)).collect(), dimensions }
    }

    /// Uniform between plus and minus 0.5 / dimensions.
    pub(super) fn random(rows: usize, dimensions: usize, seed: u64) -> Self {
        let shared = Self::zeros(rows, dimensions);
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut row = vec![0.0; width(dimensions)];
        for i in 0..rows as u32 {
            for value in &mut row[..dimensions] {
                *value = (rng.random::<f32>() - 0.5) / dimensions as f32;
            }
            shared.add(i, &row);
        }
        shared
    }

    fn row(&self, i: u32) -> &[AtomicU64] {
        let cells = width(self.dimensions) / 2;
        &self.cells[i as usize * cells..][..cells]
    }

    /// Copies a row out.
    pub(super) fn load(&self, i: u32, row: &mut [f32]) {
        let (pairs, _) = row.as_chunks_mut::<2>();
        for (cell, pair) in self.row(i).iter().zip(pairs) {
            *pair = bytemuck::cast(cell.load(Relaxed));
        }
    }

    /// Adds to a row. What another thread adds in the same moment may be lost.
    pub(super) fn add(&self, i: u32, change: &[f32]) {
        let (pairs, _) = change.as_chunks::<2>();
        for (cell, change) in self.row(i).iter().zip(pairs) {
            let old: [f32; 2] = bytemuck::cast(cell.load(Relaxed));
            cell.store(bytemuck::cast([old[0] + change[0], old[1] + change[1]]), Relaxed);
        }
    }

    /// All rows without what lies beyond the dimensions.
    pub(super) fn values(&self) -> Vec<f32> {
        let width = width(self.dimensions);
        let mut row = vec![0.0; width];
        let rows = self.cells.len() / (width / 2);
        let mut values = Vec::with_capacity(rows * self.dimensions);
        for i in 0..rows as u32 {
            self.load(i, &mut row);
            values.extend_from_slice(&row[..self.dimensions]);
        }
        values
    }
}
