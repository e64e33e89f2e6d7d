//! The linears of an encoder block of width H.

use allreel_kernels::linear;
use candle_core::Result;

use super::{Case, Pass, Setup, Work};
use crate::command::bench::measure::Body;

/// H to H, H to 4H and back.
pub fn cases(setup: &Setup) -> Vec<Case> {
    let hidden = setup.sizes.hidden;
    let shapes = [(hidden, hidden), (hidden, 4 * hidden), (4 * hidden, hidden)];
    let each = |(k, n)| Pass::ALL.map(|pass| case(setup, k, n, pass));
    shapes.into_iter().flat_map(each).collect()
}

fn case(setup: &Setup, k: usize, n: usize, pass: Pass) -> Case {
    let tokens = setup.sizes.tokens;
    let [forward, input, parameters] = works(tokens, k, n, setup.element());
    let work = pass.work(forward, input + parameters);
    let sizes = format!("{tokens} tokens, {k} to {n}");
    let name = format!("linear {}", pass.name());
    Case::new(name, sizes, work, move |setup| run(setup, k, n, pass))
}

/// Forward, the input's gradient, the parameters' (W and b, which are read and added to in f32).
pub fn works(tokens: usize, inputs: usize, outputs: usize, element: f64) -> [Work; 3] {
    let (t, k, n) = (tokens as f64, inputs as f64, outputs as f64);
    let (x, w, y) = (element * t * k, element * n * k, element * t * n);
    let product = 2.0 * t * n * k;
    [
        Work { bytes: x + w + y + 4.0 * n, flops: product },
        Work { bytes: y + w + x, flops: product },
        Work { bytes: y + x + 8.0 * n * k + y + 8.0 * n, flops: product },
    ]
}

fn run(setup: &Setup, k: usize, n: usize, pass: Pass) -> Result<Body> {
    let tokens = setup.sizes.tokens;
    let (x, dy) = (setup.normal((tokens, k))?, setup.normal((tokens, n))?);
    let (weight, bias) = (setup.normal((n, k))?, setup.zeros(n)?);
    let (weight_grad, bias_grad) = (setup.zeros((n, k))?, setup.zeros(n)?);
    Ok(Box::new(move || {
        linear::forward(&x, &weight, Some(&bias))?;
        if pass == Pass::Both {
            linear::backward_input(&dy, &weight)?;
            linear::backward_weight(&dy, &x, &weight_grad)?;
            linear::backward_bias(&dy, &bias_grad)?;
        }
        Ok(())
    }))
}
