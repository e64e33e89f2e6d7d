//! `allreel bench [OP]...`: kernel microbenchmarks, held against what the device can do.

use std::{path::PathBuf, time::Duration};

use candle_core::DType;
use indicatif::ProgressBar;

use super::{
    ceiling::Ceilings,
    compare::Comparison,
    measure::{Body, Harness, Laps, Spread},
    op::{self, Case, Op, Setup, Sizes},
    record::{Machine, Record, Report, Settings, Timed},
    table,
};
use crate::{
    Error, Result,
    command::start_threads,
    device::{Choice, Placement},
};

/// Arguments of `allreel bench [OP]...`.
#[derive(clap::Args)]
pub struct Args {
    /// What to time [default: all of them]
    #[arg(value_enum, value_name = "OP")]
    ops: Vec<Op>,
    /// Only cases whose name or sizes have this in them, like "fwd+bwd" or "L 512"
    #[arg(long, value_name = "TEXT")]
    filter: Option<String>,
    /// Where to run
    #[arg(long, default_value = "auto")]
    device: Choice,
    /// What activations and matrices are stored in [default: f32 on a CPU, bf16 on CUDA]
    #[arg(long, value_enum)]
    dtype: Option<Element>,
    /// Worker threads [default: all cores]
    #[arg(long)]
    threads: Option<usize>,
    /// Tokens of the batch [default: 2048; on CUDA 16384]
    #[arg(long, value_name = "N")]
    tokens: Option<usize>,
    /// Tokens of a sequence; several, separated by commas, are several cases [default: 128,512; on
    /// CUDA 512,2048,8192]
    #[arg(long, value_name = "N", value_delimiter = ',')]
    length: Vec<usize>,
    /// Heads of attention
    #[arg(long, value_name = "N", default_value_t = 12)]
    heads: usize,
    /// Size of a head
    #[arg(long, value_name = "N", default_value_t = 64)]
    head_size: usize,
    /// Width of everything but attention; inside the feed-forward part it is four times that
    #[arg(long, value_name = "N", default_value_t = 768)]
    hidden: usize,
    /// Rows of the word table [default: 32000; on CUDA 128100]
    #[arg(long, value_name = "N")]
    vocabulary: Option<usize>,
    /// Elements of AdamW's bucket [default: 8000000; on CUDA 184000000]
    #[arg(long, value_name = "N")]
    parameters: Option<usize>,
    /// Probability of every dropout
    #[arg(long, value_name = "P", default_value_t = 0.0)]
    dropout: f64,
    /// Leave the caches as the last run left them
    #[arg(long)]
    warm: bool,
    /// Time to warm up for, per case
    #[arg(long, value_name = "MS", default_value_t = 50)]
    warmup: u64,
    /// Time to measure for, per case; five runs are made in any case
    #[arg(long, value_name = "MS", default_value_t = 250)]
    budget: u64,
    /// Write every figure to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Compare with a file that --json wrote
    #[arg(long, value_name = "FILE")]
    compare: Option<PathBuf>,
}

/// What an element is stored in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Element {
    F32,
    Bf16,
}

/// Runs the command.
///
/// # Errors
/// If sizes or files are bad, or the device cannot run a case.
pub fn run(args: &Args) -> Result<()> {
    let old = args.compare.as_deref().map(Report::load).transpose()?;
    check_output(args)?;
    let setup = setup(args)?;
    let groups = selected(args, &setup)?;
    let threads = start_threads(args.threads, 1);
    let ms = Duration::from_millis;
    let (warmup, budget) = (ms(args.warmup), ms(args.budget));
    let harness =
        Harness::new(&setup.device, warmup, budget, args.warm).map_err(failed("flush"))?;
    let ceilings = || Ceilings::measure(&harness, &setup).map_err(failed("the ceilings"));
    let before = ceilings()?;
    let mut timed = Vec::new();
    let progress = ProgressBar::new_spinner();
    for group in groups {
        progress.set_message(group[0].name.clone());
        progress.tick();
        timed.extend(measure(&harness, &setup, group)?);
    }
    progress.finish_and_clear();
    let ceilings = before.max(ceilings()?);
    let cases = timed.iter().map(|timed| Record::new(timed, &ceilings)).collect();
    let report = Report::new(
        Machine::this(&setup.device, threads),
        Settings {
            dtype: setup.dtype.as_str().into(),
            flushed_bytes: harness.flushed(),
            warmup_ms: args.warmup,
            budget_ms: args.budget,
            sizes: setup.sizes,
        },
        ceilings,
        cases,
    );
    if let Some(path) = &args.json {
        report.save(path)?;
    }
    let comparison = old.as_ref().map(|old| Comparison::new(old, &report));
    print!("{}", table::render(&report, comparison.as_ref()));
    Ok(())
}

