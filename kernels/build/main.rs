//! Builds the device code of `kernels/*/op.cu`, for whom a feature asks for it; without one it does
//! nothing.

#[cfg(feature = "fatbin")]
mod fatbin;
#[cfg(feature = "host-kernels")]
mod host;
#[cfg(feature = "fatbin")]
mod nvcc;
#[cfg(feature = "fatbin")]
mod resources;
#[cfg(any(feature = "fatbin", feature = "host-kernels"))]
mod sources;

fn main() {
    println!("cargo::rerun-if-changed=build");
    // Whether kernels of op.cu can run at all, on a device or on the host.
    println!("cargo::rustc-check-cfg=cfg(device)");
    if cfg!(any(feature = "cuda", feature = "host-kernels")) {
        println!("cargo::rustc-cfg=device");
    }
    #[cfg(any(feature = "fatbin", feature = "host-kernels"))]
    watch(std::path::Path::new("."));
    #[cfg(feature = "fatbin")]
    fatbin::build();
    #[cfg(feature = "host-kernels")]
    host::build();
}

/// Has cargo run this again when device code changes. For a room that has none yet that is its
/// `mod.rs`, which changes when some comes.
#[cfg(any(feature = "fatbin", feature = "host-kernels"))]
fn watch(kernels: &std::path::Path) {
    let bare = sources::rooms(kernels).into_iter().filter(|room| !room.join("op.cu").exists());
    let bare = bare.map(|room| room.join("mod.rs")).filter(|file| file.exists());
    let device = sources::kernels(kernels).into_iter().chain(sources::headers(kernels));
    for file in device.chain(bare).chain([kernels.join("lib.rs")]) {
        println!("cargo::rerun-if-changed={}", file.display());
    }
}
