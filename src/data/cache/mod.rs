//! Tokenised data on disk, found again by what went into it.
//!
//! One safetensors file a [`Key`]: `tokens` u32, `offsets` u64, `labels` i64 (-1 for none), `ids`
//! as UTF-8 end to end with `id_offsets` u64. Files are written whole or not at all and verified
//! on every read; one that is damaged counts as absent. Which rank builds is the caller's choice:
//! let one call [`TokenSet::load_or_build`], then, past a barrier, the others.

use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

use super::{Cleaning, Limit, TokenSet, Tokenizer, Truncation, read, synthetic};
use crate::atomic::write_atomic;
use crate::{Error, Result};

/// Changes whenever the same inputs give other contents or another layout.
const FORMAT: &str = "allreel tokens 1";
const DIGEST: &str = "blake3";

/// Where reviews come from.
#[derive(Debug, Clone, Copy)]
pub enum Source<'a> {
    /// A file or an aclImdb directory.
    File(&'a Path),
    /// The built-in generator.
    Synthetic {
        /// How many reviews.
        count: usize,
        /// Its seed.
        seed: u64,
    },
}

/// Everything that decides what a [`TokenSet`] contains, as one hash.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Key(String);

impl Key {
    /// `selection` says in any fixed words which rows of the source are meant, such as
    /// "validation 0.1 seed 7 limit 2000". Files count by their content, not by their name.
    pub fn new(
        source: Source<'_>,
        tokenizer: &Tokenizer,
        cleaning: Cleaning,
        limit: &Limit,
        selection: &str,
    ) -> Result<Self> {
        let truncation = match limit.truncation {
            Truncation::Head => "head",
            Truncation::HeadTail => "head+tail",
        };
        let mut hasher = blake3::Hasher::new();
        for part in [
            FORMAT.as_bytes(),
            &source_digest(source)?,
            &tokenizer.fingerprint(),
            cleaning.name().as_bytes(),
            truncation.as_bytes(),
            &(limit.max_length as u64).to_le_bytes(),
            selection.as_bytes(),
        ] {
            add(&mut hasher, part);
        }
        Ok(Self(hasher.finalize().to_hex().to_string()))
    }

    /// The cache file of this key.
    pub fn path(&self, cache_dir: &Path) -> PathBuf {
        cache_dir.join(format!("tokens-{}.safetensors", &self.0[..32]))
    }
}

/// Adds one part with its length, so that parts cannot run into each other.
fn add(hasher: &mut blake3::Hasher, part: &[u8]) {
    hasher.update(&(part.len() as u64).to_le_bytes()).update(part);
}

fn source_digest(source: Source<'_>) -> Result<[u8; 32]> {
    let mut hasher = blake3::Hasher::new();
    match source {
        Source::Synthetic { count, seed } => {
            add(&mut hasher, format!("synthetic {} {count} {seed}", synthetic::VERSION).as_bytes());
        }
        Source::File(root) if root.is_dir() => {
            for path in read::tree_files(root)? {
                // Folder and name are the label and the id.
                let name = path.strip_prefix(root).unwrap_or(&path);
                add(&mut hasher, name.as_os_str().as_encoded_bytes());
                add(&mut hasher, &file_digest(&path)?);
            }
        }
        Source::File(path) => {
            add(&mut hasher, &file_digest(path)?);
        }
    }
    Ok(*hasher.finalize().as_bytes())
}

fn file_digest(path: &Path) -> Result<[u8; 32]> {
    let mut hasher = blake3::Hasher::new();
    File::open(path)
        .and_then(|file| hasher.update_reader(file).map(|_| ()))
        .map_err(|e| read::unreadable(path, &e))?;
    Ok(*hasher.finalize().as_bytes())
}

impl TokenSet {
    /// The set cached under `key`, or the one `build` makes, which is then cached.
    pub fn load_or_build(
        cache_dir: &Path,
        key: &Key,
        build: impl FnOnce() -> Result<Self>,
    ) -> Result<Self> {
        if let Some(set) = load(cache_dir, key) {
            return Ok(set);
        }
        let set = build()?;
        store(cache_dir, key, &set)?;
        Ok(set)
    }
}

/// The set cached under `key`, if it is there and every byte of it is as it was written.
pub fn load(cache_dir: &Path, key: &Key) -> Option<TokenSet> {
    let bytes = std::fs::read(key.path(cache_dir)).ok()?;
    let (_, metadata) = SafeTensors::read_metadata(&bytes).ok()?;
    let columns = Columns::read(&SafeTensors::deserialize(&bytes).ok()?)?;
    let intact = metadata.metadata().as_ref()?.get(DIGEST) == Some(&columns.digest(key));
    intact.then(|| columns.into_set()).flatten()
}

