//! The ops that can be timed: their sizes, what one run of each must move and compute, and the run.
//!
//! | file | cases |
//! |---|---|
//! | [`attention`], [`disentangled`] | forward and backward, on their own and with the projections |
//! | [`projections`] | what makes queries, keys and values, and takes their gradients |
//! | [`quantized`] | frozen linears in 8 and 4 bits, beside one of full width |
//! | [`linear`], [`norm`], [`activation`], [`embedding`] | forward and backward |
//! | [`recurrence`] | both directions of an LSTM or GRU layer, with the products of their inputs |
//! | [`adamw`] | the update and the norm of the gradients |
//!
//! Bytes are the least that an op can move: every operand read once, every result written once. FLOPs
//! are those of matrix products, two for a multiplication and an addition; what is done elementwise
//! counts nothing. Both are formulas beside the case (`work`). Letters as in `kernels/lib.rs`.

mod activation;
mod adamw;
mod attention;
mod disentangled;
mod embedding;
mod linear;
mod norm;
mod projections;
mod quantized;
mod recurrence;
#[cfg(test)]
mod test;

use std::ops::{Add, Mul};

use allreel_kernels::{Dropout, DropoutKey, Ragged};
use candle_core::{DType, Device, Result, Shape, Tensor};
use serde::{Deserialize, Serialize};

use super::measure::Body;

/// Largest size that is taken: what is a slip of the keyboard anyway.
const MOST: usize = 1 << 30;

/// The ops.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Op {
    /// Attention, on its own and with its projections
    Attention,
    /// The same with relative positions (DeBERTa), beside plain attention
    Disentangled,
    /// x·Wᵀ + b
    Linear,
    /// Frozen linears in 8 and 4 bits, beside one of full width
    Quantized,
    /// Bias + dropout + residual + LayerNorm
    Norm,
    /// GELU, plain and gated
    Activation,
    /// Rows of a word table, and their gradient
    Embedding,
    /// A bidirectional LSTM or GRU layer over word vectors
    Recurrence,
    /// The optimizer's update
    Adamw,
}

/// The sizes of the cases.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sizes {
    /// T.
    pub tokens: usize,
    /// Tokens of each sequence; attention has cases for each of them.
    pub lengths: Vec<usize>,
    /// h.
    pub heads: usize,
    /// d.
    pub head_size: usize,
    /// H of everything but attention, whose width is h·d.
    pub hidden: usize,
    /// V.
    pub vocabulary: usize,
    /// Elements of AdamW's bucket.
    pub parameters: usize,
    /// Probability of every dropout.
    pub dropout: f64,
}

/// What cases are built from.
pub struct Setup {
    /// Where they run.
    pub device: Device,
    /// What activations and matrices are stored in. Vectors of parameters and all gradients of
    /// parameters are f32.
    pub dtype: DType,
    /// How large they are.
    pub sizes: Sizes,
}

/// How far a case goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    /// Forward alone.
    Forward,
    /// Forward and then backward.
    Both,
}

/// What one run must move and compute at least.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Work {
    /// Bytes read and written.
    pub bytes: f64,
    /// Floating-point operations of matrix products.
    pub flops: f64,
}

/// Builds a run: what it reads is made here and not before, so that cases left out cost no memory.
type Prepare = Box<dyn FnOnce(&Setup) -> Result<Body>>;

/// One line of the table.
pub struct Case {
    /// Op, variant and pass.
    pub name: String,
    /// The sizes that matter to it.
    pub sizes: String,
    /// What one run must do at least.
    pub work: Work,
    /// Builds it.
    pub prepare: Prepare,
}

/// The cases of an op, in groups that are timed in turn; the others of a group are compared with its
/// first.
pub fn groups(op: Op, setup: &Setup) -> Vec<Vec<Case>> {
    let alone = |cases: Vec<Case>| cases.into_iter().map(|case| vec![case]).collect();
    match op {
        Op::Attention => alone(attention::cases(setup)),
        Op::Disentangled => disentangled::groups(setup),
        Op::Linear => alone(linear::cases(setup)),
        Op::Quantized => quantized::groups(setup),
        Op::Norm => alone(norm::cases(setup)),
        Op::Activation => alone(activation::cases(setup)),
        Op::Embedding => alone(embedding::cases(setup)),
        Op::Recurrence => alone(recurrence::cases(setup)),
        Op::Adamw => alone(adamw::cases(setup)),
    }
}

