//! The IMDB reviews of Maas et al. (2011): fetched, checked, unpacked as the tree that
//! `data.train` reads.

use std::{
    fs::{self, File, TryLockError},
    io::BufReader,
    path::{Path, PathBuf},
};

use flate2::bufread::GzDecoder;

use crate::{
    Error, Result,
    hub::{
        download::{Checksum, Download},
        http::{Failure, Http},
    },
};

/// The authors' page has it.
const URL: &str = "https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz";
const MD5: &str = "7c2ac02c03563afcf9b574c7e56c153a";
/// The folder in the archive.
const TOP: &str = "aclImdb";
/// Where it goes.
const PLACE: &str = "data/aclImdb";

/// Fetches and unpacks, unless it is there.
///
/// # Errors
/// `Data` if the archive is not the one expected, `Device` if the network or the disk fails.
pub(super) fn run(out: Option<&Path>, url: Option<&str>, md5: Option<&str>) -> Result<()> {
    let out = out.unwrap_or(Path::new(PLACE));
    if !is_there(out)? {
        let variable = std::env::var("ALLREEL_IMDB_URL").ok().filter(|url| !url.is_empty());
        let url = url.map(str::to_owned).or(variable).unwrap_or_else(|| URL.into());
        let checksum = Checksum::Md5(md5.map_or_else(|| MD5.into(), str::to_ascii_lowercase));
        fetch(out, &url, checksum)?;
    } else {
        println!("{} is there already", out.display());
    }
    let place = |part: &str| out.join(part).display().to_string();
    let (train, test) = (place("train"), place("test"));
    println!("\n[data]\ntrain = {train:?}\ntest = {test:?}");
    Ok(())
}

/// Whether `out` holds the reviews.
fn is_there(out: &Path) -> Result<bool> {
    if is_tree(out) {
        return Ok(true);
    }
    if out.exists() {
        return Err(Error::User(format!(
            "{} exists and does not hold the reviews (train/pos, train/neg, test/pos, test/neg); \
             remove it, or choose another --out",
            out.display()
        )));
    }
    Ok(false)
}

fn is_tree(dir: &Path) -> bool {
    ["train/pos", "train/neg", "test/pos", "test/neg"].iter().all(|part| dir.join(part).is_dir())
}

fn fetch(out: &Path, url: &str, checksum: Checksum) -> Result<()> {
    let folder = match out.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    fs::create_dir_all(folder).map_err(|e| Error::writing(folder, e))?;
    let _lock = lock(&beside(out, "lock"))?;
    // Another process may have done it meanwhile.
    if is_tree(out) {
        return Ok(());
    }
    let archive = beside(out, "tar.gz.incomplete");
    let http = Http::new(url, None)?;
    let download = Download {
        http: &http,
        url,
        name: "the IMDB reviews",
        size: None,
        checksum: Some(checksum),
    };
    download.fetch(&archive).map_err(Failure::into_error)?;
    let unpacking = beside(out, "unpacking");
    clear(&unpacking)?;
    unpack(&archive, &unpacking)?;
    let tree = unpacking.join(TOP);
    if !is_tree(&tree) {
        clear(&unpacking)?;
        return Err(Error::Data(format!(
            "{url} holds no {TOP}/train/pos, train/neg, test/pos and test/neg; use another --url"
        )));
    }
    fs::rename(&tree, out).map_err(|e| Error::writing(out, e))?;
    clear(&unpacking)?;
    fs::remove_file(&archive).map_err(|e| Error::writing(&archive, e))?;
    println!("the IMDB reviews are in {}", out.display());
    Ok(())
}

/// `.NAME.ENDING` beside `out`: on the same disk, for a rename.
fn beside(out: &Path, ending: &str) -> PathBuf {
    let name = out.file_name().unwrap_or(TOP.as_ref()).to_string_lossy();
    out.with_file_name(format!(".{name}.{ending}"))
}

/// Keeps a second process off until it is dropped.
fn lock(path: &Path) -> Result<File> {
    let file = File::create(path).map_err(|e| Error::writing(path, e))?;
    if matches!(file.try_lock(), Err(TryLockError::WouldBlock)) {
        eprintln!("waiting for another process, which is fetching the reviews");
        // A file system without locks is no reason not to fetch.
        let _ = file.lock();
    }
    Ok(file)
}

/// Removes what a killed process has left.
fn clear(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::writing(dir, error))
        }
        _ => Ok(()),
    }
}

fn unpack(archive: &Path, into: &Path) -> Result<()> {
    eprintln!("unpacking into {}", into.display());
    let file = File::open(archive).map_err(|e| Error::reading(archive, e))?;
    let mut tar = tar::Archive::new(GzDecoder::new(BufReader::new(file)));
    tar.set_preserve_mtime(false);
    tar.unpack(into).map_err(|e| match e.kind() {
        std::io::ErrorKind::InvalidData
        | std::io::ErrorKind::InvalidInput
        | std::io::ErrorKind::UnexpectedEof => {
            Error::Data(format!("{} is no .tar.gz ({e}); give another --url", archive.display()))
        }
        _ => Error::writing(into, e),
    })
}
