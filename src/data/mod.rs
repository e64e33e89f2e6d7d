//! Reviews on their way from files to token ids: reading, cleaning, splitting, tokenising, caching.
//!
//! This module knows text and files. It refuses to know about batches, ranks and models: what
//! leaves here is a [`tokens::TokenSet`], and the caller decides which rank builds it.

pub mod cache;
pub mod clean;
pub mod read;
pub mod split;
pub mod submission;
pub mod synthetic;
pub mod tokenizer;
pub mod tokens;
pub mod words;

#[cfg(test)]
mod fixtures;

pub use cache::{Key, Source};
pub use clean::Cleaning;
pub use tokenizer::{Limit, Tokenizer, Truncation};
pub use tokens::TokenSet;

/// One review as it stands in its source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Review {
    /// The source's own id, without any quotes the file format wraps it in; the row number
    /// (from 0) where the source has none.
    pub id: String,
    /// The text, uncleaned; may be empty.
    pub text: String,
    /// 0 negative, 1 positive; `None` in an unlabelled source.
    pub label: Option<u32>,
}
