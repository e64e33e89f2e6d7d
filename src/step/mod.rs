//! One optimizer step: forward, loss, backward, reduce, clip, update.
//!
//! | file | owns |
//! |---|---|
//! | this | [`Trainer`]: the step itself |
//! | [`schedule`] | learning rate by step |
//! | [`evaluate`] | loss, accuracy and predictions of a set |

pub mod evaluate;
pub mod schedule;

use std::time::Instant;

use allreel_kernels::{
    DropoutKey, Later,
    adamw::{self, AdamW, Norm, Reading, Table, Update},
    cross_entropy::{Totals, cross_entropy},
    embedding::SparseRows,
};

use crate::{
    Error, Result,
    batch::plan,
    collective::{Collective, Pending, Traffic},
    config,
    data::TokenSet,
    model::{Classifier, Pass, classifier::Ready},
};
use schedule::Schedule;

/// A classifier and what it takes to train it.
pub struct Trainer<'a> {
    /// The network.
    pub classifier: &'a Classifier,
    /// The other ranks.
    pub collective: &'a mut dyn Collective,
    /// The `[train]` settings.
    pub settings: &'a config::Train,
    /// Learning rates.
    pub schedule: Schedule,
    /// Whether blocks run again in backward instead of keeping what they saved.
    pub checkpoint: bool,
    /// What communication cost so far.
    pub traffic: Traffic,
    /// Norm of the step before, where a device has it: what comes after one that is not finite updates
    /// nothing either. `None` before the first.
    pub before: Option<Norm>,
}

/// A step that has been begun: all ranks have agreed on it, and on a device it is queued.
pub struct Started {
    step: u64,
    samples: usize,
    tokens: usize,
    learning_rate: f64,
    totals: Later,
    norm: Reading,
    /// Whether some rank has been asked to stop.
    pub stop: bool,
}

/// What one step did, over all ranks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Outcome {
    /// Number of the step, from 1.
    pub step: u64,
    /// Sum of the samples' losses.
    pub loss_sum: f64,
    /// Hits.
    pub correct: usize,
    /// Samples.
    pub samples: usize,
    /// Tokens.
    pub tokens: usize,
    /// L2 norm of the mean gradient, before clipping.
    pub gradient_norm: f64,
    /// Learning rate used.
    pub learning_rate: f64,
    /// Whether some rank has been asked to stop.
    pub stop: bool,
}

impl Outcome {
    /// Mean loss.
    pub fn loss(&self) -> f64 {
        self.loss_sum / self.samples as f64
    }
}

/// Sums of one rank's micro-batches.
struct Local {
    totals: Totals,
    tokens: usize,
    words: SparseRows,
}

