//! The activation functions and their slopes, one type each, so that a loop is compiled for each.

use crate::common::Real;

/// An elementwise function and its derivative. Both are inlined into `common::simd` bodies.
pub(super) trait Function {
    /// f(u).
    fn value<T: Real>(u: T) -> T;
    /// f'(u).
    fn slope<T: Real>(u: T) -> T;
}

pub(super) struct Gelu;
pub(super) struct GeluTanh;
pub(super) struct Relu;
pub(super) struct Silu;
pub(super) struct Tanh;

impl Function for Gelu {
    #[inline(always)]
    fn value<T: Real>(u: T) -> T {
        let half = T::of(0.5);
        half * u * (T::ONE + (u * T::of(std::f64::consts::FRAC_1_SQRT_2)).erf())
    }

    #[inline(always)]
    fn slope<T: Real>(u: T) -> T {
        let cdf = T::of(0.5) * (T::ONE + (u * T::of(std::f64::consts::FRAC_1_SQRT_2)).erf());
        // φ(u) = e^(-u²/2) / √(2π)
        let pdf = (T::of(-0.5) * u * u).exp() * T::of(0.398_942_280_401_432_7);
        u.fma(pdf, cdf)
    }
}

/// √(2/π) and the cubic coefficient of the tanh form.
const TANH_SCALE: f64 = 0.797_884_560_802_865_4;
const TANH_CUBIC: f64 = 0.044_715;

impl Function for GeluTanh {
    #[inline(always)]
    fn value<T: Real>(u: T) -> T {
        let inner = T::of(TANH_SCALE) * u * (T::ONE + T::of(TANH_CUBIC) * u * u);
        T::of(0.5) * u * (T::ONE + inner.tanh())
    }

    #[inline(always)]
    fn slope<T: Real>(u: T) -> T {
        let cubic = T::of(TANH_CUBIC) * u * u;
        let tanh = (T::of(TANH_SCALE) * u * (T::ONE + cubic)).tanh();
        let inner_slope = T::of(TANH_SCALE) * (T::ONE + T::of(3.0) * cubic);
        T::of(0.5) * (T::ONE + tanh + u * (T::ONE - tanh * tanh) * inner_slope)
    }
}

impl Function for Relu {
    #[inline(always)]
    fn value<T: Real>(u: T) -> T {
        // In this order NaN stays NaN.
        T::ZERO.larger(u)
    }

    #[inline(always)]
    fn slope<T: Real>(u: T) -> T {
        if u <= T::ZERO { T::ZERO } else { T::ONE }
    }
}

/// σ(u) = 1 / (1 + e^-u).
#[inline(always)]
fn sigmoid<T: Real>(u: T) -> T {
    T::ONE / (T::ONE + (-u).exp())
}

impl Function for Silu {
    #[inline(always)]
    fn value<T: Real>(u: T) -> T {
        u * sigmoid(u)
    }

    #[inline(always)]
    fn slope<T: Real>(u: T) -> T {
        let sigmoid = sigmoid(u);
        sigmoid * (T::ONE + u * (T::ONE - sigmoid))
    }
}

impl Function for Tanh {
    #[inline(always)]
    fn value<T: Real>(u: T) -> T {
        u.tanh()
    }

    #[inline(always)]
    fn slope<T: Real>(u: T) -> T {
        let tanh = u.tanh();
        T::ONE - tanh * tanh
    }
}

/// Calls `$call::<$t, F>` with the function of `$activation` for F.
macro_rules! by_activation {
    ($activation:expr, $call:ident::<$t:ident>($($argument:expr),* $(,)?)) => {
        match $activation {
            Activation::Gelu => $call::<$t, Gelu>($($argument),*),
            Activation::GeluTanh => $call::<$t, GeluTanh>($($argument),*),
            Activation::Relu => $call::<$t, Relu>($($argument),*),
            Activation::Silu => $call::<$t, Silu>($($argument),*),
            Activation::Tanh => $call::<$t, Tanh>($($argument),*),
        }
    };
}
pub(super) use by_activation;
