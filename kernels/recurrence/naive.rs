//! The recurrence of one sequence as its formulas say, in f64, with what the kernels store rounded as they
//! round it. How wrong that is sets what they may be.

use super::Cell;

/// Of one layer.
pub(super) struct Naive<'a> {
    pub(super) cell: Cell,
    pub(super) hidden: usize,
    /// `[G·H, H]`.
    pub(super) w_hh: &'a [f64],
    /// `[G·H]`.
    pub(super) b_hh: &'a [f64],
    /// What storing makes of a number.
    pub(super) round: &'a dyn Fn(f64) -> f64,
}

/// Rows of a sequence in the order of its steps.
pub(super) type Rows = Vec<Vec<f64>>;

/// What forward leaves of a sequence, and what it started from.
pub(super) struct Passed {
    pub(super) gates: Rows,
    pub(super) cell: Rows,
    pub(super) h: Rows,
    pub(super) h0: Vec<f64>,
    pub(super) c0: Vec<f64>,
}

/// The gradients of a sequence; `before` is h'.
#[derive(Default)]
pub(super) struct Back {
    pub(super) gx: Rows,
    pub(super) a: Rows,
    pub(super) before: Rows,
    pub(super) h0: Vec<f64>,
    pub(super) c0: Vec<f64>,
}

fn sigmoid(u: f64) -> f64 {
    1.0 / (1.0 + (-u).exp())
}

impl Naive<'_> {
    /// From gx, h₀ and c₀.
    pub(super) fn forward(&self, gx: &Rows, h0: Vec<f64>, c0: Vec<f64>) -> Passed {
        let rounded = |row: &[f64]| row.iter().map(|x| (self.round)(*x)).collect::<Vec<_>>();
        let mut passed = Passed { gates: vec![], cell: vec![], h: vec![], h0, c0 };
        // A GRU's h is carried as it is and rounded for the product.
        let (mut h, mut c) = (passed.h0.clone(), passed.c0.clone());
        for gx in gx {
            let a = self.recurrent(passed.h.last().unwrap_or(&passed.h0));
            let mut gates = vec![0.0; gx.len()];
            let mut cell = vec![0.0; self.hidden];
            for j in 0..self.hidden {
                let at = |gate: usize| gate * self.hidden + j;
                let sum = |gate| gx[at(gate)] + a[at(gate)];
                match self.cell {
                    Cell::Lstm => {
                        let (i, f, o) = (sigmoid(sum(0)), sigmoid(sum(1)), sigmoid(sum(3)));
                        let g = sum(2).tanh();
                        c[j] = f * c[j] + i * g;
                        h[j] = o * c[j].tanh();
                        (gates[at(0)], gates[at(1)], gates[at(2)], gates[at(3)]) = (i, f, g, o);
                        cell[j] = c[j];
                    }
                    Cell::Gru => {
                        let (r, z) = (sigmoid(sum(0)), sigmoid(sum(1)));
                        let n = (gx[at(2)] + r * a[at(2)]).tanh();
                        h[j] = n + z * (h[j] - n);
                        (gates[at(0)], gates[at(1)], gates[at(2)]) = (r, z, n);
                        cell[j] = a[at(2)];
                    }
                }
            }
            passed.gates.push(rounded(&gates));
            passed.cell.push(cell);
            passed.h.push(rounded(&h));
        }
        passed
    }

    /// h·W_hhᵀ + b_hh.
    fn recurrent(&self, h: &[f64]) -> Vec<f64> {
        let rows = self.w_hh.chunks_exact(self.hidden).zip(self.b_hh);
        rows.map(|(row, b)| b + row.iter().zip(h).map(|(w, h)| w * h).sum::<f64>()).collect()
    }

    /// The gradients from dh.
    pub(super) fn backward(&self, passed: &Passed, dh: &Rows) -> Back {
        let mut back = Back::default();
        let (mut after, mut carry) = (vec![0.0; self.hidden], vec![0.0; self.hidden]);
        for t in (0..dh.len()).rev() {
            let earlier = |rows: &Rows, start: &Vec<f64>| match t {
                0 => start.clone(),
                _ => rows[t - 1].clone(),
            };
            let (h_before, c_before) =
                (earlier(&passed.h, &passed.h0), earlier(&passed.cell, &passed.c0));
            let (gates, cell) = (&passed.gates[t], &passed.cell[t]);
            let (mut d_gx, mut d_a) = (vec![0.0; gates.len()], vec![0.0; gates.len()]);
            for j in 0..self.hidden {
                let at = |gate: usize| gate * self.hidden + j;
                let gate = |k| gates[at(k)];
                let d = dh[t][j] + after[j];
                match self.cell {
                    Cell::Lstm => {
                        let ((i, f), (g, o)) = ((gate(0), gate(1)), (gate(2), gate(3)));
                        let tanh = cell[j].tanh();
                        let dc = carry[j] + d * o * (1.0 - tanh * tanh);
                        d_gx[at(0)] = dc * g * i * (1.0 - i);
                        d_gx[at(1)] = dc * c_before[j] * f * (1.0 - f);
                        d_gx[at(2)] = dc * i * (1.0 - g * g);
                        d_gx[at(3)] = d * tanh * o * (1.0 - o);
                        carry[j] = dc * f;
                        (0..4).for_each(|k| d_a[at(k)] = d_gx[at(k)]);
                    }
                    Cell::Gru => {
                        let ((r, z), n) = ((gate(0), gate(1)), gate(2));
                        let d = d + carry[j];
                        let dn = d * (1.0 - z) * (1.0 - n * n);
                        d_gx[at(0)] = dn * cell[j] * r * (1.0 - r);
                        d_gx[at(1)] = d * (h_before[j] - n) * z * (1.0 - z);
                        d_gx[at(2)] = dn;
                        carry[j] = d * z;
                        (0..2).for_each(|k| d_a[at(k)] = d_gx[at(k)]);
                        d_a[at(2)] = dn * r;
                    }
                }
            }
            d_gx.iter_mut().chain(&mut d_a).for_each(|x| *x = (self.round)(*x));
            after = self.through_weight(&d_a);
            back.gx.insert(0, d_gx);
            back.a.insert(0, d_a);
            back.before.insert(0, h_before);
        }
        (back.h0, back.c0) = match self.cell {
            Cell::Lstm => (after, carry),
            Cell::Gru => (after.iter().zip(&carry).map(|(a, b)| a + b).collect(), vec![]),
        };
        back.h0.iter_mut().for_each(|x| *x = (self.round)(*x));
        back
    }

    /// da·W_hh.
    fn through_weight(&self, d_a: &[f64]) -> Vec<f64> {
        let mut sum = vec![0.0; self.hidden];
        for (d_a, row) in d_a.iter().zip(self.w_hh.chunks_exact(self.hidden)) {
            sum.iter_mut().zip(row).for_each(|(sum, w)| *sum += d_a * w);
        }
        sum
    }
}
