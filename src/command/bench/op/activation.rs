//! The activation inside the feed-forward part of a block, 4H wide: bias + GELU, and GeGLU.

use allreel_kernels::activation::{self, Activation};
use candle_core::Result;

use super::{Case, Pass, Setup, Work};
use crate::command::bench::measure::Body;

/// Plain and gated, forward and both.
pub fn cases(setup: &Setup) -> Vec<Case> {
    let (tokens, outputs) = (setup.sizes.tokens, 4 * setup.sizes.hidden);
    let case = |(gated, pass): (bool, Pass)| {
        let name = format!("{} {}", if gated { "geglu" } else { "gelu" }, pass.name());
        let work = work(tokens, outputs, setup.element(), gated, pass);
        let sizes = format!("{tokens} x {outputs}");
        Case::new(format!("activation {name}"), sizes, work, move |setup| run(setup, gated, pass))
    };
    let kinds = [false, true].into_iter().flat_map(|gated| Pass::ALL.map(|pass| (gated, pass)));
    kinds.map(case).collect()
}

/// h is as wide as y, or twice if gated. Forward reads h and b and writes y; backward reads dy, h and b,
/// writes dh and adds to db.
pub fn work(tokens: usize, outputs: usize, element: f64, gated: bool, pass: Pass) -> Work {
    let inputs = if gated { 2.0 } else { 1.0 } * outputs as f64;
    let y = element * tokens as f64 * outputs as f64;
    let h = element * tokens as f64 * inputs;
    pass.work(
        Work { bytes: h + y + 4.0 * inputs, flops: 0.0 },
        Work { bytes: y + 2.0 * h + 4.0 * inputs + 8.0 * inputs, flops: 0.0 },
    )
}

fn run(setup: &Setup, gated: bool, pass: Pass) -> Result<Body> {
    let (tokens, outputs) = (setup.sizes.tokens, 4 * setup.sizes.hidden);
    let inputs = if gated { 2 * outputs } else { outputs };
    let (h, dy) = (setup.normal((tokens, inputs))?, setup.normal((tokens, outputs))?);
    let (bias, bias_grad) = (setup.zeros(inputs)?, setup.zeros(inputs)?);
    Ok(Box::new(move || {
        let (bias, act) = (Some(&bias), Activation::Gelu);
        match gated {
            false => activation::forward(&h, bias, act)?,
            true => activation::gated_forward(&h, bias, act)?,
        };
        if pass == Pass::Both {
            match gated {
                false => activation::backward(&dy, &h, bias, act, Some(&bias_grad))?,
                true => activation::gated_backward(&dy, &h, bias, act, Some(&bias_grad))?,
            };
        }
        Ok(())
    }))
}
