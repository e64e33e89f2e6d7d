//! What `--json` writes: every figure of a run, with the machine and the settings that made it.

use std::{fs, path::Path};

use candle_core::Device;
use serde::{Deserialize, Serialize};

use super::{
    ceiling::{Bound, Ceilings},
    measure::{Laps, Spread},
    op::{Sizes, Work},
};
use crate::{Error, Result, atomic::write_atomic};

/// Version of the file; another is not compared with.
const FORMAT: u32 = 1;

/// A whole run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    format: u32,
    /// Of allreel.
    pub version: String,
    /// When it was made, UTC.
    pub date: String,
    /// Where.
    pub machine: Machine,
    /// How.
    pub settings: Settings,
    /// What the device can do at most.
    pub ceilings: Ceilings,
    /// The cases, in the order of the table.
    pub cases: Vec<Record>,
}

/// What it ran on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    /// Model of the CPU.
    pub processor: String,
    /// Processors that this process may use.
    pub cores: usize,
    /// Worker threads.
    pub threads: usize,
    /// `cpu`, or the GPU's name.
    pub device: String,
}

/// What was asked for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// What activations and matrices are stored in.
    pub dtype: String,
    /// Bytes written between two runs to empty the caches; 0 where they stay warm.
    pub flushed_bytes: usize,
    /// Milliseconds of warming up, per case.
    pub warmup_ms: u64,
    /// Milliseconds of measuring, per case.
    pub budget_ms: u64,
    /// Sizes of all cases.
    pub sizes: Sizes,
}

/// One case.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Op, variant and pass.
    pub name: String,
    /// The sizes that matter to it.
    pub sizes: String,
    /// Runs measured.
    pub runs: usize,
    /// Milliseconds by the device's clock.
    pub kernel_ms: Spread,
    /// Milliseconds by the caller's.
    pub wall_ms: Spread,
    /// The least that one run must read and write.
    pub bytes: f64,
    /// The matrix products of one run.
    pub flops: f64,
    /// `bytes` over the median kernel time.
    pub bytes_per_second: f64,
    /// `flops` likewise.
    pub flops_per_second: f64,
    /// The least time that the ceilings allow over the median kernel time.
    pub share_of_limit: f64,
    /// Which ceiling that is.
    pub limited_by: Bound,
    /// Bytes of the device that a run holds at most, results and scratch; not on a CPU.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub peak_bytes: Option<u64>,
    /// Kernel times over those of the group's plain case in the same rounds.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub times_plain: Option<Spread>,
}

/// A case that has run.
pub struct Timed {
    /// Op, variant and pass.
    pub name: String,
    /// The sizes that matter to it.
    pub sizes: String,
    /// What one run must do at least.
    pub work: Work,
    /// What its runs took.
    pub laps: Laps,
    /// Kernel times over those of its group's first case in the same rounds.
    pub times_first: Option<Spread>,
}

impl Record {
    /// A case held against the ceilings.
    pub fn new(timed: &Timed, ceilings: &Ceilings) -> Self {
        let kernel_ms = Spread::of(timed.laps.kernel.clone());
        let (limit, limited_by) = ceilings.limit(timed.work);
        let seconds = kernel_ms.median / 1e3;
        Self {
            name: timed.name.clone(),
            sizes: timed.sizes.clone(),
            runs: timed.laps.kernel.len(),
            kernel_ms,
            wall_ms: Spread::of(timed.laps.wall.clone()),
            bytes: timed.work.bytes,
            flops: timed.work.flops,
            bytes_per_second: timed.work.bytes / seconds,
            flops_per_second: timed.work.flops / seconds,
            share_of_limit: limit / kernel_ms.median,
            limited_by,
            peak_bytes: timed.laps.memory,
            times_plain: timed.times_first,
        }
    }
}

impl Machine {
    /// This one.
    pub fn this(device: &Device, threads: usize) -> Self {
        Self {
            processor: processor().unwrap_or_else(|| std::env::consts::ARCH.into()),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            threads,
            device: name(device),
        }
    }
}

