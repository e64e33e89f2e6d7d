//! Where a run begins: anew or at its newest checkpoint, alone in its directory, on the same bits
//! on every rank.

use std::{
    collections::HashSet,
    fs::{File, TryLockError},
    path::{Path, PathBuf},
    sync::{Arc, atomic::AtomicBool},
};

use candle_core::DType;
use signal_hook::{
    consts::{SIGINT, SIGTERM, SIGUSR1},
    flag,
};

use super::Prepared;
use crate::{
    Error, Result,
    atomic::write_atomic,
    checkpoint::{Checkpoints, State, files},
    collective::{Collective, agree, must_be_equal},
    config::Config,
    device::to_host,
    model::Parameters,
    report::Metrics,
};

/// What the loop starts with.
pub(super) struct Start {
    pub(super) state: State,
    /// Rank 0's records.
    pub(super) metrics: Option<Metrics>,
    /// Held by rank 0 as long as the run lasts.
    pub(super) lock: Option<File>,
}

/// Finds the run's start and opens its files.
///
/// # Errors
/// `User` if another process works on this run or its settings differ; `Data` if a checkpoint does
/// not fit; `Peer` if ranks would start from different bits.
pub(super) fn start(
    prepared: &Prepared,
    checkpoints: &Checkpoints,
    collective: &mut dyn Collective,
    resume: bool,
) -> Result<Start> {
    let main = collective.rank() == 0;
    let dir = &prepared.config.run.dir;
    let locked = main.then(|| lock(dir)).transpose();
    let lock = agree(collective, locked)?;
    let data = fingerprint(prepared);
    must_be_equal(collective, "training data", &data)?;
    let frozen = agree(collective, weights(&prepared.classifier.parameters, false))?;
    must_be_equal(collective, "frozen weights", &frozen)?;
    let found = find(prepared, checkpoints, resume, main, [&data, &frozen]);
    let state = agree(collective, found)?.unwrap_or_else(|| State {
        version: env!("CARGO_PKG_VERSION").into(),
        epoch: 1,
        data,
        frozen,
        ..State::default()
    });
    // A directory of its own on every node would start each from other bits.
    let weights = weights(&prepared.classifier.parameters, true);
    let weights = agree(collective, weights)?;
    must_be_equal(collective, "start", &format!("step {}, weights {weights}", state.step))?;
    let opened = main.then(|| open_outputs(&prepared.config, checkpoints, state.step)).transpose();
    let metrics = agree(collective, opened)?;
    Ok(Start { state, metrics, lock })
}

/// Keeps a second process off a run: each would sweep away what the other is writing.
pub(super) fn lock(dir: &Path) -> Result<File> {
    let path = dir.join(".lock");
    let file = File::create(&path).map_err(|e| Error::writing(&path, e))?;
    match file.try_lock() {
        Err(TryLockError::WouldBlock) => Err(Error::User(format!(
            "another process is working on {}; wait for it or stop it",
            dir.display()
        ))),
        // A file system without locks is no reason not to train.
        Ok(()) | Err(TryLockError::Error(_)) => Ok(file),
    }
}

/// What the training and validation sets contain, as a hash.
fn fingerprint(prepared: &Prepared) -> String {
    let mut hash = blake3::Hasher::new();
    for set in [&prepared.data.train, &prepared.data.validation] {
        hash.update(bytemuck::cast_slice(&set.tokens));
        hash.update(bytemuck::cast_slice(&set.offsets));
        for label in set.labels.iter().flatten() {
            hash.update(&label.to_le_bytes());
        }
    }
    hash.finalize().to_hex().to_string()
}

