//! The loop of a run: epochs, steps, evaluations, checkpoints, and stopping in good order.

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use signal_hook::{
    consts::{SIGINT, SIGTERM, SIGUSR1},
    flag,
};

use super::Prepared;
use crate::{
    Error, Result,
    atomic::write_atomic,
    batch::plan,
    checkpoint::{Best, Checkpoints, EpochSums, State, files},
    collective::{Collective, Traffic, agree},
    config::Config,
    report::{
        AllReduce, EpochRecord, EvalRecord, Metrics, Progress, Record, StepRecord, Summary,
        epoch_table, peak_host_bytes,
    },
    step::{
        Outcome, Trainer,
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
    traffic: Traffic,
    /// Rank 0's records.
    metrics: Option<Metrics>,
    progress: Progress,
    stop: Arc<AtomicBool>,
    started: Instant,
    seconds_before: f64,
}

impl<'a> Run<'a> {
    /// Plans the run, or finds where it stopped.
    pub(super) fn new(
        prepared: Prepared,
        collective: &'a mut dyn Collective,
        resume: bool,
    ) -> Result<Self> {
        let config = &prepared.config;
        let lengths = prepared.data.train.lengths();
        let total_steps = total_steps(config, &lengths);
        let schedule = Schedule::new(config.train.schedule, config.train.warmup(), total_steps);
        let schedule = agree(collective, schedule)?;
        let checkpoints = Checkpoints::new(&config.run.dir, config.checkpoint.keep);
        let data = fingerprint(&prepared);
        let start = agree(collective, find_start(&prepared, &checkpoints, resume, &data))?;
        let state = start.unwrap_or_else(|| State {
            version: env!("CARGO_PKG_VERSION").into(),
            epoch: 1,
            data,
            ..State::default()
        });
        let main = collective.rank() == 0;
        let opened = main.then(|| open_outputs(config, &checkpoints, state.step)).transpose();
        let metrics = agree(collective, opened)?;
        let progress = match main {
            true => Progress::new(total_steps as usize, state.step as usize),
            false => Progress::hidden(),
        };
        let stop = Arc::new(AtomicBool::new(false));
        catch_signals(&stop)?;
        let seconds_before = state.seconds;
        let (traffic, started) = (Traffic::default(), Instant::now());
        Ok(Self {
            prepared,
            collective,
            lengths,
            total_steps,
            schedule,
            checkpoints,
            state,
            traffic,
            metrics,
            progress,
            stop,
            started,
            seconds_before,
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
        self.conclude()
    }

    /// The rest of the current epoch.
    fn epoch(&mut self, batches: &[Vec<u32>]) -> Result<()> {
        while self.state.next_batch < batches.len() && !self.state.finished {
            let outcome = self.step(&batches[self.state.next_batch])?;
            let step = self.state.step;
            let ends_epoch = self.state.next_batch == batches.len();
            let ends_run = step == self.total_steps;
            let due = |every: Option<usize>| every.is_some_and(|n| step.is_multiple_of(n as u64));
            if ends_epoch || ends_run {
                self.end_epoch(ends_run)?;
            } else if due(self.prepared.config.train.eval_steps) {
                let evaluation = self.evaluate()?;
                self.record(EvalRecord {
                    step: step as usize,
                    epoch: self.state.epoch,
                    val_accuracy: evaluation.accuracy,
                    val_loss: evaluation.loss,
                    seconds: self.seconds(),
                })?;
            }
            let save = due(self.prepared.config.checkpoint.every_steps);
            if save || ends_epoch || self.state.finished || outcome.stop {
                self.save()?;
            }
            if outcome.stop && !self.state.finished {
                return Err(self.interrupted());
            }
            if ends_epoch {
                return Ok(());
            }
        }
        Ok(())
    }

    /// One optimizer step.
    fn step(&mut self, samples: &[u32]) -> Result<Outcome> {
        let begin = Instant::now();
        let config = &self.prepared.config;
        let mut trainer = Trainer {
            classifier: &self.prepared.classifier,
            collective: &mut *self.collective,
            settings: &config.train,
            schedule: self.schedule,
            checkpoint: config.model.gradient_checkpointing,
            traffic: self.traffic,
        };
        let stop = self.stop.load(Ordering::Relaxed);
        let step = self.state.step + 1;
        let outcome = trainer.step(&self.prepared.data.train, &self.lengths, samples, step, stop);
        self.traffic = trainer.traffic;
        let outcome = outcome.map_err(|error| match error {
            // What is not finite is so on all ranks; it is said once.
            Error::User(_) if self.collective.rank() != 0 => Error::Said { code: 2 },
            error @ Error::User(_) => Error::Agreed(Box::new(error)),
            error => error,
        })?;
        let seconds = begin.elapsed().as_secs_f64();
        let state = &mut self.state;
        state.step = step;
        state.next_batch += 1;
        state.samples += outcome.samples as u64;
        state.tokens += outcome.tokens as u64;
        state.train_seconds += seconds;
        state.sums.loss += outcome.loss_sum;
        state.sums.correct += outcome.correct;
        state.sums.samples += outcome.samples;
        state.sums.tokens += outcome.tokens;
        state.sums.seconds += seconds;
        let record = StepRecord {
            step: step as usize,
            epoch: state.epoch,
            loss: outcome.loss(),
            learning_rate: outcome.learning_rate,
            grad_norm: outcome.gradient_norm,
            samples: outcome.samples,
            tokens: outcome.tokens,
            seconds,
        };
        self.progress.step(&record);
        self.record(record)?;
        Ok(outcome)
    }

    /// Evaluates, keeps the model if it is the best, and counts towards early stopping.
    fn evaluate(&mut self) -> Result<Evaluation> {
        let Prepared { config, data, classifier, .. } = &self.prepared;
        let budget = config.train.micro_tokens;
        let evaluation = evaluate(classifier, &data.validation, budget, self.collective)?;
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

    fn end_epoch(&mut self, ends_run: bool) -> Result<()> {
        let evaluation = self.evaluate()?;
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
        self.state.finished |= ends_run;
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

    /// Writes the summary and shows the table of epochs.
    fn conclude(mut self) -> Result<()> {
        std::mem::replace(&mut self.progress, Progress::hidden()).finish();
        let test_accuracy = self.test()?;
        let traffic = self.traffic;
        if !self.main() {
            return Ok(());
        }
        let Prepared { config, classifier, threads, .. } = &self.prepared;
        let state = &self.state;
        let best = state.best.unwrap_or(Best { accuracy: 0.0, loss: 0.0, epoch: 0, step: 0 });
        let busy = traffic.busy.as_secs_f64();
        let summary = Summary {
            version: env!("CARGO_PKG_VERSION").into(),
            model: model_name(config),
            world_size: self.collective.world(),
            threads_per_rank: *threads,
            parameters: classifier.parameters.count(),
            trainable_parameters: classifier.parameters.trainable_count(),
            steps: state.step as usize,
            epochs: state.epoch - 1,
            train_accuracy: state.train_accuracy,
            val_accuracy: state.val_accuracy,
            best_val_accuracy: best.accuracy,
            best_epoch: best.epoch,
            test_accuracy,
            samples_per_second: state.samples as f64 / state.train_seconds,
            tokens_per_second: state.tokens as f64 / state.train_seconds,
            // Batches are ragged: no token of padding is ever computed.
            padding_share: 0.0,
            peak_host_bytes: peak_host_bytes().unwrap_or(0),
            seconds: self.seconds(),
            allreduce: (busy > 0.0).then(|| AllReduce {
                bytes: traffic.bytes,
                seconds: busy,
                bytes_per_second: traffic.bytes as f64 / busy,
                hidden_share: traffic.hidden.as_secs_f64() / busy,
            }),
        };
        summary.write(&config.run.dir)?;
        let epochs: Vec<EpochRecord> = Metrics::read(&config.run.dir)?
            .into_iter()
            .filter_map(|record| match record {
                Record::Epoch(epoch) => Some(epoch),
                _ => None,
            })
            .collect();
        println!("{}", epoch_table(&epochs, best.epoch));
        if let Some(accuracy) = test_accuracy {
            println!("test accuracy {accuracy:.4}");
        }
        println!("best model: {}", self.checkpoints.best().display());
        Ok(())
    }

    /// Accuracy of the best model on `data.test`.
    fn test(&mut self) -> Result<Option<f64>> {
        let Some(test) = &self.prepared.data.test else {
            return Ok(None);
        };
        // Rank 0 has written it; the others read it.
        self.collective.barrier()?;
        let config = &self.prepared.config;
        let best = super::super::saved::open(&config.run.dir, None);
        let best = agree(self.collective, best)?;
        let budget = config.train.micro_tokens;
        Ok(Some(evaluate(&best.classifier, test, budget, self.collective)?.accuracy))
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

/// SIGINT, SIGTERM and SIGUSR1 (what `allreel launch` sends in their place) ask to stop in good
/// order. A second SIGINT ends the process at once.
fn catch_signals(stop: &Arc<AtomicBool>) -> Result<()> {
    let interrupted = Arc::new(AtomicBool::new(false));
    let catch = || -> std::io::Result<()> {
        flag::register_conditional_shutdown(SIGINT, 130, interrupted.clone())?;
        flag::register(SIGINT, interrupted.clone())?;
        for signal in [SIGINT, SIGTERM, SIGUSR1] {
            flag::register(signal, stop.clone())?;
        }
        Ok(())
    };
    catch().map_err(|e| Error::Bug(format!("signal handler: {e}")))
}

/// Steps of all epochs, or `train.max_steps` if that is less.
fn total_steps(config: &Config, lengths: &[usize]) -> u64 {
    let train = &config.train;
    let of_epoch =
        |e| plan::epoch(lengths, train.batch(), train.group_window, train.seed, e).len() as u64;
    let all = (1..=train.epochs).map(of_epoch).sum();
    train.max_steps.map_or(all, |max| all.min(max as u64))
}

/// What the training set contains, as a hash.
fn fingerprint(prepared: &Prepared) -> String {
    let mut hash = blake3::Hasher::new();
    let train = &prepared.data.train;
    hash.update(bytemuck::cast_slice(&train.tokens));
    hash.update(bytemuck::cast_slice(&train.offsets));
    for label in train.labels.iter().flatten() {
        hash.update(&label.to_le_bytes());
    }
    hash.finalize().to_hex().to_string()
}

/// The state of the newest checkpoint, with its weights put in place; `None` to start afresh.
fn find_start(
    prepared: &Prepared,
    checkpoints: &Checkpoints,
    resume: bool,
    data: &str,
) -> Result<Option<State>> {
    if !resume {
        return Ok(None);
    }
    let dir = &prepared.config.run.dir;
    let own = dir.join("config.toml");
    if own.is_file()
        && let Some(difference) = prepared.config.difference(&Config::load(&own, &[])?)?
    {
        return Err(Error::User(format!(
            "cannot resume {}: {difference} there; use the settings it was started with",
            dir.display()
        )));
    }
    let Some((path, state)) = checkpoints.latest(|warning| eprintln!("warning: {warning}"))? else {
        return Ok(None);
    };
    if state.data != data {
        return Err(Error::Data(format!(
            "cannot resume {}: the training data is not what it was started with",
            dir.display()
        )));
    }
    files::restore(&path, &prepared.classifier)?;
    Ok(Some(state))
}

/// Rank 0's files: cleans up after a killed run, writes the resolved config, opens the metrics.
fn open_outputs(config: &Config, checkpoints: &Checkpoints, step: u64) -> Result<Metrics> {
    checkpoints.sweep()?;
    let dir = &config.run.dir;
    let path: PathBuf = dir.join("config.toml");
    write_atomic(&path, config.to_toml()?.as_bytes())?;
    match step {
        0 => Metrics::create(dir),
        step => Metrics::resume(dir, step as usize),
    }
}

/// The model's name for tables: its directory, or its kind.
fn model_name(config: &Config) -> String {
    match &config.model.weights {
        crate::config::Weights::Pretrained(path) => {
            path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
        }
        crate::config::Weights::Random(_) => "bert".into(),
    }
}
