//! The seeded, stratified split of one labelled source into training and validation rows.

use rand::seq::SliceRandom;
use rand::{SeedableRng, rngs::StdRng};

use crate::{Error, Result};

/// Splits row numbers into (training, validation), each ascending, so that every label has the
/// same share in both, to the nearest row. The same labels, share and seed give the same split.
/// A label that occurs only once stays in training.
pub fn stratified(
    labels: &[u32],
    validation_share: f64,
    seed: u64,
) -> Result<(Vec<usize>, Vec<usize>)> {
    if !(validation_share > 0.0 && validation_share < 1.0) {
        return Err(Error::User(format!(
            "data.validation = {validation_share} is not a share; use a number between 0 and 1, \
             such as 0.1, or the name of a file"
        )));
    }
    let classes = labels.iter().max().map_or(0, |&top| top as usize + 1);
    let mut rows = vec![Vec::new(); classes];
    for (row, &label) in labels.iter().enumerate() {
        rows[label as usize].push(row);
    }
    let sizes: Vec<usize> = rows.iter().map(Vec::len).collect();
    let counts = validation_counts(&sizes, validation_share);
    let mut random = StdRng::seed_from_u64(seed);
    let (mut training, mut validation) = (Vec::new(), Vec::new());
    for (mut rows, count) in rows.into_iter().zip(counts) {
        rows.shuffle(&mut random);
        training.extend(rows.split_off(count));
        validation.extend(rows);
    }
    if validation.is_empty() {
        return Err(Error::User(format!(
            "data.validation = {validation_share} of {} labelled rows leaves none to validate on; \
             use a larger share or more rows",
            labels.len()
        )));
    }
    training.sort_unstable();
    validation.sort_unstable();
    Ok((training, validation))
}

/// How many rows of each label are held out: the share rounded down, and what that leaves of the
/// total given to the largest remainders.
fn validation_counts(sizes: &[usize], share: f64) -> Vec<usize> {
    let total = (sizes.iter().sum::<usize>() as f64 * share).round() as usize;
    let exact: Vec<f64> = sizes.iter().map(|&size| size as f64 * share).collect();
    let mut counts: Vec<usize> = exact.iter().map(|e| e.floor() as usize).collect();
    let mut order: Vec<usize> = (0..sizes.len()).filter(|&c| counts[c] + 1 < sizes[c]).collect();
    order.sort_by(|&a, &b| exact[b].fract().total_cmp(&exact[a].fract()));
    let missing = total.saturating_sub(counts.iter().sum());
    for class in order.into_iter().take(missing) {
        counts[class] += 1;
    }
    counts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(rows: &[usize], labels: &[u32], label: u32) -> usize {
        rows.iter().filter(|&&row| labels[row] == label).count()
    }

    #[test]
    fn every_row_is_in_exactly_one_part_and_shares_hold() {
        let labels: Vec<u32> = (0..1003).map(|i| u32::from(i % 10 < 3)).collect();
        let (training, validation) = stratified(&labels, 0.2, 7).unwrap();
        let mut all = [training.clone(), validation.clone()].concat();
        all.sort_unstable();
        assert_eq!(all, (0..1003).collect::<Vec<_>>());
        assert_eq!(validation.len(), 201);
        // 303 rows of label 1: 60.6 wanted; 700 of label 0: 140.0.
        assert_eq!((count(&validation, &labels, 0), count(&validation, &labels, 1)), (140, 61));
        assert!(training.is_sorted() && validation.is_sorted());
    }

    #[test]
    fn the_seed_decides_and_nothing_else() {
        let labels: Vec<u32> = (0..200).map(|i| i % 2).collect();
        let first = stratified(&labels, 0.1, 1).unwrap();
        assert_eq!(first, stratified(&labels, 0.1, 1).unwrap());
        assert_ne!(first, stratified(&labels, 0.1, 2).unwrap());
    }

    #[test]
    fn impossible_shares_are_refused() {
        let labels = [0, 1, 0, 1];
        for share in [0.0, 1.0, -0.5, 1.5, f64::NAN] {
            let message = stratified(&labels, share, 0).unwrap_err().to_string();
            assert!(message.contains("is not a share"), "{message}");
        }
        for labels in [&labels[..], &[], &[1]] {
            let message = stratified(labels, 0.1, 0).unwrap_err().to_string();
            assert!(message.contains("leaves none to validate on"), "{message}");
        }
    }

    #[test]
    fn a_single_row_of_a_label_stays_in_training() {
        let (training, _) = stratified(&[0, 0, 0, 0, 1], 0.9, 3).unwrap();
        assert!(training.contains(&4));
    }
}
