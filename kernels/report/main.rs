//! `cargo run --release -p allreel-kernel-report`: compiles every kernel for sm_80 and sm_90 with the
//! flags of the build, tables registers, shared memory, stack and spills, and fails where a kernel
//! leaves its entry in `kernels/budget.toml` or nvcc warns. `--record` writes that file anew. Both are
//! nvcc 13.0's; another's figures are only shown.
//!
//! Needs nvcc (`launch/cuda-toolkit`), no GPU. Knows nothing of dynamic shared memory and of speed.

#[path = "../build/nvcc.rs"]
mod nvcc;
#[path = "../build/resources.rs"]
mod resources;
#[path = "../build/sources.rs"]
mod sources;

mod budget;
mod table;
#[cfg(test)]
mod test;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::{env, fs};

fn main() -> ExitCode {
    let record = match env::args().nth(1).as_deref() {
        None => false,
        Some("--record") => true,
        Some(other) => {
            eprintln!("kernel-report: no argument {other}; there is --record, or none");
            return ExitCode::from(2);
        }
    };
    match report(record) {
        Ok(faults) => {
            faults.iter().for_each(|fault| eprintln!("kernel-report: {fault}"));
            if faults.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(message) => {
            eprintln!("kernel-report: {message}");
            ExitCode::from(2)
        }
    }
}

/// Prints the table; what is wrong with what it shows.
fn report(record: bool) -> Result<Vec<String>, String> {
    let kernels = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("kernels/report");
    let repository = kernels.parent().expect("kernels/ lies in the repository");
    let cache = env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| repository.join("target"), PathBuf::from)
        .join("kernel-report");
    fs::create_dir_all(&cache)
        .map_err(|error| format!("cannot create {}: {error}", cache.display()))?;
    let nvcc = nvcc::Nvcc::find(repository)?;
    let rooms = nvcc.compile(kernels, &cache)?;
    let (mut measured, mut faults, mut bytes) = (Vec::new(), Vec::new(), 0);
    for room in &rooms {
        let resources = resources::parse(&room.log);
        measured.extend(resources.map_err(|error| format!("{}: {error}", room.room))?);
        let warnings = room.log.lines().filter(|line| line.contains("warning"));
        faults.extend(warnings.map(|line| format!("{}: {line}", room.room)));
        bytes += fs::metadata(&room.fatbin).map_or(0, |file| file.len());
    }
    println!("{}", table::resources(&measured));
    println!("{} rooms, {} KB of device code to embed", rooms.len(), bytes / 1000);
    let budget = kernels.join("budget.toml");
    if nvcc.release != budget::RELEASE {
        let ((major, minor), path) = (nvcc.release, nvcc.path.display());
        println!("{path} is nvcc {major}.{minor}: shown, but not held to the budget of 13.0");
        return Ok(Vec::new());
    }
    if record {
        budget::write(&budget, &measured)?;
    }
    faults.extend(budget::exceeded(&budget::read(&budget)?, &measured));
    Ok(faults)
}
