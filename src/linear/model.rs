//! A trained model: how it reads text, its columns and their weights; on disk, and what it says of reviews.
//!
//! ```text
//! config.json         model_type "allreel-ngram" or "allreel-majority", how text is read
//! model.safetensors   keys u64 [N], ascending; weight f32 [N], with naive Bayes' ratios; idf f64 [N], of TF-IDF;
//!                     intercept f64 [1]
//! vocabulary.txt      the n-gram of each key in a line of its own, where the model has a vocabulary: for people
//! ```
//!
//! The score of a review is `intercept + Σ value · weight`, the log-odds of its being positive. The majority's
//! model is the same without a column: always the log-odds of the labels.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{
    arrays::{Array, Arrays, write_arrays},
    bags::{Bags, Reading},
    columns::index,
    features::{Weighting, matrix},
    matrix::Matrix,
    regression::softplus,
};
use crate::{Error, Result, atomic::write_atomic};

const CONFIG: &str = "config.json";
const WEIGHTS: &str = "model.safetensors";
const VOCABULARY: &str = "vocabulary.txt";
const TYPES: [&str; 2] = ["allreel-ngram", "allreel-majority"];

/// A linear classifier of two classes.
#[derive(Debug, Clone, PartialEq)]
pub struct Model {
    /// How text becomes n-grams.
    pub reading: Reading,
    /// What an n-gram of a review counts.
    pub weighting: Weighting,
    /// The keys that are columns, ascending.
    pub keys: Vec<u64>,
    /// Of each column; empty unless the weighting is TF-IDF.
    pub idf: Vec<f64>,
    /// Of each column.
    pub weights: Vec<f32>,
    /// The log-odds of a review without any column.
    pub intercept: f64,
}

/// What scores are worth against labels.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Tally {
    /// Reviews with the right label.
    pub correct: usize,
    /// Sum of the losses `-ln p(label)`.
    pub loss: f64,
    /// Reviews.
    pub reviews: usize,
}

#[derive(Serialize, Deserialize)]
struct Description {
    model_type: String,
    num_labels: usize,
    reading: Reading,
    features: Weighting,
}

impl Model {
    /// The rows of bags that [`Reading::bags`] made, for [`Self::scores`].
    pub fn matrix(&self, bags: &Bags) -> Matrix {
        matrix(bags, &index(&self.keys), self.weighting, &self.idf)
    }

    /// The log-odds of each row.
    pub fn scores(&self, rows: &Matrix) -> Vec<f64> {
        let weights: Vec<f64> = self.weights.iter().map(|weight| f64::from(*weight)).collect();
        rows.times(&weights).into_iter().map(|score| score + self.intercept).collect()
    }

    /// Whether `dir` holds one, by its `config.json`.
    pub fn is_in(dir: &Path) -> bool {
        let text = std::fs::read(dir.join(CONFIG)).unwrap_or_default();
        serde_json::from_slice::<serde_json::Value>(&text).is_ok_and(|config| {
            config["model_type"].as_str().is_some_and(|kind| TYPES.contains(&kind))
        })
    }

    /// Writes it, with the n-grams of its columns where there are `names`.
    ///
    /// # Errors
    /// `Device` if it cannot be written.
    pub fn save(&self, dir: &Path, names: Option<&[String]>) -> Result<()> {
        let description = Description {
            model_type: TYPES[usize::from(self.keys.is_empty())].to_owned(),
            num_labels: 2,
            reading: self.reading.clone(),
            features: self.weighting,
        };
        let text =
            serde_json::to_vec_pretty(&description).map_err(|e| Error::Bug(e.to_string()))?;
        write_atomic(&dir.join(CONFIG), &text)?;
        let intercept = [self.intercept];
        let mut arrays = vec![
            ("keys", Array::of(&self.keys)),
            ("weight", Array::of(&self.weights)),
            ("intercept", Array::of(&intercept)),
        ];
        if self.weighting == Weighting::TfIdf {
            arrays.push(("idf", Array::of(&self.idf)));
        }
        write_arrays(&dir.join(WEIGHTS), &arrays)?;
        match names {
            Some(names) => {
                write_atomic(&dir.join(VOCABULARY), (names.join("\n") + "\n").as_bytes())
            }
            None => Ok(()),
        }
    }

