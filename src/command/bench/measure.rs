//! Repetitions of one body or of several in turn, and what is made of their times.
//!
//! After triton's `do_bench`: warm up for a time, then as many repetitions as fit into a budget, the
//! caches emptied before each, and quantiles of what they took.

use std::time::{Duration, Instant};

use candle_core::{Device, Result};
use serde::{Deserialize, Serialize};

use super::{
    cache::Flush,
    clock::{self, Clock},
};

/// Repetitions that are made even if they exceed the budget.
const FEWEST: usize = 5;

/// What is timed.
pub type Body = Box<dyn FnMut() -> Result<()>>;

/// How bodies are timed.
pub struct Harness {
    clock: Box<dyn Clock>,
    /// `None` leaves the caches warm.
    flush: Option<Flush>,
    warmup: Duration,
    budget: Duration,
}

/// The times of all repetitions of one body, in milliseconds, in order.
#[derive(Clone, Debug, Default)]
pub struct Laps {
    /// By the device's clock.
    pub kernel: Vec<f64>,
    /// By the caller's.
    pub wall: Vec<f64>,
    /// Bytes of the device held at most beyond what was there before; `None` on a CPU.
    pub memory: Option<u64>,
}

impl Harness {
    /// Warms up for `warmup` and then measures for `budget`, each per body, with caches emptied
    /// between runs unless they are to stay `warm`.
    ///
    /// # Errors
    /// If `device` has no clock or no memory.
    pub fn new(device: &Device, warmup: Duration, budget: Duration, warm: bool) -> Result<Self> {
        let flush = (!warm).then(|| Flush::new(device)).transpose()?;
        Ok(Self { clock: clock::of(device)?, flush, warmup, budget })
    }

    /// Bytes written between two runs; 0 if caches stay warm.
    pub fn flushed(&self) -> usize {
        self.flush.as_ref().map_or(0, Flush::bytes)
    }

    /// Times `bodies` in turn, so that what else the machine does meets all of them alike.
    ///
    /// # Errors
    /// Those of the bodies.
    pub fn measure(&self, bodies: &mut [Body]) -> Result<Vec<Laps>> {
        let share = bodies.len() as u32;
        let begin = Instant::now();
        loop {
            for body in bodies.iter_mut() {
                self.clock.lap(&mut || Ok(()), body)?;
            }
            if begin.elapsed() >= self.warmup * share {
                break;
            }
        }
        let mut laps = vec![Laps::default(); bodies.len()];
        for (body, laps) in bodies.iter_mut().zip(&mut laps) {
            laps.memory = self.clock.memory(body)?;
        }
        let begin = Instant::now();
        for round in 0.. {
            if round >= FEWEST && begin.elapsed() >= self.budget * share {
                break;
            }
            for (body, laps) in bodies.iter_mut().zip(&mut laps) {
                let mut before = || self.flush.as_ref().map_or(Ok(()), Flush::run);
                let lap = self.clock.lap(&mut before, body)?;
                laps.kernel.push(lap.kernel);
                laps.wall.push(lap.wall);
            }
        }
        Ok(laps)
    }
}

/// Minimum, 20th percentile, median and 80th percentile of some numbers.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Spread {
    /// The least.
    pub min: f64,
    /// A fifth is below.
    pub p20: f64,
    /// Half is below.
    pub median: f64,
    /// Four fifths are below.
    pub p80: f64,
}

impl Spread {
    /// Of at least one number; between two of them quantiles are interpolated, as PyTorch's are.
    pub fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let at = |share: f64| {
            let place = (values.len() - 1) as f64 * share;
            let (low, high) = (values[place.floor() as usize], values[place.ceil() as usize]);
            low + (high - low) * place.fract()
        };
        Self { min: at(0.0), p20: at(0.2), median: at(0.5), p80: at(0.8) }
    }
}

#[cfg(test)]
mod tests {
    use std::{cell::Cell, rc::Rc};

    use super::*;

    #[test]
    fn quantiles_are_interpolated() {
        let spread = Spread::of(vec![3.0, 1.0, 2.0, 5.0, 4.0, 6.0]);
        assert_eq!(spread, Spread { min: 1.0, p20: 2.0, median: 3.5, p80: 5.0 });
        let spread = Spread::of(vec![10.0, 20.0]);
        assert_eq!(spread, Spread { min: 10.0, p20: 12.0, median: 15.0, p80: 18.0 });
        assert_eq!(Spread::of(vec![7.0]), Spread { min: 7.0, p20: 7.0, median: 7.0, p80: 7.0 });
    }

    /// A body that counts its calls and takes `pause`.
    fn counted(pause: Duration) -> (Rc<Cell<usize>>, Body) {
        let calls = Rc::new(Cell::new(0));
        let counter = calls.clone();
        let body = move || {
            counter.set(counter.get() + 1);
            std::thread::sleep(pause);
            Ok(())
        };
        (calls, Box::new(body))
    }

    #[test]
    fn a_budget_is_filled_and_without_one_a_few_runs_are_made() {
        let pause = Duration::from_millis(2);
        let (calls, body) = counted(pause);
        let none = Duration::ZERO;
        let harness = Harness::new(&Device::Cpu, none, none, true).unwrap();
        assert_eq!(harness.flushed(), 0);
        let laps = harness.measure(&mut [body]).unwrap();
        assert_eq!(calls.get(), 1 + FEWEST, "one to warm up");
        assert_eq!(laps[0].kernel.len(), FEWEST);
        // On a CPU both clocks are one, and a sleep is never short.
        assert_eq!(laps[0].kernel, laps[0].wall);
        assert!(laps[0].wall.iter().all(|ms| *ms >= 2.0), "{laps:?}");

        let bodies = [counted(pause), counted(pause)];
        let harness = Harness::new(&Device::Cpu, none, 20 * pause, true).unwrap();
        let begin = Instant::now();
        let (calls, mut bodies): (Vec<_>, Vec<_>) = bodies.into_iter().unzip();
        let laps = harness.measure(&mut bodies).unwrap();
        assert!(begin.elapsed() >= 40 * pause, "20 for each of the two");
        assert_eq!(calls[0].get(), calls[1].get(), "not in turn");
        assert_eq!((laps.len(), laps[1].wall.len()), (2, calls[1].get() - 1));
    }

    #[test]
    fn an_error_ends_it() {
        let harness = Harness::new(&Device::Cpu, Duration::ZERO, Duration::ZERO, true).unwrap();
        let body: Body = Box::new(|| candle_core::bail!("broken"));
        let error = harness.measure(&mut [body]).unwrap_err().to_string();
        assert!(error.starts_with("broken"), "{error}");
    }
}
