//! What a step does for one row beside the product, forward and backward: [`LANES`] units at a time.
//!
//! Units are copied to arrays and back because arrays do not overlap, which of a dozen slices the compiler
//! would not know: the loops over them become vector code.

use super::super::Cell;
use crate::common::{Real, real::LANES};

/// One row of one step forward, `H` units.
pub(super) struct Forward<'a, T> {
    /// gx, which become the gates, `[G·H]`.
    pub(super) gates: &'a mut [T],
    /// h'·W_hhᵀ, `[G·H]`.
    pub(super) product: &'a [T],
    /// b_hh, `[G·H]`.
    pub(super) bias: &'a [T],
    /// h', which becomes h.
    pub(super) state: &'a mut [T],
    /// c of an LSTM (c' before), a_n of a GRU.
    pub(super) cell: &'a mut [T],
}

/// One row of one step backward.
pub(super) struct Backward<'a, T> {
    /// Gates, which become dgx, `[G·H]`.
    pub(super) gates: &'a mut [T],
    /// c of an LSTM, a_n of a GRU.
    pub(super) cell: &'a [T],
    /// c' of an LSTM, h' of a GRU.
    pub(super) before: &'a [T],
    /// dh, from above.
    pub(super) dh: &'a [T],
    /// e_h, by the product of the step after.
    pub(super) after: &'a [T],
    /// e_c of an LSTM, dh·z of a GRU: of the step after, then of this one.
    pub(super) carry: &'a mut [T],
    /// da, `[G·H]`.
    pub(super) d_a: &'a mut [T],
}

impl<T: Real> Forward<'_, T> {
    #[inline(always)]
    pub(super) fn run(mut self, cell: Cell) {
        for at in (0..self.state.len()).step_by(LANES) {
            match cell {
                Cell::Lstm => self.lstm(at),
                Cell::Gru => self.gru(at),
            }
        }
    }

    #[inline(always)]
    fn lstm(&mut self, at: usize) {
        let (mut i, mut f) = (self.sum(0, at), self.sum(1, at));
        let (mut g, mut o) = (self.sum(2, at), self.sum(3, at));
        let (mut c, mut h) = (units(self.cell, at), [T::ZERO; LANES]);
        for l in 0..LANES {
            (i[l], f[l], g[l], o[l]) = (sigmoid(i[l]), sigmoid(f[l]), g[l].tanh(), sigmoid(o[l]));
            c[l] = f[l].fma(c[l], i[l] * g[l]);
            h[l] = o[l] * c[l].tanh();
        }
        self.put_gates([i, f, g, o], at);
        put(self.cell, at, c);
        put(self.state, at, h);
    }

    #[inline(always)]
    fn gru(&mut self, at: usize) {
        let (mut r, mut z) = (self.sum(0, at), self.sum(1, at));
        let (mut n, a) = (units(self.gate(self.gates, 2), at), self.recurrent(2, at));
        let mut h = units(self.state, at);
        for l in 0..LANES {
            (r[l], z[l]) = (sigmoid(r[l]), sigmoid(z[l]));
            n[l] = r[l].fma(a[l], n[l]).tanh();
            h[l] = z[l].fma(h[l] - n[l], n[l]);
        }
        self.put_gates([r, z, n], at);
        put(self.cell, at, a);
        put(self.state, at, h);
    }

    /// gx + a.
    #[inline(always)]
    fn sum(&self, gate: usize, at: usize) -> [T; LANES] {
        let (mut sum, x) = (self.recurrent(gate, at), units(self.gate(self.gates, gate), at));
        for l in 0..LANES {
            sum[l] += x[l];
        }
        sum
    }

    /// a.
    #[inline(always)]
    fn recurrent(&self, gate: usize, at: usize) -> [T; LANES] {
        let bias = units(self.gate(self.bias, gate), at);
        let mut a = units(self.gate(self.product, gate), at);
        for l in 0..LANES {
            a[l] += bias[l];
        }
        a
    }

    #[inline(always)]
    fn gate<'r>(&self, row: &'r [T], gate: usize) -> &'r [T] {
        let hidden = self.state.len();
        &row[gate * hidden..][..hidden]
    }

    #[inline(always)]
    fn put_gates<const G: usize>(&mut self, gates: [[T; LANES]; G], at: usize) {
        put_gates(self.gates, self.state.len(), gates, at);
    }
}