/// Refuses a place for the JSON that cannot be written, before an hour of measuring.
fn check_output(args: &Args) -> Result<()> {
    let Some(path) = &args.json else { return Ok(()) };
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty());
    if path.is_dir() || dir.is_some_and(|dir| !dir.is_dir()) {
        return Err(Error::User(format!(
            "--json {}: not a file in a directory that exists; name one",
            path.display()
        )));
    }
    Ok(())
}

fn setup(args: &Args) -> Result<Setup> {
    let Placement { device, .. } = Placement::open(args.device, 0)?;
    let cuda = device.is_cuda();
    let dtype = match args.dtype {
        Some(Element::Bf16) if !cuda => {
            return Err(Error::User(
                "--dtype bf16: the ops compute in f32 on a CPU; use --dtype f32, or --device cuda"
                    .into(),
            ));
        }
        Some(Element::F32) => DType::F32,
        Some(Element::Bf16) => DType::BF16,
        None if cuda => DType::BF16,
        None => DType::F32,
    };
    let sizes = sizes(args, cuda)?;
    Ok(Setup { device, dtype, sizes })
}

/// The sizes, with defaults that suit the device: on CUDA those of the aims, which compare with what
/// others measured; on a CPU such that all ops take seconds.
fn sizes(args: &Args, cuda: bool) -> Result<Sizes> {
    let or = |given: Option<usize>, host, device| given.unwrap_or(if cuda { device } else { host });
    let lengths = match (&args.length[..], cuda) {
        ([], false) => vec![128, 512],
        ([], true) => vec![512, 2048, 8192],
        (given, _) => given.to_vec(),
    };
    let sizes = Sizes {
        tokens: or(args.tokens, 2048, 16_384),
        lengths,
        heads: args.heads,
        head_size: args.head_size,
        hidden: args.hidden,
        vocabulary: or(args.vocabulary, 32_000, 128_100),
        parameters: or(args.parameters, 8_000_000, 184_000_000),
        dropout: args.dropout,
    };
    sizes.check().map_err(Error::User)?;
    Ok(sizes)
}

/// The groups of the ops asked for, without what the filter leaves out.
fn selected(args: &Args, setup: &Setup) -> Result<Vec<Vec<Case>>> {
    let all = <Op as clap::ValueEnum>::value_variants();
    let wanted = |op: &&Op| args.ops.is_empty() || args.ops.contains(*op);
    let mut groups: Vec<Vec<Case>> =
        all.iter().filter(wanted).flat_map(|op| op::groups(*op, setup)).collect();
    let Some(filter) = &args.filter else { return Ok(groups) };
    let mut names: Vec<String> = groups.iter().flatten().map(|case| case.name.clone()).collect();
    for group in &mut groups {
        group.retain(|case| format!("{}, {}", case.name, case.sizes).contains(filter));
    }
    groups.retain(|group| !group.is_empty());
    if groups.is_empty() {
        names.sort();
        names.dedup();
        return Err(Error::User(format!(
            "--filter {filter:?} leaves no case; the names are: {}",
            names.join(", ")
        )));
    }
    Ok(groups)
}

/// Times a group; its first case, if the filter left it, is what the others are compared with.
fn measure(harness: &Harness, setup: &Setup, group: Vec<Case>) -> Result<Vec<Timed>> {
    let (mut bodies, mut rows): (Vec<Body>, Vec<_>) = (Vec::new(), Vec::new());
    for Case { name, sizes, work, prepare } in group {
        bodies.push(prepare(setup).map_err(failed(&name))?);
        rows.push((name, sizes, work));
    }
    let laps = harness.measure(&mut bodies).map_err(failed(&rows[0].0))?;
    let timed = rows.into_iter().enumerate().map(|(i, (name, sizes, work))| {
        let times_first = (i > 0).then(|| ratio(&laps[i], &laps[0]));
        Timed { name, sizes, work, laps: laps[i].clone(), times_first }
    });
    Ok(timed.collect())
}

/// By how much the runs of one took longer than those of another that were made in the same rounds.
fn ratio(laps: &Laps, first: &Laps) -> Spread {
    Spread::of(laps.kernel.iter().zip(&first.kernel).map(|(own, first)| own / first).collect())
}

/// An error of the device while it ran `what`.
fn failed(what: &str) -> impl Fn(candle_core::Error) -> Error {
    move |error| {
        Error::Device(format!(
            "cannot time {what}: {}; choose smaller sizes, or other cases with --filter",
            first_line(&error)
        ))
    }
}

/// An error without the backtrace that candle may append.
fn first_line(error: &candle_core::Error) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ratio_is_of_runs_in_the_same_round() {
        let laps =
            |kernel: [f64; 3]| Laps { kernel: kernel.into(), wall: vec![1.0; 3], memory: None };
        // The machine slowed down fourfold after the first round; the ratio did not change much.
        let spread = ratio(&laps([2.0, 8.0, 9.0]), &laps([1.0, 4.0, 4.0]));
        assert_eq!(spread, Spread { min: 2.0, p20: 2.0, median: 2.0, p80: 2.15 });
    }
}
