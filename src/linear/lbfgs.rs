//! L-BFGS (Liu & Nocedal 1989): minimises a smooth function of many variables from its gradients.
//!
//! The direction is the two-loop recursion over the last [`HISTORY`] steps; its length is found by
//! bisection until both of Wolfe's conditions hold (Lewis & Overton 2013), which a convex function always lets
//! happen. One evaluation gives the value and the gradient together: over ranks that is one pass over the
//! data and one sum, where argmin and the bindings of liblbfgs ask for both apart or know no ranks.
//!
//! Everything here is the same on every rank, and the same whatever the number of threads.

use std::collections::VecDeque;

use rayon::prelude::*;

use crate::Result;

/// Steps that are remembered.
pub const HISTORY: usize = 10;
/// Share of the promised decrease that a step must keep (Armijo).
const DECREASE: f64 = 1e-4;
/// Share of the slope that may be left after a step.
const CURVATURE: f64 = 0.9;
/// Lengths tried for one step.
const TRIES: usize = 30;
/// Elements that are summed before partial sums are: fixed, so that threads change no bit.
const PART: usize = 1 << 13;

/// A function of a vector: its value and its gradient there.
pub type Function<'a> = dyn FnMut(&[f64]) -> Result<(f64, Vec<f64>)> + 'a;

/// Steps, and how the gradient changed with each, oldest first.
pub type History = VecDeque<(Vec<f64>, Vec<f64>)>;

/// A minimisation under way.
#[derive(Debug, Clone, PartialEq)]
pub struct Lbfgs {
    /// Where it is.
    pub point: Vec<f64>,
    /// The function's value there.
    pub value: f64,
    /// The function's gradient there.
    pub gradient: Vec<f64>,
    /// The last steps.
    pub history: History,
}

impl Lbfgs {
    /// Starts at `point`.
    ///
    /// # Errors
    /// Those of `function`.
    pub fn start(point: Vec<f64>, function: &mut Function<'_>) -> Result<Self> {
        let (value, gradient) = function(&point)?;
        Ok(Self::at(point, value, gradient))
    }

    /// At `point`, where the function is known, without a step to remember.
    pub fn at(point: Vec<f64>, value: f64, gradient: Vec<f64>) -> Self {
        Self { point, value, gradient, history: VecDeque::new() }
    }

    /// The largest absolute element of the gradient: what is left to do.
    pub fn slope(&self) -> f64 {
        most(&self.gradient)
    }

    /// One step, and its length in directions; `None` if neither the value nor the slope gets any lower:
    /// this is the minimum, to rounding.
    ///
    /// # Errors
    /// Those of `function`.
    pub fn step(&mut self, function: &mut Function<'_>) -> Result<Option<f64>> {
        let direction = self.direction();
        let slope = dot(&self.gradient, &direction);
        if slope.is_nan() || slope >= 0.0 {
            return Ok(None);
        }
        let (mut low, mut high) = (0.0, f64::INFINITY);
        let mut length = match self.history.is_empty() {
            true => (1.0 / dot(&direction, &direction).sqrt()).min(1.0),
            false => 1.0,
        };
        for _ in 0..TRIES {
            let point = plus(&self.point, length, &direction);
            let (value, gradient) = function(&point)?;
            if value.is_nan() || value > self.value + DECREASE * length * slope {
                high = length;
            } else if dot(&gradient, &direction) < CURVATURE * slope {
                low = length;
            } else {
                let better = value < self.value || most(&gradient) < self.slope();
                self.accept(point, value, gradient);
                return Ok(better.then_some(length));
            }
            length = if high.is_finite() { (low + high) / 2.0 } else { 2.0 * low };
        }
        Ok(None)
    }

    /// Minus the gradient times the inverse Hessian that the history describes.
    fn direction(&self) -> Vec<f64> {
        let mut direction: Vec<f64> = self.gradient.iter().map(|g| -g).collect();
        let mut shares = Vec::with_capacity(self.history.len());
        for (step, change) in self.history.iter().rev() {
            let share = dot(step, &direction) / dot(step, change);
            add(&mut direction, -share, change);
            shares.push(share);
        }
        if let Some((step, change)) = self.history.back() {
            let scale = dot(step, change) / dot(change, change);
            direction.par_iter_mut().for_each(|d| *d *= scale);
        }
        for ((step, change), share) in self.history.iter().zip(shares.into_iter().rev()) {
            let back = dot(change, &direction) / dot(step, change);
            add(&mut direction, share - back, step);
        }
        direction
    }

