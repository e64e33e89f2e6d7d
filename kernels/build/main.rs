//! Builds the device code of `kernels/*/op.cu`, for whom a feature asks for it; without one it does
//! nothing.

#[cfg(feature = "host-kernels")]
mod host;

fn main() {
    println!("cargo::rerun-if-changed=build");
    #[cfg(feature = "host-kernels")]
    host::build();
}
