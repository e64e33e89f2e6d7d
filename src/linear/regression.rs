//! Logistic regression over all ranks: the loss, its gradient and the hits.
//!
//! ```text
//! f(w, b) = 1/n Σ ln(1 + exp(-y_i (x_i·w + b))) + |w|² / (2 C n)      y_i = ±1
//! ```
//!
//! which is LIBLINEAR's and scikit-learn's `|w|²/2 + C Σ ...` divided by `C n`. The intercept `b`, the last
//! element of a point, costs nothing, as in scikit-learn's L-BFGS. A rank has its own rows of `X` and `y`; one
//! sum over the ranks gives all of them the same value and gradient.

use super::{lbfgs::dot, matrix::Matrix};
use crate::{Result, collective::Collective};

/// Numbers in one message between ranks.
const MESSAGE: usize = 1 << 18;

/// The regression's data on one rank.
#[derive(Debug, Clone)]
pub struct Regression {
    rows: Matrix,
    columns: Matrix,
    /// +1 or -1.
    signs: Vec<f64>,
    /// Rows of all ranks.
    total: f64,
    /// 1 / (C n).
    penalty: f64,
}

/// What one evaluation gives.
#[derive(Debug, Clone, PartialEq)]
pub struct Evaluation {
    /// The mean loss with its penalty.
    pub value: f64,
    /// Its gradient, the intercept's last.
    pub gradient: Vec<f64>,
    /// The mean loss without.
    pub loss: f64,
    /// Training reviews on the right side.
    pub correct: usize,
}

impl Regression {
    /// Of `rows` with `columns` columns and `labels` of 0 and 1, of which all ranks have `total`; `c` is
    /// the inverse of the regularisation's strength.
    pub fn new(rows: Matrix, columns: usize, labels: &[u32], total: usize, c: f64) -> Self {
        let signs = labels.iter().map(|label| if *label == 1 { 1.0 } else { -1.0 }).collect();
        let total = total as f64;
        let transposed = rows.transposed(columns);
        Self { rows, columns: transposed, signs, total, penalty: 1.0 / (c * total) }
    }

    /// Length of a point: columns and the intercept.
    pub fn dimensions(&self) -> usize {
        self.columns.rows() + 1
    }

    /// The loss and its gradient at `point`, over all ranks.
    ///
    /// # Errors
    /// `Peer` when the others cannot be reached.
    pub fn evaluate(&self, point: &[f64], collective: &mut dyn Collective) -> Result<Evaluation> {
        let (weights, intercept) = point.split_at(self.columns.rows());
        let (mut loss, mut correct) = (0.0, 0);
        let mut slopes = self.rows.times(weights);
        for (margin, sign) in slopes.iter_mut().zip(&self.signs) {
            let score = *margin + intercept[0];
            loss += softplus(-sign * score);
            correct += usize::from((score > 0.0) == (*sign > 0.0));
            *margin = -sign * sigmoid(-sign * score);
        }
        let mut sums = self.columns.times(&slopes);
        sums.push(slopes.iter().sum());
        sums.extend([loss, correct as f64]);
        if collective.world() > 1 {
            sums.chunks_mut(MESSAGE).try_for_each(|part| collective.all_reduce_f64(part))?;
        }
        let tail = sums.split_off(point.len());
        for (gradient, weight) in sums.iter_mut().zip(weights) {
            *gradient = *gradient / self.total + self.penalty * weight;
        }
        sums[weights.len()] /= self.total;
        let loss = tail[0] / self.total;
        let value = loss + 0.5 * self.penalty * dot(weights, weights);
        Ok(Evaluation { value, gradient: sums, loss, correct: tail[1] as usize })
    }
}

/// `1 / (1 + exp(-x))`, without overflow.
pub fn sigmoid(x: f64) -> f64 {
    match x >= 0.0 {
        true => 1.0 / (1.0 + (-x).exp()),
        false => x.exp() / (1.0 + x.exp()),
    }
}