fn store(cache_dir: &Path, key: &Key, set: &TokenSet) -> Result<()> {
    let columns = Columns::of(set);
    // A single entry: the file would list several in random order.
    let metadata = HashMap::from([(DIGEST.to_owned(), columns.digest(key))]);
    let bug = |e: safetensors::SafeTensorError| Error::Bug(format!("token cache: {e}"));
    let mut views = Vec::new();
    for (name, (dtype, size), bytes) in columns.parts() {
        let view = TensorView::new(dtype, vec![bytes.len() / size], bytes).map_err(bug)?;
        views.push((name, view));
    }
    let bytes = safetensors::serialize(views, Some(metadata)).map_err(bug)?;
    std::fs::create_dir_all(cache_dir).map_err(|e| Error::writing(cache_dir, e))?;
    write_atomic(&key.path(cache_dir), &bytes)
}

/// A set as the bytes on disk, little-endian.
struct Columns {
    tokens: Vec<u8>,
    offsets: Vec<u8>,
    labels: Vec<u8>,
    ids: Vec<u8>,
    id_offsets: Vec<u8>,
}

impl Columns {
    fn of(set: &TokenSet) -> Self {
        let label = |l: &Option<u32>| l.map_or(-1, i64::from).to_le_bytes();
        let ends = set.ids.iter().scan(0, |end, id| {
            *end += id.len() as u64;
            Some(*end)
        });
        Self {
            tokens: set.tokens.iter().flat_map(|t| t.to_le_bytes()).collect(),
            offsets: set.offsets.iter().flat_map(|o| o.to_le_bytes()).collect(),
            labels: set.labels.iter().flat_map(label).collect(),
            ids: set.ids.concat().into_bytes(),
            id_offsets: std::iter::once(0).chain(ends).flat_map(u64::to_le_bytes).collect(),
        }
    }

    fn parts(&self) -> [(&'static str, (Dtype, usize), &[u8]); 5] {
        [
            ("tokens", (Dtype::U32, 4), &self.tokens),
            ("offsets", (Dtype::U64, 8), &self.offsets),
            ("labels", (Dtype::I64, 8), &self.labels),
            ("ids", (Dtype::U8, 1), &self.ids),
            ("id_offsets", (Dtype::U64, 8), &self.id_offsets),
        ]
    }

    /// Over the key too, so that a renamed file is not trusted.
    fn digest(&self, key: &Key) -> String {
        let mut hasher = blake3::Hasher::new();
        add(&mut hasher, key.0.as_bytes());
        for (_, _, bytes) in self.parts() {
            add(&mut hasher, bytes);
        }
        hasher.finalize().to_hex().to_string()
    }

    fn read(file: &SafeTensors<'_>) -> Option<Self> {
        let bytes = |name| file.tensor(name).ok().map(|view| view.data().to_vec());
        Some(Self {
            tokens: bytes("tokens")?,
            offsets: bytes("offsets")?,
            labels: bytes("labels")?,
            ids: bytes("ids")?,
            id_offsets: bytes("id_offsets")?,
        })
    }

    /// `None` where the numbers do not fit together, which the digest leaves to a foreign writer.
    fn into_set(self) -> Option<TokenSet> {
        let tokens = words(&self.tokens).map(u32::from_le_bytes).collect::<Vec<_>>();
        let offsets = words(&self.offsets).map(u64::from_le_bytes).collect::<Vec<_>>();
        let labels = words(&self.labels)
            .map(|w| match i64::from_le_bytes(w) {
                -1 => Some(None),
                label => u32::try_from(label).ok().map(Some),
            })
            .collect::<Option<Vec<_>>>()?;
        let id_offsets = words(&self.id_offsets).map(u64::from_le_bytes).collect::<Vec<_>>();
        let text = String::from_utf8(self.ids).ok()?;
        let ids = id_offsets
            .windows(2)
            .map(|pair| text.get(pair[0] as usize..pair[1] as usize).map(str::to_owned))
            .collect::<Option<Vec<_>>>()?;
        let whole = offsets.len() == labels.len() + 1
            && ids.len() == labels.len()
            && offsets.is_sorted()
            && offsets.first() == Some(&0)
            && offsets.last() == Some(&(tokens.len() as u64));
        whole.then_some(TokenSet { tokens, offsets, labels, ids })
    }
}

fn words<const N: usize>(bytes: &[u8]) -> impl Iterator<Item = [u8; N]> {
    bytes.as_chunks::<N>().0.iter().copied()
}

#[cfg(test)]
mod tests;
