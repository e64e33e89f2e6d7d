//! The end of a run: accuracy on the test set, the summary, and what is shown.

use std::path::Path;

use super::Prepared;
use crate::{
    Result,
    checkpoint::{Checkpoints, State},
    collective::{Collective, Traffic, agree},
    command::saved,
    config::{Config, Weights},
    report::{AllReduce, EpochRecord, Metrics, Record, Summary, epoch_table, peak_host_bytes},
    step::evaluate::evaluate,
};

/// Writes `summary.json` and shows the table of epochs. `traffic` is `None` if this process made no
/// step: the run was finished already, and what it measured then stands.
pub(super) fn conclude(
    prepared: &Prepared,
    state: &State,
    checkpoints: &Checkpoints,
    traffic: Option<Traffic>,
    collective: &mut dyn Collective,
) -> Result<()> {
    let config = &prepared.config;
    let dir = &config.run.dir;
    let summary = match traffic {
        Some(traffic) => Some(summarise(prepared, state, traffic, collective)?),
        None => None,
    };
    match collective.rank() {
        0 => show(dir, checkpoints, summary),
        _ => Ok(()),
    }
}

/// Writes the summary of a run, or reads that of one that was finished already, and shows what it came to.
pub(super) fn show(dir: &Path, checkpoints: &Checkpoints, summary: Option<Summary>) -> Result<()> {
    let summary = match summary {
        Some(summary) => {
            summary.write(dir)?;
            summary
        }
        None => Summary::read(dir)?,
    };
    let epochs: Vec<EpochRecord> = Metrics::read(dir)?
        .into_iter()
        .filter_map(|record| match record {
            Record::Epoch(epoch) => Some(epoch),
            _ => None,
        })
        .collect();
    println!("{}", epoch_table(&epochs, summary.best_epoch));
    if let Some(accuracy) = summary.test_accuracy {
        println!("test accuracy {accuracy:.4}");
    }
    println!("best model: {}", checkpoints.best().display());
    Ok(())
}

fn summarise(
    prepared: &Prepared,
    state: &State,
    traffic: Traffic,
    collective: &mut dyn Collective,
) -> Result<Summary> {
    let Prepared { config, classifier, threads, .. } = prepared;
    let test_accuracy = test(prepared, collective)?;
    let busy = traffic.busy.as_secs_f64();
    Ok(Summary {
        version: env!("CARGO_PKG_VERSION").into(),
        model: model_name(config),
        world_size: collective.world(),
        threads_per_rank: *threads,
        parameters: classifier.parameters.count(),
        trainable_parameters: classifier.parameters.trainable_count(),
        steps: state.step as usize,
        epochs: state.epoch - 1,
        train_accuracy: state.train_accuracy,
        val_accuracy: state.val_accuracy,
        best_val_accuracy: state.best.map_or(0.0, |best| best.accuracy),
        best_epoch: state.best.map_or(0, |best| best.epoch),
        test_accuracy,
        samples_per_second: state.samples as f64 / state.train_seconds,
        tokens_per_second: state.tokens as f64 / state.train_seconds,
        // Batches are ragged: nothing is padded to the longest of its batch.
        padding_share: 0.0,
        peak_host_bytes: most_held(collective)?,
        seconds: state.seconds,
        allreduce: (collective.world() > 1 && busy > 0.0).then(|| AllReduce {
            bytes: traffic.bytes,
            seconds: busy,
            bytes_per_second: traffic.bytes as f64 / busy,
            hidden_share: traffic.hidden.as_secs_f64() / busy,
        }),
    })
}

/// The most memory a rank held at once, the highest over the ranks.
pub(super) fn most_held(collective: &mut dyn Collective) -> Result<u64> {
    let peaks = collective.all_gather(&peak_host_bytes().unwrap_or(0).to_le_bytes())?;
    let peak = |bytes: &Vec<u8>| bytes.as_slice().try_into().map_or(0, u64::from_le_bytes);
    Ok(peaks.iter().map(peak).max().unwrap_or(0))
}

/// Accuracy of the best model on `data.test`.
fn test(prepared: &Prepared, collective: &mut dyn Collective) -> Result<Option<f64>> {
    let Some(test) = &prepared.data.test else { return Ok(None) };
    // Rank 0 has written it; the others read it.
    collective.barrier()?;
    let best = agree(
        collective,
        saved::open(&prepared.classifier.parameters.placement, &prepared.config.run.dir, None),
    )?;
    let budget = prepared.config.train.micro_tokens;
    Ok(Some(evaluate(&best.classifier, test, budget, collective)?.accuracy))
}

/// The model's name for tables: its directory's, or its family.
pub(super) fn model_name(config: &Config) -> String {
    match &config.model.weights {
        Weights::Pretrained(path) => {
            path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
        }
        Weights::Random(shape) => shape.family().model_type().into(),
        Weights::Linear(linear) => linear.name().into(),
    }
}
