//! Every op of allreel that has device code: the maths, a safe API on candle tensors, the CPU
//! implementation, CUDA kernels, and a hand-written backward of both.
//!
//! One op is one room: `mod.rs` holds the maths, shapes and the safe API, `cpu.rs` the CPU
//! implementation, `test.rs` its finite differences, `op.cu` its CUDA kernels, `device.rs` their launches,
//! and `check.rs` what holds either implementation to the CPU's in f64, on any device (docs/kernels.md).
//! On a CPU tensors are f32 (f64 in tests); on a CUDA device activations and matrices are bf16. `unsafe` lives in this crate and nowhere else
//! in the workspace. In reading order:
//!
//! | room | op |
//! |---|---|
//! | [`common`] | ragged batches, counted randomness, SIMD dispatch, tensor access |
//! | [`embedding`] | gather-sum of tables; segmented and sparse gradients |
//! | [`linear`] | `x·Wᵀ + b` with gradients accumulated in place |
//! | [`quantized`] | frozen linears in 8 or 4 bits, dequantised part by part |
//! | [`activation`] | bias + GELU / ReLU / SiLU / tanh, plain and gated |
//! | [`dropout`] | counted dropout on its own |
//! | [`norm`] | bias + dropout + residual + LayerNorm, with the norm or without |
//! | [`rotary`] | rotary positions of queries and keys |
//! | [`attention`] | ragged multi-head attention: full, causal, windowed |
//! | [`disentangled`] | the same with relative positions in the scores (DeBERTa) |
//! | [`prefix`] | attention to keys that all sequences share, joined to either of those |
//! | [`recurrence`] | one direction of an LSTM or GRU layer, sequences to their true ends |
//! | [`convolution`] | conv1d over the tokens of each sequence |
//! | [`pooling`] | first, last, mean or largest token of each sequence, or both its ends |
//! | [`attention_pooling`] | a mean of each sequence's tokens, weighted by attention |
//! | [`capsule`] | vectors that each sequence's tokens agree on, by dynamic routing |
//! | [`cross_entropy`] | softmax cross-entropy with label smoothing |
//! | [`adamw`] | fused AdamW over flat buckets, gradient norm |
//! | `nccl` | sums of device memory over ranks (feature `nccl`) |
//!
//! Legend of shapes: `T` tokens of the whole ragged batch, `B` sequences, `H` hidden size,
//! `h` heads, `d` head size, `N` outputs, `K` inputs, `C` classes, `V` rows of a table, `G` gates.
//!
//! Errors are candle's: shapes are checked here, once, and the message names the op and the shapes.

pub mod activation;
pub mod adamw;
pub mod attention;
pub mod attention_pooling;
pub mod capsule;
pub mod common;
pub mod convolution;
pub mod cross_entropy;
pub mod disentangled;
pub mod dropout;
pub mod embedding;
pub mod linear;
#[cfg(any(feature = "nccl", test))]
pub mod nccl;
pub mod norm;
pub mod pooling;
pub mod prefix;
pub mod quantized;
pub mod recurrence;
pub mod rotary;

pub use common::{Dropout, DropoutKey, Later, Mirror, Parked, Ragged, RowIds, threads};

/// Whether ops on the CPU take bf16 as well, by the CUDA kernels run on the host: for tests only.
pub const HOST_KERNELS: bool = cfg!(feature = "host-kernels");

#[cfg(test)]
mod testing;
