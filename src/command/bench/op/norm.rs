//! The junction of a post-LN block: bias + dropout + residual + LayerNorm.

use allreel_kernels::{
    Ragged,
    norm::{self, Gradients, Junction, LayerNorm},
};
use candle_core::Result;

use super::{Case, Pass, Setup, Work};
use crate::command::bench::measure::Body;

/// Forward and both.
pub fn cases(setup: &Setup) -> Vec<Case> {
    let (tokens, hidden) = (setup.sizes.tokens, setup.sizes.hidden);
    let case = |pass: Pass| {
        let work = work(tokens, hidden, setup.element(), setup.dropout().is_some(), pass);
        let name = format!("norm {}", pass.name());
        Case::new(name, format!("{tokens} x {hidden}"), work, move |setup| run(setup, pass))
    };
    Pass::ALL.map(case).into()
}

/// Forward reads x, r and three vectors and writes z, y and two moments a row. Backward reads dy, z,
/// the moments and γ, adds to the gradients of the three and writes dr, and dx where dropout sets it
/// apart.
pub fn work(tokens: usize, hidden: usize, element: f64, dropped: bool, pass: Pass) -> Work {
    let (t, h) = (tokens as f64, hidden as f64);
    let (rows, moments) = (element * t * h, 8.0 * t);
    let written = if dropped { 2.0 } else { 1.0 };
    pass.work(
        Work { bytes: 4.0 * rows + moments + 12.0 * h, flops: 0.0 },
        Work { bytes: (2.0 + written) * rows + moments + 4.0 * h + 24.0 * h, flops: 0.0 },
    )
}

fn run(setup: &Setup, pass: Pass) -> Result<Body> {
    let (tokens, hidden) = (setup.sizes.tokens, setup.sizes.hidden);
    let operand = || setup.normal((tokens, hidden));
    let (x, residual, dy) = (operand()?, operand()?, operand()?);
    let vector = || setup.zeros(hidden);
    let (bias, gamma, beta) = (vector()?, (vector()? + 1.0)?, vector()?);
    let gradients = [vector()?, vector()?, vector()?];
    let (dropout, ragged) = (setup.dropout(), Ragged::new(&[tokens], &[0])?);
    Ok(Box::new(move || {
        let junction = Junction {
            bias: Some(&bias),
            dropout: dropout.as_ref().map(|dropout| (dropout, ragged.token_rows())),
            residual: Some(&residual),
        };
        let layer = LayerNorm { gamma: &gamma, beta: Some(&beta), eps: 1e-7 };
        let (_, saved) = norm::forward(&x, junction, layer)?;
        if pass == Pass::Both {
            let [gamma, beta, bias] = &gradients;
            let gradients = Gradients { gamma, beta: Some(beta), bias: Some(bias) };
            norm::backward(&dy, &saved, None, junction, layer, Some(gradients))?;
        }
        Ok(())
    }))
}
