//! Builds the device code of `kernels/*/op.cu`, for whom a feature asks for it; without one it does
//! nothing.

#[cfg(feature = "cuda")]
mod cuda;
#[cfg(feature = "host-kernels")]
mod host;
#[cfg(feature = "cuda")]
mod nvcc;
#[cfg(feature = "cuda")]
mod resources;
#[cfg(any(feature = "cuda", feature = "host-kernels"))]
mod sources;

fn main() {
    println!("cargo::rerun-if-changed=build");
    #[cfg(any(feature = "cuda", feature = "host-kernels"))]
    watch(std::path::Path::new("."));
    #[cfg(feature = "cuda")]
    cuda::build();
    #[cfg(feature = "host-kernels")]
    host::build();
}

/// Has cargo run this again when device code changes. For a room that has none yet that is its
/// `mod.rs`, which changes when some comes.
#[cfg(any(feature = "cuda", feature = "host-kernels"))]
fn watch(kernels: &std::path::Path) {
    let bare = sources::rooms(kernels).into_iter().filter(|room| !room.join("op.cu").exists());
    let bare = bare.map(|room| room.join("mod.rs")).filter(|file| file.exists());
    let device = sources::kernels(kernels).into_iter().chain(sources::headers(kernels));
    for file in device.chain(bare).chain([kernels.join("lib.rs")]) {
        println!("cargo::rerun-if-changed={}", file.display());
    }
}
