//! Which keys are columns of the matrix, and in how many reviews of each class every one occurs: over all
//! ranks, each of which has its own reviews.

use rayon::prelude::*;
use rustc_hash::FxHashMap;

use super::bags::Bags;
use crate::{Error, Result, collective::Collective};

/// The classes there are: 0 negative, 1 positive.
pub const CLASSES: usize = 2;

/// The columns, ascending by key.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Columns {
    /// The key of each.
    pub keys: Vec<u64>,
    /// Training reviews of each class that have it.
    pub documents: Vec<[u32; CLASSES]>,
    /// Training reviews of each class.
    pub totals: [u64; CLASSES],
}

type Count = (u64, [u32; CLASSES]);

impl Columns {
    /// The keys that at least `min_count` reviews have, over all ranks.
    ///
    /// # Errors
    /// `Peer` when the others cannot be reached.
    pub fn count(
        bags: &Bags,
        labels: &[u32],
        min_count: usize,
        collective: &mut dyn Collective,
    ) -> Result<Self> {
        let mut totals = [0; CLASSES];
        labels.iter().for_each(|label| totals[*label as usize] += 1);
        let mut counts = of_rank(bags, labels);
        if collective.world() > 1 {
            counts = summed(&counts, collective)?;
            let mut sums = totals.map(|total| total as f64);
            collective.all_reduce_f64(&mut sums)?;
            totals = sums.map(|sum| sum as u64);
        }
        counts.retain(|(_, counts)| counts.iter().sum::<u32>() as usize >= min_count);
        let (keys, documents) = counts.into_iter().unzip();
        Ok(Self { keys, documents, totals })
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.keys.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// ln of how much rarer a column is than reviews, as scikit-learn smooths it:
    /// `ln((1 + reviews) / (1 + reviews with it)) + 1`.
    pub fn idf(&self) -> Vec<f64> {
        let reviews = self.totals.iter().sum::<u64>() as f64;
        let idf = |counts: &[u32; CLASSES]| {
            ((1.0 + reviews) / (1.0 + f64::from(counts[0] + counts[1]))).ln() + 1.0
        };
        self.documents.iter().map(idf).collect()
    }

    /// Naive Bayes' log-count ratios of presence (Wang & Manning 2012, with their `alpha`):
    /// `ln((p / |p|) / (q / |q|))` with `p = alpha + positive reviews with it`, `q` of negative ones.
    pub fn ratios(&self, alpha: f64) -> Vec<f64> {
        let smoothed = |counts: &[u32; CLASSES], class: usize| alpha + f64::from(counts[class]);
        let norm = |class| self.documents.iter().map(|c| smoothed(c, class)).sum::<f64>();
        let prior = (norm(1) / norm(0)).ln();
        let ratio = |counts| (smoothed(counts, 1) / smoothed(counts, 0)).ln() - prior;
        self.documents.iter().map(ratio).collect()
    }
}

/// Where each key is among the columns.
pub fn index(keys: &[u64]) -> FxHashMap<u64, u32> {
    keys.iter().enumerate().map(|(column, key)| (*key, column as u32)).collect()
}

/// The counts of this rank's reviews, by key.
fn of_rank(bags: &Bags, labels: &[u32]) -> Vec<Count> {
    let mut entries: Vec<Count> = Vec::with_capacity(bags.keys.len());
    for (i, label) in labels.iter().enumerate() {
        let mut one = [0; CLASSES];
        one[*label as usize] = 1;
        entries.extend(bags.keys[bags.range(i)].iter().map(|key| (*key, one)));
    }
    merged(entries)
}

/// Sorted by key, with equal keys added up.
fn merged(mut counts: Vec<Count>) -> Vec<Count> {
    counts.par_sort_unstable_by_key(|(key, _)| *key);
    counts.dedup_by(|next, sum| {
        let equal = next.0 == sum.0;
        if equal {
            (0..CLASSES).for_each(|class| sum.1[class] += next.1[class]);
        }
        equal
    });
    counts
}

/// The same over all ranks.
fn summed(counts: &[Count], collective: &mut dyn Collective) -> Result<Vec<Count>> {
    let mut bytes = Vec::with_capacity(16 * counts.len());
    for (key, [negative, positive]) in counts {
        bytes.extend_from_slice(&key.to_le_bytes());
        bytes.extend_from_slice(&negative.to_le_bytes());
        bytes.extend_from_slice(&positive.to_le_bytes());
    }
    let mut all = Vec::new();
    for bytes in collective.all_gather(&bytes)? {
        let (entries, rest) = bytes.as_chunks::<16>();
        if !rest.is_empty() {
            return Err(Error::Bug(format!("{} bytes of counts", bytes.len())));
        }
        all.extend(entries.iter().map(|entry| {
            let [a, b, c, d, e, f, g, h, n0, n1, n2, n3, p0, p1, p2, p3] = *entry;
            let key = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
            (key, [u32::from_le_bytes([n0, n1, n2, n3]), u32::from_le_bytes([p0, p1, p2, p3])])
        }));
    }
    Ok(merged(all))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::collective::threads::Threads;

    /// Bags of keys, each once.
    fn bags(reviews: &[&[u64]]) -> Bags {
        let mut bags = Bags { offsets: vec![0], ..Bags::default() };
        for review in reviews {
            bags.keys.extend(*review);
            bags.offsets.push(bags.keys.len());
        }
        bags.counts = vec![1; bags.keys.len()];
        bags
    }

    const REVIEWS: [&[u64]; 5] = [&[1, 2], &[2, 3], &[2, u64::MAX], &[], &[1, u64::MAX]];
    const LABELS: [u32; 5] = [1, 0, 1, 0, 0];

    #[test]
    fn ranks_count_what_one_would() {
        for world in [1, 2, 4] {
            let of_ranks = Threads::run(world, |collective| {
                let mine = (collective.rank()..5).step_by(world);
                let (reviews, labels): (Vec<_>, Vec<_>) =
                    mine.map(|i| (REVIEWS[i], LABELS[i])).unzip();
                Columns::count(&bags(&reviews), &labels, 2, collective).unwrap()
            });
            let expected = Columns {
                keys: vec![1, 2, u64::MAX],
                documents: vec![[1, 1], [1, 2], [1, 1]],
                totals: [3, 2],
            };
            assert!(of_ranks.iter().all(|columns| *columns == expected), "{of_ranks:?}");
        }
    }

    #[test]
    fn ratios_are_of_shares() {
        let columns = Columns { keys: vec![5, 6], documents: vec![[0, 3], [1, 0]], totals: [1, 3] };
        let ratios = columns.ratios(1.0);
        // p = (4, 1) of 5, q = (1, 2) of 3.
        let expected = [(0.8_f64 / (1.0 / 3.0)).ln(), (0.2_f64 / (2.0 / 3.0)).ln()];
        for (ratio, expected) in ratios.iter().zip(expected) {
            assert!((ratio - expected).abs() < 1e-15, "{ratios:?}");
        }
        assert_eq!(index(&columns.keys)[&6], 1);
    }
}
