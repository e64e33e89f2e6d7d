//! Two runs, case by case: is it faster?

use super::{
    measure::Spread,
    record::{Record, Report},
};

/// What an older run says about the cases of a newer one.
pub struct Comparison {
    /// Same order as the newer run's cases; `None` where the older has no such case.
    pub cases: Vec<Option<Change>>,
    /// Cases of the older run that the newer lacks.
    pub gone: Vec<String>,
    /// What else differs: each makes the times incomparable.
    pub differs: Vec<String>,
}

/// What became of a case.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Change {
    /// Median kernel time of the older run, in milliseconds.
    pub old_ms: f64,
    /// New over old: of the medians, then from the new p20 over the old p80 to the opposite.
    pub ratio: [f64; 3],
    /// Whether that can be told from noise.
    pub verdict: Verdict,
}

/// Faster or slower only if the ranges from p20 to p80 do not touch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// All of the newer range is below the older.
    Faster,
    /// They overlap.
    Same,
    /// All of it is above.
    Slower,
}

impl Comparison {
    /// Compares kernel times.
    pub fn new(old: &Report, new: &Report) -> Self {
        let same = |a: &Record, b: &Record| (&a.name, &a.sizes) == (&b.name, &b.sizes);
        let change = |case: &Record| {
            let old = old.cases.iter().find(|old| same(old, case))?;
            Some(Change::new(&old.kernel_ms, &case.kernel_ms))
        };
        let gone = old.cases.iter().filter(|old| !new.cases.iter().any(|case| same(old, case)));
        Self {
            cases: new.cases.iter().map(change).collect(),
            gone: gone.map(|case| format!("{}, {}", case.name, case.sizes)).collect(),
            differs: differences(old, new),
        }
    }
}

/// Settings that the times depend on and the cases' sizes do not show.
fn differences(old: &Report, new: &Report) -> Vec<String> {
    let facts = |report: &Report| {
        let (machine, settings) = (&report.machine, &report.settings);
        [
            ("processor", machine.processor.clone()),
            ("device", machine.device.clone()),
            ("threads", machine.threads.to_string()),
            ("dtype", settings.dtype.clone()),
            ("dropout", settings.sizes.dropout.to_string()),
            ("bytes flushed", settings.flushed_bytes.to_string()),
        ]
    };
    let pairs = facts(old).into_iter().zip(facts(new));
    let changed = pairs.filter(|(old, new)| old != new);
    changed.map(|((what, old), (_, new))| format!("{what}: {old} then, {new} now")).collect()
}

impl Change {
    fn new(old: &Spread, new: &Spread) -> Self {
        let verdict = if new.p80 < old.p20 {
            Verdict::Faster
        } else if new.p20 > old.p80 {
            Verdict::Slower
        } else {
            Verdict::Same
        };
        let ratio = [new.median / old.median, new.p20 / old.p80, new.p80 / old.p20];
        Self { old_ms: old.median, ratio, verdict }
    }
}

impl Verdict {
    /// As it is printed.
    pub fn name(self) -> &'static str {
        match self {
            Self::Faster => "faster",
            Self::Same => "same",
            Self::Slower => "slower",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::record::tests::report, *};

    #[test]
    fn only_ranges_that_do_not_touch_are_told_apart() {
        let old = report(&[
            ("below", [1.0, 4.0, 5.0, 8.0]),
            ("touching", [1.0, 4.0, 5.0, 8.0]),
            ("above", [1.0, 4.0, 5.0, 8.0]),
            ("away", [1.0, 4.0, 5.0, 8.0]),
        ]);
        let mut new = report(&[
            ("above", [8.5, 9.0, 10.0, 12.0]),
            ("touching", [0.0, 1.0, 2.5, 4.0]),
            ("below", [0.0, 1.0, 2.5, 3.0]),
            ("added", [1.0, 1.0, 1.0, 1.0]),
        ]);
        let comparison = Comparison::new(&old, &new);
        let change = |ratio, verdict| Some(Change { old_ms: 5.0, ratio, verdict });
        assert_eq!(
            comparison.cases,
            [
                change([2.0, 9.0 / 8.0, 3.0], Verdict::Slower),
                change([0.5, 1.0 / 8.0, 1.0], Verdict::Same),
                change([0.5, 1.0 / 8.0, 0.75], Verdict::Faster),
                None,
            ]
        );
        assert_eq!(comparison.gone, ["away, 4 x 4"]);
        assert!(comparison.differs.is_empty(), "{:?}", comparison.differs);

        new.machine.threads = 9;
        new.settings.flushed_bytes = 0;
        let differs = Comparison::new(&old, &new).differs;
        assert_eq!(differs, ["threads: 2 then, 9 now", "bytes flushed: 9 then, 0 now"]);
    }
}