/// `ln(1 + exp(x))`, without overflow.
pub fn softplus(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{collective::threads::Threads, linear::lbfgs::Lbfgs};

    const X: [[f32; 3]; 8] = [
        [1.0, 0.0, 2.0],
        [0.0, 1.0, 0.0],
        [3.0, 0.0, 0.5],
        [0.0, 0.0, 1.0],
        [1.0, 1.0, 1.0],
        [0.0, 2.0, 0.0],
        [2.0, 0.0, 1.0],
        [0.0, 0.5, 3.0],
    ];
    const Y: [u32; 8] = [1, 0, 1, 0, 1, 0, 0, 1];

    /// The problem as rank `rank` of `world` has it.
    fn shard(rank: usize, world: usize, c: f64) -> Regression {
        let mut rows = Matrix { offsets: vec![0], ..Matrix::default() };
        let mine: Vec<usize> = (rank..X.len()).step_by(world).collect();
        for i in &mine {
            for (column, x) in (0..).zip(X[*i]).filter(|(_, x)| *x != 0.0) {
                rows.columns.push(column);
                rows.values.push(x);
            }
            rows.offsets.push(rows.columns.len());
        }
        let labels: Vec<u32> = mine.iter().map(|i| Y[*i]).collect();
        Regression::new(rows, 3, &labels, X.len(), c)
    }

    fn solution(world: usize, c: f64) -> Vec<f64> {
        let points = Threads::run(world, |collective| {
            let regression = shard(collective.rank(), world, c);
            let mut function = |point: &[f64]| {
                regression.evaluate(point, collective).map(|e| (e.value, e.gradient))
            };
            let mut state =
                Lbfgs::start(vec![0.0; regression.dimensions()], &mut function).unwrap();
            for _ in 0..100 {
                if state.step(&mut function).unwrap().is_none() {
                    break;
                }
            }
            assert!(state.slope() < 1e-9, "{state:?}");
            state.point
        });
        assert!(points.iter().all(|point| *point == points[0]), "every rank has the same bits");
        points[0].clone()
    }

    /// `LogisticRegression(C=C, tol=1e-12)` of scikit-learn 1.9.1, by lbfgs and newton-cholesky alike.
    #[test]
    fn the_solution_is_scikit_learns_whatever_the_ranks() {
        for (c, expected) in [
            (0.5, [0.39008357, -0.05318288, 0.62767645, -0.99071582]),
            (10.0, [1.46497087, 1.35529819, 2.43772487, -4.75770085]),
        ] {
            for world in [1, 2, 4] {
                let point = solution(world, c);
                let near = point.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-7);
                assert!(near, "C = {c}, {world} ranks: {point:?}");
            }
        }
    }

    #[test]
    fn the_gradient_is_that_of_finite_differences() {
        Threads::run(1, |collective| {
            let regression = shard(0, 1, 2.0);
            let point = [0.3, -0.7, 0.2, 0.4];
            let evaluation = regression.evaluate(&point, collective).unwrap();
            let step = 1e-5;
            for i in 0..point.len() {
                let mut value = |step: f64| {
                    let mut moved = point;
                    moved[i] += step;
                    regression.evaluate(&moved, collective).unwrap().value
                };
                let slope = (value(step) - value(-step)) / (2.0 * step);
                // The third derivative's share is of the order of step², rounding 1e-16 / step.
                let off = (slope - evaluation.gradient[i]).abs();
                assert!(off < 1e-9, "{i}: {slope} {:?}", evaluation.gradient);
            }
        });
    }

    #[test]
    fn extreme_scores_neither_overflow_nor_vanish() {
        assert_eq!((sigmoid(800.0), sigmoid(-800.0), sigmoid(0.0)), (1.0, 0.0, 0.5));
        assert_eq!((softplus(800.0), softplus(-800.0)), (800.0, 0.0));
        assert!((softplus(-30.0) / (-30.0_f64).exp() - 1.0).abs() < 1e-12);
    }
}
