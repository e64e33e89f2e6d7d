//! Convolution on the CPU: the batch once with zeros between its sequences, then one product per tap.
//!
//! With (k-1)/2 rows of zeros around every sequence, a tap is the same shift for the whole batch, and
//! no product is cut at the ends of a sequence: for short ones, packing W again and again would cost
//! as much as the arithmetic. What is computed for the rows of the gaps is dropped.

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::Shape;
use crate::{
    common::{
        ROWS_PER_TASK, Ragged, Real,
        host::{Scatter, read, tensor, unwritten, write},
        simd,
    },
    linear::{View, add, gemm},
};

/// A batch with `border` rows of zeros before, between and after its sequences.
struct Gapped {
    border: usize,
    /// Token at each row; none in a gap.
    tokens: Vec<Option<usize>>,
    /// Row of each token.
    rows: Vec<usize>,
}

impl Gapped {
    fn new(ragged: &Ragged, taps: usize) -> Self {
        let border = (taps - 1) / 2;
        let (mut tokens, mut rows) = (vec![None; border], Vec::with_capacity(ragged.tokens()));
        for i in 0..ragged.sequences() {
            for token in ragged.range(i) {
                rows.push(tokens.len());
                tokens.push(Some(token));
            }
            tokens.extend(std::iter::repeat_n(None, border));
        }
        Self { border, tokens, rows }
    }

    /// Rows that have all their neighbours: those between the first border and the last.
    fn inner(&self) -> usize {
        self.tokens.len().saturating_sub(2 * self.border)
    }

    /// `[rows, width]` from `[T, width]`.
    fn spread<T: Real>(&self, x: &Tensor) -> Result<Vec<T>> {
        let width = x.dim(1)?;
        let x = read::<T>(x)?;
        let mut spread = unwritten::<T>(self.tokens.len() * width);
        spread
            .par_chunks_mut(ROWS_PER_TASK * width)
            .zip(self.tokens.par_chunks(ROWS_PER_TASK))
            .for_each(|(rows, tokens)| {
                for (row, token) in rows.chunks_exact_mut(width).zip(tokens) {
                    match token {
                        Some(token) => row.copy_from_slice(&x[token * width..][..width]),
                        None => row.fill(T::ZERO),
                    }
                }
            });
        Ok(spread)
    }

    /// `[T, width]`, plus the bias, from the `[inner, width]` that a product made.
    fn gather<T: Real>(&self, inner: &[T], width: usize, bias: Option<&[T]>) -> Result<Tensor> {
        let mut y = unwritten::<T>(self.rows.len() * width);
        y.par_chunks_mut(ROWS_PER_TASK * width).zip(self.rows.par_chunks(ROWS_PER_TASK)).for_each(
            |(y, rows)| {
                simd(
                    #[inline(always)]
                    || {
                        for (y, row) in y.chunks_exact_mut(width).zip(rows) {
                            y.copy_from_slice(&inner[(row - self.border) * width..][..width]);
                            if let Some(bias) = bias {
                                add(y, bias);
                            }
                        }
                    },
                );
            },
        );
        tensor(y, (self.rows.len(), width))
    }
}

impl Shape {
    fn inputs_per_group(&self) -> usize {
        self.inputs / self.groups
    }

    fn outputs_per_group(&self) -> usize {
        self.outputs / self.groups
    }

    /// Tap `tap` of group `group`, `[N/groups, K/groups]`, of the weight that `start(at)` points into.
    fn tap<P>(&self, group: usize, tap: usize, start: impl Fn(usize) -> P) -> View<P> {
        let row_stride = self.inputs_per_group() * self.taps;
        let at = group * self.outputs_per_group() * row_stride + tap;
        View { start: start(at), row_stride, column_stride: self.taps }
    }
}

