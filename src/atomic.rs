//! Files that are there whole or not at all: a temporary name in the same directory, synced,
//! then renamed over the final one.
//!
//! A process killed in between leaves a `.NAME.RANDOM.tmp` behind, never a torn `NAME`.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

use crate::{Error, Result};

/// Writes `bytes` to `path`, so that a reader, or the machine after a power cut, sees the old
/// file or the new one. The directory must exist.
///
/// # Errors
/// [`Error::Device`] naming `path`; the old file is then intact and no temporary one is left.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    let name = path.file_name().ok_or_else(|| Error::writing(path, "it is not a file name"))?;
    // Ranks, on several nodes too, may write the same name in a shared directory at once.
    let unique: u64 = rand::random();
    let mut temporary = OsString::from(".");
    temporary.push(name);
    temporary.push(format!(".{unique:016x}.tmp"));
    let temporary = path.with_file_name(temporary);

    replace(path, &temporary, bytes).map_err(|error| {
        // Best effort: the first error is the one worth telling.
        let _ = fs::remove_file(&temporary);
        Error::writing(path, error)
    })
}

/// Whether a file of this name is what a process killed in [`write_atomic`] left behind.
pub fn is_temporary(name: &str) -> bool {
    name.starts_with('.') && name.ends_with(".tmp")
}

fn replace(path: &Path, temporary: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = File::create_new(temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(temporary, path)?;
    // The rename itself is only on disk once the directory is.
    match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => File::open(dir)?.sync_all(),
        _ => File::open(".")?.sync_all(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        let entries = fs::read_dir(dir).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[test]
    fn the_new_bytes_replace_the_old_and_nothing_else_is_left() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("weights");
        write_atomic(&path, b"a longer first version").unwrap();
        write_atomic(&path, b"second").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"second");
        assert_eq!(names(dir.path()), ["weights"]);
    }

    #[test]
    fn many_writers_of_one_file_leave_one_of_their_versions() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cache");
        std::thread::scope(|scope| {
            for writer in 0..8u8 {
                let path = &path;
                scope.spawn(move || {
                    for _ in 0..10 {
                        write_atomic(path, &[writer; 10_000]).unwrap();
                    }
                });
            }
        });
        let bytes = fs::read(&path).unwrap();
        assert_eq!(bytes, vec![bytes[0]; 10_000]);
        assert_eq!(names(dir.path()), ["cache"]);
    }

    #[test]
    fn a_failed_rename_leaves_no_temporary_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("taken");
        fs::create_dir(&path).unwrap();
        let error = write_atomic(&path, b"x").unwrap_err();
        assert!(matches!(error, Error::Device(_)), "{error:?}");
        assert!(error.to_string().contains(&path.display().to_string()), "{error}");
        assert_eq!(names(dir.path()), ["taken"]);
    }

    #[test]
    fn a_missing_directory_is_an_error_naming_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("none").join("file");
        let error = write_atomic(&path, b"x").unwrap_err().to_string();
        assert!(error.starts_with(&format!("cannot write {}: ", path.display())), "{error}");
    }
}
