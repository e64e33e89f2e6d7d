//! What a cache must never do: return another set's contents, or damaged ones.

use super::*;
use crate::data::fixtures::file;

fn tokenizer() -> Tokenizer {
    Tokenizer::train_wordpiece(&["a good film, a bad film".to_owned()], 50).unwrap()
}

fn limit() -> Limit {
    Limit { max_length: 16, truncation: Truncation::Head }
}

fn set() -> TokenSet {
    TokenSet {
        tokens: vec![2, 5, 3, 2, 3, 2, 70_000, 9, 3],
        offsets: vec![0, 3, 5, 9],
        labels: vec![Some(1), Some(0), Some(1)],
        ids: vec!["12311_10".into(), "é".into(), String::new()],
    }
}

fn key(selection: &str) -> Key {
    let source = Source::Synthetic { count: 3, seed: 1 };
    Key::new(source, &tokenizer(), Cleaning::Html, &limit(), selection).unwrap()
}

#[test]
fn what_was_stored_is_loaded_without_building() {
    let dir = tempfile::tempdir().unwrap();
    let cache = dir.path().join("cache");
    let unlabelled = TokenSet { labels: vec![None; 3], ..set() };
    for (selection, expected) in [("all", set()), ("test", unlabelled)] {
        let built = TokenSet::load_or_build(&cache, &key(selection), || Ok(expected.clone()));
        assert_eq!(built.unwrap(), expected);
        let again = TokenSet::load_or_build(&cache, &key(selection), || panic!("cached"));
        assert_eq!(again.unwrap(), expected);
    }
    assert!(load(&cache, &key("other")).is_none());
    assert_eq!(std::fs::read_dir(&cache).unwrap().count(), 2);
}

#[test]
fn a_failed_build_stores_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let failed = || Err(Error::Data("no".into()));
    assert!(TokenSet::load_or_build(dir.path(), &key("all"), failed).is_err());
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn every_flipped_byte_and_every_cut_is_noticed_and_repaired() {
    let dir = tempfile::tempdir().unwrap();
    let key = key("all");
    TokenSet::load_or_build(dir.path(), &key, || Ok(set())).unwrap();
    let path = key.path(dir.path());
    let good = std::fs::read(&path).unwrap();
    for at in 0..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 0x01;
        std::fs::write(&path, &bad).unwrap();
        // A byte of the header may not matter; the contents must never differ.
        assert!(load(dir.path(), &key).is_none_or(|found| found == set()), "byte {at}");
        std::fs::write(&path, &good[..at]).unwrap();
        assert!(load(dir.path(), &key).is_none(), "cut at {at}");
    }
    let mut bad = good.clone();
    *bad.last_mut().unwrap() ^= 0x01;
    std::fs::write(&path, &bad).unwrap();
    assert_eq!(TokenSet::load_or_build(dir.path(), &key, || Ok(set())).unwrap(), set());
    assert_eq!(std::fs::read(&path).unwrap(), good);
}

#[test]
fn a_file_of_another_key_is_not_trusted() {
    let dir = tempfile::tempdir().unwrap();
    TokenSet::load_or_build(dir.path(), &key("all"), || Ok(set())).unwrap();
    std::fs::rename(key("all").path(dir.path()), key("test").path(dir.path())).unwrap();
    assert!(load(dir.path(), &key("test")).is_none());
}

#[test]
fn everything_that_matters_is_in_the_key() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (file(&dir, "a.csv", "text\nx\n"), file(&dir, "b.csv", "text\ny\n"));
    let copy = file(&dir, "copy.csv", "text\nx\n");
    file(&dir, "tree/pos/1.txt", "x");
    file(&dir, "tree/neg/2.txt", "y");
    let tree = dir.path().join("tree");
    let other = Tokenizer::train_wordpiece(&["another film".to_owned()], 50).unwrap();
    let (first, long) = (tokenizer(), Limit { max_length: 17, ..limit() });
    let tail = Limit { truncation: Truncation::HeadTail, ..limit() };
    let new = |source, tokenizer: &Tokenizer, cleaning, limit: &Limit, selection: &str| {
        Key::new(source, tokenizer, cleaning, limit, selection).unwrap()
    };
    let html = Cleaning::Html;
    let base = new(Source::File(&a), &first, html, &limit(), "all");
    assert_eq!(base, new(Source::File(&copy), &tokenizer(), html, &limit(), "all"));
    let tree_key = || new(Source::File(&tree), &first, html, &limit(), "all");
    let before = tree_key();
    std::fs::rename(tree.join("neg/2.txt"), tree.join("pos/2.txt")).unwrap();
    let mut keys = vec![
        base,
        before,
        tree_key(),
        new(Source::File(&b), &first, html, &limit(), "all"),
        new(Source::Synthetic { count: 3, seed: 1 }, &first, html, &limit(), "all"),
        new(Source::Synthetic { count: 3, seed: 2 }, &first, html, &limit(), "all"),
        new(Source::Synthetic { count: 4, seed: 1 }, &first, html, &limit(), "all"),
        new(Source::File(&a), &other, html, &limit(), "all"),
        new(Source::File(&a), &first, Cleaning::Words, &limit(), "all"),
        new(Source::File(&a), &first, html, &long, "all"),
        new(Source::File(&a), &first, html, &tail, "all"),
        new(Source::File(&a), &first, html, &limit(), "train"),
    ];
    let count = keys.len();
    keys.sort_by(|a, b| a.0.cmp(&b.0));
    keys.dedup();
    assert_eq!(keys.len(), count);
}