pub(super) fn forward<T: Real>(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    shape: Shape,
    ragged: &Ragged,
) -> Result<Tensor> {
    let gapped = Gapped::new(ragged, shape.taps);
    let w = read::<T>(weight)?;
    let widths = (shape.inputs, shape.outputs);
    let y = correlate(&gapped, &gapped.spread::<T>(x)?, widths, shape, |group, shift| {
        shape.tap(group, shift, |at| w[at..].as_ptr()).transposed()
    });
    let bias = bias.map(read::<T>).transpose()?;
    gapped.gather(&y, shape.outputs, bias.as_deref())
}

pub(super) fn backward_input<T: Real>(
    dy: &Tensor,
    weight: &Tensor,
    shape: Shape,
    ragged: &Ragged,
) -> Result<Tensor> {
    let gapped = Gapped::new(ragged, shape.taps);
    let w = read::<T>(weight)?;
    let widths = (shape.outputs, shape.inputs);
    // The last tap looked furthest ahead, so what comes back through it comes from furthest behind.
    let dx = correlate(&gapped, &gapped.spread::<T>(dy)?, widths, shape, |group, shift| {
        shape.tap(group, shape.taps - 1 - shift, |at| w[at..].as_ptr())
    });
    gapped.gather(&dx, shape.inputs, None)
}

/// `[inner, to]`: at each inner row, the sum over groups and shifts of the spread `[rows, from]` so
/// many rows on by `tap(group, shift)`, a `[from/groups, to/groups]` inside the weight.
fn correlate<T: Real>(
    gapped: &Gapped,
    spread: &[T],
    (from, to): (usize, usize),
    shape: Shape,
    tap: impl Fn(usize, usize) -> View<*const T>,
) -> Vec<T> {
    let inner = gapped.inner();
    let mut sum = unwritten::<T>(inner * to);
    if inner == 0 {
        return sum;
    }
    let (from_group, to_group) = (from / shape.groups, to / shape.groups);
    for (group, shift) in (0..shape.groups).flat_map(|g| (0..shape.taps).map(move |s| (g, s))) {
        // SAFETY: `sum` is [inner, to] and ours alone; rows shift..shift + inner of the spread exist
        // because shift < taps and it has inner + taps - 1 rows; both views stay in their group's
        // columns, and the tap's in the weight, whose shape was checked.
        unsafe {
            gemm(
                (inner, to_group, from_group),
                View::rows(sum[group * to_group..].as_mut_ptr(), to),
                shift > 0,
                T::ONE,
                View::rows(spread[shift * from + group * from_group..].as_ptr(), from),
                tap(group, shift),
                rayon::current_num_threads(),
            );
        }
    }
    sum
}

pub(super) fn backward_weight<T: Real>(
    dy: &Tensor,
    x: &Tensor,
    weight_grad: &Tensor,
    shape: Shape,
    ragged: &Ragged,
) -> Result<()> {
    let gapped = Gapped::new(ragged, shape.taps);
    let inner = gapped.inner();
    if inner == 0 {
        return Ok(());
    }
    let Shape { inputs, outputs, taps, groups } = shape;
    let (x, dy) = (gapped.spread::<T>(x)?, gapped.spread::<T>(dy)?);
    write::<T, _>(weight_grad, |dw| {
        let dw = Scatter::new(dw);
        for (group, tap) in (0..groups).flat_map(|g| (0..taps).map(move |t| (g, t))) {
            let dy = &dy[gapped.border * outputs + group * shape.outputs_per_group()..];
            let x = &x[tap * inputs + group * shape.inputs_per_group()..];
            // SAFETY: dw is the whole weight gradient, exclusively borrowed, and its tap stays inside;
            // dy and x have inner rows from border and from tap < taps on; rows of the gaps are zero.
            unsafe {
                gemm(
                    (shape.outputs_per_group(), shape.inputs_per_group(), inner),
                    shape.tap(group, tap, |at| dw.pointer(at)),
                    true,
                    T::ONE,
                    View::rows(dy.as_ptr(), outputs).transposed(),
                    View::rows(x.as_ptr(), inputs),
                    rayon::current_num_threads(),
                );
            }
        }
        Ok(())
    })
}
