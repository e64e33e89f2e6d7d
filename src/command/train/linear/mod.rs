//! `allreel train` of a classifier on n-grams, or of the majority: steps of L-BFGS in the place of the
//! optimizer's, and the same run directory.
//!
//! A step reads all training reviews, so that an epoch is a step too. Every [`EVALUATE`] steps (or
//! `train.eval_steps`) the model is evaluated, and kept in `best/` if it is better. The run ends when the
//! gradient is [`TOLERANCE`] of what it began with, or after `train.max_steps` (100 if not given). A
//! checkpoint has all of the solver's state: going on from one changes no bit.

mod problem;
mod solver_files;

use std::{
    fs::File,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use super::{Args, check_run_dir, conclusion, start, version};
use crate::{
    Error, Result,
    checkpoint::{Best, Checkpoints, State},
    collective::{Collective, agree, must_be_equal},
    command::{linear::tally, start_threads},
    config::{Config, Weights},
    device::Choice,
    linear::{
        lbfgs::{History, Lbfgs},
        model::Model,
        regression::Evaluation,
    },
    report::{EpochRecord, Metrics, Progress, StepRecord, Summary},
};
use problem::Problem;

/// Steps between two evaluations where nothing is said.
const EVALUATE: usize = 5;
/// Most steps where nothing is said; real reviews take about 30.
const MOST_STEPS: usize = 100;
/// Share of the first gradient's largest element at which a run ends.
const TOLERANCE: f64 = 1e-4;

/// Runs the command as one rank.
pub(super) fn run(args: &Args, config: Config, collective: &mut dyn Collective) -> Result<()> {
    must_be_equal(collective, "version", &version())?;
    must_be_equal(collective, "config", &config.fingerprint()?)?;
    let threads = start_threads(config.run.threads, collective.local_world());
    agree(collective, check(args, &config))?;
    let result = Run::new(config, threads, collective, args.resume).and_then(Run::finish);
    if result.is_err() {
        collective.break_off();
    }
    result
}

fn check(args: &Args, config: &Config) -> Result<()> {
    crate::command::linear::on_cpu(args.device.unwrap_or(Choice::Auto))?;
    check_run_dir(&config.run.dir, args.resume)
}

struct Run<'a> {
    config: Config,
    threads: usize,
    problem: Problem,
    collective: &'a mut dyn Collective,
    checkpoints: Checkpoints,
    state: State,
    solver: Lbfgs,
    /// The largest element of the first gradient.
    first_slope: f64,
    /// Loss and hits at the solver's point.
    fit: (f64, usize),
    /// Whether this process made a step.
    stepped: bool,
    metrics: Option<Metrics>,
    progress: Progress,
    stop: Arc<AtomicBool>,
    started: Instant,
    seconds_before: f64,
    /// Held until the run ends.
    _lock: Option<File>,
}

impl<'a> Run<'a> {
    fn new(
        config: Config,
        threads: usize,
        collective: &'a mut dyn Collective,
        resume: bool,
    ) -> Result<Self> {
        let started = Instant::now();
        let main = collective.rank() == 0;
        let Weights::Linear(linear) = &config.model.weights else {
            return Err(Error::Bug("a linear run of a network".into()));
        };
        let problem = Problem::new(&config, linear, collective)?;
        if main {
            describe(&config, &problem, collective.world(), threads);
        }
        let lock = agree(collective, main.then(|| start::lock(&config.run.dir)).transpose())?;
        let checkpoints = Checkpoints::new(&config.run.dir, config.checkpoint.keep);
        let origin = vec![0.0; problem.regression.dimensions()];
        let first = problem.regression.evaluate(&origin, collective)?;
        let first_slope = first.gradient.iter().fold(0.0, |most, g| g.abs().max(most));
        let found = start::newest(&config, &checkpoints, resume, main, &problem.data);
        let found = found.and_then(|found| {
            found.map(|(dir, state)| resumed(main, &dir, state, origin.len())).transpose()
        });
        let (state, solver, fit) = match agree(collective, found)? {
            None => {
                let fit = (first.loss, first.correct);
                (fresh(&problem), Lbfgs::at(origin, first.value, first.gradient), fit)
            }
            Some((state, point, history)) => {
                let now = problem.regression.evaluate(&point, collective)?;
                let solver = Lbfgs { history, ..Lbfgs::at(point, now.value, now.gradient) };
                (state, solver, (now.loss, now.correct))
            }
        };
        let position = blake3::hash(bytemuck::cast_slice(&solver.point)).to_hex();
        must_be_equal(collective, "start", &format!("step {}, weights {position}", state.step))?;
        let opened = main.then(|| start::open_outputs(&config, &checkpoints, state.step));
        let metrics = agree(collective, opened.transpose())?;
        let most = config.train.max_steps.unwrap_or(MOST_STEPS);
        Ok(Self {
            progress: if main {
                Progress::new(most, state.step as usize)
            } else {
                Progress::hidden()
            },
            stop: start::stop_flag()?,
            seconds_before: state.seconds,
            fit,
            stepped: false,
            config,
            threads,
            problem,
            collective,
            checkpoints,
            state,
            solver,
            first_slope,
            metrics,
            started,
            _lock: lock,
        })
    }

