//! Readers: one entry point, [`read`], that finds out which format it is looking at.
//!
//! Owns decompression, UTF-8, column names, labels and the errors about them; each format's own
//! syntax is in its file. Refuses to repair: a row that does not fit is an error naming its line.

mod csv;
mod jsonl;
mod tree;
mod tsv;

use std::fs;
use std::io::Read;
use std::path::Path;

pub(super) use tree::files as tree_files;

use super::Review;
use crate::{Error, Result};

/// Names a text column may have, in order of preference.
const TEXT: [&str; 3] = ["text", "review", "sentence"];
/// Names a label column may have.
const LABEL: [&str; 2] = ["label", "sentiment"];
/// Names an id column may have.
const ID: [&str; 1] = ["id"];

/// Reads reviews from a file or an aclImdb directory.
///
/// A directory is the aclImdb tree (`pos/`, `neg/`, or a `train/` that holds them). A file is
/// Kaggle or GLUE TSV, CSV with a header, or JSONL; the extension decides, else the content. Gzip
/// is undone whatever the name. Ids come back without the quotes a format wraps them in, because
/// that is how a Kaggle submission writes them.
pub fn read(path: &Path) -> Result<Vec<Review>> {
    if path.is_dir() {
        return tree::read(path);
    }
    let text = load_text(path)?;
    let mut rows = Rows::new(path);
    match detect(path, &text)? {
        Format::Tsv => tsv::read(&text, &mut rows)?,
        Format::Csv => csv::read(&text, &mut rows)?,
        Format::Jsonl => jsonl::read(&text, &mut rows)?,
    }
    rows.finish()
}

#[derive(Debug, PartialEq, Eq)]
enum Format {
    Tsv,
    Csv,
    Jsonl,
}

fn detect(path: &Path, text: &str) -> Result<Format> {
    let name = path.to_string_lossy().to_ascii_lowercase();
    let stem = name.strip_suffix(".gz").unwrap_or(&name);
    match Path::new(stem).extension().and_then(|e| e.to_str()) {
        Some("tsv") => return Ok(Format::Tsv),
        Some("csv") => return Ok(Format::Csv),
        Some("jsonl" | "ndjson") => return Ok(Format::Jsonl),
        _ => {}
    }
    let first = text.lines().find(|line| !line.trim().is_empty()).unwrap_or_default();
    if first.trim_start().starts_with('{') {
        Ok(Format::Jsonl)
    } else if first.contains('\t') {
        Ok(Format::Tsv)
    } else if first.contains(',') {
        Ok(Format::Csv)
    } else {
        Err(Error::Data(format!(
            "{}: neither the name nor the first line tells the format; name the file .tsv, .csv \
             or .jsonl (or .gz of these)",
            path.display()
        )))
    }
}

/// The error for a file that cannot be opened.
pub(super) fn unreadable(path: &Path, error: &std::io::Error) -> Error {
    match error.kind() {
        std::io::ErrorKind::NotFound => {
            Error::Data(format!("{} does not exist; check the path", path.display()))
        }
        _ => Error::reading(path, error),
    }
}

/// The whole file as text: decompressed, checked to be UTF-8, without a byte order mark.
fn load_text(path: &Path) -> Result<String> {
    let raw = fs::read(path).map_err(|e| unreadable(path, &e))?;
    let named_gzip = path.extension().is_some_and(|e| e.eq_ignore_ascii_case("gz"));
    let bytes = if !raw.is_empty() && (named_gzip || raw.starts_with(&[0x1f, 0x8b])) {
        let mut bytes = Vec::new();
        flate2::read::MultiGzDecoder::new(raw.as_slice()).read_to_end(&mut bytes).map_err(|e| {
            Error::Data(format!(
                "{}: broken gzip ({e}) after {} bytes of text; fetch or compress the file again",
                path.display(),
                bytes.len()
            ))
        })?;
        bytes
    } else {
        raw
    };
    let text = String::from_utf8(bytes).map_err(|e| {
        let at = e.utf8_error().valid_up_to();
        let line = 1 + e.as_bytes()[..at].iter().filter(|&&b| b == b'\n').count();
        let problem = format!("byte 0x{:02X} is not valid UTF-8", e.as_bytes()[at]);
        wrong(path, line, &format!("{problem}; convert the file, e.g. iconv -f latin1 -t utf-8"))
    })?;
    Ok(match text.strip_prefix('\u{feff}') {
        Some(rest) => rest.to_owned(),
        None => text,
    })
}

