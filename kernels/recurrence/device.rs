//! The recurrence on a device: two launches a step, over the sequences that are still running: the product
//! with W_hh and what follows it, or, backward, what precedes it.

use candle_core::{DType, Result, Tensor};

use super::{
    Cell, OP, Recurrence, Saved, State, Steps, Weights,
    schedule::{Group, longest_first},
};
use crate::{
    Mirror,
    common::device::{
        Address, Kernel, Launch, int, kernels, of_dtype,
        product::{Matrix, product},
        unwritten,
    },
};

const THREADS: usize = 128;
/// Units that a thread takes.
const CHUNK: usize = 8;

#[repr(C)]
struct Step {
    cu_seqlens: Address,
    order: Address,
    active: i32,
    hidden: i32,
    step: i32,
    reverse: i32,
}

#[repr(C)]
struct Forward {
    gates: Address,
    product: Address,
    bias: Address,
    carry: Address,
    state: Address,
    cell: Address,
    h: Address,
    step: Step,
}

#[repr(C)]
struct Backward {
    gates: Address,
    cell: Address,
    h: Address,
    dh: Address,
    h0: Address,
    c0: Address,
    after: Address,
    carry: Address,
    compact: Address,
    d_a: Address,
    before: Address,
    step: Step,
}

kernels!(
    Forward, THREADS as u32 => recurrence_forward_lstm_f32, recurrence_forward_lstm_bf16,
        recurrence_forward_gru_f32, recurrence_forward_gru_bf16;
    Backward, THREADS as u32 => recurrence_backward_lstm_f32, recurrence_backward_lstm_bf16,
        recurrence_backward_gru_f32, recurrence_backward_gru_bf16;
);

/// The sequences by place: longest first.
struct Places<'a> {
    op: Recurrence<'a>,
    order: Mirror<i32>,
    sequences: Vec<usize>,
    hidden: usize,
}

impl<'a> Places<'a> {
    fn new(op: Recurrence<'a>, hidden: usize) -> Self {
        let sequences = longest_first(op);
        let order: Vec<i32> = sequences.iter().map(|sequence| *sequence as i32).collect();
        Self { op, order: order.into(), sequences, hidden }
    }

    fn group(&self) -> Group<'_> {
        Group { op: self.op, sequences: &self.sequences }
    }

    /// `[B, columns]` zeros.
    fn zeros(&self, like: &Tensor, columns: usize, dtype: DType) -> Result<Tensor> {
        Tensor::zeros((self.sequences.len(), columns), dtype, like.device())
    }

    /// A copy of `[B, H]` by sequence, by place; zeros if there is none.
    fn by_place(&self, state: Option<&Tensor>, like: &Tensor, dtype: DType) -> Result<Tensor> {
        let Some(state) = state else { return self.zeros(like, self.hidden, dtype) };
        state.index_select(&indices(&self.sequences, like)?, 0)?.to_dtype(dtype)
    }

    /// The other way.
    fn by_sequence(&self, state: &Tensor) -> Result<Tensor> {
        let mut places: Vec<usize> = (0..self.sequences.len()).collect();
        places.sort_by_key(|place| self.sequences[*place]);
        state.index_select(&indices(&places, state)?, 0)
    }

    /// What `launch` needs to know of a step, and its grid.
    fn step<'l>(&'l self, launch: &mut Launch<'l>, step: usize) -> Result<(Step, [usize; 3])> {
        let active = self.group().active(step);
        let chunks = active * self.hidden.div_ceil(CHUNK);
        let of_step = Step {
            cu_seqlens: launch.mirror(self.op.ragged.starts())?,
            order: launch.mirror(&self.order)?,
            active: int(OP, active)?,
            hidden: int(OP, self.hidden)?,
            step: int(OP, step)?,
            reverse: i32::from(self.op.reverse),
        };
        int(OP, chunks.next_multiple_of(THREADS))?;
        Ok((of_step, [chunks.div_ceil(THREADS), 1, 1]))
    }

    /// `to = from·weight` of the places that have step `step`.
    fn product(&self, step: usize, from: &Tensor, weight: Matrix<'_>, to: &Tensor) -> Result<()> {
        let active = self.group().active(step);
        let (from, to) = (from.narrow(0, 0, active)?, to.narrow(0, 0, active)?);
        product(OP, [Matrix::of(&from)?, weight, Matrix::of(&to)?], 1, false)
    }
}

fn indices(of: &[usize], like: &Tensor) -> Result<Tensor> {
    let indices: Vec<u32> = of.iter().map(|i| *i as u32).collect();
    Tensor::from_vec(indices, of.len(), like.device())
}

/// The kernel of a cell for `tensor`'s elements.
fn of_cell<P>(
    cell: Cell,
    tensor: &Tensor,
    [lstm_f32, lstm_bf16, gru_f32, gru_bf16]: [Kernel<P>; 4],
) -> Result<Kernel<P>> {
    match cell {
        Cell::Lstm => of_dtype(OP, tensor, lstm_f32, lstm_bf16),
        Cell::Gru => of_dtype(OP, tensor, gru_f32, gru_bf16),
    }
}

