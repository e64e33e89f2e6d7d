//! `metrics.jsonl`: one JSON object per line for every optimizer step, evaluation and epoch.
//!
//! Lines are only ever appended, each handed to the system at once, so that a killed run has all
//! but at most a torn last line; [`Metrics::resume`] takes that away.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use super::Record;
use crate::atomic::write_atomic;
use crate::{Error, Result};

/// The file's name in the run's directory.
const NAME: &str = "metrics.jsonl";

/// The metrics file of a run, open for more lines.
#[derive(Debug)]
pub struct Metrics {
    path: PathBuf,
    file: File,
}

impl Metrics {
    /// An empty file in the run's directory `dir`, in place of any there.
    ///
    /// # Errors
    /// [`Error::Device`] if it cannot be written.
    pub fn create(dir: &Path) -> Result<Self> {
        let path = dir.join(NAME);
        let file = File::create(&path).map_err(|error| Error::writing(&path, error))?;
        Ok(Self { path, file })
    }

    /// The file as it was after optimizer step `step`: later lines belong to steps that are about
    /// to be made again.
    ///
    /// # Errors
    /// [`Error::Data`] naming a line that is no record, [`Error::Device`] if the file cannot be
    /// written.
    pub fn resume(dir: &Path, step: usize) -> Result<Self> {
        let path = dir.join(NAME);
        let mut kept = String::new();
        for (line, record) in lines(&path)? {
            if record.step() <= step {
                kept.push_str(&line);
                kept.push('\n');
            }
        }
        write_atomic(&path, kept.as_bytes())?;
        let file = OpenOptions::new()
            .append(true)
            .open(&path)
            .map_err(|error| Error::writing(&path, error))?;
        Ok(Self { path, file })
    }

    /// All records in the run's directory `dir`, such as the epochs before a resume.
    ///
    /// # Errors
    /// [`Error::Data`] if the file cannot be read, naming a line that is no record.
    pub fn read(dir: &Path) -> Result<Vec<Record>> {
        Ok(lines(&dir.join(NAME))?.into_iter().map(|(_, record)| record).collect())
    }

    /// Appends one line.
    ///
    /// # Errors
    /// [`Error::Device`] if it cannot be written, such as on a full disk.
    pub fn write(&mut self, record: impl Into<Record>) -> Result<()> {
        let mut line = serde_json::to_vec(&record.into())
            .map_err(|error| Error::Bug(format!("metrics: {error}")))?;
        line.push(b'\n');
        // One call for the whole line: the file is unbuffered, so nothing waits to be flushed.
        self.file.write_all(&line).map_err(|error| Error::writing(&self.path, error))
    }
}

