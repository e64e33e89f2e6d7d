//! Linear classifiers on n-grams: what a network has to beat.
//!
//! | file | owns |
//! |---|---|
//! | [`words`] | the words of a review, its n-grams and their keys |
//! | [`bags`] | reviews as bags of n-grams |
//! | [`columns`] | the n-grams that are features, and naive Bayes' ratios: over all ranks |
//! | [`features`] | presence, counts or TF-IDF as a matrix |
//! | [`matrix`] | sparse matrices, and their products |
//! | [`regression`] | logistic regression: loss and gradient over all ranks |
//! | [`lbfgs`] | the solver |
//! | [`model`], [`arrays`] | what was trained, on disk |
//!
//! This module knows ranks only as sums. It refuses to know about runs, their settings and their files.

pub mod arrays;
pub mod bags;
pub mod columns;
pub mod features;
pub mod lbfgs;
pub mod matrix;
pub mod model;
pub mod regression;
pub mod words;