impl<T: Real> Backward<'_, T> {
    #[inline(always)]
    pub(super) fn run(mut self, cell: Cell) {
        for at in (0..self.dh.len()).step_by(LANES) {
            match cell {
                Cell::Lstm => self.lstm(at),
                Cell::Gru => self.gru(at),
            }
        }
    }

    #[inline(always)]
    fn lstm(&mut self, at: usize) {
        let (mut i, mut f) = (self.gate(0, at), self.gate(1, at));
        let (mut g, mut o) = (self.gate(2, at), self.gate(3, at));
        let (c, before, mut carry) =
            (units(self.cell, at), units(self.before, at), units(self.carry, at));
        let dh = self.dh(at);
        for l in 0..LANES {
            let tanh = c[l].tanh();
            let dc = (dh[l] * o[l]).fma(T::ONE - tanh * tanh, carry[l]);
            carry[l] = dc * f[l];
            let (of_i, of_g) = (dc * g[l], dc * i[l]);
            i[l] = of_i * i[l] * (T::ONE - i[l]);
            f[l] = carry[l] * before[l] * (T::ONE - f[l]);
            g[l] = of_g * (T::ONE - g[l] * g[l]);
            o[l] = dh[l] * tanh * o[l] * (T::ONE - o[l]);
        }
        put(self.carry, at, carry);
        put_gates(self.gates, self.dh.len(), [i, f, g, o], at);
        put_gates(self.d_a, self.dh.len(), [i, f, g, o], at);
    }

    #[inline(always)]
    fn gru(&mut self, at: usize) {
        let (mut r, mut z, mut n) = (self.gate(0, at), self.gate(1, at), self.gate(2, at));
        let (a, before, mut carry) =
            (units(self.cell, at), units(self.before, at), units(self.carry, at));
        let (dh, mut d_a) = (self.dh(at), [T::ZERO; LANES]);
        for l in 0..LANES {
            let dh = dh[l] + carry[l];
            carry[l] = dh * z[l];
            let dn = dh * (T::ONE - z[l]) * (T::ONE - n[l] * n[l]);
            z[l] = carry[l] * (before[l] - n[l]) * (T::ONE - z[l]);
            d_a[l] = dn * r[l];
            r[l] = d_a[l] * a[l] * (T::ONE - r[l]);
            n[l] = dn;
        }
        put(self.carry, at, carry);
        put_gates(self.gates, self.dh.len(), [r, z, n], at);
        put_gates(self.d_a, self.dh.len(), [r, z, d_a], at);
    }

    /// dh of the step, from above and from the product.
    #[inline(always)]
    fn dh(&self, at: usize) -> [T; LANES] {
        let (mut dh, after) = (units(self.dh, at), units(self.after, at));
        for l in 0..LANES {
            dh[l] += after[l];
        }
        dh
    }

    #[inline(always)]
    fn gate(&self, gate: usize, at: usize) -> [T; LANES] {
        let hidden = self.dh.len();
        units(&self.gates[gate * hidden..][..hidden], at)
    }
}

/// σ(u) = 1 / (1 + e^-u).
#[inline(always)]
fn sigmoid<T: Real>(u: T) -> T {
    T::ONE / (T::ONE + (-u).exp())
}

/// [`LANES`] elements from `at` on; zeros past the end.
#[inline(always)]
fn units<T: Real>(from: &[T], at: usize) -> [T; LANES] {
    let from = &from[at..];
    if let Some(whole) = from.first_chunk::<LANES>() {
        return *whole;
    }
    let mut units = [T::ZERO; LANES];
    for (unit, value) in units.iter_mut().zip(from) {
        *unit = *value;
    }
    units
}

/// The other way.
#[inline(always)]
fn put<T: Real>(to: &mut [T], at: usize, units: [T; LANES]) {
    let to = &mut to[at..];
    if let Some(whole) = to.first_chunk_mut::<LANES>() {
        *whole = units;
        return;
    }
    for (value, unit) in to.iter_mut().zip(units) {
        *value = unit;
    }
}

/// The same for all gates of a row of as many times `hidden`.
#[inline(always)]
fn put_gates<T: Real, const G: usize>(
    to: &mut [T],
    hidden: usize,
    gates: [[T; LANES]; G],
    at: usize,
) {
    for gate in 0..G {
        put(&mut to[gate * hidden..][..hidden], at, gates[gate]);
    }
}
