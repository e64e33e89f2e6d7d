//! Launches of the junction, with LayerNorm and without it.

use candle_core::{DType, Result, Tensor, bail};

use super::{Gradients, Junction, LayerNorm, Saved};
use crate::common::{
    Dropout, RowIds,
    device::{
        Address, Kernel, Launch, int, kernels, of_dtype,
        parameters::{DropoutParameters, Parts, RowIdParameters, add_partials},
        unwritten,
    },
};

const OP: &str = "norm";
/// Threads of a row under the norm.
const THREADS: u32 = 128;
const ADD_THREADS: usize = 256;
/// Columns that a block of the backward without a norm takes.
const STRIP: usize = 256;
/// Columns of the widest row that each of three kernels takes: a row is in one block's registers.
const WIDEST: [usize; 3] = [1024, 2048, 4096];

#[repr(C)]
struct JunctionParameters {
    x: Address,
    bias: Address,
    residual: Address,
    dropout: DropoutParameters,
    ids: RowIdParameters,
}

#[repr(C)]
struct Forward {
    junction: JunctionParameters,
    gamma: Address,
    beta: Address,
    z: Address,
    y: Address,
    moments: Address,
    rows: i32,
    columns: i32,
    eps: f32,
}

#[repr(C)]
struct Backward {
    dy: Address,
    z: Address,
    past: Address,
    moments: Address,
    gamma: Address,
    dx: Address,
    dz: Address,
    dropout: DropoutParameters,
    ids: RowIdParameters,
    gamma_partials: Address,
    beta_partials: Address,
    bias_partials: Address,
    rows: i32,
    columns: i32,
    rows_per_part: i32,
}

#[repr(C)]
struct Add {
    junction: JunctionParameters,
    z: Address,
    rows: i32,
    columns: i32,
}

#[repr(C)]
struct AddBackward {
    dz: Address,
    dx: Address,
    dropout: DropoutParameters,
    ids: RowIdParameters,
    partials: Address,
    rows: i32,
    columns: i32,
    rows_per_part: i32,
}

kernels!(
    Forward, THREADS => norm_forward_1024_f32, norm_forward_2048_f32, norm_forward_4096_f32,
        norm_forward_1024_bf16, norm_forward_2048_bf16, norm_forward_4096_bf16;
    Backward, THREADS => norm_backward_1024_f32, norm_backward_2048_f32, norm_backward_4096_f32,
        norm_backward_1024_bf16, norm_backward_2048_bf16, norm_backward_4096_bf16;
    Add, ADD_THREADS as u32 => norm_add_f32, norm_add_bf16;
    AddBackward, STRIP as u32 => norm_add_backward_f32, norm_add_backward_bf16;
);

/// The first of the kernels for `x`'s elements whose rows are wide enough.
fn fitting<P>(x: &Tensor, f32: [Kernel<P>; 3], bf16: [Kernel<P>; 3]) -> Result<Kernel<P>> {
    let columns = x.dim(1)?;
    match WIDEST.iter().position(|widest| columns <= *widest) {
        Some(i) => of_dtype(OP, x, f32[i], bf16[i]),
        None => bail!("norm: rows of {columns} columns, the kernels take up to {}", WIDEST[2]),
    }
}

type Drop<'a> = Option<(&'a Dropout, &'a RowIds)>;

fn dropping<'a>(
    launch: &mut Launch<'a>,
    dropout: Drop<'a>,
) -> Result<(DropoutParameters, RowIdParameters)> {
    Ok(match dropout {
        Some((dropout, rows)) => {
            (DropoutParameters::new(Some(dropout)), RowIdParameters::new(launch, rows)?)
        }
        None => (DropoutParameters::new(None), RowIdParameters::NONE),
    })
}

fn joining<'a>(
    launch: &mut Launch<'a>,
    x: &'a Tensor,
    junction: Junction<'a>,
) -> Result<JunctionParameters> {
    let (dropout, ids) = dropping(launch, junction.dropout)?;
    Ok(JunctionParameters {
        x: launch.read(x, x.dtype())?,
        bias: launch.read_some(junction.bias, DType::F32)?,
        residual: launch.read_some(junction.residual, x.dtype())?,
        dropout,
        ids,
    })
}

pub(super) fn forward(
    x: &Tensor,
    junction: Junction<'_>,
    norm: LayerNorm<'_>,
) -> Result<(Tensor, Saved)> {
    let kernel = fitting(
        x,
        [norm_forward_1024_f32, norm_forward_2048_f32, norm_forward_4096_f32],
        [norm_forward_1024_bf16, norm_forward_2048_bf16, norm_forward_4096_bf16],
    )?;
    let (rows, columns) = x.dims2()?;
    let matrix = || unwritten(x.device(), (rows, columns), x.dtype());
    let (z, y) = (matrix()?, matrix()?);
    let moments = unwritten(x.device(), (rows, 2), DType::F32)?;
    let mut launch = Launch::on(OP, x)?;
    let parameters = Forward {
        junction: joining(&mut launch, x, junction)?,
        gamma: launch.read(norm.gamma, DType::F32)?,
        beta: launch.read_some(norm.beta, DType::F32)?,
        z: launch.write(&z, x.dtype())?,
        y: launch.write(&y, x.dtype())?,
        moments: launch.write(&moments, DType::F32)?,
        rows: int(OP, rows)?,
        columns: int(OP, columns)?,
        eps: norm.eps as f32,
    };
    launch.run(kernel, [rows, 1, 1], 0, &parameters)?;
    Ok((y, Saved { z, moments }))
}

