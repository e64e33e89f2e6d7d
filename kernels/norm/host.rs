//! The kernels of op.cu, run on the host, against the CPU implementation in f64.

use candle_core::Result;
use half::bf16;

use super::*;
use crate::{
    Ragged,
    common::host_run::{
        Address, Buffer, DropoutParameters, Kernel, RowIdBuffers, RowIdParameters, Storage,
        add_partials, check, in_every_order, kernels, launch, parts, rounded,
    },
    testing::{dropout, random, zeros},
};

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
    Forward: host_norm_forward_1024_f32, host_norm_forward_2048_f32, host_norm_forward_4096_f32,
        host_norm_forward_1024_bf16, host_norm_forward_2048_bf16, host_norm_forward_4096_bf16;
    Backward: host_norm_backward_1024_f32, host_norm_backward_2048_f32,
        host_norm_backward_4096_f32, host_norm_backward_1024_bf16, host_norm_backward_2048_bf16,
        host_norm_backward_4096_bf16;
    Add: host_norm_add_f32, host_norm_add_bf16;
    AddBackward: host_norm_add_backward_f32, host_norm_add_backward_bf16;
);

/// What the CPU and the kernels are both given.
struct Case {
    x: Tensor,
    residual: Tensor,
    dy: Tensor,
    past: Tensor,
    bias: Tensor,
    gamma: Tensor,
    beta: Tensor,
    rows: RowIds,
    dropout: Option<Dropout>,
    /// Whether there are a residual, a bias, a shift and a gradient past the norm.
    whole: bool,
}

const EPS: f64 = 1e-7;

impl Case {
    fn new<S: Storage>(h: usize, dropout: Option<Dropout>, whole: bool) -> Result<Self> {
        let ragged = Ragged::new(&[5, 1, 31], &[31, 4, 1500])?;
        let matrix = |seed| rounded::<S>(&random(&[37, h], seed)?);
        let vector = |seed| rounded::<f32>(&random(&[h], seed)?);
        Ok(Self {
            x: matrix(1)?,
            residual: matrix(2)?,
            dy: matrix(3)?,
            past: matrix(4)?,
            bias: vector(5)?,
            gamma: vector(6)?,
            beta: vector(7)?,
            rows: ragged.token_rows().clone(),
            dropout,
            whole,
        })
    }

    fn some<'a>(&self, x: &'a Tensor) -> Option<&'a Tensor> {
        self.whole.then_some(x)
    }

    fn junction(&self) -> Junction<'_> {
        Junction {
            bias: self.some(&self.bias),
            dropout: self.dropout.as_ref().map(|dropout| (dropout, &self.rows)),
            residual: self.some(&self.residual),
        }
    }

    fn norm(&self) -> LayerNorm<'_> {
        LayerNorm { gamma: &self.gamma, beta: self.some(&self.beta), eps: EPS }
    }
}

/// A case in memory of kernels.
struct Operands<S> {
    x: Buffer<S>,
    residual: Option<Buffer<S>>,
    dy: Buffer<S>,
    past: Option<Buffer<S>>,
    bias: Option<Buffer<f32>>,
    gamma: Buffer<f32>,
    beta: Option<Buffer<f32>>,
    ids: RowIdBuffers,
    dropout: Option<Dropout>,
    rows: usize,
    columns: usize,
}

impl<S: Storage> Operands<S> {
    fn new(case: &Case) -> Result<Self> {
        let (rows, columns) = case.x.dims2()?;
        Ok(Self {
            x: Buffer::tensor(&case.x)?,
            residual: case.some(&case.residual).map(Buffer::tensor).transpose()?,
            dy: Buffer::tensor(&case.dy)?,
            past: case.some(&case.past).map(Buffer::tensor).transpose()?,
            bias: case.some(&case.bias).map(Buffer::tensor).transpose()?,
            gamma: Buffer::tensor(&case.gamma)?,
            beta: case.some(&case.beta).map(Buffer::tensor).transpose()?,
            ids: RowIdBuffers::new(&case.rows),
            dropout: case.dropout,
            rows,
            columns,
        })
    }

    fn junction(&self) -> JunctionParameters {
        JunctionParameters {
            x: self.x.address(),
            bias: Address::of(self.bias.as_ref()),
            residual: Address::of(self.residual.as_ref()),
            dropout: DropoutParameters::new(self.dropout.as_ref()),
            ids: self.ids.parameters(),
        }
    }

