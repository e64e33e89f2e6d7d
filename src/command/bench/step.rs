//! `allreel bench step`: a whole training step of a network on random tokens, dropout on.

use std::time::Instant;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha12Rng;
use serde_json::json;

use super::measure::Spread;
use crate::{
    Error, Result,
    collective::{Traffic, solo::Solo},
    command::start_threads,
    config::{
        ALL_LINEAR, Adapter, Family, Lora, Method, PoolRow, Quantization, Schedule as Curve,
        TargetModules, Train, Trainable, Warmup,
    },
    data::TokenSet,
    device::{Choice, Placement},
    model::{
        Classifier, Dropouts, ModelConfig, Training,
        plan::{BlockPlan, Quantized},
    },
    report::peak_host_bytes,
    step::{Trainer, schedule::Schedule},
};

/// Arguments of `allreel bench step`.
#[derive(clap::Args)]
pub struct Args {
    /// Family: bert, distilbert, roberta, deberta-v2, modernbert or gpt2; on words cnn, lstm, gru, cnnlstm,
    /// attention_lstm, capsule_lstm or transformer
    #[arg(long, default_value = "bert", value_parser = family)]
    kind: Family,
    /// Width of the activations; of each direction of a recurrent layer
    #[arg(long, default_value_t = 256)]
    hidden_size: usize,
    /// On words: columns of the word vectors
    #[arg(long, default_value_t = 100)]
    embedding_size: usize,
    /// Number of blocks
    #[arg(long, default_value_t = 4)]
    layers: usize,
    /// Heads of a block
    #[arg(long, default_value_t = 4)]
    heads: usize,
    /// Width inside the feed-forward part
    #[arg(long, default_value_t = 1024)]
    intermediate_size: usize,
    /// Rows of the word table
    #[arg(long, default_value_t = 8192)]
    vocab_size: usize,
    /// Sequences of a step
    #[arg(long, default_value_t = 16)]
    batch: usize,
    /// Tokens of a sequence
    #[arg(long, default_value_t = 128)]
    length: usize,
    /// Dropout everywhere
    #[arg(long, default_value_t = 0.1)]
    dropout: f64,
    /// DeBERTa: tokens that the convolution beside the first block reads; 0 for none
    #[arg(long, default_value_t = 0)]
    conv_kernel_size: usize,
    /// Train LoRA of this rank in place of everything
    #[arg(long, value_name = "R")]
    lora: Option<usize>,
    /// With --lora: the layers, or all-linear [default: the family's usual ones]
    #[arg(long, requires = "lora", value_delimiter = ',')]
    target_modules: Vec<String>,
    /// With --lora: keep the blocks' weights in int8, nf4 or fp4
    #[arg(long, requires = "lora", value_parser = quantization)]
    quantization: Option<Quantization>,
    /// With --lora: keep the word table in 8 bits
    #[arg(long, requires = "lora")]
    quantize_embeddings: bool,
    /// Run blocks again in backward instead of keeping what they saved
    #[arg(long)]
    gradient_checkpointing: bool,
    /// Where to run
    #[arg(long, default_value = "auto")]
    device: Choice,
    /// Worker threads [default: all cores]
    #[arg(long)]
    threads: Option<usize>,
    /// Timed steps, after three that are not
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    repeats: u32,
    /// Print one JSON object instead of text
    #[arg(long)]
    json: bool,
}