/// h, and what else is saved: c or a_n, f32.
pub(super) fn forward(
    op: Recurrence<'_>,
    gx: &Tensor,
    weights: Weights<'_>,
    start: Option<&State>,
) -> Result<(Tensor, Tensor)> {
    let (t, (rows, hidden), dtype) = (op.ragged.tokens(), weights.w_hh.dims2()?, gx.dtype());
    let kernel = of_cell(
        op.cell,
        gx,
        [
            recurrence_forward_lstm_f32,
            recurrence_forward_lstm_bf16,
            recurrence_forward_gru_f32,
            recurrence_forward_gru_bf16,
        ],
    )?;
    let places = Places::new(op, hidden);
    let (h0, c0) = (start.map(|start| &start.h), start.and_then(|start| start.c.as_ref()));
    let state = places.by_place(h0, gx, dtype)?;
    let carried = if op.cell == Cell::Lstm { c0 } else { h0 };
    let carry = places.by_place(carried, gx, DType::F32)?;
    let product = unwritten(gx.device(), (places.sequences.len(), rows), DType::F32)?;
    let h = unwritten(gx.device(), (t, hidden), dtype)?;
    let cell = unwritten(gx.device(), (t, hidden), DType::F32)?;
    for step in 0..places.group().steps() {
        places.product(step, &state, Matrix::of(weights.w_hh)?.t(), &product)?;
        let mut launch = Launch::on(OP, gx)?;
        let (of_step, grid) = places.step(&mut launch, step)?;
        let parameters = Forward {
            gates: launch.write(gx, dtype)?,
            product: launch.read(&product, DType::F32)?,
            bias: launch.read_some(weights.b_hh, DType::F32)?,
            carry: launch.write(&carry, DType::F32)?,
            state: launch.write(&state, dtype)?,
            cell: launch.write(&cell, DType::F32)?,
            h: launch.write(&h, dtype)?,
            step: of_step,
        };
        launch.run(kernel, grid, 0, &parameters)?;
    }
    Ok((h, cell))
}

pub(super) fn backward(
    op: Recurrence<'_>,
    saved: Saved,
    w_hh: &Tensor,
    dh: &Tensor,
) -> Result<Steps> {
    let (t, (rows, hidden), dtype) = (op.ragged.tokens(), w_hh.dims2()?, dh.dtype());
    let kernel = of_cell(
        op.cell,
        dh,
        [
            recurrence_backward_lstm_f32,
            recurrence_backward_lstm_bf16,
            recurrence_backward_gru_f32,
            recurrence_backward_gru_bf16,
        ],
    )?;
    let places = Places::new(op, hidden);
    let start = saved.start.as_ref();
    // A sequence joins with its last step, where nothing comes from later ones.
    let after = places.zeros(dh, hidden, DType::F32)?;
    let carry = places.zeros(dh, hidden, DType::F32)?;
    let compact = unwritten(dh.device(), (places.sequences.len(), rows), dtype)?;
    let before = unwritten(dh.device(), (t, hidden), dtype)?;
    let d_a = (op.cell == Cell::Gru).then(|| unwritten(dh.device(), (t, rows), dtype));
    let d_a = d_a.transpose()?;
    for step in (0..places.group().steps()).rev() {
        let mut launch = Launch::on(OP, dh)?;
        let (of_step, grid) = places.step(&mut launch, step)?;
        let c0 = start.and_then(|start| start.c.as_ref());
        let parameters = Backward {
            gates: launch.write(&saved.gates, dtype)?,
            cell: launch.read(&saved.cell, DType::F32)?,
            h: launch.read(&saved.h, dtype)?,
            dh: launch.read(dh, dtype)?,
            h0: launch.read_some(start.map(|start| &start.h), dtype)?,
            c0: launch.read_some(c0, DType::F32)?,
            after: launch.read(&after, DType::F32)?,
            carry: launch.write(&carry, DType::F32)?,
            compact: launch.write(&compact, dtype)?,
            d_a: launch.write_some(d_a.as_ref(), dtype)?,
            before: launch.write(&before, dtype)?,
            step: of_step,
        };
        launch.run(kernel, grid, 0, &parameters)?;
        places.product(step, &compact, Matrix::of(w_hh)?, &after)?;
    }
    let start = saved.start.is_some().then(|| start_gradient(&places, after, carry, dtype));
    Ok(Steps { d_gx: saved.gates, d_a, before, start: start.transpose()? })
}

/// The gradient of what each sequence started from, from what backward left by place.
fn start_gradient(
    places: &Places<'_>,
    after: Tensor,
    carry: Tensor,
    dtype: DType,
) -> Result<State> {
    let (h, c) = match places.op.cell {
        Cell::Lstm => (after, Some(carry)),
        Cell::Gru => ((after + carry)?, None),
    };
    let c = c.map(|c| places.by_sequence(&c)).transpose()?;
    Ok(State { h: places.by_sequence(&h)?.to_dtype(dtype)?, c })
}
