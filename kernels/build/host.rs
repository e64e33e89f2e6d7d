//! The kernels as plain C++ for this machine (feature `host-kernels`): every `op.cu`, and the runtime
//! under which they run, `common/host_run`.

use std::path::{Path, PathBuf};

const RUNTIME: &str = "common/host_run";

/// Compiles one library of all kernels, with a C entry for each, and one of the runtime.
pub fn build() {
    let mut kernels: Vec<PathBuf> =
        rooms().iter().map(|room| room.join("op.cu")).filter(|file| file.exists()).collect();
    // What the runtime's own tests run.
    kernels.push(Path::new(RUNTIME).join("faults.cu"));
    watched().iter().chain(&kernels).for_each(|file| {
        println!("cargo::rerun-if-changed={}", file.display());
    });
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

/// What the libraries depend on besides the kernels: headers, the runtime, and for a room that has no
/// kernel yet its `mod.rs`, which changes when one comes.
fn watched() -> Vec<PathBuf> {
    let headers = rooms().into_iter().flat_map(|room| entries(&room));
    let headers = headers.filter(|path| path.extension().is_some_and(|e| e == "cuh"));
    let bare = rooms().into_iter().filter(|room| !room.join("op.cu").exists());
    let bare = bare.map(|room| room.join("mod.rs")).filter(|file| file.exists());
    headers.chain(bare).chain([PathBuf::from("lib.rs"), PathBuf::from(RUNTIME)]).collect()
}

/// The folders of the package, sorted.
fn rooms() -> Vec<PathBuf> {
    let mut rooms: Vec<PathBuf> =
        entries(Path::new(".")).into_iter().filter(|path| path.is_dir()).collect();
    rooms.sort();
    rooms
}

fn entries(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).expect("the package's own folders can be read");
    entries.map(|entry| entry.expect("as above").path()).collect()
}