/// Runs the command.
///
/// # Errors
/// If the sizes do not fit together.
pub(super) fn run(args: &Args) -> Result<()> {
    let threads = start_threads(args.threads, 1);
    let config = config(args)?;
    let flops = flops(args, &config);
    let placement = Placement::open(args.device, 0)?;
    let classifier = Classifier::new(&placement, config, training(args), 1)?;
    let set = random_tokens(args);
    let samples: Vec<u32> = (0..args.batch as u32).collect();
    let mut settings = Train::default();
    settings.micro_tokens = usize::MAX;
    let mut solo = Solo::new(1)?;
    let total = u64::from(args.repeats) + 3;
    let mut trainer = Trainer {
        classifier: &classifier,
        collective: &mut solo,
        settings: &settings,
        schedule: Schedule::new(Curve::Constant, Warmup::Steps(0), total)?,
        checkpoint: args.gradient_checkpointing,
        traffic: Traffic::default(),
        before: None,
    };
    // As in training: a device is given the next step while one runs.
    let (mut times, mut queued, mut mark) = (Vec::new(), None, Instant::now());
    let launched = placement.launches();
    for step in 1..=total {
        let started = trainer.begin(&set, &set.lengths(), &samples, step, false)?;
        let before = match placement.is_cuda() {
            true => queued.replace(started),
            false => Some(started),
        };
        if let Some(before) = before {
            trainer.finish(before)?;
            times.push(mark.elapsed().as_secs_f64() * 1e3);
            mark = Instant::now();
        }
    }
    if let Some(last) = queued {
        trainer.finish(last)?;
    }
    let launches = (placement.launches() - launched) / total;
    let times = times.split_off(times.len().saturating_sub(args.repeats as usize));
    let spread = Spread::of(times);
    let rate = |ms: f64| flops / ms / 1e6;
    if args.json {
        let object = json!({
            "bench": "step", "kind": args.kind.model_type(), "batch": args.batch, "length": args.length, "threads": threads,
            "dropout": args.dropout, "gflop": flops / 1e9, "ms_min": spread.min,
            "ms_p20": spread.p20, "ms_median": spread.median, "ms_p80": spread.p80,
            "gflops_median": rate(spread.median), "device": placement.name(), "launches": launches,
            "peak_device_bytes": placement.peak_memory(), "peak_host_bytes": peak_host_bytes(),
            "trainable_parameters": classifier.parameters.trainable_count(),
        });
        println!("{object}");
    } else {
        println!(
            "{} step of {} x {} tokens, {threads} threads, dropout {}: median {:.0} ms (p20 {:.0}, p80 \
             {:.0}, best {:.0}); {:.1} GFLOP in matrix products, {:.0} GFLOP/s (best {:.0})",
            args.kind.model_type(),
            args.batch,
            args.length,
            args.dropout,
            spread.median,
            spread.p20,
            spread.p80,
            spread.min,
            flops / 1e9,
            rate(spread.median),
            rate(spread.min)
        );
        println!(
            "{:.2} M of {:.1} M parameters train; {:.0} MiB of the host at most",
            classifier.parameters.trainable_count() as f64 / 1e6,
            classifier.parameters.count() as f64 / 1e6,
            peak_host_bytes().unwrap_or(0) as f64 / (1u64 << 20) as f64
        );
        if let Some(peak) = placement.peak_memory() {
            println!(
                "{}: {launches} launches a step, {:.1} for each of {} blocks; {:.2} GiB at most",
                placement.name(),
                launches as f64 / args.layers as f64,
                args.layers,
                peak as f64 / (1u64 << 30) as f64
            );
        }
    }
    Ok(())
}

fn family(name: &str) -> Result<Family, String> {
    let families = Family::ENCODERS.into_iter().chain(Family::ON_WORDS);
    families.clone().find(|family| family.model_type() == name).ok_or_else(|| {
        let names: Vec<&str> = families.map(Family::model_type).collect();
        format!("no such family; use one of {}", names.join(", "))
    })
}

fn quantization(name: &str) -> Result<Quantization, String> {
    let name = serde_json::Value::String(name.to_owned());
    serde_json::from_value(name).map_err(|_| "use int8, nf4 or fp4".to_owned())
}

