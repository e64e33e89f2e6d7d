//! One file: gone on with where it broke off, and only taken if its checksum is right.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    path::Path,
    thread,
    time::Duration,
};

use md5::Md5;
use sha1::Sha1;
use sha2::{Digest, Sha256};
use ureq::{
    Body,
    http::{Response, header},
};

use super::{
    http::{Failure, Http},
    progress::Meter,
};
use crate::{Error, Result};

/// How long to wait before asking again, when nothing has come since the last time.
const PAUSES: [Duration; 4] = [
    Duration::from_millis(250),
    Duration::from_millis(1000),
    Duration::from_millis(3000),
    Duration::from_millis(8000),
];

/// What a file must hash to, in lower-case hexadecimal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Checksum {
    /// Of the bytes.
    Sha256(String),
    /// Git's name of the content: the SHA-1 of a header and the bytes.
    Git(String),
    /// Of the bytes.
    Md5(String),
}

impl Checksum {
    /// The one that an ETag of the Hub is; `None` if it is none (another server's).
    pub(super) fn from_etag(etag: &str) -> Option<Self> {
        let hex = etag.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        match etag.len() {
            64 if hex => Some(Self::Sha256(etag.to_owned())),
            40 if hex => Some(Self::Git(etag.to_owned())),
            _ => None,
        }
    }

    /// What `path` hashes to, if that is something else.
    ///
    /// # Errors
    /// `Data` if it cannot be read.
    pub fn mismatch(&self, path: &Path) -> Result<Option<String>> {
        let read = || -> io::Result<(String, &str)> {
            Ok(match self {
                Self::Sha256(want) => (hash(Sha256::new(), path)?, want),
                Self::Md5(want) => (hash(Md5::new(), path)?, want),
                Self::Git(want) => {
                    let header = format!("blob {}\0", fs::metadata(path)?.len());
                    (hash(Sha1::new_with_prefix(header), path)?, want)
                }
            })
        };
        let (found, want) = read().map_err(|e| Error::reading(path, e))?;
        Ok((found != want).then_some(found))
    }
}

impl std::fmt::Display for Checksum {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Sha256(hex) => write!(f, "SHA-256 {hex}"),
            Self::Git(hex) => write!(f, "git hash {hex}"),
            Self::Md5(hex) => write!(f, "MD5 {hex}"),
        }
    }
}

