//! What a run says about itself: the metrics file, the summary, the progress shown while it
//! trains, the table at its end.
//!
//! It computes nothing about the model: numbers come in as records and go out as text. Only rank
//! 0 reports; the other ranks hold a [`Progress::hidden`] and no [`Metrics`].

mod memory;
mod metrics;
mod number;
mod pace;
mod progress;
mod records;
mod summary;
mod table;

pub use memory::peak_host_bytes;
pub use metrics::Metrics;
pub use progress::Progress;
pub use records::{EpochRecord, EvalRecord, Record, StepRecord};
pub use summary::{AllReduce, Summary};
pub use table::epochs as epoch_table;