    fn accept(&mut self, point: Vec<f64>, value: f64, gradient: Vec<f64>) {
        let step = plus(&point, -1.0, &self.point);
        let change = plus(&gradient, -1.0, &self.gradient);
        // Wolfe's second condition says so but for rounding.
        if dot(&step, &change) > 0.0 {
            if self.history.len() == HISTORY {
                self.history.pop_front();
            }
            self.history.push_back((step, change));
        }
        (self.point, self.value, self.gradient) = (point, value, gradient);
    }
}

/// The largest absolute element.
fn most(vector: &[f64]) -> f64 {
    // Not f64::max, which would pass over a NaN.
    vector.iter().fold(0.0, |most, x| if x.abs() <= most { most } else { x.abs() })
}

/// `a·b`.
pub(super) fn dot(a: &[f64], b: &[f64]) -> f64 {
    let part = |(a, b): (&[f64], &[f64])| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let parts: Vec<f64> = a.par_chunks(PART).zip(b.par_chunks(PART)).map(part).collect();
    parts.into_iter().sum()
}

/// `a + scale * b`.
fn plus(a: &[f64], scale: f64, b: &[f64]) -> Vec<f64> {
    let mut sum = a.to_vec();
    add(&mut sum, scale, b);
    sum
}

/// `a += scale * b`.
fn add(a: &mut [f64], scale: f64, b: &[f64]) {
    a.par_chunks_mut(PART).zip(b.par_chunks(PART)).for_each(|(a, b)| {
        a.iter_mut().zip(b).for_each(|(a, b)| *a += scale * b);
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn minimise(start: Vec<f64>, function: &mut Function<'_>, steps: usize) -> Lbfgs {
        let mut state = Lbfgs::start(start, function).unwrap();
        for _ in 0..steps {
            if state.slope() < 1e-10 || state.step(function).unwrap().is_none() {
                break;
            }
        }
        state
    }

    /// Scales from 1 to 1e3, beyond one part of the sums.
    #[test]
    fn a_quadratic_ends_at_its_minimum() {
        let n = PART + 7;
        let scale = |i: usize| 10_f64.powi((i % 4) as i32);
        let mut function = |x: &[f64]| {
            let gradient: Vec<f64> =
                x.iter().enumerate().map(|(i, x)| scale(i) * (x - i as f64 / n as f64)).collect();
            let value = gradient.iter().enumerate().map(|(i, g)| g * g / scale(i) / 2.0).sum();
            Ok((value, gradient))
        };
        let state = minimise(vec![1.0; n], &mut function, 200);
        let off = state.point.iter().enumerate().map(|(i, x)| (x - i as f64 / n as f64).abs());
        let worst = off.fold(0.0, |worst, off| if off <= worst { worst } else { off });
        assert!(worst < 1e-9, "{worst}");
    }

    /// Curved and far from convex; the minimum is at (1, 1).
    #[test]
    fn rosenbrocks_valley_is_followed_to_its_end() {
        let mut function = |x: &[f64]| {
            let (a, b) = (1.0 - x[0], x[1] - x[0] * x[0]);
            Ok((a * a + 100.0 * b * b, vec![-2.0 * a - 400.0 * x[0] * b, 200.0 * b]))
        };
        let state = minimise(vec![-1.2, 1.0], &mut function, 100);
        let worst = (state.point[0] - 1.0).abs().max((state.point[1] - 1.0).abs());
        assert!(worst < 1e-6 && state.slope() < 1e-6, "{state:?}");
    }

    #[test]
    fn no_step_is_made_from_the_minimum_or_a_function_without_numbers() {
        let mut flat = |x: &[f64]| Ok((1.0, vec![0.0; x.len()]));
        let mut state = Lbfgs::start(vec![1.0], &mut flat).unwrap();
        assert_eq!(state.step(&mut flat).unwrap(), None);
        let mut nan = |_: &[f64]| Ok((f64::NAN, vec![f64::NAN]));
        let mut state = Lbfgs::start(vec![1.0], &mut nan).unwrap();
        assert!(state.slope().is_nan());
        assert_eq!(state.step(&mut nan).unwrap(), None);
        assert_eq!(state.point, [1.0]);
    }

    #[test]
    fn going_on_from_what_was_kept_changes_no_bit() {
        let mut function = |x: &[f64]| {
            let (a, b) = (1.0 - x[0], x[1] - x[0] * x[0]);
            Ok((a * a + 100.0 * b * b, vec![-2.0 * a - 400.0 * x[0] * b, 200.0 * b]))
        };
        let whole = minimise(vec![-1.2, 1.0], &mut function, 20);
        let mut half = minimise(vec![-1.2, 1.0], &mut function, 13).clone();
        for _ in 13..20 {
            half.step(&mut function).unwrap();
        }
        assert_eq!(half, whole);
    }
}
