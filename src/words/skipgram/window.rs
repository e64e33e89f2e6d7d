//! The arithmetic of one window: inputs h_c of the words around, outputs u_k of the word in the middle
//! (k = 0) and of those drawn. The slope of the loss -log s(h·u_0) - sum_k log s(-h·u_k) gives
//!
//! ```text
//! g_ck = rate (1[k = 0] - s(h_c·u_k)),   h_c += sum_k g_ck u_k,   u_k += sum_c g_ck h_c
//! ```
//!
//! with every h and u on the right as it was before the window.

use pulp::{Simd, WithSimd};

/// The logistic function by a table.
pub(super) struct Sigmoid(Vec<f32>);

impl Sigmoid {
    /// Beyond this it is taken as 0 or 1, wrong by 3.4e-4 at most.
    const LIMIT: f32 = 8.0;
    /// Entries for 1. Between two the function moves by 1/256 of its slope of at most 1/4, so that the
    /// nearest is wrong by 5e-4 at most.
    const PER_UNIT: f32 = 256.0;

    pub(super) fn new() -> Self {
        let entries = (2.0 * Self::LIMIT * Self::PER_UNIT) as usize + 1;
        let x = |i: usize| i as f32 / Self::PER_UNIT - Self::LIMIT;
        Self((0..entries).map(|i| 1.0 / (1.0 + (-x(i)).exp())).collect())
    }

    #[inline(always)]
    fn of(&self, x: f32) -> f32 {
        let x = x.clamp(-Self::LIMIT, Self::LIMIT);
        // NaN as an index is 0; that the vectors are not finite is seen in the end.
        self.0[((x + Self::LIMIT) * Self::PER_UNIT + 0.5) as usize]
    }
}

/// One window; see the head of this file.
pub(super) struct Window<'a> {
    /// Numbers of a row, a multiple of the widest vector's.
    pub(super) width: usize,
    /// Rows of the words around, and others.
    pub(super) near: &'a mut [f32],
    /// Which are those of the words around.
    pub(super) slots: &'a [usize],
    /// Rows of the word in the middle and of those drawn.
    pub(super) far: &'a [f32],
    /// Receives how these change.
    pub(super) change: &'a mut [f32],
    /// Room for a number for each of them.
    pub(super) slopes: &'a mut [f32],
    pub(super) sigmoid: &'a Sigmoid,
    pub(super) rate: f32,
}

impl WithSimd for Window<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { width, near, slots, far, change, slopes, sigmoid, rate } = self;
        change.fill(0.0);
        for slot in slots {
            let (h, _) = S::as_mut_simd_f32s(&mut near[slot * width..][..width]);
            for (k, (u, slope)) in far.chunks_exact(width).zip(slopes.iter_mut()).enumerate() {
                let (u, _) = S::as_simd_f32s(u);
                let mut sum = simd.splat_f32s(0.0);
                for (h, u) in h.iter().zip(u) {
                    sum = simd.mul_add_f32s(*h, *u, sum);
                }
                let label = if k == 0 { 1.0 } else { 0.0 };
                *slope = rate * (label - sigmoid.of(simd.reduce_sum_f32s(sum)));
            }
            for (at, h) in h.iter_mut().enumerate() {
                let before = *h;
                let rows = far.chunks_exact(width).zip(change.chunks_exact_mut(width));
                for ((u, change), slope) in rows.zip(slopes.iter()) {
                    let slope = simd.splat_f32s(*slope);
                    let change = &mut S::as_mut_simd_f32s(change).0[at];
                    *change = simd.mul_add_f32s(slope, before, *change);
                    *h = simd.mul_add_f32s(slope, S::as_simd_f32s(u).0[at], *h);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_follows_its_slope() {
        let width = 16;
        let value = |i: usize| ((i * 37 % 101) as f32 - 50.0) / 60.0;
        let near: Vec<f32> = (0..4 * width).map(value).collect();
        let far: Vec<f32> = (0..3 * width).map(|i| value(i + 7)).collect();
        let (slots, rate) = ([3, 1], 0.1);
        let mut after = near.clone();
        let (mut change, mut slopes) = (vec![f32::NAN; far.len()], vec![0.0; 5]);
        let (sigmoid, arch) = (Sigmoid::new(), pulp::Arch::new());
        arch.dispatch(Window {
            width,
            near: &mut after,
            slots: &slots,
            far: &far,
            change: &mut change,
            slopes: &mut slopes,
            sigmoid: &sigmoid,
            rate,
        });
        let loss = |near: &[f64], far: &[f64]| -> f64 {
            let dot = |slot: usize, k: usize| -> f64 {
                (0..width).map(|i| near[slot * width + i] * far[k * width + i]).sum()
            };
            let term = |slot, k| if k == 0 { dot(slot, k) } else { -dot(slot, k) };
            let all = slots.iter().flat_map(|slot| (0..3).map(move |k| (*slot, k)));
            all.map(|(slot, k)| (-term(slot, k)).exp().ln_1p()).sum()
        };
        let wide = |values: &[f32]| values.iter().map(|v| f64::from(*v)).collect::<Vec<_>>();
        let (near64, far64) = (wide(&near), wide(&far));
        // The table is wrong by 5e-4 at most, times the rate and three or two numbers below 0.85.
        let allowed = 0.1 * 5e-4 * 3.0 * 0.85 + 1e-6;
        let slope = |nudge: &dyn Fn(f64) -> f64| (nudge(1e-5) - nudge(-1e-5)) / 2e-5;
        for i in 0..near.len() {
            let nudged = |by| {
                let mut near = near64.clone();
                near[i] += by;
                loss(&near, &far64)
            };
            let got = f64::from(after[i] - near[i]);
            let want = -f64::from(rate) * slope(&nudged);
            assert!((got - want).abs() <= allowed, "h[{i}]: {got}, expected {want}");
        }
        for i in 0..far.len() {
            let nudged = |by| {
                let mut far = far64.clone();
                far[i] += by;
                loss(&near64, &far)
            };
            let want = -f64::from(rate) * slope(&nudged);
            assert!(
                (f64::from(change[i]) - want).abs() <= allowed,
                "u[{i}]: {}, {want}",
                change[i]
            );
        }
    }

    #[test]
    fn the_table_is_the_logistic_function() {
        let sigmoid = Sigmoid::new();
        for i in -10_000..10_000 {
            let x = i as f32 / 1000.0;
            let want = 1.0 / (1.0 + (-x).exp());
            assert!((sigmoid.of(x) - want).abs() <= 5e-4, "{x}: {} {want}", sigmoid.of(x));
        }
    }
}
