//! Launches of cross-entropy: a pass over the rows, then the sums over them.

use candle_core::{DType, Result, Tensor};

use crate::common::{
    Mirror,
    device::{Address, Launch, int, kernels, of_dtype, unwritten},
};

const OP: &str = "cross_entropy";
const THREADS: u32 = 128;
/// Rows that a block takes, a warp each.
const ROWS: usize = 4;

#[repr(C)]
struct CrossEntropy {
    logits: Address,
    labels: Address,
    d_logits: Address,
    losses: Address,
    predictions: Address,
    rows: i32,
    classes: i32,
    smoothing: f32,
}

#[repr(C)]
struct Sum {
    losses: Address,
    predictions: Address,
    labels: Address,
    totals: Address,
    rows: i32,
}

kernels!(
    CrossEntropy, THREADS => cross_entropy_f32, cross_entropy_bf16;
    Sum, THREADS => cross_entropy_totals;
);

/// What the first pass leaves of `B` rows.
pub(super) struct Rows {
    /// `[B, C]`, as the logits.
    pub(super) d_logits: Tensor,
    /// f32 `[B]`.
    losses: Tensor,
    /// u32 `[B]`: the first largest logit of each row.
    pub(super) predictions: Tensor,
}

pub(super) fn cross_entropy(
    logits: &Tensor,
    labels: &Mirror<u32>,
    smoothing: f64,
    sums: &Tensor,
) -> Result<Tensor> {
    let rows = of_rows(logits, labels, smoothing)?;
    let mut launch = Launch::on(OP, logits)?;
    let parameters = Sum {
        losses: launch.read(&rows.losses, DType::F32)?,
        predictions: launch.read(&rows.predictions, DType::U32)?,
        labels: launch.mirror(labels)?,
        totals: launch.write(sums, DType::F64)?,
        rows: int(OP, labels.len())?,
    };
    launch.run(cross_entropy_totals, [1, 1, 1], 0, &parameters)?;
    Ok(rows.d_logits)
}

pub(super) fn of_rows(logits: &Tensor, labels: &Mirror<u32>, smoothing: f64) -> Result<Rows> {
    let kernel = of_dtype(OP, logits, cross_entropy_f32, cross_entropy_bf16)?;
    let (rows, classes) = logits.dims2()?;
    let results = Rows {
        d_logits: unwritten(logits.device(), (rows, classes), logits.dtype())?,
        losses: unwritten(logits.device(), rows, DType::F32)?,
        predictions: unwritten(logits.device(), rows, DType::U32)?,
    };
    let mut launch = Launch::on(OP, logits)?;
    let parameters = CrossEntropy {
        logits: launch.read(logits, logits.dtype())?,
        labels: launch.mirror(labels)?,
        d_logits: launch.write(&results.d_logits, logits.dtype())?,
        losses: launch.write(&results.losses, DType::F32)?,
        predictions: launch.write(&results.predictions, DType::U32)?,
        rows: int(OP, rows)?,
        classes: int(OP, classes)?,
        smoothing: smoothing as f32,
    };
    launch.run(kernel, [rows.div_ceil(ROWS), 1, 1], 0, &parameters)?;
    Ok(results)
}
