//! Which device code there is: `op.cu` of every room, and the headers that they share.

use std::path::{Path, PathBuf};

/// `op.cu` of every room below `kernels`, sorted.
pub fn kernels(kernels: &Path) -> Vec<PathBuf> {
    rooms(kernels).iter().map(|room| room.join("op.cu")).filter(|file| file.exists()).collect()
}

/// Every `.cuh` of a room, sorted. Any kernel may include any of them.
pub fn headers(kernels: &Path) -> Vec<PathBuf> {
    let files = rooms(kernels).into_iter().flat_map(|room| entries(&room));
    files.filter(|path| path.extension().is_some_and(|extension| extension == "cuh")).collect()
}

/// Every folder of an op, sorted.
pub fn rooms(kernels: &Path) -> Vec<PathBuf> {
    entries(kernels).into_iter().filter(|path| path.is_dir()).collect()
}

fn entries(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).expect("the package's own folders can be read");
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.expect("as above").path()).collect();
    paths.sort();
    paths
}
