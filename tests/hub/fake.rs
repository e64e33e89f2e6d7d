//! A Hub with one model: the listing, small files from itself, large ones by a redirect to a store
//! at another address, as the real one does it.

use std::{
    fs,
    path::Path,
    sync::{Arc, Mutex},
};

use sha1::Sha1;
use sha2::{Digest, Sha256};

use super::server::{Reply, Request, Server};

/// The commit that `main` is at.
pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
/// The only model.
pub const REPO: &str = "test/tiny";

/// What goes wrong, each thing so many times.
#[derive(Default)]
pub struct Faults {
    /// The store closes the connection half-way through what is left.
    pub drops: usize,
    /// The store sends another byte in the middle.
    pub damages: usize,
    /// The Hub answers with this instead, with this `X-Error-Code`.
    pub status: Option<(u16, &'static str)>,
    /// The Hub answers 503.
    pub busy: usize,
}

/// One file of the model.
#[derive(Clone)]
struct File {
    name: String,
    bytes: Vec<u8>,
    /// Its SHA-256, for one in the store.
    large: Option<String>,
}

pub struct FakeHub {
    pub hub: Server,
    pub store: Server,
    pub faults: Arc<Mutex<Faults>>,
}

pub fn hex(digest: impl IntoIterator<Item = u8>) -> String {
    digest.into_iter().map(|byte| format!("{byte:02x}")).collect()
}

impl FakeHub {
    /// A Hub whose model has the files of `dir`; weights are in the store.
    pub fn of(dir: &Path) -> Self {
        let entries = fs::read_dir(dir).expect("a directory");
        let file = |entry: std::io::Result<fs::DirEntry>| {
            let path = entry.expect("an entry").path();
            let name = path.file_name().expect("a name").to_string_lossy().into_owned();
            let bytes = fs::read(&path).expect("a file");
            let is_large = name.ends_with(".safetensors") || name.ends_with(".bin");
            let large = is_large.then(|| hex(Sha256::digest(&bytes)));
            File { name, bytes, large }
        };
        let files: Vec<File> = entries.map(file).collect();
        let faults = Arc::<Mutex<Faults>>::default();
        let store = {
            let (files, faults) = (files.clone(), faults.clone());
            Server::start(move |request| from_store(&files, &faults, request))
        };
        let (address, own) = (store.url.clone(), faults.clone());
        let hub = Server::start(move |request| from_hub(&files, &own, &address, request));
        Self { hub, store, faults }
    }

    pub fn fail(&self, faults: Faults) {
        *self.faults.lock().expect("no panic") = faults;
    }
}

fn from_hub(files: &[File], faults: &Mutex<Faults>, store: &str, request: &Request) -> Reply {
    let mut faults = faults.lock().expect("no panic");
    if let Some((status, name)) = faults.status {
        return Reply::status(status).header("X-Error-Code", name);
    }
    if faults.busy > 0 {
        faults.busy -= 1;
        return Reply::status(503);
    }
    let listings = ["main", COMMIT].map(|r| format!("/api/models/{REPO}/revision/{r}"));
    if listings.contains(&request.path) {
        let names = files.iter().map(|file| serde_json::json!({"rfilename": file.name}));
        let siblings: Vec<_> =
            names.chain([serde_json::json!({"rfilename": "README.md"})]).collect();
        let mut reply = Reply::status(200).header("Content-Type", "application/json");
        reply.body = serde_json::json!({"id": REPO, "sha": COMMIT, "siblings": siblings})
            .to_string()
            .into_bytes();
        return reply;
    }
    // As for a model that was renamed.
    if let Some(rest) = request.path.strip_prefix(&format!("/{REPO}/resolve/")) {
        return Reply::status(307).header("Location", format!("/renamed/tiny/resolve/{rest}"));
    }
    let name = request.path.strip_prefix(&format!("/renamed/tiny/resolve/{COMMIT}/"));
    let Some(file) = files.iter().find(|file| Some(file.name.as_str()) == name) else {
        return Reply::status(404).header("X-Error-Code", "RepoNotFound");
    };
    match &file.large {
        Some(sha256) => Reply::status(302)
            .header("Location", format!("{store}/{sha256}?signature=x"))
            .header("X-Linked-Etag", format!("\"{sha256}\""))
            .header("X-Linked-Size", file.bytes.len())
            .header("ETag", "\"not this\"")
            .header("X-Repo-Commit", COMMIT),
        None => {
            let git = Sha1::new_with_prefix(format!("blob {}\0", file.bytes.len()));
            Reply::file(&file.bytes, request)
                .header("ETag", format!("W/\"{}\"", hex(git.chain_update(&file.bytes).finalize())))
                .header("X-Repo-Commit", COMMIT)
        }
    }
}

fn from_store(files: &[File], faults: &Mutex<Faults>, request: &Request) -> Reply {
    let sha256 = request.path.strip_prefix('/').and_then(|path| path.strip_suffix("?signature=x"));
    let Some(file) =
        files.iter().find(|file| file.large.is_some() && file.large.as_deref() == sha256)
    else {
        return Reply::status(403);
    };
    let mut faults = faults.lock().expect("no panic");
    let mut bytes = file.bytes.clone();
    if faults.damages > 0 {
        faults.damages -= 1;
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
    }
    let mut reply = Reply::file(&bytes, request);
    if faults.drops > 0 {
        faults.drops -= 1;
        reply.cut = Some(reply.body.len() / 2);
    }
    reply
}
