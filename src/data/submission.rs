//! Kaggle submission files: `id,sentiment`, one line a review.

use std::path::Path;

use crate::atomic::write_atomic;
use crate::{Error, Result};

/// Writes predictions in the given order, whole or not at all; the directory must exist. Ids are quoted only where CSV
/// itself needs it, so Kaggle's own come out as they stand in its test file.
pub fn write(path: &Path, predictions: &[(&str, u32)]) -> Result<()> {
    let bug = |e: &dyn std::fmt::Display| Error::Bug(format!("CSV in memory: {e}"));
    let mut writer = csv::Writer::from_writer(Vec::new());
    writer.write_record(["id", "sentiment"]).map_err(|e| bug(&e))?;
    for (id, label) in predictions {
        writer.write_record([*id, label.to_string().as_str()]).map_err(|e| bug(&e))?;
    }
    write_atomic(path, &writer.into_inner().map_err(|e| bug(&e))?)
}

#[cfg(test)]
mod tests {
    #[test]
    fn ids_are_quoted_only_when_csv_needs_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("submission.csv");
        super::write(&path, &[("12311_10", 1), ("a,b", 0), ("say \"x\"", 1)]).unwrap();
        assert_eq!(
            std::fs::read_to_string(path).unwrap(),
            "id,sentiment\n12311_10,1\n\"a,b\",0\n\"say \"\"x\"\"\",1\n"
        );
    }
}