    fn matrix(&self) -> Buffer<S> {
        Buffer::poisoned(self.rows * self.columns)
    }

    /// The first of three kernels whose rows are long enough.
    fn fitting<P>(&self, kernels: [Kernel<P>; 3]) -> Kernel<P> {
        kernels[[1024, 2048, 4096].iter().position(|w| self.columns <= *w).expect("a kernel")]
    }

    /// `(z, y, moments)`.
    fn forward(&self) -> (Buffer<S>, Buffer<S>, Buffer<f32>) {
        let (z, y, moments) = (self.matrix(), self.matrix(), Buffer::poisoned(2 * self.rows));
        let parameters = Forward {
            junction: self.junction(),
            gamma: self.gamma.address(),
            beta: Address::of(self.beta.as_ref()),
            z: z.address(),
            y: y.address(),
            moments: moments.address(),
            rows: self.rows as i32,
            columns: self.columns as i32,
            eps: EPS as f32,
        };
        let kernel = self.fitting(if S::BF16 {
            [host_norm_forward_1024_bf16, host_norm_forward_2048_bf16, host_norm_forward_4096_bf16]
        } else {
            [host_norm_forward_1024_f32, host_norm_forward_2048_f32, host_norm_forward_4096_f32]
        });
        launch(kernel, [self.rows, 1, 1], 0, &parameters);
        (z, y, moments)
    }

    /// `(dx, dz)`, and `[dγ, dβ, db]` added to zeros.
    #[allow(clippy::type_complexity)]
    fn backward(
        &self,
        z: &Buffer<S>,
        moments: &Buffer<f32>,
    ) -> Result<(Option<Buffer<S>>, Buffer<S>, [Buffer<f32>; 3])> {
        let (dx, dz) = (self.dropout.map(|_| self.matrix()), self.matrix());
        let (rows_per_part, parts) = parts(self.rows);
        let partials: [Buffer<f32>; 3] =
            std::array::from_fn(|_| Buffer::poisoned(parts * self.columns));
        let parameters = Backward {
            dy: self.dy.address(),
            z: z.address(),
            past: Address::of(self.past.as_ref()),
            moments: moments.address(),
            gamma: self.gamma.address(),
            dx: Address::of(dx.as_ref()),
            dz: dz.address(),
            dropout: DropoutParameters::new(self.dropout.as_ref()),
            ids: self.ids.parameters(),
            gamma_partials: partials[0].address(),
            beta_partials: partials[1].address(),
            bias_partials: partials[2].address(),
            rows: self.rows as i32,
            columns: self.columns as i32,
            rows_per_part: rows_per_part as i32,
        };
        let kernel = self.fitting(if S::BF16 {
            [
                host_norm_backward_1024_bf16,
                host_norm_backward_2048_bf16,
                host_norm_backward_4096_bf16,
            ]
        } else {
            [host_norm_backward_1024_f32, host_norm_backward_2048_f32, host_norm_backward_4096_f32]
        });
        launch(kernel, [parts, 1, 1], 0, &parameters);
        let gradients: [Buffer<f32>; 3] =
            std::array::from_fn(|_| Buffer::of(&vec![0.0; self.columns]));
        for (partials, gradient) in partials.iter().zip(&gradients) {
            add_partials(partials, gradient);
        }
        Ok((dx, dz, gradients))
    }
}

fn tensor<S: Storage>(buffer: &Buffer<S>, shape: (usize, usize)) -> Result<Tensor> {
    Tensor::from_vec(buffer.wide(), shape, &Device::Cpu)
}