impl Case {
    fn new(
        name: String,
        sizes: String,
        work: Work,
        prepare: impl FnOnce(&Setup) -> Result<Body> + 'static,
    ) -> Self {
        Self { name, sizes, work, prepare: Box::new(prepare) }
    }
}

impl Pass {
    const ALL: [Self; 2] = [Self::Forward, Self::Both];

    fn name(self) -> &'static str {
        match self {
            Self::Forward => "fwd",
            Self::Both => "fwd+bwd",
        }
    }

    /// The work of this pass, from that of forward and that of backward.
    fn work(self, forward: Work, backward: Work) -> Work {
        match self {
            Self::Forward => forward,
            Self::Both => forward + backward,
        }
    }
}

impl Add for Work {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self { bytes: self.bytes + other.bytes, flops: self.flops + other.flops }
    }
}

impl Mul<f64> for Work {
    type Output = Self;

    fn mul(self, factor: f64) -> Self {
        Self { bytes: self.bytes * factor, flops: self.flops * factor }
    }
}

impl Sizes {
    /// Width of attention, h·d.
    pub fn width(&self) -> usize {
        self.heads * self.head_size
    }

    /// What is wrong with them, if anything is: the flag, its value and what to write.
    pub fn check(&self) -> std::result::Result<(), String> {
        let counts = [
            ("tokens", self.tokens),
            ("heads", self.heads),
            ("head-size", self.head_size),
            ("hidden", self.hidden),
            ("vocabulary", self.vocabulary),
            ("parameters", self.parameters),
        ];
        let lengths = self.lengths.iter().map(|length| ("length", *length));
        for (flag, value) in counts.into_iter().chain(lengths) {
            if !(1..=MOST).contains(&value) {
                return Err(format!("--{flag} {value}: use a number from 1 to {MOST}"));
            }
        }
        let tokens = self.tokens;
        if let Some(length) = self.lengths.iter().find(|length| !tokens.is_multiple_of(**length)) {
            let fits = tokens.next_multiple_of(*length);
            return Err(format!(
                "--length {length}: {tokens} tokens are no whole number of such sequences; use a \
                 multiple of it, such as --tokens {fits}"
            ));
        }
        if !(0.0..1.0).contains(&self.dropout) {
            return Err(format!("--dropout {}: use a number from 0 to below 1", self.dropout));
        }
        Ok(())
    }

    /// The sizes that matter to attention.
    fn attention(&self, length: usize) -> String {
        format!("{} tokens, L {length}, {} x {}", self.tokens, self.heads, self.head_size)
    }
}

impl Setup {
    /// Bytes of a stored element.
    fn element(&self) -> f64 {
        self.dtype.size_in_bytes() as f64
    }

    /// Normal numbers as activations and matrices are stored. Not zeros: on zeros a GPU's matrix
    /// products are faster, for they heat it less.
    pub fn normal(&self, shape: impl Into<Shape>) -> Result<Tensor> {
        Tensor::randn(0f32, 1f32, shape, &self.device)?.to_dtype(self.dtype)
    }

    /// Zeros, f32: a vector of parameters, or a gradient.
    fn zeros(&self, shape: impl Into<Shape>) -> Result<Tensor> {
        Tensor::zeros(shape, DType::F32, &self.device)
    }

    /// The batch: sequences of `length` tokens each.
    fn ragged(&self, length: usize) -> Result<Ragged> {
        let sequences = self.sizes.tokens / length;
        let samples: Vec<u32> = (0..sequences as u32).collect();
        Ragged::new(&vec![length; sequences], &samples)
    }

    fn dropout(&self) -> Option<Dropout> {
        Dropout::new(self.sizes.dropout, DropoutKey { seed: 1, step: 1, stream: 0 }, 1)
    }
}
