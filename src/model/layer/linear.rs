//! A linear layer: which gradients it makes depends only on what trains.
//!
//! ```text
//! y = x·Wᵀ + b                          without LoRA
//! y = x·Wᵀ + b + u·Bᵀ                   with it, u = s·drop(x)·Aᵀ [T, r]
//! dB += dyᵀ·u     du = s·dy·B     dA += duᵀ·drop(x)     dx = dy·W + drop'(du·A)
//! ```
//!
//! Saved are x and u, and neither where nothing of the layer trains. W may be quantised; it is frozen then.

use allreel_kernels::{
    Dropout, DropoutKey, RowIds, dropout, linear,
    norm::{self, Junction},
    quantized::{self, Quantized},
};
use candle_core::Tensor;

use crate::{
    Error, Result,
    model::{
        parameters::{Group, Init, Parameter, Parameters, Spec, Weight},
        plan::{LinearPlan, LoraPlan},
    },
};

/// `y = x·Wᵀ + b`, and a low-rank update.
pub struct Linear {
    /// `[N, K]`.
    weight: Weight,
    /// `[N]`.
    pub bias: Option<Parameter>,
    lora: Option<Lora>,
    /// LLM.int8(): x is in 8 bits too, but for columns with one of at least this (0: for none).
    int8_threshold: Option<f32>,
}

/// A low-rank update (Hu et al. 2021).
struct Lora {
    /// `[r, K]`.
    a: Parameter,
    /// `[N, r]`.
    b: Parameter,
    plan: LoraPlan,
}

/// What keys the dropout of what a layer reads.
#[derive(Clone, Copy)]
pub struct Rows<'a> {
    /// Sample and position of every row.
    pub ids: &'a RowIds,
    /// Key of the step; `None` in evaluation.
    pub key: Option<DropoutKey>,
}

/// What a linear layer's backward needs.
pub struct Saved {
    x: Option<Tensor>,
    /// u.
    small: Option<Tensor>,
}

impl Linear {
    /// Declares `name.weight`, `name.bias` if it has one, and the update's A and B.
    pub fn declare(group: &mut Group, plan: &LinearPlan) {
        let name = |leaf: &str| format!("{}.{leaf}", plan.name);
        let weight = Spec::new(name("weight"), &[plan.outputs, plan.inputs], plan.init);
        let quantization = plan.quantization.map(|quantized| quantized.quantization);
        group.specs.push(Spec { transposed: plan.transposed, quantization, ..weight });
        if plan.bias {
            group.specs.push(Spec::new(name("bias"), &[plan.outputs], Init::Zeros));
        }
        if let Some(lora) = &plan.lora {
            // As PEFT starts them: B·A is zero, and A as PyTorch starts a linear layer.
            let bound = (plan.inputs as f64).recip().sqrt();
            let a = ("lora_A.weight", [lora.rank, plan.inputs], Init::Uniform(bound));
            for (leaf, shape, init) in
                [a, ("lora_B.weight", [plan.outputs, lora.rank], Init::Zeros)]
            {
                group.specs.push(Spec::added(name(leaf), &shape, init));
            }
        }
    }

    /// Takes the declared parameters.
    ///
    /// # Errors
    /// If they were not declared.
    pub fn new(parameters: &Parameters, plan: &LinearPlan) -> Result<Self> {
        let name = |leaf: &str| format!("{}.{leaf}", plan.name);
        let lora = |plan: &LoraPlan| -> Result<Lora> {
            let (a, b) = (name("lora_A.weight"), name("lora_B.weight"));
            Ok(Lora { a: parameters.get(&a)?, b: parameters.get(&b)?, plan: *plan })
        };
        Ok(Self {
            weight: parameters.weight(&name("weight"))?,
            bias: plan.bias.then(|| parameters.get(&name("bias"))).transpose()?,
            lora: plan.lora.as_ref().map(lora).transpose()?,
            int8_threshold: plan.quantization.and_then(|quantized| quantized.threshold),
        })
    }

    /// The layer whose outputs are `len` of this one's, from `first` on; it shares the memory.
    ///
    /// # Errors
    /// If there are fewer outputs.
    pub fn rows(&self, first: usize, len: usize) -> Result<Self> {
        let cut = |parameter: &Parameter| -> Result<Parameter> {
            let narrow = |tensor: &Tensor| tensor.narrow(0, first, len);
            Ok(Parameter {
                value: narrow(&parameter.value)?,
                gradient: parameter.gradient.as_ref().map(narrow).transpose()?,
            })
        };
        let weight = match &self.weight {
            Weight::Dense(weight) => Weight::Dense(cut(weight)?),
            Weight::Quantized(weight) => Weight::Quantized(weight.rows(first, len)?),
        };
        let lora = |lora: &Lora| -> Result<Lora> {
            Ok(Lora { a: lora.a.clone(), b: cut(&lora.b)?, plan: lora.plan })
        };
        Ok(Self {
            weight,
            bias: self.bias.as_ref().map(cut).transpose()?,
            lora: self.lora.as_ref().map(lora).transpose()?,
            int8_threshold: self.int8_threshold,
        })
    }

    /// Value of the bias, for an op that adds it itself.
    pub fn bias_value(&self) -> Option<&Tensor> {
        self.bias.as_ref().map(|bias| &bias.value)
    }

    /// Gradient of the bias, for an op that adds to it itself; `None` if there is none or it is
    /// frozen.
    pub fn bias_gradient(&self) -> Option<&Tensor> {
        self.bias.as_ref().and_then(|bias| bias.gradient.as_ref())
    }

    /// Where the weight's gradient goes, if it trains.
    fn weight_gradient(&self) -> Option<&Tensor> {
        match &self.weight {
            Weight::Dense(weight) => weight.gradient.as_ref(),
            Weight::Quantized(_) => None,
        }
    }

