//! The kernels as plain C++ for this machine (feature `host-kernels`): every `op.cu`, and the runtime
//! under which they run, `common/host_run`.

use std::path::Path;

use crate::sources;

const RUNTIME: &str = "common/host_run";

/// Compiles one library of all kernels, with a C entry for each, and one of the runtime.
pub fn build() {
    println!("cargo::rerun-if-changed={RUNTIME}");
    let mut kernels = sources::kernels(Path::new("."));
    // What the runtime's own tests run.
    kernels.push(Path::new(RUNTIME).join("faults.cu"));
    compiler()
        // Each access to memory becomes a call of racecheck.cpp. It must not be linked: what would
        // be linked is ours.
        .flag("-fsanitize=thread")
        .flag("-xc++")
        .files(&kernels)
        .compile("allreel_host_kernels");
    compiler()
        .files(["run.cpp", "racecheck.cpp"].map(|file| Path::new(RUNTIME).join(file)))
        .compile("allreel_host_run");
}

fn compiler() -> cc::Build {
    let mut compiler = cc::Build::new();
    compiler
        .cpp(true)
        .std("c++17")
        .opt_level(2)
        // Kernels reinterpret shared memory, which nvcc allows.
        .flag("-fno-strict-aliasing")
        // No contraction: what the host computes does not depend on its instruction set.
        .flag("-ffp-contract=off")
        .flag("-Wno-unknown-pragmas")
        .warnings_into_errors(true);
    compiler
}
