//! The kernels of op.cu, run on the host, against the CPU implementation in f64.

use candle_core::{DType, Device, Result};

use super::*;
use crate::{
    Ragged,
    common::host_run::in_every_order,
    testing::{STORED, check, dropout, random, rounded, wide},
};

const ROWS: usize = 37;
const EPS: f64 = 1e-7;

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

impl Case {
    fn new(h: usize, dtype: DType, dropout: Option<Dropout>, whole: bool) -> Result<Self> {
        let ragged = Ragged::new(&[5, 1, 31], &[31, 4, 1500])?;
        let matrix = |seed| rounded(&random(&[ROWS, h], seed)?, dtype);
        let vector = |seed| rounded(&random(&[h], seed)?, DType::F32);
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

    /// The same in f64.
    fn exact(&self) -> Result<Self> {
        Ok(Self {
            x: wide(&self.x)?,
            residual: wide(&self.residual)?,
            dy: wide(&self.dy)?,
            past: wide(&self.past)?,
            bias: wide(&self.bias)?,
            gamma: wide(&self.gamma)?,
            beta: wide(&self.beta)?,
            rows: self.rows.clone(),
            ..*self
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

/// Gradients that start at something, and the same in f64.
fn started<const N: usize>(h: usize) -> Result<[[Tensor; N]; 2]> {
    let start = rounded(&random(&[h], 8)?, DType::F32)?;
    let each = |make: &dyn Fn() -> Result<Tensor>| {
        let all = (0..N).map(|_| make()).collect::<Result<Vec<_>>>()?;
        Ok::<[Tensor; N], candle_core::Error>(all.try_into().expect("N of them"))
    };
    Ok([each(&|| start.copy())?, each(&|| wide(&start))?])
}

fn all([gamma, beta, bias]: &[Tensor; 3]) -> Option<Gradients<'_>> {
    Some(Gradients { gamma, beta: Some(beta), bias: Some(bias) })
}

fn compare_norm(h: usize, dtype: DType, dropout: Option<Dropout>, whole: bool) -> Result<()> {
    let case = Case::new(h, dtype, dropout, whole)?;
    let exact_case = case.exact()?;
    let (junction, norm, exact_norm) = (case.junction(), case.norm(), exact_case.norm());
    let (y, saved) = device::forward(&case.x, junction, norm)?;
    let (_, exact) = forward(&exact_case.x, exact_case.junction(), exact_norm)?;
    check("z", saved.z(), exact.z(), 1e-6)?;
    // What follows is of z as it was stored.
    let stored = wide(saved.z())?;
    let (exact_y, exact) = forward(&stored, Junction::default(), exact_norm)?;
    check("y", &y, &exact_y, 2e-6)?;
    check("moments", &saved.moments, &exact.moments, 1e-6)?;

    let [gradients, exact_gradients] = started::<3>(h)?;
    let past = case.some(&case.past);
    let (dx, dz) = device::backward(&case.dy, &saved, past, junction, norm, all(&gradients))?;
    let saved = Saved { z: stored, moments: wide(&saved.moments)? };
    let past = exact_case.some(&exact_case.past);
    let (exact_dx, exact_dz) = backward(
        &exact_case.dy,
        &saved,
        past,
        exact_case.junction(),
        exact_norm,
        all(&exact_gradients),
    )?;
    check("dz", &dz, &exact_dz, 2e-6)?;
    check("dx", &dx, &exact_dx, 2e-6)?;
    for (what, (got, exact)) in
        ["dγ", "dβ", "db"].iter().zip(gradients.iter().zip(&exact_gradients))
    {
        check(what, got, exact, 2e-6)?;
    }
    Ok(())
}

/// Every size of row, what there is to drop and join, and what is stored.
fn in_every_case(
    sizes: &[usize],
    compare: fn(usize, DType, Option<Dropout>, bool) -> Result<()>,
) -> Result<()> {
    in_every_order(|| {
        for h in sizes {
            for (dropout, whole) in [(None, false), (Some(dropout()), true), (None, true)] {
                for dtype in STORED {
                    compare(*h, dtype, dropout, whole)?;
                }
            }
        }
        Ok(())
    })
}

#[test]
fn host_norm_matches_the_cpu() -> Result<()> {
    in_every_case(&[1, 19, 776, 1032, 2056], compare_norm)
}

fn compare_add(h: usize, dtype: DType, dropout: Option<Dropout>, whole: bool) -> Result<()> {
    let case = Case::new(h, dtype, dropout, whole)?;
    let exact = case.exact()?;
    let z = device::add(&case.x, case.junction())?;
    check("z", &z, &add(&exact.x, exact.junction())?, 1e-6)?;
    let [[db], [exact_db]] = started::<1>(h)?;
    let dx = device::add_backward(&case.dy, case.junction().dropout, Some(&db))?;
    let exact_dx = add_backward(&exact.dy, exact.junction(), Some(&exact_db))?;
    check("dx", &dx, &exact_dx, 1e-6)?;
    check("db", &db, &exact_db, 1e-6)?;
    let dx = device::add_backward(&case.dy, case.junction().dropout, None)?;
    check("dx without a bias", &dx, &exact_dx, 1e-6)
}

#[test]
fn host_add_matches_the_cpu() -> Result<()> {
    in_every_case(&[1, 19, 776], compare_add)
}

#[test]
fn host_norm_without_gradients_passes_the_same_back() -> Result<()> {
    let case = Case::new(19, DType::F32, Some(dropout()), true)?;
    let (_, saved) = device::forward(&case.x, case.junction(), case.norm())?;
    let run = |gradients| {
        device::backward(&case.dy, &saved, None, case.junction(), case.norm(), gradients)
    };
    let [gradients, _] = started::<3>(19)?;
    let ((dx, dz), (same_dx, same_dz)) = (run(None)?, run(all(&gradients))?);
    assert_eq!(dx.to_vec2::<f32>()?, same_dx.to_vec2::<f32>()?);
    assert_eq!(dz.to_vec2::<f32>()?, same_dz.to_vec2::<f32>()?);
    Ok(())
}

#[test]
fn host_norm_of_a_large_mean_does_not_cancel() -> Result<()> {
    let x = rounded(&(random(&[ROWS, 100], 1)? + 10_000.0)?, DType::F32)?;
    let case = Case { x, ..Case::new(100, DType::F32, None, false)? };
    let exact = case.exact()?;
    let (y, _) = device::forward(&case.x, case.junction(), case.norm())?;
    // As on the CPU: the mean of numbers near 1e4 is good to 1e-3 of their spread.
    check("y", &y, &forward(&exact.x, exact.junction(), exact.norm())?.0, 2e-3)
}

#[test]
fn host_rows_that_are_too_wide_are_refused() -> Result<()> {
    let x = Tensor::zeros((1, 4097), DType::BF16, &Device::Cpu)?;
    let gamma = Tensor::zeros(4097, DType::F32, &Device::Cpu)?;
    let norm = LayerNorm { gamma: &gamma, beta: None, eps: EPS };
    let error = forward(&x, Junction::default(), norm).err().expect("an error").to_string();
    assert!(error.contains("4097 columns, the kernels take up to 4096"), "{error}");
    Ok(())
}