/// What trains, and how the rest is kept.
fn training(args: &Args) -> Training {
    let Some(r) = args.lora else { return Trainable::All.into() };
    let target_modules = match args.target_modules.as_slice() {
        [] => None,
        [all] if all == ALL_LINEAR => Some(TargetModules::Pattern(all.clone())),
        names => Some(TargetModules::Names(names.to_vec())),
    };
    let lora = Lora { r, target_modules, ..Lora::default() };
    let adapter =
        Adapter { method: Method::Lora(lora), modules_to_save: None, pool: PoolRow::default() };
    let quantization =
        args.quantization.map(|quantization| Quantized { quantization, threshold: None });
    Training { quantization, quantize_embeddings: args.quantize_embeddings, ..adapter.into() }
}

/// The network that the arguments describe.
fn config(args: &Args) -> Result<ModelConfig> {
    if args.kind.is_on_words() && args.lora.is_some() {
        return Err(Error::User("--lora is for encoders; leave it out".into()));
    }
    let positions = args.length.max(512) + 2;
    let mut fields = json!({
        "vocab_size": args.vocab_size,
        "hidden_size": args.hidden_size,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.heads,
        "intermediate_size": args.intermediate_size,
        "max_position_embeddings": positions,
    });
    if args.kind.is_on_words() {
        fields["embedding_size"] = args.embedding_size.into();
    }
    if args.conv_kernel_size > 0 {
        fields["conv_kernel_size"] = args.conv_kernel_size.into();
    }
    let fields = fields.as_object().cloned().unwrap_or_default();
    let (hidden, attention) = (Some(args.dropout), Some(args.dropout));
    let dropouts = Dropouts { hidden, attention, classifier: Some(args.dropout) };
    ModelConfig::fresh(args.kind, &fields, 2, dropouts.into()).map_err(Error::User)
}

/// Floating-point operations of a step's matrix products: 2 forward and 4 backward (2 where weights are frozen)
/// for each weight and token, without LoRA's own; 2 and 4 for the products of attention (content to position and position to content
/// count like content to content).
fn flops(args: &Args, config: &ModelConfig) -> f64 {
    let (h, tokens) = (args.hidden_size as f64, (args.batch * args.length) as f64);
    let length = args.length;
    // Weights and attention apart: a frozen weight has no gradient.
    let per_token = config.plan.blocks.iter().map(|block| match block {
        BlockPlan::PostNorm(block) => {
            let inner = block.intermediate.outputs as f64;
            let products = if block.disentangled.is_some() { 4.0 } else { 2.0 };
            (4.0 * h * h + 2.0 * h * inner, products * length as f64 * h)
        }
        BlockPlan::PreNorm(block) => {
            let inner = (block.mlp_input.outputs + block.mlp_output.inputs) as f64;
            let seen = block.span.window.map_or(length, |window| length.min(2 * window + 1));
            let share = if block.span.causal { 0.5 } else { 1.0 };
            (4.0 * h * h + h * inner, 2.0 * share * seen as f64 * h)
        }
        BlockPlan::Recurrent(layers) => {
            let of = |inputs: usize| {
                2 * layers.cell.gates() * layers.hidden_size * (inputs + layers.hidden_size)
            };
            let above = (layers.num_layers - 1) * of(2 * layers.hidden_size);
            ((of(layers.inputs) + above) as f64, 0.0)
        }
        BlockPlan::Filters(filters) => {
            let taps: usize = filters.kernels.iter().sum();
            ((taps * filters.inputs * filters.filters) as f64, 0.0)
        }
    });
    let of_weights = if args.lora.is_some() { 4.0 } else { 6.0 };
    let all = per_token.map(|(weights, attention)| of_weights * weights + 6.0 * attention);
    tokens * all.sum::<f64>()
}

fn random_tokens(args: &Args) -> TokenSet {
    let mut rng = ChaCha12Rng::seed_from_u64(1);
    let n = args.batch * args.length;
    TokenSet {
        tokens: (0..n).map(|_| rng.random_range(0..args.vocab_size as u32)).collect(),
        offsets: (0..=args.batch as u64).map(|i| i * args.length as u64).collect(),
        labels: (0..args.batch as u32).map(|i| Some(i % 2)).collect(),
        ids: vec![String::new(); args.batch],
    }
}
