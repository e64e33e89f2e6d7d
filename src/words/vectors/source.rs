//! The bytes of a file of vectors: unpacked, and in which format they are.

use std::{
    fs::File,
    io::{BufRead, BufReader, Read},
    path::{Path, PathBuf},
};

use flate2::read::MultiGzDecoder;
use zip::ZipArchive;

use super::Vectors;
use crate::{Error, Result};

/// How vectors are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    Text,
    Binary,
    Pickle,
}

impl Format {
    fn of(name: &str) -> Self {
        match Path::new(name).extension().and_then(|extension| extension.to_str()) {
            Some("bin") => Self::Binary,
            Some("pickle" | "pickle2" | "pickle3" | "pkl") => Self::Pickle,
            _ => Self::Text,
        }
    }
}

/// A file while it is read.
pub(super) struct Source<'a> {
    /// What errors call it.
    name: String,
    pub(super) format: Format,
    pub(super) bytes: &'a mut dyn BufRead,
}

impl Source<'_> {
    /// The error about a part of it, such as `line 3`.
    pub(super) fn wrong(&self, place: impl std::fmt::Display, problem: &str) -> Error {
        Error::Data(format!("{}, {place}: {problem}", self.name))
    }

    /// The error about all of it.
    pub(super) fn damaged(&self, problem: impl std::fmt::Display) -> Error {
        Error::Data(format!("{}: {problem}; fetch or make the file again", self.name))
    }
}

/// Opens `path`, unpacks it, and has `read` read it.
pub(super) fn open(
    path: &Path,
    read: impl FnOnce(&mut Source<'_>) -> Result<Vectors>,
) -> Result<Vectors> {
    let (path, member) = split_member(path);
    let file = File::open(&path).map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => {
            Error::Data(format!("{} does not exist; check the path", path.display()))
        }
        _ => Error::reading(&path, e),
    })?;
    if path.is_dir() {
        let shown = path.display();
        return Err(Error::Data(format!("{shown} is a directory; name a file of vectors")));
    }
    let shown = path.display().to_string();
    let name = shown.to_ascii_lowercase();
    if name.ends_with(".zip") {
        return unzipped(&shown, file, member.as_deref(), read);
    }
    let read_as = |name: &str, bytes: Box<dyn Read>| {
        let mut bytes = BufReader::with_capacity(1 << 20, bytes);
        read(&mut Source { name: shown.clone(), format: Format::of(name), bytes: &mut bytes })
    };
    match name.strip_suffix(".gz") {
        Some(inner) => read_as(inner, Box::new(MultiGzDecoder::new(BufReader::new(file)))),
        None => read_as(&name, Box::new(file)),
    }
}

/// The file, and what of the archive that it is stands behind a `#`.
fn split_member(path: &Path) -> (PathBuf, Option<String>) {
    let text = path.to_string_lossy();
    match text.to_ascii_lowercase().find(".zip#") {
        Some(at) => (text[..at + 4].into(), Some(text[at + 5..].to_owned())),
        None => (path.to_owned(), None),
    }
}

fn unzipped(
    shown: &str,
    file: File,
    member: Option<&str>,
    read: impl FnOnce(&mut Source<'_>) -> Result<Vectors>,
) -> Result<Vectors> {
    let damaged = |e: zip::result::ZipError| {
        Error::Data(format!("{shown}: broken zip archive ({e}); fetch it again"))
    };
    let mut archive = ZipArchive::new(BufReader::new(file)).map_err(damaged)?;
    let mut names: Vec<String> = archive
        .file_names()
        .map(|name| Ok(name?.into_owned()))
        .collect::<Result<_, _>>()
        .map_err(damaged)?;
    names.retain(|name| !name.ends_with('/'));
    let chosen = match member {
        Some(member) => names.iter().find(|name| *name == member),
        None => names.first().filter(|_| names.len() == 1),
    };
    let Some(chosen) = chosen else {
        let listed = names.join(", ");
        let problem = match member {
            Some(member) => format!("it holds no {member}"),
            None => format!("it holds {} files", names.len()),
        };
        return Err(Error::Data(format!(
            "{shown}: {problem}; name one of them behind a #, as in {shown}#{} (there are: {listed})",
            names.first().map_or("vectors.txt", String::as_str)
        )));
    };
    let format = Format::of(&chosen.to_ascii_lowercase());
    let mut bytes = BufReader::with_capacity(1 << 20, archive.by_name(chosen).map_err(damaged)?);
    read(&mut Source { name: format!("{shown}#{chosen}"), format, bytes: &mut bytes })
}
