//! Models of the Hugging Face Hub: `microsoft/deberta-v3-large` instead of a directory.
//!
//! | file | owns |
//! |---|---|
//! | [`name`] | `org/name@revision` |
//! | [`settings`] | what the environment says: `HF_HOME`, `HF_ENDPOINT`, `HF_TOKEN`, `HF_HUB_OFFLINE` |
//! | [`files`] | which files make a model |
//! | `cache` | where they are kept, in the layout that Python shares |
//! | [`http`] | requests; who gets to see the token |
//! | [`download`] | one file: resumed, checked |
//! | `progress` | a bar, or lines |
//! | `explain` | what went wrong, in terms of the model and what to do |
//!
//! The `hf-hub` crate is not used: 1.0 begins a broken download again from its start, checks no
//! checksum, and brings an asynchronous runtime; 0.5 has no TLS here without OpenSSL.

mod cache;
pub mod download;
mod explain;
pub mod files;
pub mod http;
pub mod name;
mod progress;
pub mod settings;

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde::Deserialize;

pub use name::ModelId;
pub use settings::Settings;

use crate::{Error, Result};
use cache::Place;
use download::{Checksum, Download};
use http::{Failure, Http};

/// What `model.path` names.
#[derive(Clone, Debug, PartialEq)]
pub enum Source {
    /// A directory on this machine.
    Directory(PathBuf),
    /// A model of the Hub.
    Hub(ModelId),
}

impl Source {
    /// A directory that exists is one, whatever its name; else the name of a model.
    ///
    /// # Errors
    /// `User` if it is neither.
    pub fn of(path: &Path) -> Result<Self> {
        if path.exists() {
            return Ok(Self::Directory(path.to_owned()));
        }
        let id = path.to_str().and_then(ModelId::parse);
        id.map(Self::Hub).ok_or_else(|| {
            Error::User(format!(
                "{} does not exist, and is no name of a model on the Hub (org/name or \
                 org/name@revision); check the path",
                path.display()
            ))
        })
    }
}

/// A model's files on this machine.
#[derive(Debug)]
pub struct Fetched {
    /// The directory that holds them.
    pub dir: PathBuf,
    /// How many had to be fetched.
    pub new: usize,
}

/// What the Hub says about a model.
#[derive(Deserialize)]
struct Listing {
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
}

/// The Hub, as this process may use it.
pub struct Hub {
    settings: Settings,
    http: Http,
}

impl Hub {
    /// The Hub that `settings` describe.
    ///
    /// # Errors
    /// As [`Http::new`].
    pub fn new(settings: Settings) -> Result<Self> {
        let http = Http::new(&settings.endpoint, settings.token.as_deref())?;
        Ok(Self { settings, http })
    }

    /// The Hub that the environment describes.
    ///
    /// # Errors
    /// As its parts.
    pub fn from_env() -> Result<Self> {
        Self::new(Settings::from_env()?)
    }

    /// The model's directory in the cache, without asking anybody.
    ///
    /// # Errors
    /// `User` if it is not there, or not whole.
    pub fn cached(&self, id: &ModelId) -> Result<PathBuf> {
        cache::snapshot(&self.settings.cache, &id.repo, &id.revision)
            .map_err(|lacks| explain::absent(id, &lacks, &self.settings))
    }

    /// The model's directory in the cache, with what was missing fetched. Without a network, or
    /// with `HF_HUB_OFFLINE`, what was fetched before.
    ///
    /// # Errors
    /// `User` if the Hub does not give it, `Device` if it cannot be reached or the disk is full,
    /// `Data` if a file arrives damaged again and again.
    pub fn fetch(&self, id: &ModelId) -> Result<Fetched> {
        if self.settings.offline {
            return Ok(Fetched { dir: self.cached(id)?, new: 0 });
        }
        let cached = cache::snapshot(&self.settings.cache, &id.repo, &id.revision);
        if let (true, Ok(dir)) = (id.is_commit(), &cached) {
            return Ok(Fetched { dir: dir.clone(), new: 0 });
        }
        let listing = match (self.list(id), cached) {
            (Ok(listing), _) => listing,
            (Err(Failure::Network { url, why }), Ok(dir)) => {
                eprintln!("cannot reach {url} ({why}); using {}", dir.display());
                return Ok(Fetched { dir, new: 0 });
            }
            (Err(Failure::Status { url, code, .. }), Ok(dir)) if http::passing(code) => {
                eprintln!("{url} answers {code}; using {}", dir.display());
                return Ok(Fetched { dir, new: 0 });
            }
            (Err(failure), _) => return Err(explain::failure(failure, id, &self.settings)),
        };
        let place = Place::cache(&self.settings.cache, &id.repo, &listing.sha);
        self.fetch_into(id, &listing, &place)
    }

