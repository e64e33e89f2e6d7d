//! Counted randomness: Philox4x32-10 (Salmon et al., SC 2011), and dropout decided by it.
//!
//! A dropout decision is a pure function of (seed, step, sample, site, stream, row, column), so it is
//! the same in forward, backward and recompute, on every device, in any packing and on any rank.
//! One block of four 32-bit words decides eight neighbouring columns, 16 bits each.
//!
//! ```text
//! counter = [column / 8, row, sample, step]
//! key     = [seed low, seed high ^ (site << 16 | head << 8 | stream)]
//! ```

use super::Real;

const MULTIPLIER: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
/// Blocks computed side by side: one AVX-512 register of 32-bit words.
const BLOCKS: usize = 16;

/// The Philox4x32-10 block function.
pub fn philox(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let lanes = blocks::<1>([[counter[0]], [counter[1]], [counter[2]], [counter[3]]], key);
    [lanes[0][0], lanes[1][0], lanes[2][0], lanes[3][0]]
}

/// `N` blocks side by side; word-major.
#[inline(always)]
fn blocks<const N: usize>(mut c: [[u32; N]; 4], mut key: [u32; 2]) -> [[u32; N]; 4] {
    for _ in 0..10 {
        for i in 0..N {
            let a = u64::from(c[0][i]) * u64::from(MULTIPLIER[0]);
            let b = u64::from(c[2][i]) * u64::from(MULTIPLIER[1]);
            c[0][i] = (b >> 32) as u32 ^ c[1][i] ^ key[0];
            c[1][i] = b as u32;
            c[2][i] = (a >> 32) as u32 ^ c[3][i] ^ key[1];
            c[3][i] = a as u32;
        }
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    c
}

/// What a step's dropout is keyed by, before the site is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DropoutKey {
    /// The run's seed.
    pub seed: u64,
    /// Optimizer step.
    pub step: u32,
    /// Which of several passes over the same step (R-Drop's second is 1).
    pub stream: u8,
}

/// One dropout in the network, in one step.
#[derive(Clone, Copy, Debug)]
pub struct Dropout {
    pub(super) key: [u32; 2],
    pub(super) step: u32,
    /// A 16-bit draw below this drops.
    pub(super) threshold: u16,
}

impl Dropout {
    /// Columns decided by one block.
    pub(crate) const COLUMNS: usize = 8;

    /// Dropout with probability `p` at `site` (a number unique in the network, below 65,536).
    /// `None` when nothing would be dropped. `p` is rounded to a multiple of 2^-16.
    pub fn new(p: f64, key: DropoutKey, site: u16) -> Option<Self> {
        let threshold = (p * 65536.0).round().clamp(0.0, 65535.0) as u16;
        (threshold > 0).then(|| Self {
            key: [
                key.seed as u32,
                (key.seed >> 32) as u32 ^ (u32::from(site) << 16 | u32::from(key.stream)),
            ],
            step: key.step,
            threshold,
        })
    }

    /// The same site for one attention head.
    pub(crate) fn head(&self, head: usize) -> Self {
        Self { key: [self.key[0], self.key[1] ^ (head as u32) << 8], ..*self }
    }

    /// What kept values are multiplied by: one over the exact keep probability.
    #[inline(always)]
    pub fn scale(&self) -> f64 {
        65536.0 / (65536.0 - f64::from(self.threshold))
    }

    /// Fills `factors` with 0 (dropped) or [`scale`](Self::scale) for the columns of one row.
    #[inline(always)]
    pub(crate) fn factors<T: Real>(&self, sample: u32, row: u32, factors: &mut [T]) {
        self.factors_from(sample, row, 0, factors);
    }