impl Trainer<'_> {
    /// Trains on `samples` of `set`, the batch of all ranks together. `step` counts from 1;
    /// `stop` is whether this rank has been asked to stop.
    ///
    /// # Errors
    /// Those of [`begin`](Self::begin) and [`finish`](Self::finish).
    pub fn step(
        &mut self,
        set: &TokenSet,
        lengths: &[usize],
        samples: &[u32],
        step: u64,
        stop: bool,
    ) -> Result<Outcome> {
        let started = self.begin(set, lengths, samples, step, stop)?;
        self.finish(started)
    }

    /// Runs a step; on a device, queues it and waits for nothing. See [`step`](Self::step).
    ///
    /// # Errors
    /// `Peer` if communication fails.
    pub fn begin(
        &mut self,
        set: &TokenSet,
        lengths: &[usize],
        samples: &[u32],
        step: u64,
        stop: bool,
    ) -> Result<Started> {
        let (rank, world) = (self.collective.rank(), self.collective.world());
        let mine = plan::shard(samples, lengths, rank, world);
        let micro = plan::micro_batches(&mine, lengths, self.settings.micro_tokens);
        let (local, pending) = self.gradients(set, &micro, step)?;
        let backward_end = Instant::now();

        let mut sums = [local.tokens as f64, f64::from(u8::from(stop))];
        let mut words = local.words;
        if world > 1 {
            self.collective.all_reduce_f64(&mut sums)?;
            if self.classifier.words_bucket().is_some() {
                words = self.exchange_rows(&words, backward_end)?;
            }
        }
        for pending in pending {
            self.traffic.add(pending.wait()?, backward_end);
        }
        let learning_rate = self.settings.learning_rate * self.schedule.multiplier(step - 1);
        let norm = self.update(samples.len(), learning_rate, &words, step)?;
        Ok(Started {
            step,
            samples: samples.len(),
            tokens: sums[0] as usize,
            learning_rate,
            totals: local.totals.later()?,
            norm,
            stop: sums[1] > 0.0,
        })
    }

    /// Waits for a step that was begun, and says what it did. Another may have been begun meanwhile.
    ///
    /// # Errors
    /// `User` if loss or gradient is not finite, on all ranks: neither this step nor one begun after it has
    /// updated anything. `Peer` if communication fails.
    pub fn finish(&mut self, started: Started) -> Result<Outcome> {
        let Started { step, samples, tokens, learning_rate, totals, norm, stop } = started;
        let mut sums = totals.wait()?;
        if self.collective.world() > 1 {
            self.collective.all_reduce_f64(&mut sums)?;
        }
        let (gradient_norm, finite) = norm.wait()?;
        let (loss_sum, correct) = (sums[0], sums[1] as usize);
        if !(finite && loss_sum.is_finite()) {
            self.clear_gradients()?;
            return Err(Error::User(format!(
                "step {step}: loss {} and gradient norm {gradient_norm} are not both finite; \
                 nothing was updated. Lower train.learning_rate or set train.max_grad_norm, in a new \
                 run.dir",
                loss_sum / samples as f64
            )));
        }
        Ok(Outcome { step, loss_sum, correct, samples, tokens, gradient_norm, learning_rate, stop })
    }

    /// Runs the micro-batches; the buckets of the last one are reduced as they become ready.
    fn gradients(
        &mut self,
        set: &TokenSet,
        micro: &[Vec<u32>],
        step: u64,
    ) -> Result<(Local, Vec<Pending>)> {
        let key = DropoutKey { seed: self.settings.seed, step: step as u32, stream: 0 };
        let pass = Pass {
            dropout: Some(key),
            checkpoint: self.checkpoint,
            offload: self.settings.offload,
        };
        let width = self.classifier.config.plan.embeddings.width;
        let words = SparseRows::empty(width, &self.classifier.parameters.placement.device)?;
        let mut local = Local { totals: Totals::default(), tokens: 0, words };
        let mut pending = Vec::new();
        let buckets = &self.classifier.parameters.buckets;
        for (i, samples) in micro.iter().enumerate() {
            let last = i + 1 == micro.len();
            let batch = self.classifier.gather(set, samples)?;
            let (logits, saved) = self.classifier.forward(&batch, pass)?;
            let smoothing = self.settings.label_smoothing;
            let d_logits = cross_entropy(&logits, &batch.labels, smoothing, &local.totals)?;
            local.tokens += batch.tokens.len();
            self.classifier.backward(&batch, saved, &d_logits, pass, &mut |ready| {
                match ready {
                    Ready::Words(rows) => local.words.merge(&rows)?,
                    Ready::Bucket(bucket) if last => {
                        if let Some(gradients) = &buckets[bucket].gradients {
                            pending.push(self.collective.all_reduce_sum(gradients)?);
                        }
                    }
                    Ready::Bucket(_) => {}
                }
                Ok(())
            })?;
        }
        if micro.is_empty() {
            // Fewer samples than ranks: this one adds zeros.
            for gradients in buckets.iter().filter_map(|bucket| bucket.gradients.as_ref()) {
                pending.push(self.collective.all_reduce_sum(gradients)?);
            }
        }
        Ok((local, pending))
    }

    /// The sum of every rank's rows: the ranks agree on which rows occur at all, then sum just those.
    fn exchange_rows(&mut self, rows: &SparseRows, backward_end: Instant) -> Result<SparseRows> {
        let gathered = self.collective.all_gather(bytemuck::cast_slice(&rows.ids))?;
        let mut ids: Vec<u32> =
            gathered.iter().flat_map(|ids| bytemuck::pod_collect_to_vec::<u8, u32>(ids)).collect();
        ids.sort_unstable();
        ids.dedup();
        let sum = rows.spread(&ids)?;
        self.traffic.add(self.collective.all_reduce_sum(&sum.values)?.wait()?, backward_end);
        Ok(sum)
    }

    /// Clips and updates. On a device the update is queued behind its norm and takes nothing from the host;
    /// where that is not finite it does nothing.
    fn update(
        &mut self,
        samples: usize,
        learning_rate: f64,
        words: &SparseRows,
        step: u64,
    ) -> Result<Reading> {
        let settings = self.settings;
        let update = all(self.classifier, words)?;
        let norm = update.norm(samples, settings.max_grad_norm, self.before.as_ref())?;
        let adamw = AdamW {
            learning_rate,
            beta1: settings.adam_beta1,
            beta2: settings.adam_beta2,
            epsilon: settings.adam_epsilon,
            weight_decay: settings.weight_decay,
            step,
        };
        update.step(&adamw, &norm)?;
        let reading = norm.read()?;
        self.before = (!norm.is_here()).then_some(norm);
        Ok(reading)
    }

    fn clear_gradients(&self) -> Result<()> {
        for bucket in &self.classifier.parameters.buckets {
            if let Some(gradients) = &bucket.gradients {
                gradients.zero_set()?;
            }
        }
        Ok(())
    }
}

/// Everything that trains, with its gradients.
fn all<'a>(classifier: &'a Classifier, words: &'a SparseRows) -> Result<Update<'a>> {
    let (mut buckets, mut table) = (Vec::new(), None);
    for bucket in &classifier.parameters.buckets {
        let state = &bucket.state;
        match &bucket.gradients {
            Some(gradients) => {
                buckets.push(adamw::Bucket { state, gradients, decayed: bucket.decayed });
            }
            None => table = Some(Table { state, rows: words }),
        }
    }
    Ok(Update::new(buckets, table)?)
}
