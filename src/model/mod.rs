//! Models: parameters under Hugging Face names, explicit forward and backward, loading and saving.
//!
//! | file | owns |
//! |---|---|
//! | [`parameters`] | flat buckets of values, gradients and optimizer state |
//! | [`plan`] | what a network is made of: names, sizes, rates |
//! | [`family`] | from each family's `config.json` to a plan |
//! | [`config`] | `config.json`, read and written |
//! | [`weight_files`] | `model.safetensors`, `pytorch_model.bin`, one file or shards, into f32 |
//! | [`weights`] | names mapped, what is missing or too much, initialisation |
//! | [`training`] | what of a network trains, what is added to it, what is kept in fewer bits |
//! | [`layer`] | the layers over the kernels, forward and backward |
//! | [`classifier`] | the whole network: what a training step runs |

pub mod classifier;
pub mod config;
pub mod family;
pub mod layer;
pub mod parameters;
pub mod plan;
pub mod training;
pub mod weight_files;
pub mod weights;

pub use classifier::{Classifier, Pass};
pub use config::{Dropouts, ModelConfig, Overrides};
pub use family::Family;
pub use parameters::{Parameter, Parameters};
pub use training::Training;
