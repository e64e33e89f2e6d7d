//! Bags as rows of a matrix: presence, counts or TF-IDF, and naive Bayes' ratios over them.

use rayon::prelude::*;
use rustc_hash::FxHashMap;

use super::{bags::Bags, matrix::Matrix};
pub use crate::config::Weighting;

/// The rows of `bags`, whose keys `index` turns into columns; other keys are left out. `idf` is of every
/// column, and used by [`Weighting::TfIdf`].
pub fn matrix(
    bags: &Bags,
    index: &FxHashMap<u64, u32>,
    weighting: Weighting,
    idf: &[f64],
) -> Matrix {
    let rows: Vec<_> =
        (0..bags.len()).into_par_iter().map(|i| row(bags, i, index, weighting, idf)).collect();
    let mut offsets = vec![0];
    offsets.extend(rows.iter().scan(0, |end, row| {
        *end += row.len();
        Some(*end)
    }));
    let (columns, values) = rows.into_iter().flatten().unzip();
    Matrix { offsets, columns, values }
}

fn row(
    bags: &Bags,
    i: usize,
    index: &FxHashMap<u64, u32>,
    weighting: Weighting,
    idf: &[f64],
) -> Vec<(u32, f32)> {
    let range = bags.range(i);
    let entries = bags.keys[range.clone()].iter().zip(&bags.counts[range]);
    let known = entries.filter_map(|(key, count)| Some((*index.get(key)?, f64::from(*count))));
    let value = |(column, count): (u32, f64)| match weighting {
        Weighting::Binary => (column, 1.0),
        Weighting::Count => (column, count),
        Weighting::TfIdf => (column, (1.0 + count.ln()) * idf[column as usize]),
    };
    let row: Vec<(u32, f64)> = known.map(value).collect();
    let scale = match weighting {
        Weighting::TfIdf => row.iter().map(|(_, x)| x * x).sum::<f64>().sqrt().recip(),
        Weighting::Binary | Weighting::Count => 1.0,
    };
    row.into_iter().map(|(column, x)| (column, (x * scale) as f32)).collect()
}

/// Multiplies every column by its element of `scale`.
pub fn scale_columns(matrix: &mut Matrix, scale: &[f64]) {
    let entries = matrix.values.par_iter_mut().zip(&matrix.columns);
    entries.for_each(|(x, column)| *x = (f64::from(*x) * scale[*column as usize]) as f32);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        data::Cleaning,
        linear::{
            bags::Reading,
            columns::{Columns, index},
            words::key,
        },
    };

    const TEXTS: [&str; 4] = ["good good film", "bad film", "good plot bad end", "a plot"];

    fn bags() -> Bags {
        let reading =
            Reading { cleaning: Cleaning::None, punctuation: false, ngrams: 1..=2, buckets: None };
        reading.bags(TEXTS.into_par_iter())
    }

    /// `TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"\w+", min_df=2)` of
    /// scikit-learn 1.9.1 gives these; f32 keeps 7 digits of them.
    #[test]
    fn tf_idf_is_scikit_learns() {
        let words = ["bad", "film", "good", "plot"];
        let mut keys = words.map(key).to_vec();
        keys.sort_unstable();
        let columns = Columns { documents: vec![[1, 1]; 4], totals: [2, 2], keys };
        let idf = columns.idf();
        assert!(idf.iter().all(|idf| (idf - 1.51082562).abs() < 5e-9), "{idf:?}");
        let index = index(&columns.keys);
        let matrix = matrix(&bags(), &index, Weighting::TfIdf, &idf);
        let expected = [
            [0.0, 0.50854232, 0.861037, 0.0],
            [std::f64::consts::FRAC_1_SQRT_2, std::f64::consts::FRAC_1_SQRT_2, 0.0, 0.0],
            [0.57735027, 0.0, 0.57735027, 0.57735027],
            [0.0, 0.0, 0.0, 1.0],
        ];
        for (word, column) in words.iter().zip(0..) {
            let mut one = [0.0; 4];
            one[index[&key(word)] as usize] = 1.0;
            for (row, value) in matrix.times(&one).into_iter().enumerate() {
                assert!((value - expected[row][column]).abs() < 1e-7, "{word} {row}: {value}");
            }
        }
    }

    #[test]
    fn presence_counts_and_ratios() {
        let keys = vec![key("good")];
        let index = index(&keys);
        let mut binary = matrix(&bags(), &index, Weighting::Binary, &[]);
        assert_eq!(
            (&binary.offsets[..], &binary.values[..]),
            (&[0, 1, 1, 2, 2][..], &[1.0; 2][..])
        );
        let count = matrix(&bags(), &index, Weighting::Count, &[]);
        assert_eq!(count.values, [2.0, 1.0]);
        scale_columns(&mut binary, &[-0.5]);
        assert_eq!(binary.values, [-0.5; 2]);
    }
}