fn compare_norm<S: Storage>(h: usize, dropout: Option<Dropout>, whole: bool) -> Result<()> {
    let case = Case::new::<S>(h, dropout, whole)?;
    let operands = Operands::<S>::new(&case)?;
    let (z, y, moments) = operands.forward();
    let (_, exact) = forward(&case.x, case.junction(), case.norm())?;
    check("z", &z, exact.z(), 1e-6)?;
    // What follows is of z as it was stored.
    let stored = tensor(&z, (37, h))?;
    let (exact_y, exact) = forward(&stored, Junction::default(), case.norm())?;
    check("y", &y, &exact_y, 2e-6)?;
    check("moments", &moments, &exact.moments, 1e-6)?;

    let saved = Saved { z: stored, moments: tensor(&moments, (37, 2))? };
    let exact: [Tensor; 3] = [zeros(&case.gamma)?, zeros(&case.gamma)?, zeros(&case.gamma)?];
    let all = Gradients { gamma: &exact[0], beta: Some(&exact[1]), bias: Some(&exact[2]) };
    let past = case.some(&case.past);
    let (exact_dx, exact_dz) =
        backward(&case.dy, &saved, past, case.junction(), case.norm(), Some(all))?;
    let (dx, dz, gradients) = operands.backward(&z, &moments)?;
    check("dz", &dz, &exact_dz, 2e-6)?;
    if let Some(dx) = dx {
        check("dx", &dx, &exact_dx, 2e-6)?;
    }
    for (what, (got, exact)) in ["dγ", "dβ", "db"].iter().zip(gradients.iter().zip(&exact)) {
        check(what, got, exact, 2e-6)?;
    }
    Ok(())
}

#[test]
fn host_norm_matches_the_cpu() -> Result<()> {
    in_every_order(|| {
        for h in [1, 19, 776, 1032, 2056] {
            for (dropout, whole) in [(None, false), (Some(dropout()), true), (None, true)] {
                compare_norm::<f32>(h, dropout, whole)?;
                compare_norm::<bf16>(h, dropout, whole)?;
            }
        }
        Ok(())
    })
}

fn compare_add<S: Storage>(h: usize, dropout: Option<Dropout>, whole: bool) -> Result<()> {
    let case = Case::new::<S>(h, dropout, whole)?;
    let operands = Operands::<S>::new(&case)?;
    let z = operands.matrix();
    let parameters =
        Add { junction: operands.junction(), z: z.address(), rows: 37, columns: h as i32 };
    let kernel = if S::BF16 { host_norm_add_bf16 } else { host_norm_add_f32 };
    launch(kernel, [(37 * h.div_ceil(8)).div_ceil(256), 1, 1], 0, &parameters);
    check("z", &z, &add(&case.x, case.junction())?, 1e-6)?;

    let (rows_per_part, parts) = parts(37);
    let (dx, partials) = (dropout.map(|_| operands.matrix()), Buffer::poisoned(parts * h));
    let parameters = AddBackward {
        dz: operands.dy.address(),
        dx: Address::of(dx.as_ref()),
        dropout: DropoutParameters::new(dropout.as_ref()),
        ids: operands.ids.parameters(),
        partials: partials.address(),
        rows: 37,
        columns: h as i32,
        rows_per_part: rows_per_part as i32,
    };
    let kernel = if S::BF16 { host_norm_add_backward_bf16 } else { host_norm_add_backward_f32 };
    launch(kernel, [h.div_ceil(256), parts, 1], 0, &parameters);
    let (db, exact_db) = (Buffer::of(&vec![0.0; h]), zeros(&case.gamma)?);
    add_partials(&partials, &db);
    let exact_dx = add_backward(&case.dy, case.junction(), Some(&exact_db))?;
    if let Some(dx) = dx {
        check("dx", &dx, &exact_dx, 1e-6)?;
    }
    check("db", &db, &exact_db, 1e-6)
}

#[test]
fn host_add_matches_the_cpu() -> Result<()> {
    in_every_order(|| {
        for h in [1, 19, 776] {
            for (dropout, whole) in [(None, false), (Some(dropout()), true), (None, true)] {
                compare_add::<f32>(h, dropout, whole)?;
                compare_add::<bf16>(h, dropout, whole)?;
            }
        }
        Ok(())
    })
}

#[test]
fn host_norm_of_a_large_mean_does_not_cancel() -> Result<()> {
    let x = rounded::<f32>(&(random(&[37, 100], 1)? + 10_000.0)?)?;
    let case = Case { x, ..Case::new::<f32>(100, None, false)? };
    let (_, y, _) = Operands::<f32>::new(&case)?.forward();
    // As on the CPU: the mean of numbers near 1e4 is good to 1e-3 of their spread.
    check("y", &y, &forward(&case.x, case.junction(), case.norm())?.0, 2e-3)
}