    fn finish(mut self) -> Result<()> {
        while !self.state.finished {
            self.step()?;
            let stop = self.anyone_stops()?;
            let step = self.state.step;
            let due = |every: Option<usize>| every.is_some_and(|n| step.is_multiple_of(n as u64));
            if self.state.finished || due(self.config.train.eval_steps.or(Some(EVALUATE))) {
                self.evaluate()?;
            }
            if self.state.finished || stop || due(self.config.checkpoint.every_steps) {
                self.save()?;
            }
            if stop && !self.state.finished {
                return Err(self.interrupted());
            }
        }
        std::mem::replace(&mut self.progress, Progress::hidden()).finish();
        self.conclude()
    }

    /// One step of the solver; none that lowers the loss ends the run.
    fn step(&mut self) -> Result<()> {
        let start = Instant::now();
        let mut fit = self.fit;
        let (regression, collective) = (&self.problem.regression, &mut *self.collective);
        let length = self.solver.step(&mut |point| {
            let Evaluation { value, gradient, loss, correct } =
                regression.evaluate(point, collective)?;
            fit = (loss, correct);
            Ok((value, gradient))
        })?;
        if length.is_some() {
            self.fit = fit;
        }
        self.stepped = true;
        let (state, samples) = (&mut self.state, self.problem.samples);
        state.step += 1;
        state.epoch += 1;
        let most = self.config.train.max_steps.unwrap_or(MOST_STEPS) as u64;
        let done = self.solver.slope() <= TOLERANCE * self.first_slope;
        state.finished = length.is_none() || done || state.step == most;
        let seconds = start.elapsed().as_secs_f64();
        state.train_accuracy = self.fit.1 as f64 / samples as f64;
        state.samples += samples as u64;
        state.tokens += self.problem.entries as u64;
        state.train_seconds += seconds;
        let record = StepRecord {
            step: state.step as usize,
            epoch: state.step as usize,
            loss: self.fit.0,
            learning_rate: length.unwrap_or(0.0),
            grad_norm: self.solver.gradient.iter().map(|g| g * g).sum::<f64>().sqrt(),
            samples,
            tokens: self.problem.entries,
            seconds,
        };
        state.sums.seconds += seconds;
        state.sums.samples += samples;
        state.sums.tokens += self.problem.entries;
        self.progress.step(&record);
        self.metrics.as_mut().map_or(Ok(()), |metrics| metrics.write(record))
    }

    /// Whether some rank has been asked to stop.
    fn anyone_stops(&mut self) -> Result<bool> {
        let mut stop = [f64::from(u8::from(self.stop.load(Ordering::Relaxed)))];
        self.collective.all_reduce_f64(&mut stop)?;
        Ok(stop[0] > 0.0)
    }

    /// Evaluates, keeps the model if it is the best, and counts towards early stopping.
    fn evaluate(&mut self) -> Result<()> {
        let model = self.problem.model(&self.solver.point);
        let share = &self.problem.validation;
        let scores = model.scores(&share.rows);
        let (accuracy, loss) = tally(&scores, &share.labels, share.total, self.collective)?;
        let better = self.state.best.is_none_or(|best| {
            accuracy > best.accuracy || accuracy == best.accuracy && loss < best.loss
        });
        let (step, state) = (self.state.step, &mut self.state);
        state.val_accuracy = accuracy;
        state.stale = if better { 0 } else { state.stale + 1 };
        if better {
            state.best = Some(Best { accuracy, loss, epoch: step as usize, step });
            if self.metrics.is_some() {
                let names = self.problem.names.as_deref();
                self.checkpoints.write_best(|dir| model.save(dir, names))?;
            }
        }
        if self.config.train.early_stopping_patience.is_some_and(|most| self.state.stale >= most) {
            self.state.finished = true;
        }
        self.record(accuracy, loss)
    }

