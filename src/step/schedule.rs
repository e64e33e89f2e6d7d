//! The learning rate by step, as Hugging Face's schedulers have it.
//!
//! ```text
//! s < w     s / w                                   (step 0 is the first: it has rate 0)
//! linear    max(0, (n - s) / (n - w))
//! cosine    (1 + cos(π·(s - w) / (n - w))) / 2
//! constant  1
//! ```

use crate::{
    Error, Result,
    config::{self, Warmup},
};

/// A multiplier on the learning rate for every step of a run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    kind: config::Schedule,
    warmup: u64,
    total: u64,
}

impl Schedule {
    /// A run of `total` steps.
    ///
    /// # Errors
    /// `User` if the warm-up would not end within the run.
    pub fn new(kind: config::Schedule, warmup: Warmup, total: u64) -> Result<Self> {
        let (steps, setting) = match warmup {
            Warmup::Steps(steps) => (steps as u64, format!("train.warmup_steps = {steps}")),
            // As in Hugging Face's trainer, a share is rounded up.
            Warmup::Ratio(share) => {
                ((share * total as f64).ceil() as u64, format!("train.warmup_ratio = {share}"))
            }
        };
        if steps > 0 && steps >= total {
            return Err(Error::User(format!(
                "{setting} is a warm-up of {steps} steps in a run of {total}; the learning rate \
                 would never get there. Use at most {}",
                total.saturating_sub(1)
            )));
        }
        Ok(Self { kind, warmup: steps, total })
    }

    /// The factor on `train.learning_rate` in step `s`, counted from 0.
    pub fn multiplier(&self, s: u64) -> f64 {
        if s < self.warmup {
            return s as f64 / self.warmup as f64;
        }
        let length = (self.total - self.warmup).max(1) as f64;
        let done = (s - self.warmup) as f64 / length;
        match self.kind {
            config::Schedule::Constant => 1.0,
            config::Schedule::Linear => (1.0 - done).max(0.0),
            config::Schedule::Cosine => {
                ((1.0 + (std::f64::consts::PI * done).cos()) / 2.0).max(0.0)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_warmup_that_never_ends_is_refused() {
        let make = |warmup, total| Schedule::new(config::Schedule::Linear, warmup, total);
        let error = make(Warmup::Steps(10), 10).unwrap_err().to_string();
        assert!(
            error.contains("train.warmup_steps = 10") && error.contains("at most 9"),
            "{error}"
        );
        assert!(make(Warmup::Ratio(1.0), 10).is_err());
        assert!(make(Warmup::Steps(0), 0).is_ok());
        assert_eq!(make(Warmup::Ratio(0.1), 25).map(|s| s.warmup).unwrap_or(0), 3);
    }

    #[test]
    fn constant_stays_after_warmup() -> Result<()> {
        let schedule = Schedule::new(config::Schedule::Constant, Warmup::Steps(4), 10)?;
        assert_eq!([0, 1, 4, 9].map(|s| schedule.multiplier(s)), [0.0, 0.25, 1.0, 1.0]);
        Ok(())
    }
}