pub(super) fn backward(
    dy: &Tensor,
    saved: &Saved,
    past: Option<&Tensor>,
    junction: Junction<'_>,
    norm: LayerNorm<'_>,
    gradients: Option<Gradients<'_>>,
) -> Result<(Tensor, Tensor)> {
    let kernel = fitting(
        dy,
        [norm_backward_1024_f32, norm_backward_2048_f32, norm_backward_4096_f32],
        [norm_backward_1024_bf16, norm_backward_2048_bf16, norm_backward_4096_bf16],
    )?;
    let (rows, columns) = dy.dims2()?;
    let (dtype, parts) = (dy.dtype(), Parts::of(rows));
    let matrix = || unwritten(dy.device(), (rows, columns), dtype);
    let (dx, dz) = (junction.dropout.map(|_| matrix()).transpose()?, matrix()?);
    let sums = Sums::new(dy, parts, gradients)?;
    let mut launch = Launch::on(OP, dy)?;
    let (dropout, ids) = dropping(&mut launch, junction.dropout)?;
    let [gamma_partials, beta_partials, bias_partials] = sums.write(&mut launch)?;
    let parameters = Backward {
        dy: launch.read(dy, dtype)?,
        z: launch.read(&saved.z, dtype)?,
        past: launch.read_some(past, dtype)?,
        moments: launch.read(&saved.moments, DType::F32)?,
        gamma: launch.read(norm.gamma, DType::F32)?,
        dx: launch.write_some(dx.as_ref(), dtype)?,
        dz: launch.write(&dz, dtype)?,
        dropout,
        ids,
        gamma_partials,
        beta_partials,
        bias_partials,
        rows: int(OP, rows)?,
        columns: int(OP, columns)?,
        rows_per_part: int(OP, parts.rows)?,
    };
    launch.run(kernel, [parts.count, 1, 1], 0, &parameters)?;
    sums.add()?;
    Ok((dx.unwrap_or_else(|| dz.clone()), dz))
}

/// Partial sums of γ, β and the bias, and the gradients that they are added to.
struct Sums<'a>([Option<(Tensor, &'a Tensor)>; 3]);

impl<'a> Sums<'a> {
    fn new(like: &Tensor, parts: Parts, gradients: Option<Gradients<'a>>) -> Result<Self> {
        let columns = like.dim(1)?;
        let Some(Gradients { gamma, beta, bias }) = gradients else {
            return Ok(Self([None, None, None]));
        };
        let of = |to: &'a Tensor| Ok::<_, candle_core::Error>((parts.tensor(like, columns)?, to));
        Ok(Self([Some(of(gamma)?), beta.map(of).transpose()?, bias.map(of).transpose()?]))
    }

    fn write<'s>(&'s self, launch: &mut Launch<'s>) -> Result<[Address; 3]> {
        let mut write = |i: usize| {
            launch.write_some(self.0[i].as_ref().map(|(partials, _)| partials), DType::F32)
        };
        Ok([write(0)?, write(1)?, write(2)?])
    }

    fn add(&self) -> Result<()> {
        self.0.iter().flatten().try_for_each(|(partials, to)| add_partials(OP, partials, to))
    }
}

pub(super) fn add(x: &Tensor, junction: Junction<'_>) -> Result<Tensor> {
    let kernel = of_dtype(OP, x, norm_add_f32, norm_add_bf16)?;
    let (rows, columns) = x.dims2()?;
    let z = unwritten(x.device(), (rows, columns), x.dtype())?;
    let mut launch = Launch::on(OP, x)?;
    let parameters = Add {
        junction: joining(&mut launch, x, junction)?,
        z: launch.write(&z, x.dtype())?,
        rows: int(OP, rows)?,
        columns: int(OP, columns)?,
    };
    let grid = (rows * columns.div_ceil(8)).div_ceil(ADD_THREADS);
    launch.run(kernel, [grid, 1, 1], 0, &parameters)?;
    Ok(z)
}

pub(super) fn add_backward(
    dz: &Tensor,
    dropout: Drop<'_>,
    bias_grad: Option<&Tensor>,
) -> Result<Tensor> {
    if dropout.is_none() && bias_grad.is_none() {
        return Ok(dz.clone());
    }
    let kernel = of_dtype(OP, dz, norm_add_backward_f32, norm_add_backward_bf16)?;
    let (rows, columns) = dz.dims2()?;
    let (dtype, parts) = (dz.dtype(), Parts::of(rows));
    let dx = dropout.map(|_| unwritten(dz.device(), (rows, columns), dtype)).transpose()?;
    let partials = bias_grad.map(|_| parts.tensor(dz, columns)).transpose()?;
    let mut launch = Launch::on(OP, dz)?;
    let (dropout, ids) = dropping(&mut launch, dropout)?;
    let parameters = AddBackward {
        dz: launch.read(dz, dtype)?,
        dx: launch.write_some(dx.as_ref(), dtype)?,
        dropout,
        ids,
        partials: launch.write_some(partials.as_ref(), DType::F32)?,
        rows: int(OP, rows)?,
        columns: int(OP, columns)?,
        rows_per_part: int(OP, parts.rows)?,
    };
    launch.run(kernel, [columns.div_ceil(STRIP), parts.count, 1], 0, &parameters)?;
    if let (Some(partials), Some(bias_grad)) = (&partials, bias_grad) {
        add_partials(OP, partials, bias_grad)?;
    }
    Ok(dx.unwrap_or_else(|| dz.clone()))
}
