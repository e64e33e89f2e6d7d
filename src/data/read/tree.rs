//! The aclImdb directory tree: `pos/` and `neg/`, one review a `.txt` file.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

use super::{Rows, load_text};
use crate::data::Review;
use crate::{Error, Result};

const CLASSES: [&str; 2] = ["neg", "pos"];

/// Reads `root`, or `root/train` if that is where the classes are. Both classes are sorted by
/// file name together, so that any first part of the result holds both.
pub(super) fn read(root: &Path) -> Result<Vec<Review>> {
    let folder = class_root(root)?;
    let mut files = Vec::new();
    for class in CLASSES {
        for path in text_files(&folder.join(class))? {
            let stem = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            files.push((stem, class, path));
        }
    }
    files.sort();
    let mut seen = HashSet::new();
    let collide = files.iter().any(|(stem, ..)| !seen.insert(stem.as_str()));
    let mut rows = Rows::new(root);
    for (stem, class, path) in &files {
        let id = if collide { format!("{class}_{stem}") } else { stem.clone() };
        let text = load_text(path)?;
        rows.push(1, Some(id), text.trim_end_matches('\n').to_owned(), Some(class))?;
    }
    rows.finish()
}

/// The folder that holds both classes: `root` itself or its `train/`.
fn class_root(root: &Path) -> Result<PathBuf> {
    let complete = |folder: &Path| CLASSES.iter().all(|class| folder.join(class).is_dir());
    [root.to_path_buf(), root.join("train")].into_iter().find(|f| complete(f)).ok_or_else(|| {
        Error::Data(format!(
            "{} holds no pos/ and neg/ (nor a train/ with them); name an aclImdb folder or a file",
            root.display()
        ))
    })
}

/// Every file the reader reads, in a fixed order.
pub(in crate::data) fn files(root: &Path) -> Result<Vec<PathBuf>> {
    let folder = class_root(root)?;
    let mut all = Vec::new();
    for class in CLASSES {
        all.extend(text_files(&folder.join(class))?);
    }
    all.sort();
    Ok(all)
}

fn text_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).map_err(|e| Error::reading(folder, e))? {
        let path = entry.map_err(|e| Error::reading(folder, e))?.path();
        if path.extension().is_some_and(|e| e == "txt") {
            files.push(path);
        }
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use crate::data::fixtures::{file, read_error};
    use crate::data::read::read;

    #[test]
    fn classes_become_labels_and_names_ids() {
        let dir = tempfile::tempdir().unwrap();
        file(&dir, "train/pos/1_9.txt", "good<br />");
        file(&dir, "train/pos/0_7.txt", "fine\n");
        file(&dir, "train/neg/1_2.txt", "");
        file(&dir, "train/neg/notes.md", "not a review");
        file(&dir, "train/unsup/5_0.txt", "unlabelled");
        for root in [dir.path().to_path_buf(), dir.path().join("train")] {
            let rows = read(&root).unwrap();
            let rows: Vec<_> =
                rows.iter().map(|r| (r.id.as_str(), r.text.as_str(), r.label)).collect();
            assert_eq!(
                rows,
                [("0_7", "fine", Some(1)), ("1_2", "", Some(0)), ("1_9", "good<br />", Some(1))]
            );
        }
    }

    #[test]
    fn ids_are_prefixed_only_when_they_collide() {
        let dir = tempfile::tempdir().unwrap();
        file(&dir, "pos/a.txt", "1");
        file(&dir, "neg/a.txt", "2");
        file(&dir, "neg/b.txt", "3");
        let ids: Vec<_> = read(dir.path()).unwrap().into_iter().map(|r| r.id).collect();
        assert_eq!(ids, ["neg_a", "pos_a", "neg_b"]);
    }

    #[test]
    fn incomplete_trees_and_bad_files_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        file(&dir, "pos/a.txt", "1");
        assert!(read_error(dir.path()).contains("holds no pos/ and neg/"));
        let bad = file(&dir, "neg/b.txt", b"line one\nna\xefve");
        let message = read_error(dir.path());
        assert!(message.contains("b.txt, line 2: byte 0xEF"), "{message}");
        std::fs::remove_file(bad).unwrap();
        std::fs::remove_file(dir.path().join("pos/a.txt")).unwrap();
        assert!(read_error(dir.path()).contains("holds no reviews"));
    }
}
