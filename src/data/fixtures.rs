//! Where tests find the real data, and what they do without it.

use std::path::{Path, PathBuf};

/// The folder `ALLREEL_DATA` names. Without it the caller skips, loudly; under CI it fails.
pub(super) fn real_data(test: &str) -> Option<PathBuf> {
    if let Some(root) = std::env::var_os("ALLREEL_DATA") {
        return Some(root.into());
    }
    assert!(
        std::env::var("CI").as_deref() != Ok("true"),
        "{test} needs ALLREEL_DATA, and CI must not skip it"
    );
    eprintln!("SKIPPED {test}: set ALLREEL_DATA to the folder with the real data to run it");
    None
}

/// Writes a file into `dir` and returns its path.
pub(super) fn file(dir: &tempfile::TempDir, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
    let path = dir.path().join(name);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(&path, bytes).unwrap();
    path
}

/// The message of the error that reading `path` ends in.
pub(super) fn read_error(path: &Path) -> String {
    super::read::read(path).unwrap_err().to_string()
}
