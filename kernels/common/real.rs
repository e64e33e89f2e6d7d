//! The element type of a CPU kernel: `f32` in use, `f64` for finite differences.
//!
//! `exp`, `erf` and `tanh` of `f32` are polynomials that vectorise (libm's do not, and cost more
//! than the matrix products they sit between); their error is measured in the tests below.

use candle_core::{CpuStorage, WithDType};

/// Number of independent accumulators in a reduction: one AVX-512 register of `f32`.
pub(crate) const LANES: usize = 16;

/// A floating-point element. All methods are meant to be inlined into `common::simd` bodies.
pub trait Real: WithDType + std::ops::Neg<Output = Self> {
    /// Zero.
    const ZERO: Self;
    /// One.
    const ONE: Self;
    /// Converts, rounding to nearest.
    fn of(value: f64) -> Self;
    /// Converts exactly.
    fn wide(self) -> f64;
    /// `self * a + b`, rounded once where the machine can.
    fn fma(self, a: Self, b: Self) -> Self;
    /// e^self; NaN stays NaN.
    fn exp(self) -> Self;
    /// The error function.
    fn erf(self) -> Self;
    /// Square root.
    fn sqrt(self) -> Self;
    /// The larger; `other` if one is NaN.
    fn larger(self, other: Self) -> Self;
    /// The vector inside a CPU storage of this type.
    fn storage_mut(storage: &mut CpuStorage) -> Option<&mut Vec<Self>>;

    /// Hyperbolic tangent, from `exp`.
    #[inline(always)]
    fn tanh(self) -> Self {
        // Past 20 the result is 1 to any precision, and exp must not overflow.
        let limit = Self::of(20.0);
        let x = if self > limit {
            limit
        } else if self < -limit {
            -limit
        } else {
            self
        };
        let e = (x + x).exp();
        (e - Self::ONE) / (e + Self::ONE)
    }
}

impl Real for f32 {
    const ZERO: Self = 0.0;
    const ONE: Self = 1.0;

    #[inline(always)]
    fn of(value: f64) -> Self {
        value as Self
    }

    #[inline(always)]
    fn wide(self) -> f64 {
        f64::from(self)
    }

    #[inline(always)]
    fn fma(self, a: Self, b: Self) -> Self {
        self.mul_add(a, b)
    }

    /// Cody-Waite reduction and a degree-6 polynomial; 1e-7 relative.
    #[inline(always)]
    fn exp(self) -> Self {
        // Below this the true value is denormal and denormals are flushed; above, infinite anyway.
        let x = self.clamp(-87.33, 88.72);
        // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low mantissa bits.
        const ROUND: f32 = 12_582_912.0;
        let shifted = x.mul_add(std::f32::consts::LOG2_E, ROUND);
        let n = shifted - ROUND;
        let r = n.mul_add(-0.693_359_4, x);
        let r = n.mul_add(2.121_944_4e-4, r);
        let p = 1.987_569_1e-4f32;
        let p = p.mul_add(r, 1.398_199_9e-3);
        let p = p.mul_add(r, 8.333_452e-3);
        let p = p.mul_add(r, 4.166_579_6e-2);
        let p = p.mul_add(r, 1.666_666_5e-1);
        let p = p.mul_add(r, 0.5);
        let p = p.mul_add(r * r, r) + 1.0;
        let result = f32::from_bits(p.to_bits().wrapping_add(shifted.to_bits() << 23));
        // A NaN with payload bits would come out finite.
        if self.is_nan() { self } else { result }
    }

    /// Rational approximation on [-4, 4] (the one in XLA and Eigen); 4e-7 absolute.
    #[inline(always)]
    fn erf(self) -> Self {
        let x = self.clamp(-4.0, 4.0);
        let s = x * x;
        let p = -2.726_142_3e-10f32;
        let p = p.mul_add(s, 2.770_681_4e-8);
        let p = p.mul_add(s, -2.101_024e-6);
        let p = p.mul_add(s, -5.692_506_5e-5);
        let p = p.mul_add(s, -7.349_906_3e-4);
        let p = p.mul_add(s, -2.954_6e-3);
        let p = p.mul_add(s, -1.609_603_3e-2);
        let q = -1.456_607_2e-5f32;
        let q = q.mul_add(s, -2.133_740_6e-4);
        let q = q.mul_add(s, -1.682_827e-3);
        let q = q.mul_add(s, -7.373_329_2e-3);
        let q = q.mul_add(s, -1.426_473_9e-2);
        x * p / q
    }

    #[inline(always)]
    fn sqrt(self) -> Self {
        f32::sqrt(self)
    }

    #[inline(always)]
    fn larger(self, other: Self) -> Self {
        if self > other { self } else { other }
    }

    fn storage_mut(storage: &mut CpuStorage) -> Option<&mut Vec<Self>> {
        match storage {
            CpuStorage::F32(values) => Some(values),
            _ => None,
        }
    }
}

