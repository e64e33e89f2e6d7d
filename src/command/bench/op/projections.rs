//! The linears of an attention layer: x to queries, keys and values, and for DeBERTa the relative rows
//! through the same weights of queries and keys.

use allreel_kernels::linear;
use candle_core::{Result, Tensor};

use super::{Pass, Setup, Work, linear as cases};

/// Which of the three.
#[derive(Clone, Copy)]
pub enum To {
    /// Queries.
    Query,
    /// Keys.
    Key,
    /// Values.
    Value,
}

/// Inputs, parameters and their gradients.
pub struct Projections {
    x: Tensor,
    linears: [Linear; 3],
}

struct Linear {
    weight: Tensor,
    bias: Tensor,
    weight_grad: Tensor,
    bias_grad: Tensor,
}

impl Projections {
    /// Of `[T, h·d]` to the same.
    pub fn new(setup: &Setup) -> Result<Self> {
        let width = setup.sizes.width();
        let linear = || -> Result<Linear> {
            // Of a size that keeps queries and keys like normal numbers.
            let weight = (setup.normal((width, width))? / (width as f64).sqrt())?;
            let (weight_grad, bias_grad) = (setup.zeros((width, width))?, setup.zeros(width)?);
            Ok(Linear { weight, bias: setup.zeros(width)?, weight_grad, bias_grad })
        };
        Ok(Self {
            x: setup.normal((setup.sizes.tokens, width))?,
            linears: [linear()?, linear()?, linear()?],
        })
    }

    /// q, k, v.
    pub fn forward(&self) -> Result<[Tensor; 3]> {
        let project = |to| self.project(to, &self.x);
        Ok([project(To::Query)?, project(To::Key)?, project(To::Value)?])
    }

    /// Other rows through one of the linears.
    pub fn project(&self, to: To, rows: &Tensor) -> Result<Tensor> {
        let linear = &self.linears[to as usize];
        linear::forward(rows, &linear.weight, Some(&linear.bias))
    }

    /// dx from dq, dk, dv; adds the gradients of the parameters.
    pub fn backward(&self, gradients: [&Tensor; 3]) -> Result<Tensor> {
        let [dq, dk, dv] = gradients;
        let dx = linear::backward_input(dq, &self.linears[0].weight)?;
        linear::backward_input_into(dk, &self.linears[1].weight, &dx)?;
        linear::backward_input_into(dv, &self.linears[2].weight, &dx)?;
        for (to, dy) in [(To::Query, dq), (To::Key, dk), (To::Value, dv)] {
            self.backward_parameters(to, dy, &self.x)?;
        }
        Ok(dx)
    }

    /// Adds what `dy` of other rows makes of a linear's parameters.
    pub fn backward_parameters(&self, to: To, dy: &Tensor, rows: &Tensor) -> Result<()> {
        let linear = &self.linears[to as usize];
        linear::backward_weight(dy, rows, &linear.weight_grad)?;
        linear::backward_bias(dy, &linear.bias_grad)
    }
}

/// The three linears with all their gradients.
pub fn work(tokens: usize, width: usize, element: f64, pass: Pass) -> Work {
    let [forward, input, parameters] = cases::works(tokens, width, width, element);
    pass.work(forward, input + parameters) * 3.0
}

/// The two linears of `rows` relative rows, which take no gradient themselves.
pub fn work_of_rows(rows: usize, width: usize, element: f64, pass: Pass) -> Work {
    let [forward, _, parameters] = cases::works(rows, width, width, element);
    pass.work(forward, parameters) * 2.0
}
