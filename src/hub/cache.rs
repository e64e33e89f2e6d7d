//! Where models are kept: the layout that Python's `huggingface_hub` writes and reads.
//!
//! ```text
//! CACHE/models--org--name/refs/main             the commit that the branch was at
//! CACHE/models--org--name/snapshots/COMMIT/...  names, as links into
//! CACHE/models--org--name/blobs/ETAG            contents; ETAG.incomplete while they arrive
//! CACHE/.locks/models--org--name/ETAG.lock      held while a content arrives
//! ```

use std::{
    fs::{self, File, TryLockError},
    path::{Path, PathBuf},
};

use super::{files, name};
use crate::{Error, Result, atomic::write_atomic};

/// Where the files of one commit go.
pub(super) enum Place {
    /// The cache, which other programs use too.
    Cache {
        /// `models--org--name`.
        repo: PathBuf,
        /// `.locks/models--org--name`.
        locks: PathBuf,
        /// The commit.
        commit: String,
    },
    /// A directory of the user's, which gets the files themselves.
    Folder(PathBuf),
}

impl Place {
    /// The cache's place for a commit of `repo` (`org/name`).
    pub(super) fn cache(cache: &Path, repo: &str, commit: &str) -> Self {
        let locks = cache.join(".locks").join(folder(repo));
        Self::Cache { repo: cache.join(folder(repo)), locks, commit: commit.to_owned() }
    }

    /// The directory that holds the files.
    pub(super) fn dir(&self) -> PathBuf {
        match self {
            Self::Cache { repo, commit, .. } => repo.join("snapshots").join(commit),
            Self::Folder(dir) => dir.clone(),
        }
    }

    /// Where the content called `etag` stays for good, and where it arrives.
    pub(super) fn paths(&self, name: &str, etag: &str) -> (PathBuf, PathBuf) {
        match self {
            Self::Cache { repo, .. } => {
                let blobs = repo.join("blobs");
                (blobs.join(etag), blobs.join(format!("{etag}.incomplete")))
            }
            Self::Folder(dir) => (dir.join(name), dir.join(format!(".{name}.{etag}.incomplete"))),
        }
    }

    /// Makes the directories for a file, and keeps other processes off its content until the lock
    /// is dropped.
    pub(super) fn lock(&self, name: &str, etag: &str) -> Result<File> {
        let (dirs, lock) = match self {
            Self::Cache { repo, locks, .. } => {
                (vec![repo.join("blobs"), self.dir(), locks.clone()], format!("{etag}.lock"))
            }
            Self::Folder(dir) => (vec![dir.clone()], format!(".{name}.lock")),
        };
        for dir in &dirs {
            fs::create_dir_all(dir).map_err(|e| Error::writing(dir, e))?;
        }
        let path = dirs[dirs.len() - 1].join(lock);
        let file = File::create(&path).map_err(|e| Error::writing(&path, e))?;
        if matches!(file.try_lock(), Err(TryLockError::WouldBlock)) {
            eprintln!("waiting for another process, which is fetching {name}");
            // A file system without locks is no reason not to fetch.
            let _ = file.lock();
        }
        Ok(file)
    }

    /// Gives the content `etag`, which is there, its name.
    pub(super) fn link(&self, name: &str, etag: &str) -> Result<()> {
        let Self::Cache { repo, .. } = self else {
            let lock = self.dir().join(format!(".{name}.lock"));
            // Whoever waits for it finds the file whole.
            let _ = fs::remove_file(lock);
            return Ok(());
        };
        let path = self.dir().join(name);
        if path.is_file() {
            return Ok(());
        }
        // A link to a content that somebody has removed.
        let _ = fs::remove_file(&path);
        let relative = Path::new("../../blobs").join(etag);
        std::os::unix::fs::symlink(relative, &path)
            // Without links, the snapshot gets the content itself, as Python does it.
            .or_else(|_| fs::rename(repo.join("blobs").join(etag), &path))
            .map_err(|e| Error::writing(&path, e))
    }

