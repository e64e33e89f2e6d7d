//! The loop of a run: epochs, steps, evaluations, checkpoints, and stopping in good order.

use std::{
    fs::File,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use allreel_kernels::adamw::Norm;

use super::{
    Prepared, conclusion,
    start::{self, Start},
};
use crate::{
    Error, Result,
    batch::plan,
    checkpoint::{Best, Checkpoints, EpochSums, State},
    collective::{Collective, Traffic, agree},
    config::Config,
    report::{EpochRecord, EvalRecord, Metrics, Progress, Record, StepRecord},
    step::{
        Started, Trainer,
        evaluate::{Evaluation, evaluate},
        schedule::Schedule,
    },
};

/// A run between its preparation and its end.
pub(super) struct Run<'a> {
    prepared: Prepared,
    collective: &'a mut dyn Collective,
    lengths: Vec<usize>,
    total_steps: u64,
    schedule: Schedule,
    checkpoints: Checkpoints,
    state: State,
    traffic: Option<Traffic>,
    /// Norm of the last step, where a device has it.
    before: Option<Norm>,
    /// The last step, where nobody has waited for it yet.
    queued: Option<Started>,
    /// When the last step ended, or what came after it.
    mark: Instant,
    metrics: Option<Metrics>,
    progress: Progress,
    stop: Arc<AtomicBool>,
    started: Instant,
    seconds_before: f64,
    /// Held until the run ends.
    _lock: Option<File>,
}

impl<'a> Run<'a> {
    /// Plans the run, or finds where it stopped.
    pub(super) fn new(
        prepared: Prepared,
        collective: &'a mut dyn Collective,
        resume: bool,
    ) -> Result<Self> {
        let config = &prepared.config;
        let lengths = prepared.classifier.lengths(&prepared.data.train);
        let total_steps = total_steps(config, &lengths);
        let schedule = Schedule::new(config.train.schedule, config.train.warmup(), total_steps);
        let schedule = agree(collective, schedule)?;
        let checkpoints = Checkpoints::new(&config.run.dir, config.checkpoint.keep);
        let Start { state, metrics, lock } =
            start::start(&prepared, &checkpoints, collective, resume)?;
        let progress = match collective.rank() {
            0 => Progress::new(total_steps as usize, state.step as usize),
            _ => Progress::hidden(),
        };
        Ok(Self {
            stop: start::stop_flag()?,
            started: Instant::now(),
            seconds_before: state.seconds,
            prepared,
            collective,
            lengths,
            total_steps,
            schedule,
            checkpoints,
            state,
            traffic: None,
            before: None,
            queued: None,
            mark: Instant::now(),
            metrics,
            progress,
            _lock: lock,
        })
    }

    /// Trains until nothing is left, or a signal or early stopping ends it.
    pub(super) fn finish(mut self) -> Result<()> {
        while !self.state.finished {
            let train = &self.prepared.config.train;
            let (epoch, seed) = (self.state.epoch, train.seed);
            let batches =
                plan::epoch(&self.lengths, train.batch(), train.group_window, seed, epoch);
            self.epoch(&batches)?;
        }
        std::mem::replace(&mut self.progress, Progress::hidden()).finish();
        conclusion::conclude(
            &self.prepared,
            &self.state,
            &self.checkpoints,
            self.traffic,
            self.collective,
        )
    }

    /// The rest of the current epoch.
    fn epoch(&mut self, batches: &[Vec<u32>]) -> Result<()> {
        let epoch = self.state.epoch;
        while self.state.epoch == epoch && !self.state.finished {
            let stop = self.step(&batches[self.state.next_batch])?;
            let step = self.state.step;
            let due = |every: Option<usize>| every.is_some_and(|n| step.is_multiple_of(n as u64));
            self.state.finished = step == self.total_steps;
            let ends_epoch = self.state.next_batch == batches.len();
            let ends = ends_epoch || self.state.finished;
            let evaluates = ends || due(self.prepared.config.train.eval_steps);
            let saves = ends || stop || due(self.prepared.config.checkpoint.every_steps);
            if evaluates || saves {
                self.settle()?;
            }
            if evaluates {
                let evaluation = self.evaluate()?;
                // Early stopping may have ended the run.
                match ends || self.state.finished {
                    true => self.end_epoch(evaluation)?,
                    false => self.record_evaluation(evaluation)?,
                }
            }
            if saves || self.state.finished {
                self.save()?;
            }
            if stop && !self.state.finished {
                return Err(self.interrupted());
            }
        }
        Ok(())
    }

