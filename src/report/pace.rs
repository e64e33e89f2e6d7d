//! How fast training goes and how long the rest will take.

use std::time::Duration;

use indicatif::FormattedDuration;

/// The weight of the past in the shown rate; at 0.95 it follows about the last 20 steps, which
/// evens out batches of long and of short reviews.
const PAST: f64 = 0.95;

/// Samples and seconds per step, recent steps weighing most. Made of the steps' own times, so
/// that an evaluation in between does not count as slow training.
#[derive(Debug, Default)]
pub(super) struct Pace {
    steps: f64,
    samples: f64,
    seconds: f64,
}

impl Pace {
    pub(super) fn add(&mut self, samples: usize, seconds: f64) {
        self.steps = PAST * self.steps + 1.0;
        self.samples = PAST * self.samples + samples as f64;
        self.seconds = PAST * self.seconds + seconds;
    }

    pub(super) fn samples_per_second(&self) -> f64 {
        if self.seconds > 0.0 { self.samples / self.seconds } else { 0.0 }
    }

    /// How long `steps` more steps take at this pace.
    pub(super) fn seconds_for(&self, steps: usize) -> f64 {
        if self.steps > 0.0 { self.seconds / self.steps * steps as f64 } else { 0.0 }
    }
}

/// `seconds` as `01:02:03`.
pub(super) fn clock(seconds: f64) -> String {
    match Duration::try_from_secs_f64(seconds.round()) {
        Ok(duration) => FormattedDuration(duration).to_string(),
        Err(_) => "??:??:??".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pace_follows_recent_steps() {
        let mut pace = Pace::default();
        assert_eq!((pace.samples_per_second(), pace.seconds_for(5)), (0.0, 0.0));
        for _ in 0..200 {
            pace.add(16, 2.0);
        }
        assert!((pace.samples_per_second() - 8.0).abs() < 1e-9, "{pace:?}");
        assert!((pace.seconds_for(5) - 10.0).abs() < 1e-9, "{pace:?}");
        for _ in 0..200 {
            pace.add(16, 1.0);
        }
        assert!((pace.samples_per_second() - 16.0).abs() < 0.01, "{pace:?}");
    }

    #[test]
    fn times_are_rounded_and_an_unknown_one_is_marked() {
        assert_eq!(clock(3723.4), "01:02:03");
        assert_eq!(clock(59.5), "00:01:00");
        assert_eq!(clock(f64::NAN), "??:??:??");
    }
}
