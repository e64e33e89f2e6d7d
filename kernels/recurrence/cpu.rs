//! The recurrence on the CPU: groups of sequences of about one length, each group a task that takes all its
//! steps by itself. Nothing waits for anything between two steps, and a row's results are the same in any group.

mod gates;
mod panels;

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::{
    Cell, Recurrence, Saved, State, Steps, Weights,
    schedule::{Group, longest_first},
};
use crate::common::{
    host::{Scatter, read, tensor, unwritten, write},
    simd,
    strip::{ROWS, Vector},
};
use panels::Panels;

/// Sequences of a group: whole strips. One strip, two and four took the same time, within 5 %, for 64 sequences of
/// 20 to 500 tokens and H of 128 and 256: fewer leave more groups for many threads, more read W_hh less often.
const GROUP: usize = 2 * ROWS;

/// Runs `task` on every group.
fn in_groups(op: Recurrence<'_>, task: impl Fn(Group<'_>) + Sync) {
    let order = longest_first(op);
    order.par_chunks(GROUP).with_max_len(1).for_each(|sequences| task(Group { op, sequences }));
}

/// The elements of a tensor, or `n` zeros.
fn or_zeros<T: Vector>(tensor: Option<&Tensor>, n: usize) -> Result<Vec<T>> {
    tensor.map_or_else(|| Ok(vec![T::ZERO; n]), |tensor| Ok(read::<T>(tensor)?.to_vec()))
}

/// h, and what else is saved: c or a_n.
pub(super) fn forward<T: Vector>(
    op: Recurrence<'_>,
    gx: &Tensor,
    weights: Weights<'_>,
    start: Option<&State>,
) -> Result<(Tensor, Tensor)> {
    let (t, b, (rows, hidden)) = (op.ragged.tokens(), op.ragged.sequences(), weights.w_hh.dims2()?);
    let bias = or_zeros::<T>(weights.b_hh, rows)?;
    let h0 = or_zeros::<T>(start.map(|start| &start.h), b * hidden)?;
    let c0 = or_zeros::<T>(start.and_then(|start| start.c.as_ref()), b * hidden)?;
    let w_hh = Panels::new(&read::<T>(weights.w_hh)?, (hidden, rows), (1, hidden));
    let (mut h, mut cell) = (unwritten::<T>(t * hidden), unwritten::<T>(t * hidden));
    write::<T, _>(gx, |gx| {
        let to = ForwardRows {
            hidden,
            gates: Scatter::new(gx),
            cell: Scatter::new(&mut cell),
            h: Scatter::new(&mut h),
        };
        in_groups(op, |group| forward_group(group, &w_hh, &bias, [&h0, &c0], to));
        Ok(())
    })?;
    Ok((tensor(h, (t, hidden))?, tensor(cell, (t, hidden))?))
}

/// What forward writes, by row.
#[derive(Clone, Copy)]
struct ForwardRows<'a, T> {
    hidden: usize,
    gates: Scatter<'a, T>,
    cell: Scatter<'a, T>,
    h: Scatter<'a, T>,
}

fn forward_group<T: Vector>(
    group: Group<'_>,
    w_hh: &Panels<T>,
    bias: &[T],
    [h0, c0]: [&[T]; 2],
    to: ForwardRows<'_, T>,
) {
    let (hidden, width) = (to.hidden, w_hh.width());
    let strips = Panels::<T>::rows(group.sequences.len());
    let (mut state, mut cell) = (places(group, h0, hidden), places(group, c0, hidden));
    let mut product = vec![T::ZERO; strips * width];
    for step in 0..group.steps() {
        let active = group.active(step);
        w_hh.product(&state, active, &mut product);
        simd(
            #[inline(always)]
            || {
                for place in 0..active {
                    let row = group.row(place, step);
                    let (state, cell) = (
                        &mut state[place * hidden..][..hidden],
                        &mut cell[place * hidden..][..hidden],
                    );
                    // SAFETY: a row is one sequence's in one step, and a sequence is in one group.
                    let (gates, to_cell, to_h) = unsafe {
                        (
                            to.gates.slice(row * bias.len(), bias.len()),
                            to.cell.slice(row * hidden, hidden),
                            to.h.slice(row * hidden, hidden),
                        )
                    };
                    let product = &product[place * width..][..bias.len()];
                    gates::Forward { gates, product, bias, state, cell }.run(group.op.cell);
                    to_cell.copy_from_slice(cell);
                    to_h.copy_from_slice(state);
                }
            },
        );
    }
}

/// The rows of `from [B, H]` of the group's sequences by place, and zeros up to whole strips.
fn places<T: Vector>(group: Group<'_>, from: &[T], hidden: usize) -> Vec<T> {
    let mut places = vec![T::ZERO; Panels::<T>::rows(group.sequences.len()) * hidden];
    for (place, sequence) in places.chunks_exact_mut(hidden).zip(group.sequences) {
        place.copy_from_slice(&from[sequence * hidden..][..hidden]);
    }
    places
}

