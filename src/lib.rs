//! allreel: a distributed trainer for sentiment classifiers.
//!
//! The modules in the order in which data flows; a module imports only from those above it:
//!
//! | module | owns |
//! |---|---|
//! | [`error`], [`atomic`] | the one error type; files that are there whole or not at all |
//! | [`config`] | a run's settings, parsed once into types |
//! | [`data`] | reading, cleaning, splitting and tokenising reviews |
//! | [`words`] | vectors of words: from files, and trained on reviews |
//! | [`device`] | where a rank computes: CPU or CUDA device |
//! | [`batch`] | ragged batches, the order of an epoch, shards |
//! | [`hub`] | models of the Hugging Face Hub, fetched and kept |
//! | [`adapter`] | which modules an adapter updates or trains whole; PEFT's files |
//! | [`model`] | parameters, layers with explicit backward, loading and saving |
//! | [`collective`] | ranks talking to each other |
//! | [`linear`] | linear classifiers on n-grams |
//! | [`step`] | one optimizer step: forward, loss, backward, reduce, clip, update |
//! | [`memory`] | what a run will need of memory, without taking it |
//! | [`checkpoint`] | what a run leaves on disk, and going on from it |
//! | [`report`] | metrics, progress, summaries |
//! | [`command`] | `train`, `eval`, `predict`, `embed`, `bench`, `check`, `fetch`, `plan`, `launch` |
#![forbid(unsafe_code)]

pub mod adapter;
pub mod atomic;
pub mod batch;
pub mod checkpoint;
pub mod collective;
pub mod command;
pub mod config;
pub mod data;
pub mod device;
pub mod error;
pub mod hub;
pub mod linear;
pub mod memory;
pub mod model;
pub mod report;
pub mod step;
pub mod words;

pub use error::{Error, Result};
