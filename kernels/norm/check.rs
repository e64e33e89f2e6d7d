//! The kernels against the CPU implementation in f64.

use candle_core::{DType, Result};

use super::*;
use crate::{
    Ragged,
    common::check::{Checker, HIDDEN, LENGTHS, Sizes, batch, dropout, random, wide},
};

const EPS: f64 = 1e-7;
/// Widest rows that are also joined without a norm.
const ADDED: usize = 776;

/// Every size of row, and what there is to drop and join.
pub(crate) fn check(c: &mut Checker, sizes: Sizes) -> Result<()> {
    let (lengths, widths) = match sizes {
        Sizes::Odd => (&[5, 1, 31][..], &[1, 19, ADDED, 1032, 2056][..]),
        Sizes::Real => (&LENGTHS[..], &[HIDDEN][..]),
    };
    let ragged = batch(lengths)?;
    for h in widths {
        for (dropout, whole) in [(None, false), (dropout(), true), (None, true)] {
            for dtype in c.stored() {
                let dropped = dropout.is_some();
                c.case(format!(
                    "{} x {h}, dropout {dropped}, bias and residual {whole}, {dtype:?}",
                    ragged.tokens()
                ));
                let case = Case::new(c, &ragged, *h, dtype, dropout, whole)?;
                compare_norm(c, &case)?;
                if *h <= ADDED {
                    compare_add(c, &case)?;
                }
            }
        }
    }
    Ok(())
}

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
    fn new(
        c: &Checker,
        ragged: &Ragged,
        h: usize,
        dtype: DType,
        dropout: Option<Dropout>,
        whole: bool,
    ) -> Result<Self> {
        let matrix = |seed| c.random(&[ragged.tokens(), h], seed, dtype);
        let vector = |seed| c.random(&[h], seed, DType::F32);
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

    /// Gradients of vectors that start at something, and the same in f64.
    fn started<const N: usize>(&self, c: &Checker) -> Result<[[Tensor; N]; 2]> {
        let start = random(self.gamma.dims(), 8)?.to_dtype(DType::F32)?;
        let each = |make: &dyn Fn() -> Result<Tensor>| {
            let all = (0..N).map(|_| make()).collect::<Result<Vec<_>>>()?;
            Ok::<[Tensor; N], candle_core::Error>(all.try_into().expect("N of them"))
        };
        Ok([each(&|| c.rounded(&start.copy()?, DType::F32))?, each(&|| wide(&start))?])
    }
}

fn all([gamma, beta, bias]: &[Tensor; 3]) -> Option<Gradients<'_>> {
    Some(Gradients { gamma, beta: Some(beta), bias: Some(bias) })
}

fn compare_norm(c: &mut Checker, case: &Case) -> Result<()> {
    let exact_case = case.exact()?;
    let (junction, norm, exact_norm) = (case.junction(), case.norm(), exact_case.norm());
    let (y, saved) = forward(&case.x, junction, norm)?;
    let (_, exact) = forward(&exact_case.x, exact_case.junction(), exact_norm)?;
    c.check("z", saved.z(), exact.z(), 1e-6)?;
    // What follows is of z as it was stored.
    let stored = wide(saved.z())?;
    let (exact_y, exact) = forward(&stored, Junction::default(), exact_norm)?;
    c.check("y", &y, &exact_y, 2e-6)?;
    c.check("moments", &saved.moments, &exact.moments, 1e-6)?;

    let [gradients, exact_gradients] = case.started::<3>(c)?;
    let past = case.some(&case.past);
    let (dx, dz) = backward(&case.dy, &saved, past, junction, norm, all(&gradients))?;
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
    c.check("dz", &dz, &exact_dz, 2e-6)?;
    c.check("dx", &dx, &exact_dx, 2e-6)?;
    let sums = c.of_sums(case.rows.len()).max(2e-6);
    for (what, (got, exact)) in
        ["dγ", "dβ", "db"].iter().zip(gradients.iter().zip(&exact_gradients))
    {
        c.check(what, got, exact, sums)?;
    }
    Ok(())
}

fn compare_add(c: &mut Checker, case: &Case) -> Result<()> {
    let exact = case.exact()?;
    let z = add(&case.x, case.junction())?;
    c.check("z added", &z, &add(&exact.x, exact.junction())?, 1e-6)?;
    let [[db], [exact_db]] = case.started::<1>(c)?;
    let dx = add_backward(&case.dy, case.junction(), Some(&db))?;
    let exact_dx = add_backward(&exact.dy, exact.junction(), Some(&exact_db))?;
    c.check("dx added", &dx, &exact_dx, 1e-6)?;
    c.check("db added", &db, &exact_db, c.of_sums(case.rows.len()).max(1e-6))?;
    let dx = add_backward(&case.dy, case.junction(), None)?;
    c.check("dx without a bias", &dx, &exact_dx, 1e-6)
}

#[cfg(all(test, feature = "host-kernels"))]
mod host {
    use candle_core::Device;

    use super::*;
    use crate::testing::on_host;

    #[test]
    fn host_norm_matches_the_cpu() -> Result<()> {
        on_host(|c| check(c, Sizes::Odd))
    }

    fn case(c: &Checker, h: usize, dropout: Option<Dropout>, whole: bool) -> Result<Case> {
        Case::new(c, &batch(&[5, 1, 31])?, h, DType::F32, dropout, whole)
    }

    #[test]
    fn host_norm_without_gradients_passes_the_same_back() -> Result<()> {
        on_host(|c| {
            let case = case(c, 19, dropout(), true)?;
            let (_, saved) = device::forward(&case.x, case.junction(), case.norm())?;
            let run = |gradients| {
                device::backward(&case.dy, &saved, None, case.junction(), case.norm(), gradients)
            };
            let [gradients, _] = case.started::<3>(c)?;
            let ((dx, dz), (same_dx, same_dz)) = (run(None)?, run(all(&gradients))?);
            c.same("dx", dx.to_vec2::<f32>()?, same_dx.to_vec2::<f32>()?);
            c.same("dz", dz.to_vec2::<f32>()?, same_dz.to_vec2::<f32>()?);
            Ok(())
        })
    }

    #[test]
    fn host_norm_of_a_large_mean_does_not_cancel() -> Result<()> {
        on_host(|c| {
            let x = c.rounded(&(random(&[37, 100], 1)? + 10_000.0)?, DType::F32)?;
            let case = Case { x, ..case(c, 100, None, false)? };
            let exact = case.exact()?;
            let (y, _) = device::forward(&case.x, case.junction(), case.norm())?;
            // As on the CPU: the mean of numbers near 1e4 is good to 1e-3 of their spread.
            c.check("y", &y, &forward(&exact.x, exact.junction(), exact.norm())?.0, 2e-3)
        })
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
}
