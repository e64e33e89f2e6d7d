//! `allreel train`: from a config to a trained classifier.
//!
//! | file | owns |
//! |---|---|
//! | this | preparing: config, ranks, data, model, checks |
//! | `start` | where the run begins: anew, or at a checkpoint |
//! | `run` | the loop over epochs and steps |
//! | `linear` | the same for classifiers on n-grams |
//! | `conclusion` | test accuracy and summary |

mod conclusion;
mod linear;
mod run;
mod start;

use std::path::{Path, PathBuf};

use super::{
    datasets::{self, Datasets},
    model, start_threads,
};
use crate::{
    Error, Result,
    collective::{Collective, agree, must_be_equal, on_device},
    config::{self, Config, Weights},
    data::TokenSet,
    device::{Choice, Placement},
    hub::{Hub, Source},
    model::{Classifier, classifier::LoadReport},
};

/// Arguments of `allreel train`.
#[derive(clap::Args)]
pub struct Args {
    /// TOML file with the settings of the run
    config: PathBuf,
    /// Replace one setting of the file; may be given several times
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    overrides: Vec<String>,
    /// Where to compute [default: the file's run.device]
    #[arg(long)]
    device: Option<Choice>,
    /// Continue from the last checkpoint in run.dir (or start, if there is none)
    #[arg(long)]
    resume: bool,
}

/// Everything a run needs, checked.
struct Prepared {
    config: Config,
    threads: usize,
    data: Datasets,
    classifier: Classifier,
}

/// Runs the command as one rank.
///
/// # Errors
/// As the parts.
pub fn run(args: &Args, carrier: &mut dyn Collective) -> Result<()> {
    let config = agree(carrier, Config::load(&args.config, &args.overrides))?;
    if let Weights::Linear(_) = config.model.weights {
        return linear::run(args, config, carrier);
    }
    let prepared = prepare(args, config, carrier)?;
    let mut collective = on_device(carrier, &prepared.classifier.parameters.placement.device)?;
    let run = run::Run::new(prepared, &mut *collective, args.resume);
    let result = run.and_then(run::Run::finish);
    if result.is_err() {
        collective.break_off();
    }
    result
}

fn prepare(args: &Args, config: Config, collective: &mut dyn Collective) -> Result<Prepared> {
    must_be_equal(collective, "version", &version())?;
    must_be_equal(collective, "config", &config.fingerprint()?)?;
    let threads = start_threads(config.run.threads, collective.local_world());
    agree(collective, check_run_dir(&config.run.dir, args.resume))?;
    let local = fetch_model(&config, collective)?;
    let choice = args.device.unwrap_or(config.run.device);
    let placement = Placement::open(choice, collective.local_rank());
    let placement = agree(collective, placement)?;
    must_be_equal(collective, "kind of device", &format!("{:?}", placement.dtype))?;
    let data = datasets::load(&local, collective)?;
    let loaded = model::load(&local, &config, &placement, &data.tokenizer);
    let (classifier, report) = agree(collective, loaded)?;
    agree(collective, config.check_length(classifier.config.plan.longest))?;
    let world = collective.world();
    agree(collective, check_data(&local, &data, &classifier, world))?;
    if collective.rank() == 0 {
        describe(&config, &report, &classifier, &data, collective.world(), threads);
    }
    Ok(Prepared { config, threads, data, classifier })
}

/// What this binary is: its version, and its own bytes.
fn version() -> String {
    let bytes = std::env::current_exe().and_then(std::fs::read).unwrap_or_default();
    let hash = blake3::hash(&bytes).to_hex();
    format!("allreel {} (binary {})", env!("CARGO_PKG_VERSION"), &hash[..12])
}

/// A run directory is used twice only to resume.
fn check_run_dir(dir: &Path, resume: bool) -> Result<()> {
    let used = ["metrics.jsonl", "summary.json", "best", "checkpoints"];
    if !resume && used.iter().any(|name| dir.join(name).exists()) {
        return Err(Error::User(format!(
            "{0} already holds a run; continue it with --resume, or choose another run.dir, or \
             remove {0}",
            dir.display()
        )));
    }
    std::fs::create_dir_all(dir).map_err(|e| Error::writing(dir, e))
}