/// The one shape of an error about a row.
fn wrong(path: &Path, line: usize, problem: &str) -> Error {
    Error::Data(format!("{}, line {line}: {problem}", path.display()))
}

/// Collects rows and refuses sources that are empty or only partly labelled.
struct Rows<'a> {
    path: &'a Path,
    reviews: Vec<Review>,
}

impl<'a> Rows<'a> {
    fn new(path: &'a Path) -> Self {
        Self { path, reviews: Vec::new() }
    }

    fn wrong(&self, line: usize, problem: &str) -> Error {
        wrong(self.path, line, problem)
    }

    /// `label` as it stands in the file; empty or absent means unlabelled.
    fn push(
        &mut self,
        line: usize,
        id: Option<String>,
        text: String,
        label: Option<&str>,
    ) -> Result<()> {
        let label = match label.map(|l| l.trim().to_ascii_lowercase()).as_deref() {
            None | Some("") => None,
            Some("0" | "neg" | "negative") => Some(0),
            Some("1" | "pos" | "positive") => Some(1),
            Some(other) => {
                // A swapped column would put a whole review here.
                let shown: String = other.chars().take(40).collect();
                let problem = format!("label \"{shown}\" is unknown");
                return Err(self.wrong(line, &format!("{problem}; use 0, 1, negative or positive")));
            }
        };
        if let Some(first) = self.reviews.first()
            && first.label.is_some() != label.is_some()
        {
            let this = if label.is_some() { "has a label" } else { "has no label" };
            let problem = format!("this row {this}, unlike the rows before it");
            return Err(self.wrong(line, &format!("{problem}; label every row or none")));
        }
        let id = id.unwrap_or_else(|| self.reviews.len().to_string());
        self.reviews.push(Review { id, text, label });
        Ok(())
    }

    fn finish(self) -> Result<Vec<Review>> {
        if self.reviews.is_empty() {
            return Err(Error::Data(format!(
                "{} holds no reviews; it needs at least one row (below a header, in TSV and CSV)",
                self.path.display()
            )));
        }
        Ok(self.reviews)
    }
}

/// Which column of a table is what.
struct Columns {
    names: Vec<String>,
    text: usize,
    label: Option<usize>,
    id: Option<usize>,
}

impl Columns {
    fn from_header(rows: &Rows<'_>, line: usize, names: Vec<String>) -> Result<Self> {
        let find = |known: &[&str]| {
            known.iter().find_map(|k| names.iter().position(|n| n.trim().eq_ignore_ascii_case(k)))
        };
        let (label, id) = (find(&LABEL), find(&ID));
        let Some(text) = find(&TEXT) else {
            let shown: String = names.join(", ").chars().take(80).collect();
            let problem = format!("the header ({shown}) names no text column");
            return Err(rows.wrong(
                line,
                &format!("{problem}; name the columns: text or review, label or sentiment, id"),
            ));
        };
        Ok(Self { names, text, label, id })
    }