/// Every whole line of the file with its record; no file has none.
fn lines(path: &Path) -> Result<Vec<(String, Record)>> {
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Error::reading(path, error)),
    };
    // What follows the last line end was torn by a kill, maybe within a character.
    let whole = bytes.iter().rposition(|&byte| byte == b'\n').map_or(0, |end| end + 1);
    let text = String::from_utf8_lossy(&bytes[..whole]);
    let records = text.lines().enumerate().map(|(number, line)| {
        let record = serde_json::from_str(line).map_err(|error| {
            Error::Data(format!(
                "{}:{}: not a record: {error}; remove the line to go on without it",
                path.display(),
                number + 1
            ))
        })?;
        Ok((line.to_owned(), record))
    });
    records.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{EpochRecord, EvalRecord, StepRecord};

    fn step(step: usize) -> StepRecord {
        StepRecord {
            step,
            epoch: 1,
            loss: 0.1 + 0.2,
            learning_rate: 2e-5,
            grad_norm: 1.5,
            samples: 16,
            tokens: 4096,
            seconds: 0.25,
        }
    }

    fn eval(step: usize) -> EvalRecord {
        EvalRecord { step, epoch: 1, val_accuracy: 0.75, val_loss: 0.5, seconds: 1.0 }
    }

    fn epoch(step: usize) -> EpochRecord {
        EpochRecord {
            step,
            epoch: 1,
            train_accuracy: 0.5,
            train_loss: f64::INFINITY,
            val_accuracy: 0.5,
            val_loss: f64::NEG_INFINITY,
            learning_rate: 0.0,
            samples_per_second: 8.0,
            tokens_per_second: 2000.0,
            seconds: 9.0,
        }
    }

    fn text(dir: &Path) -> String {
        std::fs::read_to_string(dir.join(NAME)).unwrap()
    }

    #[test]
    fn every_record_is_one_object_on_one_line_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let mut metrics = Metrics::create(dir.path()).unwrap();
        metrics.write(step(1)).unwrap();
        assert_eq!(
            text(dir.path()),
            "{\"event\":\"step\",\"step\":1,\"epoch\":1,\"loss\":0.30000000000000004,\
             \"learning_rate\":0.00002,\"grad_norm\":1.5,\"samples\":16,\"tokens\":4096,\
             \"seconds\":0.25}\n"
        );
        metrics.write(eval(1)).unwrap();
        metrics.write(epoch(2)).unwrap();
        let lines = text(dir.path());
        let events: Vec<serde_json::Value> =
            lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(events[1]["event"], "eval");
        assert_eq!(events[2]["event"], "epoch");
        let read = Metrics::read(dir.path()).unwrap();
        assert_eq!(read, [step(1).into(), eval(1).into(), epoch(2).into()]);
    }

    #[test]
    fn numbers_that_json_lacks_are_written_as_words() {
        let dir = tempfile::tempdir().unwrap();
        let mut metrics = Metrics::create(dir.path()).unwrap();
        metrics.write(StepRecord { loss: f64::NAN, ..step(1) }).unwrap();
        metrics.write(epoch(1)).unwrap();
        let written = text(dir.path());
        assert!(written.contains("\"loss\":\"NaN\""), "{written}");
        assert!(written.contains("\"train_loss\":\"inf\""), "{written}");
        assert!(written.contains("\"val_loss\":\"-inf\""), "{written}");
        assert!(!written.contains("null"), "{written}");
        let Record::Step(back) = &Metrics::read(dir.path()).unwrap()[0] else {
            panic!("{written}")
        };
        assert!(back.loss.is_nan());
    }

    #[test]
    fn a_resume_keeps_the_lines_up_to_its_step_byte_for_byte() {
        let dir = tempfile::tempdir().unwrap();
        let mut metrics = Metrics::create(dir.path()).unwrap();
        for number in 1..=3 {
            metrics.write(step(number)).unwrap();
            metrics.write(eval(number)).unwrap();
        }
        let before = text(dir.path());
        let mut metrics = Metrics::resume(dir.path(), 2).unwrap();
        let kept: Vec<&str> = before.lines().take(4).collect();
        assert_eq!(text(dir.path()).lines().collect::<Vec<_>>(), kept);
        metrics.write(step(3)).unwrap();
        metrics.write(eval(3)).unwrap();
        assert_eq!(text(dir.path()), before);
    }

    #[test]
    fn a_torn_last_line_is_taken_away() {
        let dir = tempfile::tempdir().unwrap();
        Metrics::create(dir.path()).unwrap().write(step(1)).unwrap();
        let whole = text(dir.path());
        let mut torn = whole.clone().into_bytes();
        torn.extend_from_slice(b"{\"event\":\"step\",\"st\xc3");
        std::fs::write(dir.path().join(NAME), torn).unwrap();
        let mut metrics = Metrics::resume(dir.path(), usize::MAX).unwrap();
        assert_eq!(text(dir.path()), whole);
        metrics.write(step(2)).unwrap();
        assert_eq!(Metrics::read(dir.path()).unwrap(), [step(1).into(), step(2).into()]);
    }

    #[test]
    fn a_resume_without_a_file_starts_one_and_create_empties_it() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Metrics::read(dir.path()).unwrap(), []);
        Metrics::resume(dir.path(), 5).unwrap().write(step(6)).unwrap();
        assert_eq!(Metrics::read(dir.path()).unwrap(), [step(6).into()]);
        Metrics::create(dir.path()).unwrap();
        assert_eq!(text(dir.path()), "");
    }

    #[test]
    fn a_line_that_is_no_record_is_named() {
        let dir = tempfile::tempdir().unwrap();
        Metrics::create(dir.path()).unwrap().write(step(1)).unwrap();
        for bad in ["oops", "{\"event\":\"nap\",\"step\":1}", "{\"event\":\"step\",\"step\":1}"] {
            std::fs::write(dir.path().join(NAME), format!("{}{bad}\n", text(dir.path()))).unwrap();
            let error = Metrics::resume(dir.path(), 9).unwrap_err();
            assert!(matches!(error, Error::Data(_)), "{error:?}");
            assert!(error.to_string().contains("metrics.jsonl:2: not a record: "), "{error}");
            std::fs::write(dir.path().join(NAME), "").unwrap();
            Metrics::create(dir.path()).unwrap().write(step(1)).unwrap();
        }
        let wrong =
            serde_json::to_string(&Record::from(step(1))).unwrap().replace("1.5", "\"big\"");
        std::fs::write(dir.path().join(NAME), wrong + "\n").unwrap();
        let error = Metrics::read(dir.path()).unwrap_err().to_string();
        assert!(error.contains("expected a number, \"NaN\", \"inf\" or \"-inf\""), "{error}");
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn a_full_disk_is_an_error_naming_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(NAME);
        std::os::unix::fs::symlink("/dev/full", &path).unwrap();
        let error = Metrics::create(dir.path()).unwrap().write(step(1)).unwrap_err();
        assert!(matches!(error, Error::Device(_)), "{error:?}");
        assert!(error.to_string().contains(&path.display().to_string()), "{error}");
    }
}