/// The config with a directory for `model.path`, where that names a model of the Hub. One rank of
/// each node fetches it; the others then find it in the cache.
fn fetch_model(config: &Config, collective: &mut dyn Collective) -> Result<Config> {
    let mut local = config.clone();
    let Weights::Pretrained(path) = &config.model.weights else { return Ok(local) };
    let source = agree(collective, Source::of(path))?;
    // A directory of this name on some nodes only would part the ranks here.
    must_be_equal(collective, "model.path", &format!("{source:?}"))?;
    let Source::Hub(id) = source else { return Ok(local) };
    let hub = agree(collective, Hub::from_env())?;
    let first = (collective.local_rank() == 0).then(|| hub.fetch(&id)).transpose();
    let dir = match agree(collective, first)? {
        Some(fetched) => agree(collective, Ok(fetched.dir))?,
        None => agree(collective, hub.cached(&id))?,
    };
    local.model.weights = Weights::Pretrained(dir);
    Ok(local)
}

fn check_data(
    config: &Config,
    data: &Datasets,
    classifier: &Classifier,
    world: usize,
) -> Result<()> {
    let samples = data.train.len();
    if samples < world {
        return Err(Error::User(format!(
            "{samples} training reviews for {world} ranks; use at most {samples} ranks"
        )));
    }
    if let config::Batch::Samples(batch) = config.train.batch()
        && batch < world
    {
        return Err(Error::User(format!(
            "train.batch_size = {batch} is over all ranks, and there are {world}; use at least {world}"
        )));
    }
    let sets = [Some(&data.train), Some(&data.validation), data.test.as_ref()];
    let dir = match &config.model.weights {
        Weights::Pretrained(path) => Some(path.as_path()),
        Weights::Random(_) | Weights::Linear(_) => None,
    };
    for set in sets.into_iter().flatten() {
        check_ids(set, classifier.config.vocab_size(), dir)?;
    }
    Ok(())
}

/// Fails if a token has no row in the word table of the model, which was read from `dir` or is new.
pub(super) fn check_ids(set: &TokenSet, vocab_size: usize, dir: Option<&Path>) -> Result<()> {
    let Some(id) = set.tokens.iter().find(|id| **id as usize >= vocab_size) else {
        return Ok(());
    };
    Err(Error::Data(match dir {
        Some(dir) => format!(
            "token id {id} is outside the vocab_size of {vocab_size} in {}; the tokenizer is \
             another model's: use the one that was saved with these weights",
            dir.join("config.json").display()
        ),
        None => format!(
            "token id {id} is outside model.vocab_size = {vocab_size}; give the vocab_size of \
             data.tokenizer"
        ),
    }))
}

fn describe(
    config: &Config,
    report: &LoadReport,
    classifier: &Classifier,
    data: &Datasets,
    world: usize,
    threads: usize,
) {
    let list = |what: &str, names: &[String]| {
        if !names.is_empty() {
            eprintln!("{what}: {}", shortened(names));
        }
    };
    list("new (not in the checkpoint)", &report.missing);
    list("in the checkpoint but not used", &report.unexpected);
    if let (Some((found, words)), Some(path)) = (report.vectors, &config.model.vectors) {
        eprintln!("{found} of {words} words have a vector in {}", path.display());
    }
    eprintln!(
        "{}: {:.1} M parameters, {:.1} M train; {} reviews to train on, {} to validate; {world} \
         rank{} of {threads} thread{} on {}; run {}",
        classifier.config.family.model_type(),
        classifier.parameters.count() as f64 / 1e6,
        classifier.parameters.trainable_count() as f64 / 1e6,
        data.train.len(),
        data.validation.len(),
        if world == 1 { "" } else { "s" },
        if threads == 1 { "" } else { "s" },
        classifier.parameters.placement.name(),
        config.run.dir.display()
    );
}

/// The first few names, and how many more there are.
fn shortened(names: &[String]) -> String {
    const SHOWN: usize = 8;
    let shown = names[..names.len().min(SHOWN)].join(", ");
    match names.len().saturating_sub(SHOWN) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_lists_of_names_are_shortened() {
        let names = |n: usize| (0..n).map(|i| i.to_string()).collect::<Vec<_>>();
        assert_eq!(shortened(&names(2)), "0, 1");
        assert_eq!(shortened(&names(8)), "0, 1, 2, 3, 4, 5, 6, 7");
        assert_eq!(shortened(&names(20)), "0, 1, 2, 3, 4, 5, 6, 7 and 12 more");
    }
}
