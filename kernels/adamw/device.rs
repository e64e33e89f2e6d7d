//! Launches of AdamW: squares, their norm, and the step, without a word from the host between them.

use candle_core::{DType, Result, Tensor};

use super::{AdamW, Bucket, Constants, Norm, Table, Update};
use crate::common::{
    Mirror,
    device::{Address, Launch, int, kernels, unwritten},
    mirror::Plain,
};

const OP: &str = "adamw";
const THREADS: u32 = 256;
/// Elements of one piece, which a block takes.
const PIECE: usize = 4096;
/// Rows of a table that a block takes.
const ROWS: usize = THREADS as usize / 32;

#[derive(Clone, Copy)]
#[repr(C)]
struct BucketParameters {
    values: Address,
    exp_avg: Address,
    exp_avg_sq: Address,
    gradients: Address,
    copy: Address,
    length: i64,
    decayed: i64,
}
// SAFETY: seven numbers of 8 bytes without padding; the pointers among them are the device's.
unsafe impl Plain for BucketParameters {}

#[repr(C)]
struct Squares {
    buckets: Address,
    pieces: Address,
    partials: Address,
}

#[repr(C)]
struct SquaresRows {
    values: Address,
    partials: Address,
    length: i64,
}

#[repr(C)]
struct Clip {
    partials: Address,
    before: Address,
    norm: Address,
    parts: i32,
    samples: f32,
    max_norm: f32,
}

#[repr(C)]
struct Step {
    buckets: Address,
    pieces: Address,
    norm: Address,
    constants: Constants,
}

#[repr(C)]
struct StepRows {
    values: Address,
    exp_avg: Address,
    exp_avg_sq: Address,
    copy: Address,
    ids: Address,
    gradients: Address,
    norm: Address,
    table_rows: i32,
    columns: i32,
    rows: i32,
    constants: Constants,
}

kernels!(
    Squares, THREADS => adamw_squares;
    SquaresRows, THREADS => adamw_squares_rows;
    Clip, THREADS => adamw_clip;
    Step, THREADS => adamw_step;
    StepRows, THREADS => adamw_step_rows;
);

/// (bucket, number in it) of every piece.
fn pieces<'a>(update: &'a Update<'_>) -> &'a Mirror<[i32; 2]> {
    update.pieces.get_or_init(|| {
        let of = |(i, bucket): (usize, &Bucket<'_>)| {
            let count = bucket.gradients.elem_count().div_ceil(PIECE);
            (0..count).map(move |piece| [i as i32, piece as i32])
        };
        update.buckets.iter().enumerate().flat_map(of).collect::<Vec<_>>().into()
    })
}

pub(super) fn norm(
    update: &Update<'_>,
    samples: usize,
    max_norm: f64,
    before: Option<&Norm>,
) -> Result<Norm> {
    let pieces = pieces(update).len();
    let rows = update.table.map_or(0, |table| table.rows.values.elem_count());
    let parts = pieces + rows.div_ceil(PIECE);
    let device = update.any().device();
    let partials = unwritten(device, parts, DType::F64)?;
    squares(update, &partials.narrow(0, 0, pieces)?)?;
    if let Some(table) = &update.table {
        squares_rows(table, &partials.narrow(0, pieces, parts - pieces)?)?;
    }
    let norm = unwritten(device, Norm::NUMBERS, DType::F64)?;
    let mut launch = Launch::on(OP, update.any())?;
    let parameters = Clip {
        partials: launch.read(&partials, DType::F64)?,
        before: launch.read_some(before.map(|norm| &norm.0), DType::F64)?,
        norm: launch.write(&norm, DType::F64)?,
        parts: int(OP, parts)?,
        samples: samples as f32,
        max_norm: max_norm as f32,
    };
    launch.run(adamw_clip, [1, 1, 1], 0, &parameters)?;
    Ok(Norm(norm))
}

/// A sum of squares for each piece.
fn squares(update: &Update<'_>, partials: &Tensor) -> Result<()> {
    let mut launch = Launch::on(OP, update.any())?;
    let mut buckets = Vec::with_capacity(update.buckets.len());
    for bucket in &update.buckets {
        buckets.push(BucketParameters {
            values: Address::NULL,
            exp_avg: Address::NULL,
            exp_avg_sq: Address::NULL,
            gradients: launch.read(bucket.gradients, DType::F32)?,
            copy: Address::NULL,
            length: bucket.gradients.elem_count() as i64,
            decayed: bucket.decayed as i64,
        });
    }
    let pieces = pieces(update);
    let parameters = Squares {
        buckets: launch.numbers(&buckets)?,
        pieces: launch.mirror(pieces)?,
        partials: launch.write(partials, DType::F64)?,
    };
    launch.run(adamw_squares, [pieces.len(), 1, 1], 0, &parameters)
}

/// The same for the rows of a table's gradient.
fn squares_rows(table: &Table<'_>, partials: &Tensor) -> Result<()> {
    let values = &table.rows.values;
    let mut launch = Launch::on(OP, values)?;
    let parameters = SquaresRows {
        values: launch.read(values, DType::F32)?,
        partials: launch.write(partials, DType::F64)?,
        length: values.elem_count() as i64,
    };
    launch.run(adamw_squares_rows, [partials.elem_count(), 1, 1], 0, &parameters)
}

pub(super) fn step(update: &Update<'_>, adamw: &AdamW, norm: &Norm) -> Result<()> {
    let constants = Constants::new(adamw);
    let mut launch = Launch::on(OP, update.any())?;
    let mut buckets = Vec::with_capacity(update.buckets.len());
    for bucket in &update.buckets {
        let state = bucket.state;
        buckets.push(BucketParameters {
            values: launch.write(&state.values, DType::F32)?,
            exp_avg: launch.write(&state.exp_avg, DType::F32)?,
            exp_avg_sq: launch.write(&state.exp_avg_sq, DType::F32)?,
            gradients: launch.write(bucket.gradients, DType::F32)?,
            copy: launch.write_some(state.copy.as_ref(), DType::BF16)?,
            length: bucket.gradients.elem_count() as i64,
            decayed: bucket.decayed as i64,
        });
    }
    let pieces = pieces(update);
    let parameters = Step {
        buckets: launch.numbers(&buckets)?,
        pieces: launch.mirror(pieces)?,
        norm: launch.read(&norm.0, DType::F64)?,
        constants,
    };
    launch.run(adamw_step, [pieces.len(), 1, 1], 0, &parameters)?;
    update.table.map_or(Ok(()), |table| step_rows(&table, constants, norm))
}

fn step_rows(table: &Table<'_>, constants: Constants, norm: &Norm) -> Result<()> {
    let Table { state, rows } = table;
    let table_rows = state.values.elem_count() / rows.width;
    let mut launch = Launch::on(OP, &state.values)?;
    let parameters = StepRows {
        values: launch.write(&state.values, DType::F32)?,
        exp_avg: launch.write(&state.exp_avg, DType::F32)?,
        exp_avg_sq: launch.write(&state.exp_avg_sq, DType::F32)?,
        copy: launch.write_some(state.copy.as_ref(), DType::BF16)?,
        ids: launch.numbers(&rows.ids)?,
        gradients: launch.read(&rows.values, DType::F32)?,
        norm: launch.read(&norm.0, DType::F64)?,
        table_rows: int(OP, table_rows)?,
        columns: int(OP, rows.width)?,
        rows: int(OP, rows.ids.len())?,
        constants,
    };
    launch.run(adamw_step_rows, [table_rows.div_ceil(ROWS), 1, 1], 0, &parameters)
}
