//! The `allreel` binary: allocator, command line, exit code.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    allreel_kernels::threads::keep_pages();
    ExitCode::from(allreel::command::Cli::parse().run())
}
