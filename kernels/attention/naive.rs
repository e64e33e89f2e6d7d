//! Attention as a naive bf16 implementation would compute it, for one head of one sequence: every product
//! in f64, but of operands rounded to bf16, and rounded results. How wrong it is sets what the kernels
//! of op.cu may be.

use half::bf16;

use super::HEAD;

pub(crate) fn round(x: f64) -> f64 {
    bf16::from_f64(x).to_f64()
}

/// Row-major `[rows, HEAD]`.
pub(crate) type Rows = Vec<[f64; HEAD]>;

/// Tables of relative positions: content-to-position, position-to-content, and the row of each distance.
pub(crate) struct Relative<'a> {
    pub(crate) pk: Rows,
    pub(crate) pq: Rows,
    pub(crate) slot: &'a dyn Fn(isize) -> usize,
}

/// One head of one sequence: forward reads `q, k, v`, backward all.
pub(crate) struct Head<'a> {
    pub(crate) q: Rows,
    pub(crate) k: Rows,
    pub(crate) v: Rows,
    pub(crate) o: Rows,
    pub(crate) d_o: Rows,
    pub(crate) lse: Vec<f64>,
    pub(crate) scale: f64,
    pub(crate) relative: Option<Relative<'a>>,
    /// Whether query i sees key j.
    pub(crate) sees: &'a dyn Fn(usize, usize) -> bool,
    /// Dropout's factor on (i, j).
    pub(crate) factor: &'a dyn Fn(usize, usize) -> f64,
}

/// The gradients, those of the tables not rounded: they are sums over sequences.
pub(crate) struct Gradients {
    pub(crate) q: Rows,
    pub(crate) k: Rows,
    pub(crate) v: Rows,
    pub(crate) pk: Rows,
    pub(crate) pq: Rows,
}

pub(crate) fn dot(a: &[f64; HEAD], b: &[f64; HEAD]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

pub(crate) fn add(sum: &mut [f64; HEAD], weight: f64, row: &[f64; HEAD]) {
    for (sum, row) in sum.iter_mut().zip(row) {
        *sum += weight * row;
    }
}

pub(crate) fn rounded(mut rows: Rows) -> Rows {
    rows.iter_mut().flatten().for_each(|x| *x = round(*x));
    rows
}

impl Head<'_> {
    fn score(&self, i: usize, j: usize) -> f64 {
        if !(self.sees)(i, j) {
            return f64::NEG_INFINITY;
        }
        let mut score = dot(&self.q[i], &self.k[j]);
        if let Some(relative) = &self.relative {
            let row = (relative.slot)(i as isize - j as isize);
            score += dot(&self.q[i], &relative.pk[row]) + dot(&self.k[j], &relative.pq[row]);
        }
        score * self.scale
    }

    /// o.
    pub(crate) fn forward(&self) -> Rows {
        let of_row = |i: usize| {
            let scores: Vec<f64> = (0..self.q.len()).map(|j| self.score(i, j)).collect();
            let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = scores.iter().map(|s| (s - max).exp()).sum();
            let mut o = [0.0; HEAD];
            for (j, score) in scores.iter().enumerate() {
                add(&mut o, round((score - max).exp() / sum * (self.factor)(i, j)), &self.v[j]);
            }
            o
        };
        rounded((0..self.q.len()).map(of_row).collect())
    }

    pub(crate) fn backward(&self) -> Gradients {
        let n = self.q.len();
        let zeros = |rows| vec![[0.0; HEAD]; rows];
        let table = self.relative.as_ref().map_or(0, |relative| relative.pk.len());
        let mut d =
            Gradients { q: zeros(n), k: zeros(n), v: zeros(n), pk: zeros(table), pq: zeros(table) };
        for i in 0..n {
            let delta = dot(&self.o[i], &self.d_o[i]);
            for j in 0..n {
                let p = (self.score(i, j) - self.lse[i]).exp();
                let factor = (self.factor)(i, j);
                let g = p * (dot(&self.d_o[i], &self.v[j]) * factor - delta) * self.scale;
                let g = round(g);
                add(&mut d.q[i], g, &self.k[j]);
                add(&mut d.k[j], g, &self.q[i]);
                add(&mut d.v[j], round(p * factor), &self.d_o[i]);
                if let Some(relative) = &self.relative {
                    let row = (relative.slot)(i as isize - j as isize);
                    add(&mut d.q[i], g, &relative.pk[row]);
                    add(&mut d.k[j], g, &relative.pq[row]);
                    add(&mut d.pk[row], g, &self.q[i]);
                    add(&mut d.pq[row], g, &self.k[j]);
                }
            }
        }
        Gradients { q: rounded(d.q), k: rounded(d.k), v: rounded(d.v), pk: d.pk, pq: d.pq }
    }
}
