//! Loss, accuracy and predictions of a set, spread over the ranks.

use allreel_kernels::cross_entropy::{Totals, cross_entropy};
use candle_core::DType;

use crate::{
    Error, Result, batch::plan, collective::Collective, data::TokenSet, model::Classifier,
};

/// How well a set is predicted.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Evaluation {
    /// Share of hits.
    pub accuracy: f64,
    /// Mean cross-entropy (without label smoothing).
    pub loss: f64,
}

/// Evaluates a labelled set, each rank its part; all ranks get the result.
///
/// # Errors
/// `User` if the loss is not finite, on all ranks; `Peer` if communication fails.
pub fn evaluate(
    classifier: &Classifier,
    set: &TokenSet,
    budget: usize,
    collective: &mut dyn Collective,
) -> Result<Evaluation> {
    let lengths = classifier.lengths(set);
    let (rank, world) = (collective.rank(), collective.world());
    let totals = Totals::default();
    for samples in plan::evaluation(&lengths, budget, rank, world) {
        let batch = classifier.gather(set, &samples)?;
        cross_entropy(&classifier.logits(&batch)?, &batch.labels, 0.0, &totals)?;
    }
    let (loss, correct) = totals.read()?;
    let mut sums = [loss, correct as f64];
    collective.all_reduce_f64(&mut sums)?;
    if !sums[0].is_finite() {
        return Err(Error::User(format!(
            "the evaluation loss is {}: the weights are not usable. Lower train.learning_rate, in a \
             new run.dir",
            sums[0]
        )));
    }
    let n = set.len() as f64;
    Ok(Evaluation { accuracy: sums[1] / n, loss: sums[0] / n })
}

/// Class probabilities of every sample of a set, in its order. `done` is told how many samples
/// have been predicted so far.
///
/// # Errors
/// `Data` if a logit is not finite; `Bug` if the set does not fit the network.
pub fn probabilities(
    classifier: &Classifier,
    set: &TokenSet,
    budget: usize,
    mut done: impl FnMut(usize),
) -> Result<Vec<Vec<f64>>> {
    let mut all = vec![Vec::new(); set.len()];
    let mut count = 0;
    for samples in plan::evaluation(&classifier.lengths(set), budget, 0, 1) {
        let batch = classifier.gather(set, &samples)?;
        let logits = classifier.logits(&batch)?.to_dtype(DType::F64)?.to_vec2::<f64>()?;
        for (id, row) in samples.iter().zip(logits) {
            let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let exps: Vec<f64> = row.iter().map(|x| (x - max).exp()).collect();
            let sum: f64 = exps.iter().sum();
            if !sum.is_finite() {
                return Err(Error::Data(
                    "the model's logits are not finite: its weights are damaged".into(),
                ));
            }
            all[*id as usize] = exps.into_iter().map(|e| e / sum).collect();
        }
        count += samples.len();
        done(count);
    }
    Ok(all)
}