/// The parameters that train, or those that do not, as a hash.
fn weights(parameters: &Parameters, trained: bool) -> Result<String> {
    let mut hash = blake3::Hasher::new();
    let training: HashSet<&str> = parameters.trained().collect();
    for name in parameters.names().filter(|name| training.contains(name) == trained) {
        let value = to_host(&parameters.value(name)?)?.to_dtype(DType::F32)?;
        let values = allreel_kernels::common::host::read::<f32>(&value)?;
        if values.iter().any(|x| !x.is_finite()) {
            return Err(Error::Data(
                "the weights that training would start from are not all finite; fetch the model again"
                    .into(),
            ));
        }
        hash.update(bytemuck::cast_slice(&values));
    }
    Ok(hash.finalize().to_hex()[..16].to_owned())
}

/// The state of the newest checkpoint, with its weights put in place; `None` to start afresh.
fn find(
    prepared: &Prepared,
    checkpoints: &Checkpoints,
    resume: bool,
    main: bool,
    [data, frozen]: [&str; 2],
) -> Result<Option<State>> {
    let config = &prepared.config;
    let Some((path, state)) = newest(config, checkpoints, resume, main, data)? else {
        return Ok(None);
    };
    if !state.frozen.is_empty() && state.frozen != frozen {
        return Err(Error::Data(format!(
            "cannot resume {}: the weights of model.path that do not train are not those it was started with; give \
             it the same model",
            config.run.dir.display()
        )));
    }
    files::restore(&path, &prepared.classifier)?;
    resuming(main, &path, &state);
    Ok(Some(state))
}

/// Says where a run goes on.
pub(super) fn resuming(main: bool, path: &Path, state: &State) {
    if main {
        eprintln!("resuming after step {} ({})", state.step, path.display());
    }
}

/// The newest checkpoint of a run with these settings and the training data `data`, if one is asked for and
/// there.
pub(super) fn newest(
    config: &Config,
    checkpoints: &Checkpoints,
    resume: bool,
    main: bool,
    data: &str,
) -> Result<Option<(PathBuf, State)>> {
    if !resume {
        return Ok(None);
    }
    let dir = &config.run.dir;
    let own = dir.join("config.toml");
    if own.is_file()
        && let Some(difference) = config.difference(&Config::load(&own, &[])?)?
    {
        return Err(Error::User(format!(
            "cannot resume {}: {difference} there; use the settings it was started with, or another \
             run.dir",
            dir.display()
        )));
    }
    let say = |line: &str| {
        if main {
            eprintln!("{line}");
        }
    };
    let Some((path, state)) = checkpoints.latest(|warning| say(&format!("warning: {warning}")))?
    else {
        say(&format!("no checkpoint in {}; starting at step 1", dir.display()));
        return Ok(None);
    };
    if state.data != data {
        return Err(Error::Data(format!(
            "cannot resume {}: the training or validation data is not what it was started with",
            dir.display()
        )));
    }
    Ok(Some((path, state)))
}

/// Rank 0's files: cleans up after a killed run, writes the resolved config, opens the metrics.
pub(super) fn open_outputs(
    config: &Config,
    checkpoints: &Checkpoints,
    step: u64,
) -> Result<Metrics> {
    checkpoints.sweep(step)?;
    let dir = &config.run.dir;
    write_atomic(&dir.join("config.toml"), config.to_toml()?.as_bytes())?;
    match step {
        0 => Metrics::create(dir),
        step => Metrics::resume(dir, step as usize),
    }
}

/// A flag that SIGINT, SIGTERM and SIGUSR1 (what `allreel launch` sends in their place) raise: stop
/// in good order. A second SIGINT ends the process at once.
pub(super) fn stop_flag() -> Result<Arc<AtomicBool>> {
    let (stop, interrupted) = (Arc::<AtomicBool>::default(), Arc::<AtomicBool>::default());
    let catch = || -> std::io::Result<()> {
        flag::register_conditional_shutdown(SIGINT, 130, interrupted.clone())?;
        flag::register(SIGINT, interrupted.clone())?;
        for signal in [SIGINT, SIGTERM, SIGUSR1] {
            flag::register(signal, stop.clone())?;
        }
        Ok(())
    };
    catch().map_err(|e| Error::Bug(format!("signal handler: {e}")))?;
    Ok(stop)
}
