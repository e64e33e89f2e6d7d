//! `allreel bench step`: a whole training step of a BERT on random tokens, dropout on.

use std::time::Instant;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha12Rng;
use serde_json::json;

use super::Spread;
use crate::{
    Result,
    collective::{Traffic, solo::Solo},
    command::start_threads,
    config::{self, Trainable, Warmup},
    data::TokenSet,
    model::{BertConfig, Classifier},
    step::{Trainer, schedule::Schedule},
};

/// Arguments of `allreel bench step`.
#[derive(clap::Args)]
pub struct Args {
    /// Width of the activations
    #[arg(long, default_value_t = 256)]
    hidden_size: usize,
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
    /// Run blocks again in backward instead of keeping what they saved
    #[arg(long)]
    gradient_checkpointing: bool,
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
    let shape = BertConfig {
        vocab_size: args.vocab_size,
        hidden_size: args.hidden_size,
        num_hidden_layers: args.layers,
        num_attention_heads: args.heads,
        intermediate_size: args.intermediate_size,
        max_position_embeddings: args.length.max(512),
        type_vocab_size: 2,
        hidden_act: "gelu".into(),
        layer_norm_eps: 1e-12,
        initializer_range: 0.02,
        hidden_dropout_prob: args.dropout,
        attention_probs_dropout_prob: args.dropout,
        classifier_dropout: None,
        pad_token_id: Some(0),
        num_labels: 2,
    };
    shape.check().map_err(crate::Error::User)?;
    let flops = flops(&shape, args.batch, args.length);
    let classifier = Classifier::new(shape, Trainable::All, 1)?;
    let set = random_tokens(args);
    let samples: Vec<u32> = (0..args.batch as u32).collect();
    let mut settings = config::Train::default();
    settings.micro_tokens = usize::MAX;
    let mut solo = Solo::new(1)?;
    let total = u64::from(args.repeats) + 3;
    let mut trainer = Trainer {
        classifier: &classifier,
        collective: &mut solo,
        settings: &settings,
        schedule: Schedule::new(config::Schedule::Constant, Warmup::Steps(0), total)?,
        checkpoint: args.gradient_checkpointing,
        traffic: Traffic::default(),
    };
    let mut times = Vec::new();
    for step in 1..=total {
        let begin = Instant::now();
        trainer.step(&set, &set.lengths(), &samples, step, false)?;
        if step > 3 {
            times.push(begin.elapsed().as_secs_f64() * 1e3);
        }
    }
    let spread = Spread::of(times);
    let rate = |ms: f64| flops / ms / 1e6;
    if args.json {
        let object = json!({
            "bench": "step", "batch": args.batch, "length": args.length, "threads": threads,
            "dropout": args.dropout, "gflop": flops / 1e9, "ms_min": spread.min,
            "ms_p20": spread.p20, "ms_median": spread.median, "ms_p80": spread.p80,
            "gflops_median": rate(spread.median),
        });
        println!("{object}");
    } else {
        println!(
            "step of {} x {} tokens, {threads} threads, dropout {}: median {:.0} ms (p20 {:.0}, p80 \
             {:.0}, best {:.0}); {:.1} GFLOP in matrix products, {:.0} GFLOP/s (best {:.0})",
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
    }
    Ok(())
}

/// Floating-point operations of a step's matrix products: 2 forward and 4 backward for each weight
/// and token, likewise for the two products of attention.
fn flops(shape: &BertConfig, batch: usize, length: usize) -> f64 {
    let (h, inner, layers) =
        (shape.hidden_size as f64, shape.intermediate_size as f64, shape.num_hidden_layers as f64);
    let (tokens, length) = ((batch * length) as f64, length as f64);
    let weights = layers * (4.0 * h * h + 2.0 * h * inner);
    6.0 * tokens * (weights + layers * 2.0 * length * h)
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
