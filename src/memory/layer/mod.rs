//! The layers of `model/layer`, holding what those hold and computing nothing.
//!
//! A function here takes and gives back its [`Held`](super::ledger::Held)s in the order in which its namesake
//! handles its tensors. `Saved` mirrors the struct of the same name there.
//!
//! | file | mirrors |
//! |---|---|
//! | [`linear`] | `linear`, `norm` |
//! | [`attention`] | `relative`, `disentangled`, `prefix`, and the attention of a block |
//! | [`post_norm`] | `post_norm`, `convolution` |
//! | [`pre_norm`] | `pre_norm` |
//! | [`words`] | `recurrent`, `filters`, `pool` |
//! | [`block`] | `block` |
//! | [`ends`] | `embeddings`, `rows`, `head` |

pub mod attention;
pub mod block;
pub mod ends;
pub mod linear;
pub mod post_norm;
pub mod pre_norm;
pub mod words;