    /// Reads one that [`Self::save`] wrote.
    ///
    /// # Errors
    /// `Data` naming the file that is missing, damaged or does not fit the others.
    pub fn load(dir: &Path) -> Result<Self> {
        let path = dir.join(CONFIG);
        let text = std::fs::read(&path).map_err(|e| Error::reading(&path, e))?;
        let description: Description =
            serde_json::from_slice(&text).map_err(|e| Error::reading(&path, e))?;
        let Description { reading, features: weighting, num_labels, .. } = description;
        let path = dir.join(WEIGHTS);
        let arrays = Arrays::read(&path)?;
        let keys = arrays.get("keys")?;
        let model = Self {
            idf: if weighting == Weighting::TfIdf { arrays.get("idf")? } else { Vec::new() },
            weights: arrays.get("weight")?,
            intercept: arrays.get("intercept")?.first().copied().unwrap_or(f64::NAN),
            reading,
            weighting,
            keys,
        };
        let columns = model.keys.len();
        let finite = model.intercept.is_finite() && model.weights.iter().all(|w| w.is_finite());
        let idf = model.idf.is_empty() || model.idf.len() == columns;
        if !finite || !idf || model.weights.len() != columns || num_labels != 2 {
            return Err(Error::Data(format!(
                "{} is not a model of {columns} n-grams and 2 labels with finite weights; train it again",
                path.display()
            )));
        }
        Ok(model)
    }
}

impl Tally {
    /// Of `scores` with `labels`.
    pub fn of(scores: &[f64], labels: &[u32]) -> Self {
        let mut tally = Self { reviews: labels.len(), ..Self::default() };
        for (score, label) in scores.iter().zip(labels) {
            tally.correct += usize::from(label_of(*score) == *label);
            tally.loss += softplus(if *label == 1 { -score } else { *score });
        }
        tally
    }
}

/// The label that a score gives.
pub fn label_of(score: f64) -> u32 {
    u32::from(score > 0.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Cleaning;

    fn model() -> Model {
        let reading =
            Reading { cleaning: Cleaning::Html, punctuation: true, ngrams: 1..=2, buckets: None };
        let mut keys = ["good", "bad", "good film"].map(crate::linear::words::key).to_vec();
        keys.sort_unstable();
        Model {
            reading,
            weighting: Weighting::TfIdf,
            keys,
            idf: vec![1.0 / 3.0, 2.0, 3.0],
            weights: vec![0.1, -0.2, 0.3],
            intercept: 1.0 / 7.0,
        }
    }

    #[test]
    fn a_model_reads_back_as_it_was_written() {
        let dir = tempfile::tempdir().unwrap();
        let model = model();
        assert!(!Model::is_in(dir.path()));
        let names = ["a", "b", "c"].map(str::to_owned);
        model.save(dir.path(), Some(&names)).unwrap();
        assert!(Model::is_in(dir.path()));
        assert_eq!(Model::load(dir.path()).unwrap(), model);
        let vocabulary = std::fs::read_to_string(dir.path().join(VOCABULARY)).unwrap();
        assert_eq!(vocabulary, "a\nb\nc\n");
        let majority = Model { keys: vec![], idf: vec![], weights: vec![], ..model };
        majority.save(dir.path(), None).unwrap();
        assert_eq!(Model::load(dir.path()).unwrap(), majority);
        let config = std::fs::read_to_string(dir.path().join(CONFIG)).unwrap();
        assert!(config.contains("allreel-majority"), "{config}");
    }

    #[test]
    fn damaged_models_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let broken = |model: Model, what: &str| {
            model.save(dir.path(), None).unwrap();
            let error = Model::load(dir.path()).unwrap_err();
            assert_eq!(error.exit_code(), 2);
            let text = error.to_string();
            assert!(text.contains(WEIGHTS) && text.contains(what), "{text}");
        };
        broken(Model { weights: vec![0.5], ..model() }, "not a model of 3 n-grams");
        broken(Model { idf: vec![0.5], ..model() }, "not a model of 3 n-grams");
        broken(Model { intercept: f64::NAN, ..model() }, "train it again");
        model().save(dir.path(), None).unwrap();
        let path = dir.path().join(WEIGHTS);
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
        assert!(Model::load(dir.path()).unwrap_err().to_string().contains(WEIGHTS));
        std::fs::write(dir.path().join(CONFIG), "{}").unwrap();
        assert!(Model::load(dir.path()).unwrap_err().to_string().contains(CONFIG));
    }

    #[test]
    fn scores_are_log_odds() {
        let tally = Tally::of(&[3.0_f64.ln(), 3.0_f64.ln(), 0.0], &[1, 0, 0]);
        assert_eq!((tally.correct, tally.reviews), (2, 3));
        let expected = -(0.75_f64.ln() + 0.25_f64.ln() + 0.5_f64.ln());
        assert!((tally.loss - expected).abs() < 1e-15, "{tally:?}");
    }
}
