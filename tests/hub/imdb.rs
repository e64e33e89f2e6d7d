//! `allreel fetch imdb`, from a mirror with a small archive.

use std::{
    fs,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use allreel::data::Review;
use flate2::{Compression, write::GzEncoder};
use md5::{Digest, Md5};

use super::{
    fake::hex,
    server::{Reply, Server},
};
use crate::run::{Output, Workdir, easy};

/// The archive, as Stanford's is laid out, of easy reviews.
fn archive() -> Vec<u8> {
    let mut tar = tar::Builder::new(GzEncoder::new(Vec::new(), Compression::fast()));
    let mut add = |name: String, text: &str| {
        let mut header = tar::Header::new_gnu();
        header.set_size(text.len() as u64);
        header.set_mode(0o644);
        tar.append_data(&mut header, name, text.as_bytes()).expect("appended");
    };
    add("aclImdb/README".into(), "reviews");
    for (part, seed) in [("train", 1), ("test", 2)] {
        for Review { id, text, label } in easy(40, seed) {
            let class = ["neg", "pos"][label.expect("a label") as usize];
            add(format!("aclImdb/{part}/{class}/{id}.txt"), &text);
        }
    }
    tar.into_inner().and_then(GzEncoder::finish).expect("an archive")
}

/// A mirror that breaks off so many times, and the MD5 of what it has.
fn mirror(drops: usize) -> (Server, String) {
    let bytes = archive();
    let md5 = hex(Md5::digest(&bytes));
    let drops = Arc::new(AtomicUsize::new(drops));
    let server = Server::start(move |request| {
        if request.path != "/reviews.tar.gz" {
            return Reply::status(404);
        }
        let mut reply = Reply::file(&bytes, request);
        if drops.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1)).is_ok() {
            reply.cut = Some(reply.body.len() / 2);
        }
        reply
    });
    (server, md5)
}

fn fetch(dir: &Workdir, server: &Server, md5: &str, more: &str) -> Output {
    let url = format!("{}/reviews.tar.gz", server.url);
    dir.allreel(&format!("fetch imdb --url {url} --md5 {md5} {more}"))
}

fn names(dir: &Workdir, folder: &str) -> Vec<String> {
    let entries = fs::read_dir(dir.path(folder)).expect("a directory");
    let name = |entry: std::io::Result<fs::DirEntry>| entry.expect("an entry").file_name();
    let mut names: Vec<_> =
        entries.map(|entry| name(entry).into_string().expect("UTF-8")).collect();
    names.retain(|name| name != ".aclImdb.lock");
    names.sort();
    names
}

#[test]
fn reviews_are_fetched_unpacked_and_train_as_shown() {
    let (server, md5) = mirror(2);
    let dir = Workdir::prepared();
    let shown = fetch(&dir, &server, &md5, "").ok();
    let lines = "[data]\ntrain = \"data/aclImdb/train\"\ntest = \"data/aclImdb/test\"\n";
    assert!(shown.out.ends_with(lines), "{}", shown.out);
    assert_eq!(names(&dir, "data"), ["aclImdb"]);
    let asked = server.requests();
    assert_eq!(asked.len(), 3);
    assert!(asked[1].range > Some(0) && asked[2].range > asked[1].range, "{asked:?}");
    let args = "train first.toml --set data.train=data/aclImdb/train \
                --set data.test=data/aclImdb/test --set train.max_steps=2";
    dir.allreel(args).ok();

    let shown = fetch(&dir, &server, &md5, "").ok();
    assert!(shown.out.starts_with("data/aclImdb is there already"), "{}", shown.out);
    assert!(shown.out.ends_with(lines), "{}", shown.out);
    assert_eq!(server.requests().len(), 0);
}

#[test]
fn reviews_with_a_wrong_checksum_are_refused() {
    let (server, md5) = mirror(0);
    let dir = Workdir::new();
    let wrong = "0".repeat(32);
    let shown = fetch(&dir, &server, &wrong, "");
    assert_eq!(shown.code, 2, "{}", shown.err);
    for say in ["arrived damaged twice", &md5, &wrong] {
        assert!(shown.err.contains(say), "no `{say}` in {}", shown.err);
    }
    assert_eq!(names(&dir, "data"), Vec::<String>::new());
    // Without --md5 it must be Stanford's.
    let shown = dir.allreel(&format!("fetch imdb --url {}/reviews.tar.gz", server.url));
    assert_eq!(shown.code, 2, "{}", shown.err);
    assert!(shown.err.contains("7c2ac02c03563afcf9b574c7e56c153a"), "{}", shown.err);
    let shown = dir.allreel(&format!("fetch imdb --url {}/other", server.url));
    assert_eq!(shown.code, 2);
    assert!(shown.err.contains("/other answers 404 (Not Found)"), "{}", shown.err);
}

#[test]
fn reviews_go_where_they_are_told_and_replace_nothing() {
    let (server, md5) = mirror(0);
    let dir = Workdir::new();
    dir.write("mine/notes.txt", "mine");
    let shown = fetch(&dir, &server, &md5, "--out mine");
    assert_eq!(shown.code, 2);
    assert!(shown.err.contains("mine exists and does not hold the reviews"), "{}", shown.err);
    assert_eq!(dir.read("mine/notes.txt"), "mine");
    // What a killed fetch has left is in nobody's way.
    dir.write(".other.unpacking/aclImdb/train/pos/half.txt", "half");
    fetch(&dir, &server, &md5, "--out other").ok();
    assert!(!dir.path("other/train/pos/half.txt").exists());
    assert!(!dir.path(".other.unpacking").exists());
    let reviews = allreel::data::read::read(&dir.path("other/train")).expect("reviews");
    assert_eq!(reviews.len(), 40);
}
