//! Vectors of words: those of others, read from their files, and our own, trained on reviews.
//!
//! | module | owns |
//! |---|---|
//! | [`skipgram`] | vectors trained on reviews |
//! | [`vectors`] | files of vectors, and the table that a tokenizer's vocabulary gets from one |
//!
//! Which words there are is the tokenizer's to say; what a model makes of the table is the model's.

pub mod skipgram;
pub mod vectors;
