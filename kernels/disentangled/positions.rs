//! Which row of the relative table each distance reads.
//!
//! ```text
//! M = max_relative, S = buckets (M without), mid = S/2, δ = i - j:
//! b(δ) = δ                                                            without buckets or |δ| <= mid
//!      = sign(δ)·(mid + ceil(ln(|δ|/mid) / ln((M-1)/mid)·(mid-1)))    otherwise
//! slot(δ) = clamp(b(δ) + S, 0, 2S - 1)
//! ```

use std::ops::Range;

use crate::common::Mirror;

/// Slots of relative positions, for sequences of up to some length: made anew for every batch.
#[derive(Clone, Debug)]
pub struct Positions {
    max_len: usize,
    /// Slot of distance `index - (max_len - 1)`, counted from `rows.start`: `2·max_len - 1` of them.
    places: Mirror<i32>,
    rows: Range<usize>,
}

impl Positions {
    /// Slots of every |δ| < `max_len` (at least 1), in a relative table of `2·S` rows. With
    /// `buckets`, distances beyond `buckets / 2` share rows on a logarithmic scale that ends at
    /// `max_relative`, which must be larger than `buckets / 2 + 1`.
    pub fn new(buckets: Option<usize>, max_relative: usize, max_len: usize) -> Self {
        let max_len = max_len.max(1);
        let span = buckets.unwrap_or(max_relative) as isize;
        let farthest = max_len as isize - 1;
        let slots: Vec<usize> = (-farthest..=farthest)
            .map(|delta| {
                let bucket = buckets.map_or(delta, |b| bucket(delta, b, max_relative));
                bucket.saturating_add(span).clamp(0, (2 * span - 1).max(0)) as usize
            })
            .collect();
        let first = slots.iter().copied().min().unwrap_or(0);
        let last = slots.iter().copied().max().unwrap_or(0);
        let places: Vec<i32> = slots.iter().map(|slot| (slot - first) as i32).collect();
        Self { max_len, places: places.into(), rows: first..last + 1 }
    }

    /// Longest sequence whose distances are covered.
    pub fn max_len(&self) -> usize {
        self.max_len
    }

    /// Rows of the relative table that sequences of up to [`max_len`](Self::max_len) tokens can
    /// touch: the smallest run that holds them all, which may skip some inside.
    pub fn rows(&self) -> Range<usize> {
        self.rows.clone()
    }

    /// The row of the relative table for query position minus key position = `delta`.
    ///
    /// # Panics
    /// If |`delta`| is not below [`max_len`](Self::max_len).
    pub fn slot(&self, delta: isize) -> usize {
        self.rows.start + self.places[(delta + self.max_len as isize - 1) as usize] as usize
    }

    /// [`slot`](Self::slot) of every distance from `1 - max_len` on, as a row of [`rows`](Self::rows).
    #[cfg(device)]
    pub(super) fn places(&self) -> &Mirror<i32> {
        &self.places
    }
}

/// In f32, as PyTorch computes it: a logarithm that rounds otherwise would move whole buckets.
fn bucket(delta: isize, buckets: usize, max_relative: usize) -> isize {
    let mid = buckets / 2;
    let distance = delta.unsigned_abs();
    if distance <= mid {
        return delta;
    }
    let mid_f = mid as f32;
    let whole = ((max_relative as f64 - 1.0) / mid as f64) as f32;
    let log = (distance as f32 / mid_f).ln() / whole.ln() * (mid_f - 1.0);
    delta.signum() * (log.ceil() + mid_f) as isize
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;
    use crate::testing::reference;

    #[test]
    fn slots_are_linear_then_logarithmic_then_clamped() {
        let positions = Positions::new(Some(8), 32, 100);
        assert_eq!(positions.max_len(), 100);
        assert_eq!(
            (-4..=4).map(|d| positions.slot(d)).collect::<Vec<_>>(),
            (4..=12).collect::<Vec<_>>()
        );
        // ln(5/4) / ln(31/4)·3 = 0.33, ceiled to 1; at 31 the scale ends: 4 + 3.
        assert_eq!([5, 31, 32, 99].map(|d| positions.slot(d)), [13, 15, 15, 15]);
        assert_eq!([-5, -31, -32, -99].map(|d| positions.slot(d)), [3, 1, 0, 0]);
        assert_eq!(positions.rows(), 0..16);
    }

    #[test]
    fn without_buckets_a_slot_is_the_distance_itself() {
        let positions = Positions::new(None, 6, 5);
        assert_eq!(
            (-4..=4).map(|d| positions.slot(d)).collect::<Vec<_>>(),
            (2..=10).collect::<Vec<_>>()
        );
        assert_eq!(positions.rows(), 2..11);
        assert_eq!(Positions::new(None, 3, 9).rows(), 0..6);
    }

    #[test]
    fn golden_slots_are_pytorchs() {
        let Some(root) = reference("ALLREEL_GOLDEN") else { return };
        let case = root.join("relpos/case.safetensors");
        let case = candle_core::safetensors::load(case, &Device::Cpu).expect("relpos");
        let numbers = |name: &str| {
            let tensor = case[name].to_dtype(DType::I64).and_then(|t| t.to_vec1::<i64>());
            tensor.expect("whole numbers")
        };
        let distances = numbers("relative_distance");
        let names: Vec<&String> = case.keys().filter(|name| name.starts_with("bucket.")).collect();
        assert!(names.len() >= 9, "{names:?}");
        for name in names {
            let parts: Vec<usize> = name.split('.').filter_map(|part| part.parse().ok()).collect();
            let (span, max_relative) = (parts[0], parts[1]);
            let positions = Positions::new(Some(span), max_relative, 1101);
            for (&distance, &bucket) in distances.iter().zip(&numbers(name)) {
                let want = (bucket + span as i64).clamp(0, 2 * span as i64 - 1);
                let got = positions.slot(distance as isize);
                assert_eq!(got as i64, want, "{name} at distance {distance}");
            }
        }
    }
}