    /// The text of the model's `config.json`: of the cache, or fetched alone and not kept.
    ///
    /// # Errors
    /// As [`Hub::fetch`].
    pub fn config(&self, id: &ModelId) -> Result<String> {
        let cached = self.cached(id);
        if self.settings.offline || cached.is_ok() {
            let path = cached?.join(files::CONFIG);
            return fs::read_to_string(&path).map_err(|e| Error::reading(&path, e));
        }
        let (endpoint, revision) = (&self.settings.endpoint, id.revision_in_url());
        let url = format!("{endpoint}/{}/resolve/{revision}/{}", id.repo, files::CONFIG);
        self.http.text(&url).map_err(|failure| explain::failure(failure, id, &self.settings))
    }

    /// The model's files in `dir`, without the cache.
    ///
    /// # Errors
    /// As [`Hub::fetch`].
    pub fn fetch_to(&self, id: &ModelId, dir: &Path) -> Result<Fetched> {
        if self.settings.offline {
            return Err(Error::User(format!(
                "HF_HUB_OFFLINE is set, so {id} is not fetched; unset it"
            )));
        }
        let listing = self.list(id).map_err(|e| explain::failure(e, id, &self.settings))?;
        self.fetch_into(id, &listing, &Place::Folder(dir.to_owned()))
    }

    fn list(&self, id: &ModelId) -> Result<Listing, Failure> {
        let (endpoint, revision) = (&self.settings.endpoint, id.revision_in_url());
        let url = format!("{endpoint}/api/models/{}/revision/{revision}", id.repo);
        let text = self.http.text(&url)?;
        let listing = serde_json::from_str::<Listing>(&text)
            .ok()
            // It becomes the name of a directory.
            .filter(|listing| name::is_commit(&listing.sha));
        listing.ok_or_else(|| {
            Failure::Local(Error::Data(format!(
                "{url} does not answer as the Hub does; check HF_ENDPOINT"
            )))
        })
    }

    /// Fetches what `place` lacks of the files that make a model.
    fn fetch_into(&self, id: &ModelId, listing: &Listing, place: &Place) -> Result<Fetched> {
        let listed: Vec<String> =
            listing.siblings.iter().map(|sibling| sibling.rfilename.clone()).collect();
        let mut wanted: Vec<String> = files::small(&listed).into_iter().map(Into::into).collect();
        let weights = match files::weights(&listed) {
            Some(weights) if wanted.iter().any(|name| name == files::CONFIG) => weights,
            _ => return Err(explain::no_model(id, &listed, &self.settings)),
        };
        let file = |name: &str| {
            self.file(id, &listing.sha, name, place)
                .map_err(|failure| explain::failure(failure, id, &self.settings))
        };
        let mut new = 0;
        if files::is_index(weights) {
            new += usize::from(file(weights)?);
            wanted.extend(files::shards(&place.dir().join(weights))?);
        } else {
            wanted.push(weights.to_owned());
        }
        for name in &wanted {
            new += usize::from(file(name)?);
        }
        place.note(&id.revision)?;
        Ok(Fetched { dir: place.dir(), new })
    }

    /// Fetches one file, unless it is there; returns whether it did.
    fn file(&self, id: &ModelId, commit: &str, name: &str, place: &Place) -> Result<bool, Failure> {
        let url = format!("{}/{}/resolve/{commit}/{name}", self.settings.endpoint, id.repo);
        if let (Place::Cache { .. }, true) = (place, place.dir().join(name).is_file()) {
            return Ok(false);
        }
        let head = self.http.head(&url)?;
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        let etag = head.etag.filter(|etag| etag.chars().all(plain) && !etag.starts_with('.'));
        let etag = etag.ok_or_else(|| {
            let message = "has no ETag that names its content; check HF_ENDPOINT";
            Failure::Local(Error::Data(format!("{url} {message}")))
        })?;
        let checksum = Checksum::from_etag(&etag);
        let _lock = place.lock(name, &etag)?;
        let (there, partial) = place.paths(name, &etag);
        // Another process may have fetched it just now; a user's file must be the right one.
        let fits = there.is_file()
            && match (place, &checksum) {
                (Place::Folder(_), Some(checksum)) => checksum.mismatch(&there)?.is_none(),
                _ => true,
            };
        if !fits {
            let (http, size) = (&self.http, head.size);
            Download { http, url: &url, name, size, checksum }.fetch(&partial)?;
            fs::rename(&partial, &there).map_err(|e| Error::writing(&there, e))?;
        }
        place.link(name, &etag)?;
        Ok(!fits)
    }
}
