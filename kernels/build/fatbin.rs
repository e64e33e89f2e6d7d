//! The kernels as CUDA device code (feature `fatbin`): compiles every room's `op.cu` and writes the
//! table that `common/fatbin.rs` includes.

use std::path::{Path, PathBuf};
use std::{env, fs};

use crate::nvcc::{Compiled, Nvcc};
use crate::resources;

/// Fails the build with one error where there is no nvcc, or where it refuses a kernel.
pub fn build() {
    // What `Nvcc::find` goes by. Not PATH: it differs from shell to shell, and nvcc seldom with it.
    for variable in ["NVCC", "CUDA_HOME", "ALLREEL_CUDA_TOOLKIT"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    if let Err(message) = embed() {
        for line in message.lines() {
            println!("cargo::error={line}");
        }
    }
}

fn embed() -> Result<(), String> {
    let kernels = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
    let nvcc = Nvcc::find(kernels.parent().expect("kernels/ lies in the repository"))
        .map_err(|message| format!("feature fatbin: {message}"))?;
    println!("cargo::rerun-if-changed={}", nvcc.path.display());
    let rooms = nvcc.compile(&kernels, &out)?;
    let entries = rooms.iter().map(entry).collect::<Result<String, String>>()?;
    let table = format!(
        "/// Every room that has device code, by name.\n\
         pub static FATBINS: &[Fatbin] = &[{entries}];\n\
         /// The CUDA release that compiled it. Its PTX needs a driver of that release or newer.\n\
         pub static RELEASE: (u32, u32) = {:?};\n",
        nvcc.release
    );
    write(&out.join("fatbins.rs"), &table)
}

/// A room's `Fatbin`, as Rust.
fn entry(room: &Compiled) -> Result<String, String> {
    let resources =
        resources::parse(&room.log).map_err(|error| format!("{}: {error}", room.room))?;
    let mut names: Vec<String> = resources.into_iter().map(|kernel| kernel.kernel).collect();
    names.sort();
    names.dedup(); // one of each architecture
    Ok(format!(
        "Fatbin {{ room: {:?}, kernels: &{names:?}, image: include_bytes!({:?}) }},",
        room.room, room.fatbin
    ))
}

fn write(path: &Path, text: &str) -> Result<(), String> {
    fs::write(path, text).map_err(|error| format!("cannot write {}: {error}", path.display()))
}
