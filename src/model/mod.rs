//! Models: parameters under Hugging Face names, explicit forward and backward, loading and saving.
//!
//! | file | owns |
//! |---|---|
//! | [`parameters`] | flat buckets of values, gradients and optimizer state |
//! | [`config`] | `config.json`, read and written |
//! | [`weights`] | `model.safetensors` / `pytorch_model.bin`, names mapped, initialisation |
//! | [`linear`] | a linear layer over the kernels |
//! | [`bert`] | the BERT encoder |
//! | [`head`] | pooler and classifier |
//! | [`classifier`] | the whole network: what a training step runs |

pub mod bert;
pub mod classifier;
pub mod config;
pub mod head;
pub mod linear;
pub mod parameters;
pub mod weights;

pub use classifier::{Classifier, Pass};
pub use config::BertConfig;
pub use parameters::{Parameter, Parameters};
