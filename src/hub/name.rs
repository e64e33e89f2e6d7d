//! What a model is called: `name` or `org/name`, with `@revision` for another than `main`.

use std::fmt;

/// A model of the Hub at a branch, tag or commit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelId {
    /// `name` or `org/name`.
    pub repo: String,
    /// Branch, tag, commit or `refs/pr/N`.
    pub revision: String,
}

impl ModelId {
    /// Reads `org/name@revision`; `None` if this cannot be a model of the Hub (a path with more
    /// parts, or one that begins with a dot).
    pub fn parse(text: &str) -> Option<Self> {
        let (repo, revision) = text.split_once('@').unwrap_or((text, "main"));
        let parts: Vec<&str> = repo.split('/').collect();
        let valid = parts.len() <= 2 && parts.iter().all(|part| is_part(part));
        (valid && is_revision(revision))
            .then(|| Self { repo: repo.to_owned(), revision: revision.to_owned() })
    }

    /// The same model at another revision, if that can be one.
    pub fn at(&self, revision: &str) -> Option<Self> {
        is_revision(revision)
            .then(|| Self { repo: self.repo.clone(), revision: revision.to_owned() })
    }

    /// Whether the revision is a commit, which never changes.
    pub fn is_commit(&self) -> bool {
        is_commit(&self.revision)
    }

    /// The revision as one part of a URL.
    pub fn revision_in_url(&self) -> String {
        self.revision.replace('%', "%25").replace('/', "%2F").replace('#', "%23")
    }
}

impl fmt::Display for ModelId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.revision.as_str() {
            "main" => f.write_str(&self.repo),
            revision => write!(f, "{}@{revision}", self.repo),
        }
    }
}

/// Whether `text` is a whole commit hash.
pub fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

/// The Hub's own rule for the parts of a name.
fn is_part(part: &str) -> bool {
    let edge = |c: Option<char>| c.is_some_and(|c| c != '-' && c != '.');
    part.len() <= 96
        && part.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
        && edge(part.chars().next())
        && edge(part.chars().last())
        && !part.contains("--")
        && !part.contains("..")
}

/// A revision becomes a path below `refs/`, so it must not lead out of there.
fn is_revision(revision: &str) -> bool {
    let part = |part: &str| !part.is_empty() && part != "." && part != "..";
    revision.split('/').all(part)
        && !revision.contains(|c: char| c.is_whitespace() || c.is_control() || c == '?')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_told_from_paths() {
        for (text, repo, revision) in [
            ("gpt2", "gpt2", "main"),
            ("microsoft/deberta-v3-large", "microsoft/deberta-v3-large", "main"),
            ("a/b@v1.0", "a/b", "v1.0"),
            ("a/b@refs/pr/3", "a/b", "refs/pr/3"),
        ] {
            let id = ModelId::parse(text).expect(text);
            assert_eq!((id.repo.as_str(), id.revision.as_str()), (repo, revision));
            assert_eq!(id.to_string(), text);
        }
        for path in [
            "",
            "/tmp/x",
            "./x",
            "../x",
            "a/b/c",
            "a/",
            "a--b",
            "x y",
            "~/x",
            "a/b@",
            "a@../../x",
            "a@/x",
            "a/b@x y",
        ] {
            assert_eq!(ModelId::parse(path), None, "{path}");
        }
    }

    #[test]
    fn commits_are_whole_hashes() {
        let id = ModelId::parse("a/b@0123456789abcdef0123456789abcdef01234567").expect("an id");
        assert!(id.is_commit());
        assert!(!ModelId::parse("a/b@0123456").expect("an id").is_commit());
    }

    #[test]
    fn a_revision_is_one_part_of_a_url() {
        let id = ModelId::parse("a/b@refs/pr/3").expect("an id");
        assert_eq!(id.revision_in_url(), "refs%2Fpr%2F3");
    }
}
