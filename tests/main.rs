//! The integration tests, in one binary. The map:
//!
//! | file | what it holds allreel to |
//! |---|---|
//! | [`support`] | where reference data is, comparisons that NaN fails |
//! | [`run`] | the binary in a directory of its own, on small made-up data |
//! | [`golden_tokenizers`] | ids of Hugging Face's tokenizers |
//! | [`golden_models`] | logits, hidden states, loss and every gradient of each family of Hugging Face |
//! | [`golden_gpt2_book`] | GPT-2 as a classifier in the two ways of a book |
//! | [`golden_adapters`] | PEFT's adapters: what they say, which modules they update, how tensors are called |
//! | [`golden_optim`] | PyTorch's AdamW, schedules, clipping and cross-entropy |
//! | [`golden_trajectory`] | eight steps of training, equal to PyTorch's |
//! | [`golden_e2e`] | text in, probabilities out, equal to Hugging Face's |
//! | [`invariance`] | ranks, micro-batches and recomputing change nothing |
//! | [`tcp`] | ranks over TCP sum as ranks in one process do, and name the one they lost |
//! | [`golden_peft`] | logits, loss, rows and every gradient of PEFT's adapters, and their files |
//! | [`adapters`] | every method on every family: slopes, files, folding, fewer bits |
//! | [`on_words`] | networks on word vectors: slopes, what stays frozen, what a run of one leaves |
//! | [`packing`] | a batch of sequences equals the sequences alone |
//! | [`families`] | each family trains what it is told to and goes on from its checkpoints |
//! | [`transformers`] | what is saved, transformers and PEFT load |
//! | [`bad_input`] | one clear error and exit code 2 for each thing that can be wrong |
//! | [`cli`] | the commands and the files they leave |
//! | [`hub`] | models and reviews by name, from servers that break off, lie or refuse |
//! | [`kill`] | SIGKILL at random moments, disk full, SIGTERM; resume is bitwise |
//!
//! Reference outputs are found through `ALLREEL_GOLDEN`, real data through `ALLREEL_DATA`. Where a
//! variable is unset its tests say so and pass; with `CI` set they fail instead.

mod adapters;
mod bad_input;
mod cli;
mod families;
mod golden_adapters;
mod golden_e2e;
mod golden_gpt2_book;
mod golden_models;
mod golden_optim;
mod golden_peft;
mod golden_tokenizers;
mod golden_trajectory;
mod hub;
mod invariance;
mod kill;
mod on_words;
mod packing;
mod run;
mod support;
mod tcp;
mod transformers;
