//! `allreel check`: whether this machine computes right. A user's first command on a new GPU.
//!
//! | file | owns |
//! |---|---|
//! | `rooms` | every op against the CPU implementation in f64 |
//! | `layers` | one layer of each family, forward and backward, against the CPU in f32 |
//! | `steps` | training steps of a small DeBERTa beside the same on the CPU |
//! | `ranks` | sums over the ranks |
//! | `verdict` | the table, and whether all is well |

mod layers;
mod ranks;
mod rooms;
mod steps;
mod verdict;

use allreel_kernels::common::check::{Finding, Room};

use super::start_threads;
use crate::{
    Result,
    collective::{Collective, agree, must_be_equal, on_device},
    device::{Choice, Placement},
};

/// Arguments of `allreel check`.
#[derive(clap::Args)]
pub struct Args {
    /// Where to compute
    #[arg(long, value_enum, default_value = "auto")]
    device: Choice,
    /// Only the comparisons of this op
    #[arg(long, value_name = "OP")]
    filter: Option<String>,
    /// Small sizes and few steps only
    #[arg(long)]
    quick: bool,
    /// Worker threads [default: this rank's share of the cores]
    #[arg(long)]
    threads: Option<usize>,
}

/// What was compared, and what there is to say beside it.
struct Report {
    findings: Vec<Finding>,
    /// Printed below the table.
    remarks: Vec<String>,
}

/// Runs the command as one rank.
///
/// # Errors
/// `User` for an op or a device that there is not; `Device` if a comparison fails, on the rank that it
/// failed on.
pub fn run(args: &Args, carrier: &mut dyn Collective) -> Result<()> {
    let rooms = agree(carrier, rooms::selected(args.filter.as_deref()))?;
    let placement = Placement::open(args.device, carrier.local_rank());
    let placement = agree(carrier, placement)?;
    must_be_equal(carrier, "kind of device", &format!("{:?}", placement.dtype))?;
    let threads = start_threads(args.threads, carrier.local_world());
    let mut collective = on_device(carrier, &placement.device)?;
    let main = collective.rank() == 0;
    if main {
        eprintln!("device: {}, {threads} threads", placement.name());
    }
    let result = compare(args, &rooms, &placement, &mut *collective).and_then(|report| {
        if main {
            print!("{}", verdict::render(&report));
        }
        agree(&mut *collective, verdict::verdict(&report.findings))
    });
    match &result {
        Err(_) => collective.break_off(),
        Ok(()) if main => println!("all comparisons are within their tolerances"),
        Ok(()) => {}
    }
    result
}

/// All that was asked for.
fn compare(
    args: &Args,
    rooms: &[Room],
    placement: &Placement,
    collective: &mut dyn Collective,
) -> Result<Report> {
    let main = collective.rank() == 0;
    let say = |what: &str| {
        if main {
            eprintln!("checking {what}");
        }
    };
    let findings = rooms::check(placement, rooms, args.quick, say);
    let mut report = Report { findings, remarks: Vec::new() };
    if args.filter.is_some() {
        return Ok(report);
    }
    report.findings.extend(layers::check(placement, say));
    say("training steps");
    let steps = steps::check(placement, if args.quick { 5 } else { 20 });
    let (findings, remarks) = agree(collective, steps)?;
    report.findings.extend(findings);
    report.remarks.extend(remarks);
    match collective.world() {
        1 => report.remarks.push("one rank: collectives not checked".into()),
        world => {
            say(&format!("sums over {world} ranks"));
            report.findings.extend(ranks::check(placement, collective)?);
        }
    }
    Ok(report)
}
