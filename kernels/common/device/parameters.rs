//! What kernels of several rooms take, as `common/device.cuh` and `common/op.cu` have it.

use candle_core::{DType, Result, Tensor, bail};

use super::{Address, Launch, int, kernels, unwritten};
use crate::common::{Dropout, RowIds};

/// `Dropout` of `common/device.cuh`.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct DropoutParameters {
    key: [u32; 2],
    step: u32,
    threshold: u32,
    scale: f32,
}

impl DropoutParameters {
    pub(crate) fn new(dropout: Option<&Dropout>) -> Self {
        dropout.map_or(Self { key: [0; 2], step: 0, threshold: 0, scale: 1.0 }, |dropout| Self {
            key: dropout.key,
            step: dropout.step,
            threshold: u32::from(dropout.threshold),
            scale: dropout.scale() as f32,
        })
    }
}

/// `RowIds` of `common/device.cuh`.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct RowIdParameters {
    sample: Address,
    position: Address,
}

impl RowIdParameters {
    /// Nothing, where no dropout reads it.
    pub(crate) const NONE: Self = Self { sample: Address::NULL, position: Address::NULL };

    pub(crate) fn new<'a>(launch: &mut Launch<'a>, rows: &'a RowIds) -> Result<Self> {
        Ok(Self { sample: launch.mirror(&rows.sample)?, position: launch.mirror(&rows.position)? })
    }
}

/// `AddPartials` of `common/op.cu`.
#[repr(C)]
struct AddPartials {
    partials: Address,
    gradient: Address,
    parts: i32,
    columns: i32,
}
const ADD_THREADS: usize = 128;
kernels!(AddPartials, ADD_THREADS as u32 => add_partials_f32;);

/// Sums over rows are cut into parts of fixed size, whatever the device, so that they round the same.
#[derive(Clone, Copy)]
pub(crate) struct Parts {
    /// Rows of one partial sum.
    pub(crate) rows: usize,
    /// Number of partial sums.
    pub(crate) count: usize,
}

impl Parts {
    /// Enough parts that a device is busy, few enough that adding them up costs little.
    pub(crate) fn of(rows: usize) -> Self {
        let each = match cfg!(test) {
            true => 24, // so that tests of few rows have several
            false => 128,
        };
        Self { rows: each, count: rows.div_ceil(each) }
    }

    /// Memory for the partial sums of `columns` columns, on the device of `like`.
    pub(crate) fn tensor(self, like: &Tensor, columns: usize) -> Result<Tensor> {
        unwritten(like.device(), (self.count, columns), DType::F32)
    }
}

/// Adds `[parts, gradient]` partial sums to a gradient, in order.
pub(crate) fn add_partials(op: &'static str, partials: &Tensor, gradient: &Tensor) -> Result<()> {
    let (parts, columns) = partials.dims2()?;
    if gradient.elem_count() != columns {
        bail!("{op}: a gradient {:?} of {columns} columns", gradient.dims());
    }
    let mut launch = Launch::on(op, partials)?;
    let parameters = AddPartials {
        partials: launch.read(partials, DType::F32)?,
        gradient: launch.write(gradient, DType::F32)?,
        parts: int(op, parts)?,
        columns: int(op, columns)?,
    };
    launch.run(add_partials_f32, [columns.div_ceil(ADD_THREADS), 1, 1], 0, &parameters)
}