    fn push(&self, rows: &mut Rows<'_>, line: usize, fields: &[&str]) -> Result<()> {
        if fields.len() != self.names.len() {
            let (found, wanted) = (fields.len(), self.names.len());
            let problem = format!("{found} columns where the header names {wanted}");
            let names = self.names.join(", ");
            return Err(rows.wrong(line, &format!("{problem} ({names}); complete the row")));
        }
        let id = self.id.map(|i| fields[i].to_owned());
        rows.push(line, id, fields[self.text].to_owned(), self.label.map(|i| fields[i]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::fixtures::{file, read_error};
    use std::io::Write;

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn the_format_comes_from_the_name_or_else_the_content() {
        let dir = tempfile::tempdir().unwrap();
        let expected = vec![Review { id: "0".into(), text: "fine, really".into(), label: Some(1) }];
        let tsv = b"text\tlabel\nfine, really\t1\n".as_slice();
        let csv = b"text,label\n\"fine, really\",1\n".as_slice();
        let jsonl = b"{\"text\":\"fine, really\",\"label\":1}\n".as_slice();
        for (name, bytes) in [
            ("a.tsv", tsv.to_vec()),
            ("b.CSV", csv.to_vec()),
            ("c.jsonl", jsonl.to_vec()),
            ("d.tsv.gz", gzip(tsv)),
            ("e.csv.gz", gzip(csv)),
            ("f.jsonl.gz", gzip(jsonl)),
            ("g", tsv.to_vec()),
            ("h.txt", csv.to_vec()),
            ("i.data", gzip(jsonl)),
            ("bom.csv", [b"\xef\xbb\xbf", csv].concat()),
        ] {
            assert_eq!(read(&file(&dir, name, bytes)).unwrap(), expected, "{name}");
        }
        let message = read_error(&file(&dir, "j.txt", "just some words\n"));
        assert!(message.contains("j.txt") && message.contains(".tsv, .csv"), "{message}");
    }

    #[test]
    fn missing_empty_and_header_only_files_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let message = read_error(&dir.path().join("absent.tsv"));
        assert!(message.contains("absent.tsv does not exist"), "{message}");
        for (name, bytes) in [
            ("e.tsv", ""),
            ("e.csv", ""),
            ("e.jsonl", "\n"),
            ("e.tsv.gz", ""),
            ("h.tsv", "id\tsentiment\treview\n"),
            ("h.csv", "text,label\n"),
        ] {
            let message = read_error(&file(&dir, name, bytes));
            assert!(message.contains(name) && message.contains("holds no reviews"), "{message}");
        }
    }

    #[test]
    fn broken_gzip_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let whole = gzip("text,label\n".repeat(2000).as_bytes());
        let cut = file(&dir, "cut.csv.gz", &whole[..whole.len() - 12]);
        let not_gzip = file(&dir, "not.csv.gz", "text,label\na,1\n");
        for path in [cut, not_gzip] {
            let message = read_error(&path);
            assert!(message.contains("broken gzip") && message.contains(".csv.gz"), "{message}");
        }
    }

    #[test]
    fn invalid_utf8_names_its_line_and_byte() {
        let dir = tempfile::tempdir().unwrap();
        let message = read_error(&file(&dir, "l.csv", b"text,label\nfine,1\ncaf\xe9,0\n"));
        assert!(message.contains("l.csv, line 3: byte 0xE9"), "{message}");
    }

    #[test]
    fn every_format_names_the_line_of_a_bad_label_and_of_a_mixture() {
        let dir = tempfile::tempdir().unwrap();
        for (name, head, seven, none) in [
            ("t.tsv", "text\tlabel\na\t1\n", "b\t7\n", "b\t\n"),
            ("t.csv", "text,label\na,1\n", "b,7\n", "b,\n"),
            (
                "t.jsonl",
                "\n{\"text\":\"a\",\"label\":1}\n",
                "{\"text\":\"b\",\"label\":7}\n",
                "{\"text\":\"b\"}\n",
            ),
        ] {
            let message = read_error(&file(&dir, name, [head, seven].concat()));
            assert!(message.contains("line 3: label \"7\""), "{message}");
            let message = read_error(&file(&dir, name, [head, none].concat()));
            assert!(message.contains("line 3: this row has no label"), "{message}");
        }
        let message = read_error(&file(&dir, "u.csv", "text,label\na,\nb,1\n"));
        assert!(message.contains("line 3: this row has a label"), "{message}");
    }

    #[test]
    fn an_unknown_header_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        for (name, bytes) in [("x.tsv", "great film\t1\n"), ("x.csv", "great film,1\nbad,0\n")] {
            let message = read_error(&file(&dir, name, bytes));
            assert!(message.contains("line 1: the header (great film, 1)"), "{message}");
        }
    }
}
