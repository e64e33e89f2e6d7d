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
    DropoutKey,
    adamw::{self, AdamW, Norm, Reading, Table, Update},
    cross_entropy::{Totals, cross_entropy},
    embedding::SparseRows,
};

use crate::{
    Error, Result,
    batch::{Batch, plan},
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
    /// The last step, where a device has its norm; `None` before the first.
    pub unread: Option<Unread>,
}

/// A step whose norm the host has not asked for yet.
pub struct Unread {
    step: u64,
    loss: f64,
    norm: Norm,
    reading: Reading,
}

impl Unread {
    fn new(step: u64, loss: f64, norm: &Norm) -> Result<Self> {
        Ok(Self { step, loss, norm: norm.clone(), reading: norm.read()? })
    }

    /// The step's norm.
    ///
    /// # Errors
    /// `User` if it or the loss was not finite: that step, and what came after it, updated nothing.
    pub fn check(self) -> Result<f64> {
        let Self { step, loss, reading, .. } = self;
        let (norm, finite) = reading.wait()?;
        if finite && loss.is_finite() {
            return Ok(norm);
        }
        Err(Error::User(format!(
            "step {step}: loss {loss} and gradient norm {norm} are not both finite; \
             nothing was updated. Lower train.learning_rate or set train.max_grad_norm, in a new \
             run.dir"
        )))
    }
}

/// What one step did, over all ranks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Outcome {
    /// Sum of the samples' losses.
    pub loss_sum: f64,
    /// Hits.
    pub correct: usize,
    /// Samples.
    pub samples: usize,
    /// Tokens.
    pub tokens: usize,
    /// L2 norm of the mean gradient, before clipping; on a device, which is not waited for, that of the
    /// step before, if there is one.
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
    /// `User` if loss or gradient is not finite, on all ranks, with every parameter untouched. Of a
    /// gradient on a device that may come a step later (or from [`Unread::check`]); no step between has
    /// updated anything either. `Peer` if communication fails.
    pub fn step(
        &mut self,
        set: &TokenSet,
        lengths: &[usize],
        samples: &[u32],
        step: u64,
        stop: bool,
    ) -> Result<Outcome> {
        let (rank, world) = (self.collective.rank(), self.collective.world());
        let mine = plan::shard(samples, lengths, rank, world);
        let micro = plan::micro_batches(&mine, lengths, self.settings.micro_tokens);
        let (local, pending) = self.gradients(set, &micro, step)?;
        let backward_end = Instant::now();

        let (loss, correct) = local.totals.read()?;
        let mut sums = [loss, correct as f64, local.tokens as f64, f64::from(u8::from(stop))];
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
        let [loss_sum, correct, tokens, stops] = sums;
        let mut outcome = Outcome {
            loss_sum,
            correct: correct as usize,
            samples: samples.len(),
            tokens: tokens as usize,
            gradient_norm: 0.0,
            learning_rate: self.settings.learning_rate * self.schedule.multiplier(step - 1),
            stop: stops > 0.0,
        };
        outcome.gradient_norm = self.update(&outcome, &words, step)?;
        Ok(outcome)
    }

    /// Runs the micro-batches; the buckets of the last one are reduced as they become ready.
    fn gradients(
        &mut self,
        set: &TokenSet,
        micro: &[Vec<u32>],
        step: u64,
    ) -> Result<(Local, Vec<Pending>)> {
        let key = DropoutKey { seed: self.settings.seed, step: step as u32, stream: 0 };
        let pass = Pass { dropout: Some(key), checkpoint: self.checkpoint };
        let width = self.classifier.config.plan.embeddings.width;
        let words = SparseRows::empty(width, &self.classifier.parameters.placement.device)?;
        let mut local = Local { totals: Totals::default(), tokens: 0, words };
        let mut pending = Vec::new();
        let buckets = &self.classifier.parameters.buckets;
        for (i, samples) in micro.iter().enumerate() {
            let last = i + 1 == micro.len();
            let batch = Batch::gather(set, samples)?;
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

    /// Clips and updates, and returns the norm that the host knows by then. On a device the update is
    /// queued behind its norm, and takes nothing from the host.
    fn update(&mut self, outcome: &Outcome, words: &SparseRows, step: u64) -> Result<f64> {
        let settings = self.settings;
        let update = all(self.classifier, words)?;
        let last = self.unread.take();
        let before = last.as_ref().map(|last| &last.norm);
        let norm = update.norm(outcome.samples, settings.max_grad_norm, before)?;
        let known = match last {
            Some(last) if !norm.is_here() && outcome.loss_sum.is_finite() => last,
            _ => Unread::new(step, outcome.loss(), &norm)?,
        };
        let gradient_norm = known.check().or_else(|error| {
            self.clear_gradients()?;
            Err(error)
        })?;
        let adamw = AdamW {
            learning_rate: outcome.learning_rate,
            beta1: settings.adam_beta1,
            beta2: settings.adam_beta2,
            epsilon: settings.adam_epsilon,
            weight_decay: settings.weight_decay,
            step,
        };
        update.step(&adamw, &norm)?;
        if !norm.is_here() {
            self.unread = Some(Unread::new(step, outcome.loss(), &norm)?);
        }
        Ok(gradient_norm)
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