fn hash(mut hasher: impl Digest, path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let mut buffer = vec![0; 1 << 20];
    loop {
        let read = file.read(&mut buffer)?;
        if read == 0 {
            break;
        }
        hasher.update(&buffer[..read]);
    }
    Ok(hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

/// A file to fetch.
pub struct Download<'a> {
    /// How.
    pub http: &'a Http,
    /// From where.
    pub url: &'a str,
    /// What it is called where progress is shown.
    pub name: &'a str,
    /// Its bytes, where that is known.
    pub size: Option<u64>,
    /// What it must hash to, where that is known.
    pub checksum: Option<Checksum>,
}

impl Download<'_> {
    /// Fetches what `partial` does not hold yet. It is then whole, verified and on disk, for the
    /// caller to rename; if the checksum is wrong twice, it is gone.
    ///
    /// # Errors
    /// `Status` and `Network` as the server gives them (what has arrived stays); `Local` if the disk
    /// is full or the checksum wrong.
    pub fn fetch(&self, partial: &Path) -> Result<(), Failure> {
        let mut meter = Meter::new(self.name, self.size);
        for attempt in 0.. {
            self.rest(partial, &mut meter)?;
            let Some(found) = self.wrong(partial)? else { break };
            fs::remove_file(partial).map_err(|e| Error::writing(partial, e))?;
            if attempt == 1 {
                return Err(Failure::Local(Error::Data(format!(
                    "{} arrived damaged twice: {found}; try again later, or from another mirror",
                    self.url
                ))));
            }
            meter.line(&format!("{} arrived damaged ({found}); fetching it again", self.name));
        }
        Ok(())
    }

    /// What is wrong with a whole file, if anything.
    fn wrong(&self, partial: &Path) -> Result<Option<String>> {
        let size = fs::metadata(partial).map_err(|e| Error::reading(partial, e))?.len();
        if let Some(want) = self.size.filter(|want| *want != size) {
            return Ok(Some(format!("it has {size} bytes, not {want}")));
        }
        let Some(checksum) = &self.checksum else { return Ok(None) };
        let found = checksum.mismatch(partial)?;
        Ok(found.map(|found| format!("it hashes to {found}, not {checksum}")))
    }

    /// Everything after what is there, over as many connections as it takes.
    fn rest(&self, partial: &Path, meter: &mut Meter) -> Result<(), Failure> {
        let mut pauses = PAUSES.iter();
        loop {
            let before = length(partial);
            let Err(failure) = self.stretch(partial, meter) else { return Ok(()) };
            if !failure.passes() {
                return Err(failure);
            }
            if length(partial) > before {
                pauses = PAUSES.iter();
            }
            let Some(pause) = pauses.next() else { return Err(failure) };
            thread::sleep(*pause);
        }
    }

    /// As much as one connection brings.
    fn stretch(&self, partial: &Path, meter: &mut Meter) -> Result<(), Failure> {
        let Some((response, mut done)) = self.connect(partial)? else { return Ok(()) };
        let whole = response.body().content_length().map(|rest| done + rest);
        let mut file = OpenOptions::new()
            .create(true)
            .write(true)
            .append(done > 0)
            .truncate(done == 0)
            .open(partial)
            .map_err(|e| Error::writing(partial, e))?;
        let mut body = response.into_body().into_reader();
        let mut buffer = vec![0; 256 << 10];
        loop {
            let read = body.read(&mut buffer).map_err(|e| Failure::network(self.url, e))?;
            if read == 0 {
                break;
            }
            file.write_all(&buffer[..read]).map_err(|e| Error::writing(partial, e))?;
            done += read as u64;
            meter.at(done);
        }
        file.sync_all().map_err(|e| Error::writing(partial, e))?;
        match whole {
            Some(whole) if done < whole => Err(Failure::network(self.url, "it broke off")),
            _ => Ok(()),
        }
    }

    /// Asks for what is missing: the answer, and how many bytes of `partial` it goes on from (none
    /// if the server sends everything again); `None` if nothing is missing.
    fn connect(&self, partial: &Path) -> Result<Option<(Response<Body>, u64)>, Failure> {
        let have = length(partial);
        // Longer than it should be is left to the checks, which throw it away.
        if have > 0 && self.size.is_some_and(|size| have >= size) {
            return Ok(None);
        }
        let response = self.http.get(self.url, have)?;
        match response.status().as_u16() {
            206 if starts_at(&response) == Some(have) => Ok(Some((response, have))),
            206 => {
                let _ = fs::remove_file(partial);
                Err(Failure::network(self.url, "it sent another part than was asked for"))
            }
            // Nothing lies beyond what is there: it is whole, or not this file.
            416 => Ok(None),
            _ => Ok(Some((response, 0))),
        }
    }
}

/// Bytes there; a file that is not there has none.
fn length(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |metadata| metadata.len())
}

/// The first byte of a part, from `Content-Range: bytes FIRST-LAST/ALL`.
fn starts_at(response: &Response<Body>) -> Option<u64> {
    let range = response.headers().get(header::CONTENT_RANGE)?.to_str().ok()?;
    range.strip_prefix("bytes ")?.split('-').next()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_are_those_of_the_usual_tools() -> Result<()> {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("file");
        fs::write(&path, "hello\n").expect("written");
        // sha256sum, git hash-object and md5sum of the same bytes.
        let sha256 = "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03";
        let git = "ce013625030ba8dba906f756967f9e9ca394464a";
        let md5 = "b1946ac92492d2347c6235b4d2611184";
        let right = [
            Checksum::from_etag(sha256).expect("a checksum"),
            Checksum::from_etag(git).expect("a checksum"),
            Checksum::Md5(md5.into()),
        ];
        for checksum in &right {
            assert_eq!(checksum.mismatch(&path)?, None, "{checksum}");
        }
        fs::write(&path, "hello!").expect("written");
        for checksum in right {
            assert!(checksum.mismatch(&path)?.is_some(), "{checksum}");
        }
        assert_eq!(Checksum::from_etag("5d41402abc4b2a76b9719d911017c592"), None);
        assert_eq!(Checksum::from_etag(&"X".repeat(40)), None);
        Ok(())
    }
}