    /// The same for the columns from `column` on, a multiple of [`COLUMNS`](Self::COLUMNS).
    #[inline(always)]
    pub(crate) fn factors_from<T: Real>(
        &self,
        sample: u32,
        row: u32,
        column: usize,
        factors: &mut [T],
    ) {
        debug_assert!(column.is_multiple_of(Self::COLUMNS), "column {column} is inside a block");
        let scale = T::of(self.scale());
        let mut first = (column / Self::COLUMNS) as u32;
        for group in factors.chunks_mut(BLOCKS * Self::COLUMNS) {
            let mut counter = [[0; BLOCKS], [row; BLOCKS], [sample; BLOCKS], [self.step; BLOCKS]];
            for (i, block) in counter[0].iter_mut().enumerate() {
                *block = first + i as u32;
            }
            first += BLOCKS as u32;
            let words = blocks::<BLOCKS>(counter, self.key);
            let mut draws = [0u32; BLOCKS * 4];
            for i in 0..BLOCKS {
                for word in 0..4 {
                    draws[i * 4 + word] = words[word][i];
                }
            }
            let mut out = [T::ZERO; BLOCKS * Self::COLUMNS];
            for (pair, draw) in out.chunks_exact_mut(2).zip(draws) {
                let keep = |draw: u16| {
                    if draw >= self.threshold { scale } else { T::ZERO }
                };
                pair[0] = keep(draw as u16);
                pair[1] = keep((draw >> 16) as u16);
            }
            group.copy_from_slice(&out[..group.len()]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known answers of Random123's kat_vectors for philox4x32-10.
    #[test]
    fn known_answers() {
        assert_eq!(philox([0; 4], [0; 2]), [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]);
        assert_eq!(
            philox([u32::MAX; 4], [u32::MAX; 2]),
            [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd]
        );
        assert_eq!(
            philox([0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344], [0xa4093822, 0x299f31d0]),
            [0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1]
        );
    }

    fn mask(dropout: &Dropout, sample: u32, row: u32, columns: usize) -> Vec<f32> {
        let mut factors = vec![f32::NAN; columns];
        dropout.factors(sample, row, &mut factors);
        factors
    }

    #[test]
    fn the_columns_of_a_row_do_not_depend_on_its_width() {
        let key = DropoutKey { seed: 7 << 40 | 3, step: 5, stream: 0 };
        let dropout = Dropout::new(0.3, key, 9).expect("p > 0");
        let wide = mask(&dropout, 11, 2, 300);
        for width in [1, 7, 8, 127, 128, 129] {
            assert_eq!(mask(&dropout, 11, 2, width), wide[..width]);
        }
        for column in [8, 128, 136] {
            let mut factors = vec![f32::NAN; 300 - column];
            dropout.factors_from(11, 2, column, &mut factors);
            assert_eq!(factors, wide[column..]);
        }
        let word = philox([1, 2, 11, 5], dropout.key)[1];
        let expected =
            if (word >> 16) as u16 >= dropout.threshold { dropout.scale() as f32 } else { 0.0 };
        assert_eq!(wide[8 + 3], expected);
    }

    #[test]
    fn every_part_of_the_key_matters_and_the_rate_is_right() {
        let key = DropoutKey { seed: 1, step: 1, stream: 0 };
        let base = Dropout::new(0.25, key, 1).expect("p > 0");
        let first = mask(&base, 1, 1, 4096);
        let others = [
            mask(&Dropout::new(0.25, DropoutKey { seed: 2, ..key }, 1).expect("p"), 1, 1, 4096),
            mask(
                &Dropout::new(0.25, DropoutKey { seed: 1 | 1 << 32, ..key }, 1).expect("p"),
                1,
                1,
                4096,
            ),
            mask(&Dropout::new(0.25, DropoutKey { step: 2, ..key }, 1).expect("p"), 1, 1, 4096),
            mask(&Dropout::new(0.25, DropoutKey { stream: 1, ..key }, 1).expect("p"), 1, 1, 4096),
            mask(&Dropout::new(0.25, key, 2).expect("p"), 1, 1, 4096),
            mask(&base.head(1), 1, 1, 4096),
            mask(&base, 2, 1, 4096),
            mask(&base, 1, 2, 4096),
        ];
        for other in &others {
            let equal = first.iter().zip(other).filter(|(a, b)| a == b).count() as f64 / 4096.0;
            // Independent masks agree with probability .25² + .75² = .625; six sigma is .045.
            assert!((equal - 0.625).abs() < 0.045, "agreement {equal}");
        }
        let mean = first.iter().map(|x| f64::from(*x)).sum::<f64>() / 4096.0;
        assert!((mean - 1.0).abs() < 0.06, "mean {mean}");
        assert!(Dropout::new(0.0, key, 1).is_none());
    }
}