pub(super) fn backward<T: Vector>(
    op: Recurrence<'_>,
    saved: Saved,
    w_hh: &Tensor,
    dh: &Tensor,
) -> Result<Steps> {
    let (t, b, (rows, hidden)) = (op.ragged.tokens(), op.ragged.sequences(), w_hh.dims2()?);
    let start = saved.start.as_ref();
    let h0 = or_zeros::<T>(start.map(|start| &start.h), b * hidden)?;
    let c0 = or_zeros::<T>(start.and_then(|start| start.c.as_ref()), b * hidden)?;
    let w_hh = Panels::new(&read::<T>(w_hh)?, (rows, hidden), (hidden, 1));
    let (h, cell) = (read::<T>(&saved.h)?, read::<T>(&saved.cell)?);
    let from = BackwardFrom { hidden, h: &h, cell: &cell, dh: &read::<T>(dh)?, h0: &h0, c0: &c0 };
    let mut before = unwritten::<T>(t * hidden);
    let mut d_a = unwritten::<T>(if op.cell == Cell::Gru { t * rows } else { 0 });
    let mut d_start = [(); 2].map(|()| unwritten::<T>(b * hidden));
    write::<T, _>(&saved.gates, |gates| {
        let [d_h0, d_carry] = d_start.each_mut().map(|state| Scatter::new(state));
        let to = BackwardRows {
            gates: Scatter::new(gates),
            d_a: Scatter::new(&mut d_a),
            before: Scatter::new(&mut before),
            d_h0,
            d_carry,
        };
        in_groups(op, |group| backward_group(group, &w_hh, from, to));
        Ok(())
    })?;
    drop((h, cell));
    let [d_h0, d_carry] = d_start;
    let start = saved.start.map(|start| {
        let c = start.c.map(|_| tensor(d_carry, (b, hidden))).transpose()?;
        Ok::<_, candle_core::Error>(State { h: tensor(d_h0, (b, hidden))?, c })
    });
    Ok(Steps {
        d_gx: saved.gates,
        d_a: (op.cell == Cell::Gru).then(|| tensor(d_a, (t, rows))).transpose()?,
        before: tensor(before, (t, hidden))?,
        start: start.transpose()?,
    })
}

/// What backward reads, by row, or by sequence.
#[derive(Clone, Copy)]
struct BackwardFrom<'a, T> {
    hidden: usize,
    h: &'a [T],
    cell: &'a [T],
    dh: &'a [T],
    h0: &'a [T],
    c0: &'a [T],
}

impl<'a, T: Vector> BackwardFrom<'a, T> {
    /// The row of the step before, or of the start.
    #[inline(always)]
    fn before(
        &self,
        [rows, start]: [&'a [T]; 2],
        group: Group<'_>,
        (place, step): (usize, usize),
    ) -> &'a [T] {
        match step.checked_sub(1) {
            Some(step) => &rows[group.row(place, step) * self.hidden..][..self.hidden],
            None => &start[group.sequences[place] * self.hidden..][..self.hidden],
        }
    }
}

/// What backward writes, by row, or by sequence.
#[derive(Clone, Copy)]
struct BackwardRows<'a, T> {
    /// Gates at first.
    gates: Scatter<'a, T>,
    /// Of a GRU only.
    d_a: Scatter<'a, T>,
    before: Scatter<'a, T>,
    d_h0: Scatter<'a, T>,
    /// dc₀ of an LSTM.
    d_carry: Scatter<'a, T>,
}

fn backward_group<T: Vector>(
    group: Group<'_>,
    w_hh: &Panels<T>,
    from: BackwardFrom<'_, T>,
    to: BackwardRows<'_, T>,
) {
    let (hidden, width, kind) = (from.hidden, w_hh.width(), group.op.cell);
    let (rows, strips) = (kind.gates() * hidden, Panels::<T>::rows(group.sequences.len()));
    let mut d_a = vec![T::ZERO; strips * rows];
    // A sequence joins with its last step, where nothing comes from later ones: its places are still zero.
    let (mut after, mut carry) = (vec![T::ZERO; strips * width], vec![T::ZERO; strips * hidden]);
    for step in (0..group.steps()).rev() {
        let active = group.active(step);
        simd(
            #[inline(always)]
            || {
                for place in 0..active {
                    let row = group.row(place, step);
                    let h_before = from.before([from.h, from.h0], group, (place, step));
                    let d_a = &mut d_a[place * rows..][..rows];
                    // SAFETY: a row is one sequence's in one step, and a sequence is in one group.
                    let gates = unsafe { to.gates.slice(row * rows, rows) };
                    gates::Backward {
                        gates,
                        cell: &from.cell[row * hidden..][..hidden],
                        before: match kind {
                            Cell::Lstm => from.before([from.cell, from.c0], group, (place, step)),
                            Cell::Gru => h_before,
                        },
                        dh: &from.dh[row * hidden..][..hidden],
                        after: &after[place * width..][..hidden],
                        carry: &mut carry[place * hidden..][..hidden],
                        d_a,
                    }
                    .run(kind);
                    // SAFETY: as above.
                    unsafe { to.before.slice(row * hidden, hidden) }.copy_from_slice(h_before);
                    if kind == Cell::Gru {
                        // SAFETY: as above.
                        unsafe { to.d_a.slice(row * rows, rows) }.copy_from_slice(d_a);
                    }
                }
            },
        );
        w_hh.product(&d_a, active, &mut after);
    }
    for (place, sequence) in group.sequences.iter().enumerate() {
        let (after, carry) =
            (&after[place * width..][..hidden], &carry[place * hidden..][..hidden]);
        to.start(*sequence, after, carry, kind);
    }
}

impl<T: Vector> BackwardRows<'_, T> {
    /// Leaves the gradient of what a sequence of this task started from, from what its first step left.
    fn start(&self, sequence: usize, after: &[T], carry: &[T], cell: Cell) {
        let hidden = carry.len();
        // SAFETY: a sequence is in one group, and a group is one task.
        let (d_h0, d_carry) = unsafe {
            (
                self.d_h0.slice(sequence * hidden, hidden),
                self.d_carry.slice(sequence * hidden, hidden),
            )
        };
        d_carry.copy_from_slice(carry);
        for ((d_h0, after), carry) in d_h0.iter_mut().zip(after).zip(carry) {
            *d_h0 = if cell == Cell::Gru { *after + *carry } else { *after };
        }
    }
}