    /// Notes that `revision` is at this commit, now that all of it is there.
    pub(super) fn note(&self, revision: &str) -> Result<()> {
        let Self::Cache { repo, commit, .. } = self else { return Ok(()) };
        if revision == commit {
            return Ok(());
        }
        let path = repo.join("refs").join(revision);
        if fs::read_to_string(&path).is_ok_and(|noted| noted.trim() == commit) {
            return Ok(());
        }
        let dir = path.parent().unwrap_or(repo);
        fs::create_dir_all(dir).map_err(|e| Error::writing(dir, e))?;
        write_atomic(&path, commit.as_bytes())
    }
}

/// The snapshot of `repo` at `revision`, whole.
///
/// # Errors
/// What is missing, in words.
pub(super) fn snapshot(cache: &Path, repo: &str, revision: &str) -> Result<PathBuf, String> {
    let repo = cache.join(folder(repo));
    let commit = match name::is_commit(revision) {
        true => revision.to_owned(),
        false => fs::read_to_string(repo.join("refs").join(revision))
            .map(|commit| commit.trim().to_owned())
            .ok()
            .filter(|commit| name::is_commit(commit))
            .ok_or_else(|| format!("it is not in {}", cache.display()))?,
    };
    let dir = repo.join("snapshots").join(commit);
    match files::missing(&dir) {
        None => Ok(dir),
        Some(file) => Err(format!("{} lacks {file}", dir.display())),
    }
}

fn folder(repo: &str) -> String {
    format!("models--{}", repo.replace('/', "--"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

    /// What Python leaves, byte for byte.
    fn python(cache: &Path) {
        let repo = cache.join("models--a--b");
        let snapshot = repo.join("snapshots").join(COMMIT);
        for dir in [&repo.join("blobs"), &repo.join("refs"), &snapshot] {
            fs::create_dir_all(dir).expect("a directory");
        }
        fs::write(repo.join("refs/main"), COMMIT).expect("written");
        for (name, etag) in [("config.json", "1"), ("pytorch_model.bin", "2")] {
            fs::write(repo.join("blobs").join(etag), "{}").expect("written");
            let link = format!("../../blobs/{etag}");
            std::os::unix::fs::symlink(link, snapshot.join(name)).expect("a link");
        }
    }

    #[test]
    fn a_snapshot_of_pythons_is_found_by_branch_and_by_commit() {
        let cache = tempfile::tempdir().expect("a directory");
        python(cache.path());
        let found = |revision| snapshot(cache.path(), "a/b", revision);
        let dir = cache.path().join("models--a--b/snapshots").join(COMMIT);
        assert_eq!(found("main"), Ok(dir.clone()));
        assert_eq!(found(COMMIT), Ok(dir));
        assert!(found("v2").unwrap_err().contains("is not in"));
        fs::remove_file(cache.path().join("models--a--b/blobs/2")).expect("removed");
        assert!(found("main").unwrap_err().ends_with("lacks model.safetensors"));
    }

    #[test]
    fn names_are_links_to_contents_and_branches_are_noted() -> Result<()> {
        let cache = tempfile::tempdir().expect("a directory");
        let place = Place::cache(cache.path(), "a/b", COMMIT);
        for (name, etag) in [("config.json", "1"), ("model.safetensors", "2")] {
            let lock = place.lock(name, etag)?;
            fs::write(place.paths(name, etag).0, name).expect("written");
            place.link(name, etag)?;
            drop(lock);
        }
        assert!(snapshot(cache.path(), "a/b", "refs/pr/1").is_err());
        place.note("refs/pr/1")?;
        let dir = snapshot(cache.path(), "a/b", "refs/pr/1").expect("whole");
        assert_eq!(fs::read_to_string(dir.join("config.json")).expect("a file"), "config.json");
        let link = fs::read_link(dir.join("config.json")).expect("a link");
        assert_eq!(link, Path::new("../../blobs/1"));
        Ok(())
    }
}