fn processor() -> Option<String> {
    let text = fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

fn name(device: &Device) -> String {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(cuda) => {
            cuda.cuda_stream().context().name().unwrap_or_else(|error| format!("cuda ({error})"))
        }
        _ => "cpu".into(),
    }
}

impl Report {
    /// Of this version, now.
    pub fn new(
        machine: Machine,
        settings: Settings,
        ceilings: Ceilings,
        cases: Vec<Record>,
    ) -> Self {
        let date = humantime::format_rfc3339_seconds(std::time::SystemTime::now()).to_string();
        let version = env!("CARGO_PKG_VERSION").to_owned();
        Self { format: FORMAT, version, date, machine, settings, ceilings, cases }
    }

    /// Writes it to `path`.
    ///
    /// # Errors
    /// `Device` if the file cannot be written.
    pub fn save(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(self).map_err(|e| Error::Bug(e.to_string()))?;
        write_atomic(path, format!("{text}\n").as_bytes())
    }

    /// Reads what [`save`](Self::save) wrote.
    ///
    /// # Errors
    /// `Data` if there is no such file, or it holds something else.
    pub fn load(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).map_err(|error| Error::reading(path, error))?;
        let refused = |what: String| {
            let path = path.display();
            Error::Data(format!("{path}: {what}; give a file that `allreel bench --json` wrote"))
        };
        let report: Self =
            serde_json::from_str(&text).map_err(|error| refused(error.to_string()))?;
        if report.format != FORMAT {
            return Err(refused(format!("format {}, but this is {FORMAT}", report.format)));
        }
        Ok(report)
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// A run of one case per `(name, [min, p20, median, p80])`.
    pub fn report(cases: &[(&str, [f64; 4])]) -> Report {
        let ceilings = Ceilings { bytes_per_second: 10e9, flops_per_second: 1e12 };
        let record = |(name, [min, p20, median, p80]): &(&str, [f64; 4])| {
            let spread = Spread { min: *min, p20: *p20, median: *median, p80: *p80 };
            let timed = Timed {
                name: (*name).into(),
                sizes: "4 x 4".into(),
                work: Work { bytes: 1e7, flops: 3e9 },
                laps: Laps { kernel: vec![*median], wall: vec![*median], memory: None },
                times_first: Some(spread),
            };
            Record { kernel_ms: spread, ..Record::new(&timed, &ceilings) }
        };
        let sizes = Sizes {
            tokens: 4,
            lengths: vec![2, 4],
            heads: 1,
            head_size: 2,
            hidden: 3,
            vocabulary: 5,
            parameters: 7,
            dropout: 0.1,
        };
        let settings =
            Settings { dtype: "f32".into(), flushed_bytes: 9, warmup_ms: 1, budget_ms: 2, sizes };
        let cases = cases.iter().map(record).collect();
        Report::new(Machine::this(&Device::Cpu, 2), settings, ceilings, cases)
    }

    #[test]
    fn a_report_comes_back_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("bench.json");
        let report = report(&[("a", [0.1, 1.0 / 3.0, 6.0, 7.0]), ("b", [1.0, 2.0, 3.0, 4.0])]);
        // 10 MB take 1 ms and 3 GFLOP 3 ms, half of the median.
        let a = &report.cases[0];
        assert_eq!((a.share_of_limit, a.limited_by), (0.5, Bound::Gemm));
        assert_eq!((a.bytes_per_second, a.flops_per_second), (1e7 / 6e-3, 3e9 / 6e-3));
        report.save(&path).unwrap();
        assert_eq!(Report::load(&path).unwrap(), report);
        assert!(report.date.starts_with("20") && report.date.ends_with('Z'), "{}", report.date);

        let newer = fs::read_to_string(&path).unwrap().replace("\"format\": 1", "\"format\": 2");
        fs::write(&path, newer).unwrap();
        let error = Report::load(&path).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains("bench.json: format 2"), "{error}");
    }
}
