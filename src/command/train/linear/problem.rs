//! What a linear run minimises, made of its reviews: each rank has its share of them.

use rayon::prelude::*;

use crate::{
    Error, Result,
    collective::{Collective, agree, must_be_equal},
    command::datasets::{self, Texts},
    config::{ColumnsBy, Config, Linear, Ngram},
    data::Review,
    linear::{
        bags::{Bags, Reading},
        columns::{Columns, index},
        features::{Weighting, matrix, scale_columns},
        matrix::Matrix,
        model::Model,
        regression::Regression,
    },
};

/// Added to the counts of naive Bayes, as in the paper.
const ALPHA: f64 = 1.0;

/// Everything a run needs of its data.
pub(super) struct Problem {
    /// Of the training reviews.
    pub(super) regression: Regression,
    /// To choose the best model by.
    pub(super) validation: Share,
    /// To judge the best model by.
    pub(super) test: Option<Share>,
    /// The model, but for its weights.
    pub(super) blank: Model,
    /// Naive Bayes' ratio of each column, or ones.
    ratios: Vec<f64>,
    /// The n-gram of each column, on rank 0 if the model has a vocabulary.
    pub(super) names: Option<Vec<String>>,
    /// Training reviews of all ranks.
    pub(super) samples: usize,
    /// N-grams of these, each as often as it occurs in a different review.
    pub(super) entries: usize,
    /// Hash of the training and validation reviews.
    pub(super) data: String,
}

/// A rank's share of a set.
pub(super) struct Share {
    pub(super) rows: Matrix,
    pub(super) labels: Vec<u32>,
    /// Reviews of all ranks.
    pub(super) total: usize,
}

impl Problem {
    /// Reads the reviews, counts their n-grams over all ranks, and lays them out.
    pub(super) fn new(
        config: &Config,
        linear: &Linear,
        collective: &mut dyn Collective,
    ) -> Result<Self> {
        let texts = agree(collective, datasets::texts(config))?;
        let data = fingerprint(&texts);
        must_be_equal(collective, "training data", &data)?;
        let (rank, world) = (collective.rank(), collective.world());
        let samples = texts.train.len();
        agree(collective, enough(samples, world))?;
        let reader = Reader::new(config, linear, (rank, world));
        let (bags, labels) = reader.share(&texts.train);
        let columns = Columns::count(&bags, &labels, reader.min_count, collective)?;
        agree(collective, usable(&columns, linear))?;
        let idf = match reader.weighting {
            Weighting::TfIdf => columns.idf(),
            Weighting::Binary | Weighting::Count => Vec::new(),
        };
        let index = index(&columns.keys);
        let mut rows = matrix(&bags, &index, reader.weighting, &idf);
        let mut entries = [rows.values.len() as f64];
        collective.all_reduce_f64(&mut entries)?;
        let ratios = match linear {
            Linear::Ngram(Ngram { naive_bayes: true, .. }) => columns.ratios(ALPHA),
            Linear::Ngram(_) | Linear::Majority => vec![1.0; columns.len()],
        };
        scale_columns(&mut rows, &ratios);
        let share = |reviews: &[Review]| {
            let (bags, labels) = reader.share(reviews);
            let rows = matrix(&bags, &index, reader.weighting, &idf);
            Share { rows, labels, total: reviews.len() }
        };
        let named = reader.reading.buckets.is_none() && reader.rank == 0;
        Ok(Self {
            validation: share(&texts.validation),
            test: texts.test.as_deref().map(share),
            names: named.then(|| reader.reading.names(&texts.train, &index)),
            regression: Regression::new(rows, columns.len(), &labels, samples, reader.c),
            blank: Model {
                reading: reader.reading,
                weighting: reader.weighting,
                keys: columns.keys,
                idf,
                weights: Vec::new(),
                intercept: 0.0,
            },
            ratios,
            samples,
            entries: entries[0] as usize,
            data,
        })
    }

    /// The model with the weights of `point`.
    pub(super) fn model(&self, point: &[f64]) -> Model {
        let (weights, intercept) = point.split_at(self.ratios.len());
        let weights = weights.iter().zip(&self.ratios).map(|(w, ratio)| (w * ratio) as f32);
        Model { weights: weights.collect(), intercept: intercept[0], ..self.blank.clone() }
    }
}

/// How a rank turns reviews into its share of bags.
struct Reader {
    reading: Reading,
    weighting: Weighting,
    min_count: usize,
    c: f64,
    /// The majority counts no n-gram.
    empty: bool,
    rank: usize,
    world: usize,
}

impl Reader {
    /// Of rank `rank` among `world`.
    fn new(config: &Config, linear: &Linear, (rank, world): (usize, usize)) -> Self {
        let plain = Reading {
            cleaning: config.data.cleaning,
            punctuation: false,
            ngrams: 1..=1,
            buckets: Some(1),
        };
        let (reading, weighting, min_count, c) = match linear {
            Linear::Majority => (plain, Weighting::Binary, 1, 1.0),
            Linear::Ngram(ngram) => {
                let reading = Reading {
                    punctuation: ngram.punctuation,
                    ngrams: ngram.ngram_range[0]..=ngram.ngram_range[1],
                    buckets: match ngram.columns {
                        ColumnsBy::Hashing(buckets) => Some(buckets),
                        ColumnsBy::Vocabulary => None,
                    },
                    ..plain
                };
                (reading, ngram.features, ngram.min_count, ngram.c)
            }
        };
        let empty = *linear == Linear::Majority;
        Self { reading, weighting, min_count, c, empty, rank, world }
    }

    /// Every `world`-th review, as a bag, and its label.
    fn share(&self, reviews: &[Review]) -> (Bags, Vec<u32>) {
        let mine = || reviews.iter().skip(self.rank).step_by(self.world);
        let labels: Vec<u32> = mine().filter_map(|review| review.label).collect();
        if self.empty {
            return (Bags { offsets: vec![0; labels.len() + 1], ..Bags::default() }, labels);
        }
        let texts: Vec<&str> = mine().map(|review| review.text.as_str()).collect();
        (self.reading.bags(texts.into_par_iter()), labels)
    }
}

fn enough(samples: usize, world: usize) -> Result<()> {
    match samples < world {
        true => Err(Error::User(format!(
            "{samples} training reviews for {world} ranks; use at most {samples} ranks"
        ))),
        false => Ok(()),
    }
}

/// Refuses what nothing can be learnt from.
fn usable(columns: &Columns, linear: &Linear) -> Result<()> {
    if let Some(class) = columns.totals.iter().position(|total| *total == 0) {
        return Err(Error::Data(format!(
            "data.train: all {} training reviews have the label {}, none has {class}; give it reviews of both",
            columns.totals[1 - class],
            1 - class
        )));
    }
    match linear {
        Linear::Ngram(ngram) if columns.is_empty() => Err(Error::User(format!(
            "model.min_count = {}: no n-gram is in so many of the training reviews; use a smaller one, such as 1",
            ngram.min_count
        ))),
        Linear::Ngram(_) | Linear::Majority => Ok(()),
    }
}

/// What the training and validation sets contain, as a hash.
fn fingerprint(texts: &Texts) -> String {
    let mut hash = blake3::Hasher::new();
    for set in [&texts.train, &texts.validation] {
        hash.update(&(set.len() as u64).to_le_bytes());
        for review in set {
            hash.update(&(review.text.len() as u64).to_le_bytes());
            hash.update(review.text.as_bytes());
            hash.update(&review.label.unwrap_or_default().to_le_bytes());
        }
    }
    hash.finalize().to_hex().to_string()
}