    /// Whether anything of it trains.
    pub fn trains(&self) -> bool {
        self.weight_gradient().is_some() || self.bias_gradient().is_some() || self.lora.is_some()
    }

    /// `x·Wᵀ + b`, updated, and what backward needs.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn forward(&self, x: &Tensor, rows: Rows<'_>) -> Result<(Tensor, Saved)> {
        self.product(x, self.bias_value(), rows)
    }

    /// The same for an op that adds the bias itself.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn forward_without_bias(&self, x: &Tensor, rows: Rows<'_>) -> Result<(Tensor, Saved)> {
        self.product(x, None, rows)
    }

    fn product(
        &self,
        x: &Tensor,
        bias: Option<&Tensor>,
        rows: Rows<'_>,
    ) -> Result<(Tensor, Saved)> {
        let y = match &self.weight {
            Weight::Dense(weight) => linear::forward(x, &weight.value, bias)?,
            Weight::Quantized(weight) => match (weight, self.int8_threshold) {
                (Quantized::Int8(weight), Some(threshold)) => {
                    let threshold = Some(threshold).filter(|threshold| *threshold > 0.0);
                    quantized::forward_int8(x, weight, threshold, bias)?
                }
                _ => quantized::forward(x, weight, bias)?,
            },
        };
        let small = self.lora.as_ref().map(|lora| lora.forward(x, &y, rows)).transpose()?;
        let wanted = small.is_some() || self.weight_gradient().is_some();
        Ok((y, Saved { x: wanted.then(|| x.clone()), small }))
    }

    /// `dx`; adds the gradients of everything but the bias, which is often summed elsewhere.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn backward(&self, dy: &Tensor, saved: &Saved, rows: Rows<'_>) -> Result<Tensor> {
        let dx = match &self.weight {
            Weight::Dense(weight) => linear::backward_input(dy, &weight.value)?,
            Weight::Quantized(weight) => quantized::backward_input(dy, weight)?,
        };
        self.backward_weight(dy, saved)?;
        match &self.lora {
            Some(lora) => lora.add_input(&lora.backward(dy, saved, rows)?, rows, dx),
            None => Ok(dx),
        }
    }

    /// `dx` with what this layer makes added to it, where it is wanted; adds the gradients as
    /// [`backward`](Self::backward).
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn backward_into(
        &self,
        dy: &Tensor,
        saved: &Saved,
        rows: Rows<'_>,
        dx: Option<Tensor>,
    ) -> Result<Option<Tensor>> {
        self.backward_weight(dy, saved)?;
        let du = self.lora.as_ref().map(|lora| lora.backward(dy, saved, rows)).transpose()?;
        let Some(dx) = dx else { return Ok(None) };
        match &self.weight {
            Weight::Dense(weight) => linear::backward_input_into(dy, &weight.value, &dx)?,
            Weight::Quantized(weight) => quantized::backward_input_into(dy, weight, &dx)?,
        }
        match (&self.lora, &du) {
            (Some(lora), Some(du)) => lora.add_input(du, rows, dx).map(Some),
            _ => Ok(Some(dx)),
        }
    }

    /// Adds the bias' gradient, if it trains, where no other op sums it.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn backward_bias(&self, dy: &Tensor) -> Result<()> {
        if let Some(gradient) = self.bias_gradient() {
            linear::backward_bias(dy, gradient)?;
        }
        Ok(())
    }

    fn backward_weight(&self, dy: &Tensor, saved: &Saved) -> Result<()> {
        if let (Some(gradient), Some(x)) = (self.weight_gradient(), &saved.x) {
            linear::backward_weight(dy, x, gradient)?;
        }
        Ok(())
    }
}

impl Lora {
    fn dropout(&self, key: Option<DropoutKey>) -> Option<Dropout> {
        Dropout::new(self.plan.dropout, key?, self.plan.site)
    }

    /// Adds the update of `y`; returns u.
    fn forward(&self, x: &Tensor, y: &Tensor, rows: Rows<'_>) -> Result<Tensor> {
        let x = dropout::apply(x, self.dropout(rows.key).as_ref(), rows.ids)?;
        let u = (linear::forward(&x, &self.a.value, None)? * self.plan.scaling)?;
        linear::forward_into(&u, &self.b.value, y)?;
        Ok(u)
    }

    /// Adds the gradients of A and B; returns that of x·Aᵀ.
    fn backward(&self, dy: &Tensor, saved: &Saved, rows: Rows<'_>) -> Result<Tensor> {
        let (Some(x), Some(u)) = (&saved.x, &saved.small) else {
            return Err(Error::Bug("a LoRA layer's backward without its forward".into()));
        };
        let du = (linear::backward_input(dy, &self.b.value)? * self.plan.scaling)?;
        if let (Some(da), Some(db)) = (&self.a.gradient, &self.b.gradient) {
            linear::backward_weight(dy, u, db)?;
            let x = dropout::apply(x, self.dropout(rows.key).as_ref(), rows.ids)?;
            linear::backward_weight(&du, &x, da)?;
        }
        Ok(du)
    }

    /// `dx + drop'(du·A)`.
    fn add_input(&self, du: &Tensor, rows: Rows<'_>, dx: Tensor) -> Result<Tensor> {
        let Some(dropout) = self.dropout(rows.key) else {
            linear::backward_input_into(du, &self.a.value, &dx)?;
            return Ok(dx);
        };
        let junction = Junction {
            dropout: Some((&dropout, rows.ids)),
            residual: Some(&dx),
            ..Junction::default()
        };
        Ok(norm::add(&linear::backward_input(du, &self.a.value)?, junction)?)
    }
}
