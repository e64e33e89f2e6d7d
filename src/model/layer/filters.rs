//! Convolutions of several widths over words, side by side (Kim 2014): each sees the words around a word, never
//! those of another sequence, and zeros beyond its own ends.
//!
//! ```text
//! y = drop([f(conv_0(x)), f(conv_1(x)), ...])     x [T, K]     y [T, widths·N]
//! ```

use allreel_kernels::{
    Dropout, DropoutKey, Ragged,
    activation::{self, Activation},
    convolution, dropout,
};
use candle_core::Tensor;

use super::{Sites, site};
use crate::{
    Result,
    model::{
        parameters::{Group, Init, Parameter, Parameters, Spec},
        plan::FiltersPlan,
    },
};

/// The convolutions.
pub struct Filters {
    convolutions: Vec<Convolution>,
    activation: Activation,
    dropout: f64,
    first_site: u16,
}

/// One width.
struct Convolution {
    /// `[N, K, k]`.
    weight: Parameter,
    /// `[N]`.
    bias: Parameter,
}

/// What backward needs.
pub struct Saved {
    x: Tensor,
    /// Each convolution before the activation, its bias included.
    products: Vec<Tensor>,
}

impl Filters {
    /// Declares the parameters, which start as PyTorch's.
    pub fn declare(plan: &FiltersPlan) -> Group {
        let mut group = Group::new(&plan.name);
        for (i, kernel) in plan.kernels.iter().enumerate() {
            let bound = ((plan.inputs * kernel) as f64).recip().sqrt();
            let (name, init) = (format!("{}.{i}", plan.name), Init::Uniform(bound));
            let shape = [plan.filters, plan.inputs, *kernel];
            group.specs.push(Spec::new(format!("{name}.weight"), &shape, init));
            group.specs.push(Spec::new(format!("{name}.bias"), &[plan.filters], init));
        }
        group
    }

    /// Takes the declared parameters; the block is number `i`.
    ///
    /// # Errors
    /// If they were not declared.
    pub fn new(parameters: &Parameters, plan: &FiltersPlan, i: usize) -> Result<Self> {
        let convolution = |i: usize| -> Result<Convolution> {
            let get = |leaf: &str| parameters.get(&format!("{}.{i}.{leaf}", plan.name));
            Ok(Convolution { weight: get("weight")?, bias: get("bias")? })
        };
        Ok(Self {
            convolutions: (0..plan.kernels.len()).map(convolution).collect::<Result<_>>()?,
            activation: plan.activation,
            dropout: plan.dropout,
            first_site: site::block(i),
        })
    }

    fn dropout(&self, key: Option<DropoutKey>) -> Option<Dropout> {
        Sites { first: self.first_site, key }.dropout(self.dropout, site::OUTPUT)
    }

    /// `[T, widths·N]` and what backward needs.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn forward(
        &self,
        x: &Tensor,
        ragged: &Ragged,
        key: Option<DropoutKey>,
    ) -> Result<(Tensor, Saved)> {
        let (mut products, mut activated) = (Vec::new(), Vec::new());
        for Convolution { weight, bias } in &self.convolutions {
            let h = convolution::forward(x, &weight.value, Some(&bias.value), 1, ragged)?;
            activated.push(activation::forward(&h, None, self.activation)?);
            products.push(h);
        }
        let y = Tensor::cat(&activated, 1)?;
        let y = dropout::apply(&y, self.dropout(key).as_ref(), ragged.token_rows())?;
        Ok((y, Saved { x: x.clone(), products }))
    }

    /// `dx`, unless nothing below trains; adds the gradients of all parameters.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn backward(
        &self,
        saved: &Saved,
        dy: &Tensor,
        ragged: &Ragged,
        key: Option<DropoutKey>,
        input_trains: bool,
    ) -> Result<Option<Tensor>> {
        let dy = dropout::apply(dy, self.dropout(key).as_ref(), ragged.token_rows())?;
        let mut dx: Option<Tensor> = None;
        let mut first = 0;
        for (Convolution { weight, bias }, h) in self.convolutions.iter().zip(&saved.products) {
            let width = h.dim(1)?;
            // A copy: kernels want rows at multiples of 16 bytes.
            let part = dy.narrow(1, first, width)?.force_contiguous()?;
            first += width;
            let dh = activation::backward(&part, h, None, self.activation, None)?;
            let (gradient, of_bias) = (weight.gradient.as_ref(), bias.gradient.as_ref());
            convolution::backward_parameters(&dh, &saved.x, 1, ragged, gradient, of_bias)?;
            if input_trains {
                let part = convolution::backward_input(&dh, &weight.value, 1, ragged)?;
                dx = Some(match dx {
                    Some(sum) => (sum + part)?,
                    None => part,
                });
            }
        }
        Ok(dx)
    }
}
