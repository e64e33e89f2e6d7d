//! `allreel plan`: what a run will need of memory, the largest batch that fits, and what makes it fit.
//!
//! | file | owns |
//! |---|---|
//! | this | arguments; the network's shape, of which only `config.json` is read |
//! | `advice` | settings that need less |
//! | `table` | what is printed |

mod advice;
mod table;

use std::path::PathBuf;

use super::model::{no_network, overrides};
use crate::{
    Error, Result,
    config::{Config, Weights},
    device::Choice,
    hub::{Hub, Source},
    memory::{Place, Prediction, Setting, process},
    model::ModelConfig,
};

/// Arguments of `allreel plan`.
#[derive(clap::Args)]
pub struct Args {
    /// TOML file with the settings of the run
    config: PathBuf,
    /// Replace one setting of the file; may be given several times
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    overrides: Vec<String>,
    /// Memory of the GPU of one rank, such as 16GiB; implies --device cuda
    #[arg(long, value_name = "SIZE", value_parser = size)]
    gpu_memory: Option<u64>,
    /// Number of ranks
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    ranks: u16,
    /// Where it will compute [default: the file's run.device; the CPU, unless that is cuda]
    #[arg(long)]
    device: Option<Choice>,
    /// Print one JSON object instead of tables
    #[arg(long)]
    json: bool,
}

/// What is printed.
struct Plan {
    setting: Setting,
    prediction: Prediction,
    /// Memory where a rank computes, if it is known.
    limit: Option<u64>,
    /// Sequences of the largest micro-batch within it.
    largest: Option<usize>,
    /// What would fit, where the run does not.
    advice: Option<advice::Advice>,
}

/// Runs the command.
///
/// # Errors
/// `User` if the settings cannot be used, or the network's shape is not to be had.
pub fn run(args: &Args) -> Result<()> {
    let config = Config::load(&args.config, &args.overrides)?;
    let model = model_config(&config)?;
    let place = place(args, &config)?;
    let setting = Setting::new(&config, model.clone(), place)?;
    let limit = match place.cuda {
        true => args.gpu_memory,
        false => process::memory().map(|bytes| bytes / place.ranks as u64),
    };
    let prediction = setting.predict();
    let fits = limit.is_none_or(|limit| prediction.computing() <= limit);
    let advice = match limit {
        Some(limit) if !fits => Some(advice::find(&config, &model, place, limit)?),
        _ => None,
    };
    let largest = limit.map(|limit| setting.largest(limit));
    let plan = Plan { setting, prediction, limit, largest, advice };
    match args.json {
        true => println!("{}", plan.json()),
        false => print!("{}", plan.text()),
    }
    Ok(())
}

/// The network that the settings name.
fn model_config(config: &Config) -> Result<ModelConfig> {
    let (labels, overrides) = (config.model.num_labels, overrides(&config.model));
    let path = match &config.model.weights {
        Weights::Pretrained(path) => path,
        Weights::Random(shape) => {
            return ModelConfig::fresh(shape.family(), &shape.fields(), labels, overrides)
                .map_err(|e| Error::User(format!("[model]: {e}")));
        }
        Weights::Linear(linear) => return Err(no_network(linear)),
    };
    match Source::of(path)? {
        Source::Directory(dir) => ModelConfig::read(&dir.join("config.json"), labels, overrides),
        Source::Hub(id) => {
            let text = Hub::from_env()?.config(&id).map_err(|error| {
                let remedy = "a plan needs the model's config.json alone: where you have it, give its \
                              directory with --set model.path=DIR";
                Error::User(format!("{error}; {remedy}"))
            })?;
            ModelConfig::parse(&text, &format!("config.json of {id}"), labels, overrides)
        }
    }
}

fn place(args: &Args, config: &Config) -> Result<Place> {
    let choice = args.device.unwrap_or(config.run.device);
    if args.gpu_memory.is_some() && args.device == Some(Choice::Cpu) {
        return Err(Error::User("--gpu-memory is for --device cuda; leave one of them out".into()));
    }
    let ranks = usize::from(args.ranks);
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    Ok(Place {
        cuda: choice == Choice::Cuda || args.gpu_memory.is_some(),
        ranks,
        threads: config.run.threads.unwrap_or((cores / ranks).max(1)),
    })
}

/// Bytes of `16GiB`, `16GB`, `800MiB` and the like.
fn size(text: &str) -> Result<u64, String> {
    const UNITS: [(&str, u64); 5] =
        [("GiB", 1 << 30), ("MiB", 1 << 20), ("GB", 1_000_000_000), ("MB", 1_000_000), ("B", 1)];
    let split = UNITS.iter().find_map(|(unit, bytes)| Some((text.strip_suffix(unit)?, *bytes)));
    let number = split.and_then(|(number, unit)| Some((number.trim().parse::<f64>().ok()?, unit)));
    match number {
        Some((number, unit)) if number > 0.0 && number.is_finite() => {
            Ok((number * unit as f64) as u64)
        }
        _ => Err("write a number and GiB, MiB, GB or MB, such as 16GiB".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units() {
        assert_eq!(size("16GiB"), Ok(16 << 30));
        assert_eq!(size("1.5 GB"), Ok(1_500_000_000));
        assert_eq!(size("800MiB"), Ok(800 << 20));
        for bad in ["16", "GiB", "-1GiB", "0GB", "16 gigs", "infGiB", "NaNGiB"] {
            assert!(size(bad).unwrap_err().contains("16GiB"), "{bad}");
        }
    }
}