impl Real for f64 {
    const ZERO: Self = 0.0;
    const ONE: Self = 1.0;

    fn of(value: f64) -> Self {
        value
    }

    fn wide(self) -> f64 {
        self
    }

    fn fma(self, a: Self, b: Self) -> Self {
        self * a + b
    }

    fn exp(self) -> Self {
        f64::exp(self)
    }

    fn erf(self) -> Self {
        libm::erf(self)
    }

    fn sqrt(self) -> Self {
        f64::sqrt(self)
    }

    fn larger(self, other: Self) -> Self {
        if self > other { self } else { other }
    }

    fn storage_mut(storage: &mut CpuStorage) -> Option<&mut Vec<Self>> {
        match storage {
            CpuStorage::F64(values) => Some(values),
            _ => None,
        }
    }
}

/// Sum of `f(i)` over `0..n` with [`LANES`] accumulators, always in the same order.
#[inline(always)]
pub(crate) fn sum_by<T: Real>(n: usize, f: impl Fn(usize) -> T) -> T {
    let mut lanes = [T::ZERO; LANES];
    let whole = n / LANES * LANES;
    let mut i = 0;
    while i < whole {
        for lane in 0..LANES {
            lanes[lane] += f(i + lane);
        }
        i += LANES;
    }
    let mut total = T::ZERO;
    for lane in lanes {
        total += lane;
    }
    for i in whole..n {
        total += f(i);
    }
    total
}

/// Largest value, with [`LANES`] accumulators; `start` if empty.
#[inline(always)]
pub(crate) fn largest<T: Real>(values: &[T], start: T) -> T {
    let mut lanes = [start; LANES];
    let chunks = values.chunks_exact(LANES);
    let tail = chunks.remainder();
    for chunk in chunks {
        for lane in 0..LANES {
            lanes[lane] = lanes[lane].larger(chunk[lane]);
        }
    }
    let mut best = start;
    for lane in lanes {
        best = best.larger(lane);
    }
    for value in tail {
        best = best.larger(*value);
    }
    best
}

/// Softmax of one row in place; returns its log-sum-exp. Not for an empty row.
#[inline(always)]
pub(crate) fn softmax<T: Real>(scores: &mut [T]) -> T {
    let max = largest(scores, scores[0]);
    for score in scores.iter_mut() {
        *score = (*score - max).exp();
    }
    let sum = sum_by(scores.len(), |j| scores[j]);
    let inverse = T::ONE / sum;
    for score in scores.iter_mut() {
        *score *= inverse;
    }
    max + T::of(sum.wide().ln())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Largest error of `f` against `reference` over a fine grid, absolute below 1, relative above.
    fn worst(range: (f64, f64), f: impl Fn(f32) -> f32, reference: impl Fn(f64) -> f64) -> f64 {
        let n = 400_000;
        (0..=n)
            .map(|i| {
                let x = (range.0 + (range.1 - range.0) * f64::from(i) / f64::from(n)) as f32;
                let (got, want) = (f64::from(f(x)), reference(f64::from(x)));
                let error = (got - want).abs() / want.abs().max(1.0);
                if error.is_nan() { f64::INFINITY } else { error }
            })
            .fold(0.0, f64::max)
    }

    #[test]
    fn f32_functions_are_accurate() {
        // Measured: exp 8.2e-8 (relative), erf 3.4e-7, tanh 1.4e-7.
        let exp =
            worst((-87.0, 0.0), Real::exp, f64::exp).max(worst((0.0, 88.0), Real::exp, f64::exp));
        let erf = worst((-6.0, 6.0), Real::erf, libm::erf);
        let tanh = worst((-30.0, 30.0), Real::tanh, f64::tanh);
        println!("exp {exp:e} erf {erf:e} tanh {tanh:e}");
        assert!(exp < 2e-7, "exp {exp:e}");
        assert!(erf < 4e-7, "erf {erf:e}");
        assert!(tanh < 3e-7, "tanh {tanh:e}");
    }

    #[test]
    fn nan_and_extremes() {
        assert!(Real::exp(f32::NAN).is_nan());
        assert!(Real::exp(f32::from_bits(0x7fc0_0001)).is_nan());
        assert!(Real::erf(f32::NAN).is_nan());
        assert!(Real::tanh(f32::NAN).is_nan());
        assert!(Real::exp(-1e30f32) < 1e-37);
        assert_eq!(Real::tanh(1e30f32), 1.0);
        assert!((Real::erf(-1e30f32) + 1.0).abs() < 1e-6);
    }

    #[test]
    fn reductions_take_every_element() {
        for n in [0usize, 1, 15, 16, 17, 100] {
            let values: Vec<f64> = (0..n).map(|i| i as f64 - 3.5).collect();
            assert_eq!(sum_by(n, |i| values[i]), values.iter().sum::<f64>());
            let want = values.iter().copied().fold(-1e9, f64::max);
            assert_eq!(largest(&values, -1e9), want);
        }
    }
}