    /// One optimizer step; whether some rank has been asked to stop. A device is given the step while the
    /// one before it still runs, and only that one is waited for.
    fn step(&mut self, samples: &[u32]) -> Result<bool> {
        if self.queued.is_none() {
            self.mark = Instant::now();
        }
        let (stop, step) = (self.stop.load(Ordering::Relaxed), self.state.step + 1);
        let started = self.train(|trainer, prepared, lengths| {
            trainer.begin(&prepared.data.train, lengths, samples, step, stop)
        })?;
        self.state.step = step;
        self.state.next_batch += 1;
        let stop = started.stop;
        if let Some(before) = self.queued.replace(started) {
            self.account(before)?;
        }
        if !self.prepared.classifier.parameters.placement.is_cuda() {
            self.settle()?;
        }
        Ok(stop)
    }

    /// Lets `body` train with this run's settings.
    fn train<T>(
        &mut self,
        body: impl FnOnce(&mut Trainer<'_>, &Prepared, &[usize]) -> Result<T>,
    ) -> Result<T> {
        let config = &self.prepared.config;
        let mut trainer = Trainer {
            classifier: &self.prepared.classifier,
            collective: &mut *self.collective,
            settings: &config.train,
            schedule: self.schedule,
            checkpoint: config.model.gradient_checkpointing,
            traffic: self.traffic.unwrap_or_default(),
            before: self.before.take(),
        };
        let result = body(&mut trainer, &self.prepared, &self.lengths);
        (self.traffic, self.before) = (Some(trainer.traffic), trainer.before);
        result.map_err(|error| self.everybodys(self.with_remedy(error)))
    }

    /// A device that is out of memory, with the settings that need less of it.
    fn with_remedy(&self, error: Error) -> Error {
        let Error::Memory(message) = error else { return error };
        let config = &self.prepared.config;
        let (tokens, longest) = (config.train.micro_tokens, config.data.max_length);
        let mut remedies = Vec::new();
        let held = self.lengths.iter().sum::<usize>().min(tokens);
        let half = (held / 2).max(longest);
        if half < held {
            remedies.push(format!("train.micro_tokens = {half} (the same result in more passes)"));
        }
        if !config.model.gradient_checkpointing {
            remedies.push(
                "model.gradient_checkpointing = true (the same result, a third slower)".into(),
            );
        }
        if config.model.gradient_checkpointing && !config.train.offload {
            remedies.push("train.offload = true (the same result)".into());
        }
        if config.adapter.is_some() && config.model.quantization.is_none() {
            remedies.push("model.quantization = \"int8\" or \"nf4\"".into());
        }
        if config.adapter.is_some() && !config.model.quantize_embeddings {
            remedies.push("model.quantize_embeddings = true".into());
        }
        remedies.push(format!("a data.max_length below {longest}"));
        remedies.push("more ranks".into());
        Error::Device(format!("{message}. What needs less: {}", remedies.join("; ")))
    }

    /// Waits for the last step, if nobody has yet.
    fn settle(&mut self) -> Result<()> {
        self.queued.take().map_or(Ok(()), |started| self.account(started))
    }

    /// Waits for a step and counts it.
    fn account(&mut self, started: Started) -> Result<()> {
        let outcome = self.train(|trainer, _, _| trainer.finish(started))?;
        let now = Instant::now();
        let seconds = now.duration_since(std::mem::replace(&mut self.mark, now)).as_secs_f64();
        let state = &mut self.state;
        state.samples += outcome.samples as u64;
        state.tokens += outcome.tokens as u64;
        state.train_seconds += seconds;
        state.sums.loss += outcome.loss_sum;
        state.sums.correct += outcome.correct;
        state.sums.samples += outcome.samples;
        state.sums.tokens += outcome.tokens;
        state.sums.seconds += seconds;
        let record = StepRecord {
            step: outcome.step as usize,
            epoch: state.epoch,
            loss: outcome.loss(),
            learning_rate: outcome.learning_rate,
            grad_norm: outcome.gradient_norm,
            samples: outcome.samples,
            tokens: outcome.tokens,
            seconds,
        };
        self.progress.step(&record);
        self.record(record)
    }

    /// Evaluates, keeps the model if it is the best, and counts towards early stopping.
    fn evaluate(&mut self) -> Result<Evaluation> {
        let Prepared { config, data, classifier, .. } = &self.prepared;
        let budget = config.train.micro_tokens;
        let evaluation = evaluate(classifier, &data.validation, budget, self.collective)
            .map_err(|error| self.everybodys(error))?;
        let better = self.state.best.is_none_or(|best| {
            evaluation.accuracy > best.accuracy
                || evaluation.accuracy == best.accuracy && evaluation.loss < best.loss
        });
        self.state.val_accuracy = evaluation.accuracy;
        self.state.stale = if better { 0 } else { self.state.stale + 1 };
        if better {
            self.state.best = Some(Best {
                accuracy: evaluation.accuracy,
                loss: evaluation.loss,
                epoch: self.state.epoch,
                step: self.state.step,
            });
            if self.main() {
                self.checkpoints.save_best(classifier, &data.tokenizer)?;
            }
        }
        let patience = config.train.early_stopping_patience;
        if patience.is_some_and(|patience| self.state.stale >= patience) {
            self.state.finished = true;
            self.progress.line(&format!(
                "stopping early: {} evaluations without a better validation accuracy",
                self.state.stale
            ));
        }
        Ok(evaluation)
    }

    fn record_evaluation(&mut self, evaluation: Evaluation) -> Result<()> {
        self.record(EvalRecord {
            step: self.state.step as usize,
            epoch: self.state.epoch,
            val_accuracy: evaluation.accuracy,
            val_loss: evaluation.loss,
            seconds: self.seconds(),
        })
    }

    /// Closes an epoch, or what was done of it when the run ends inside.
    fn end_epoch(&mut self, evaluation: Evaluation) -> Result<()> {
        let EpochSums { loss, correct, samples, tokens, seconds } = self.state.sums;
        let n = samples as f64;
        self.state.train_accuracy = correct as f64 / n;
        let record = EpochRecord {
            step: self.state.step as usize,
            epoch: self.state.epoch,
            train_accuracy: self.state.train_accuracy,
            train_loss: loss / n,
            val_accuracy: evaluation.accuracy,
            val_loss: evaluation.loss,
            learning_rate: self.prepared.config.train.learning_rate
                * self.schedule.multiplier(self.state.step - 1),
            samples_per_second: n / seconds,
            tokens_per_second: tokens as f64 / seconds,
            seconds,
        };
        self.progress.line(&format!(
            "epoch {}: train accuracy {:.4}, validation accuracy {:.4}, validation loss {:.4}",
            record.epoch, record.train_accuracy, record.val_accuracy, record.val_loss
        ));
        self.record(record)?;
        self.state.sums = EpochSums::default();
        self.state.epoch += 1;
        self.state.next_batch = 0;
        Ok(())
    }

    /// Saves a checkpoint, on rank 0.
    fn save(&mut self) -> Result<()> {
        self.state.seconds = self.seconds();
        if self.main() {
            let Prepared { data, classifier, .. } = &self.prepared;
            self.checkpoints.save(classifier, &data.tokenizer, &self.state)?;
        }
        Ok(())
    }

    fn interrupted(&self) -> Error {
        if !self.main() {
            return Error::Said { code: 130 };
        }
        Error::Interrupted(format!(
            "interrupted after step {}; everything is saved, continue with --resume",
            self.state.step
        ))
    }

    /// An error in what all ranks have computed alike (a loss that is not finite) is said once.
    fn everybodys(&self, error: Error) -> Error {
        match error {
            Error::User(_) if self.main() => Error::Agreed(Box::new(error)),
            Error::User(_) => Error::Said { code: error.exit_code() },
            error => error,
        }
    }

    fn record(&mut self, record: impl Into<Record>) -> Result<()> {
        match &mut self.metrics {
            Some(metrics) => metrics.write(record),
            None => Ok(()),
        }
    }

    fn main(&self) -> bool {
        self.collective.rank() == 0
    }

    fn seconds(&self) -> f64 {
        self.seconds_before + self.started.elapsed().as_secs_f64()
    }
}

/// Steps of all epochs, or `train.max_steps` if that is less.
fn total_steps(config: &Config, lengths: &[usize]) -> u64 {
    let train = &config.train;
    let of_epoch =
        |e| plan::epoch(lengths, train.batch(), train.group_window, train.seed, e).len() as u64;
    let all = (1..=train.epochs).map(of_epoch).sum();
    train.max_steps.map_or(all, |max| all.min(max as u64))
}