    fn record(&mut self, val_accuracy: f64, val_loss: f64) -> Result<()> {
        let sums = std::mem::take(&mut self.state.sums);
        let record = EpochRecord {
            step: self.state.step as usize,
            epoch: self.state.step as usize,
            train_accuracy: self.state.train_accuracy,
            train_loss: self.fit.0,
            val_accuracy,
            val_loss,
            learning_rate: 1.0,
            samples_per_second: sums.samples as f64 / sums.seconds,
            tokens_per_second: sums.tokens as f64 / sums.seconds,
            seconds: sums.seconds,
        };
        self.progress.line(&format!(
            "step {}: train accuracy {:.4}, validation accuracy {val_accuracy:.4}, validation loss {val_loss:.4}",
            record.step, record.train_accuracy
        ));
        self.metrics.as_mut().map_or(Ok(()), |metrics| metrics.write(record))
    }

    /// Saves a checkpoint, on rank 0.
    fn save(&mut self) -> Result<()> {
        self.state.seconds = self.seconds();
        match self.collective.rank() {
            0 => self.checkpoints.write(&self.state, |dir| solver_files::save(dir, &self.solver)),
            _ => Ok(()),
        }
    }

    fn interrupted(&self) -> Error {
        if self.collective.rank() != 0 {
            return Error::Said { code: 130 };
        }
        Error::Interrupted(format!(
            "interrupted after step {}; everything is saved, continue with --resume",
            self.state.step
        ))
    }

    fn conclude(mut self) -> Result<()> {
        let dir = self.config.run.dir.clone();
        let summary = match self.stepped {
            true => Some(self.summarise(&dir)?),
            false => None,
        };
        match self.collective.rank() {
            0 => conclusion::show(&dir, &self.checkpoints, summary),
            _ => Ok(()),
        }
    }

    fn summarise(&mut self, dir: &Path) -> Result<Summary> {
        let test_accuracy = self.test(dir)?;
        let state = &self.state;
        Ok(Summary {
            version: env!("CARGO_PKG_VERSION").into(),
            model: conclusion::model_name(&self.config),
            world_size: self.collective.world(),
            threads_per_rank: self.threads,
            parameters: self.solver.point.len(),
            trainable_parameters: self.solver.point.len(),
            steps: state.step as usize,
            epochs: state.step as usize,
            train_accuracy: state.train_accuracy,
            val_accuracy: state.val_accuracy,
            best_val_accuracy: state.best.map_or(0.0, |best| best.accuracy),
            best_epoch: state.best.map_or(0, |best| best.epoch),
            test_accuracy,
            samples_per_second: state.samples as f64 / state.train_seconds,
            tokens_per_second: state.tokens as f64 / state.train_seconds,
            padding_share: 0.0,
            peak_host_bytes: conclusion::most_held(self.collective)?,
            seconds: state.seconds,
            allreduce: None,
        })
    }

    /// Accuracy of the best model on `data.test`.
    fn test(&mut self, dir: &Path) -> Result<Option<f64>> {
        let Some(test) = &self.problem.test else { return Ok(None) };
        // Rank 0 has written it; the others read it.
        self.collective.barrier()?;
        let best = agree(self.collective, Model::load(&dir.join("best")))?;
        let scores = best.scores(&test.rows);
        Ok(Some(tally(&scores, &test.labels, test.total, self.collective)?.0))
    }

    fn seconds(&self) -> f64 {
        self.seconds_before + self.started.elapsed().as_secs_f64()
    }
}

fn fresh(problem: &Problem) -> State {
    State {
        version: env!("CARGO_PKG_VERSION").into(),
        epoch: 1,
        data: problem.data.clone(),
        ..State::default()
    }
}

fn resumed(
    main: bool,
    dir: &Path,
    state: State,
    length: usize,
) -> Result<(State, Vec<f64>, History)> {
    let (point, history) = solver_files::load(dir, length)?;
    start::resuming(main, dir, &state);
    Ok((state, point, history))
}

fn describe(config: &Config, problem: &Problem, world: usize, threads: usize) {
    eprintln!(
        "{}: {} features; {} reviews to train on, {} to validate; {world} rank{} of {threads} thread{} on CPU; run {}",
        conclusion::model_name(config),
        problem.blank.keys.len(),
        problem.samples,
        problem.validation.total,
        if world == 1 { "" } else { "s" },
        if threads == 1 { "" } else { "s" },
        config.run.dir.display()
    );
}
