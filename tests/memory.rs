//! `allreel plan` holds to what is allocated: for every family, with all of it training and with adapters over
//! frozen and quantised weights, what forward keeps and the most that loading and a step hold.

use allreel::{
    batch::Batch,
    collective::{Traffic, solo::Solo},
    config::{Config, Weights},
    data::TokenSet,
    device::Placement,
    memory::{Place, Setting, StepUsage},
    model::{Classifier, Dropouts, ModelConfig, Pass, Training},
    step::{Trainer, schedule::Schedule},
};
use allreel_kernels::DropoutKey;
use peak_alloc::PeakAlloc;

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

const THREADS: usize = 2;
const FAMILIES: [&str; 6] = ["bert", "distilbert", "roberta", "deberta-v2", "modernbert", "gpt2"];
const ON_WORDS: [&str; 7] =
    ["cnn", "lstm", "gru", "cnnlstm", "attention_lstm", "capsule_lstm", "transformer"];

/// Sizes of a network and a batch.
#[derive(Clone, Copy)]
struct Size {
    hidden: usize,
    heads: usize,
    layers: usize,
    vocabulary: usize,
    sequences: usize,
    length: usize,
}

const SMALL: Size =
    Size { hidden: 128, heads: 4, layers: 3, vocabulary: 700, sequences: 4, length: 100 };
const LARGER: Size =
    Size { hidden: 192, heads: 3, layers: 4, vocabulary: 1500, sequences: 5, length: 257 };

/// What differs between the ways to train.
#[derive(Clone, Copy, Debug)]
struct Way {
    name: &'static str,
    model: &'static str,
    adapter: &'static str,
}

const LORA: &str = "[adapter]\nmethod = \"lora\"\nr = 8\nlora_dropout = 0.1\n";

const WAYS: [Way; 9] = [
    Way { name: "full", model: "", adapter: "" },
    Way { name: "full, checkpointing", model: "gradient_checkpointing = true\n", adapter: "" },
    Way { name: "head", model: "trainable = \"head\"\n", adapter: "" },
    Way { name: "LoRA", model: "", adapter: LORA },
    Way {
        name: "LoRA over NF4, checkpointing",
        model: "gradient_checkpointing = true\nquantization = \"nf4\"\nquantize_embeddings = true\n",
        adapter: LORA,
    },
    Way { name: "LoRA over int8", model: "quantization = \"int8\"\n", adapter: LORA },
    Way {
        name: "P-tuning",
        model: "",
        adapter: "[adapter]\nmethod = \"p_tuning\"\nnum_virtual_tokens = 10\nencoder_hidden_size = 64\n",
    },
    Way {
        name: "P-tuning by an LSTM",
        model: "gradient_checkpointing = true\n",
        adapter: "[adapter]\nmethod = \"p_tuning\"\nnum_virtual_tokens = 10\nencoder_hidden_size = 64\n\
                  encoder_reparameterization_type = \"LSTM\"\n",
    },
    Way {
        name: "prefix",
        model: "gradient_checkpointing = true\n",
        adapter: "[adapter]\nmethod = \"prefix_tuning\"\nnum_virtual_tokens = 10\n",
    },
];

/// Ways to train a network on words.
const WAYS_ON_WORDS: [Way; 4] = [
    Way { name: "full", model: "", adapter: "" },
    Way { name: "full, checkpointing", model: "gradient_checkpointing = true\n", adapter: "" },
    Way { name: "frozen vectors", model: "freeze_embeddings = true\n", adapter: "" },
    Way { name: "head", model: "trainable = \"head\"\n", adapter: "" },
];

fn config_on_words(family: &str, size: Size, way: Way) -> Config {
    let Size { hidden, heads, vocabulary, length, .. } = size;
    let special = match family {
        "cnn" => "kernel_sizes = [1, 3, 5]\nnum_filters = 64\n".to_owned(),
        "cnnlstm" => format!("num_filters = 64\nhidden_size = {hidden}\n"),
        "transformer" => format!(
            "hidden_size = {hidden}\nnum_hidden_layers = 2\nnum_attention_heads = {heads}\n\
             intermediate_size = {}\nattention_probs_dropout_prob = 0.1\n",
            3 * hidden
        ),
        _ => format!("hidden_size = {hidden}\nnum_hidden_layers = 2\n"),
    };
    let text = format!(
        "[data]\ntrain = \"synthetic\"\nmax_length = {length}\n[model]\nkind = \"{family}\"\n\
         vocab_size = {vocabulary}\nembedding_size = 96\n{special}{}[train]\nbatch_size = {}\n",
        way.model, size.sequences,
    );
    Config::from_toml_str(&text, "test.toml".as_ref()).expect("settings")
}

fn config(family: &str, size: Size, way: Way) -> Config {
    let Size { hidden, heads, layers, vocabulary, length, .. } = size;
    let special = match family {
        "deberta-v2" => "conv_kernel_size = 3\nposition_buckets = 32\n",
        "modernbert" => "local_attention = 32\n",
        _ => "",
    };
    let text = format!(
        "[data]\ntrain = \"synthetic\"\ntokenizer = \"wordpiece\"\nmax_length = {length}\n\
         [model]\nkind = \"{family}\"\nvocab_size = {vocabulary}\nhidden_size = {hidden}\n\
         num_hidden_layers = {layers}\nnum_attention_heads = {heads}\nintermediate_size = {}\n\
         max_position_embeddings = 600\n{special}{}[train]\nbatch_size = {}\n{}",
        3 * hidden,
        way.model,
        size.sequences,
        way.adapter,
    );
    Config::from_toml_str(&text, "test.toml".as_ref()).expect("settings")
}

fn model(config: &Config) -> ModelConfig {
    let Weights::Random(shape) = &config.model.weights else { panic!("a shape") };
    let dropouts = Dropouts { hidden: Some(0.1), attention: Some(0.1), classifier: Some(0.1) };
    ModelConfig::fresh(shape.family(), &shape.fields(), 2, dropouts.into()).expect("a network")
}

/// Sequences whose tokens all differ, as far as the vocabulary goes.
fn tokens(size: Size) -> TokenSet {
    let Size { sequences, length, vocabulary, .. } = size;
    TokenSet {
        tokens: (0..(sequences * length) as u32).map(|i| i % vocabulary as u32).collect(),
        offsets: (0..=sequences as u64).map(|i| i * length as u64).collect(),
        labels: (0..sequences as u32).map(|i| Some(i % 2)).collect(),
        ids: vec![String::new(); sequences],
    }
}

/// Bytes that `body` takes and leaves, and the most it has at once.
fn counted<T>(body: impl FnOnce() -> T) -> (T, u64, u64) {
    let before = ALLOCATOR.current_usage();
    ALLOCATOR.reset_peak_usage();
    let result = body();
    let (left, most) = (ALLOCATOR.current_usage(), ALLOCATOR.peak_usage());
    (result, left.saturating_sub(before) as u64, (most - before) as u64)
}

/// The real thing.
fn measured(config: &Config, size: Size) -> StepUsage {
    let training = Training::from(config);
    let make = || Classifier::new(&Placement::CPU, model(config), training, 1).expect("a network");
    let (classifier, resident, loading) = counted(make);
    let set = tokens(size);
    let samples: Vec<u32> = (0..size.sequences as u32).collect();
    let mut solo = Solo::new(1).expect("alone");
    let schedule =
        Schedule::new(config.train.schedule, config.train.warmup(), 10).expect("a schedule");
    let mut trainer = Trainer {
        classifier: &classifier,
        collective: &mut solo,
        settings: &config.train,
        schedule,
        checkpoint: config.model.gradient_checkpointing,
        traffic: Traffic::default(),
        before: None,
    };
    let lengths = classifier.lengths(&set);
    // The first step also makes what threads keep.
    trainer.step(&set, &lengths, &samples, 1, false).expect("a step");
    let (_, _, step) =
        counted(|| trainer.step(&set, &lengths, &samples, 2, false).expect("a step"));
    let key = DropoutKey { seed: 1, step: 1, stream: 0 };
    let checkpoint = config.model.gradient_checkpointing;
    let pass = Pass { dropout: Some(key), checkpoint, offload: false };
    let batch: Batch = classifier.gather(&set, &samples).expect("a batch");
    let (_saved, saved, _) = counted(|| classifier.forward(&batch, pass).expect("logits"));
    StepUsage { loading, resident, saved, step }
}

fn predicted(config: &Config) -> StepUsage {
    let place = Place { cuda: false, ranks: 1, threads: THREADS };
    Setting::new(config, model(config), place).expect("a plan").step()
}

/// Bytes beside tensors: names and headers of some hundred parameters, a batch's ids.
const BESIDE: u64 = 96 << 10;

/// What is off by more than `share` of what was measured: in words.
fn off(what: &str, predicted: u64, measured: u64, share: f64) -> Option<String> {
    let off = predicted.abs_diff(measured);
    let said = format!("{what}: predicted {predicted}, measured {measured}");
    println!("{said} ({:+.2} %)", 100.0 * (predicted as f64 / measured as f64 - 1.0));
    let holds = off as f64 <= measured as f64 * share + BESIDE as f64;
    (!holds).then_some(said)
}

fn check(family: &str, ways: &[Way], config: impl Fn(&str, Size, Way) -> Config) -> Vec<String> {
    let mut all = Vec::new();
    let cases =
        [SMALL, LARGER].into_iter().flat_map(|size| ways.iter().map(move |way| (size, *way)));
    for (size, way) in cases {
        let config = config(family, size, way);
        let (want, got) = (measured(&config, size), predicted(&config));
        let what = |part: &str| format!("{family} {} {}: {part}", size.hidden, way.name);
        all.extend(off(&what("loading"), got.loading, want.loading, 0.01));
        all.extend(off(&what("resident"), got.resident, want.resident, 0.01));
        all.extend(off(&what("saved"), got.saved, want.saved, 0.01));
        all.extend(off(&what("step"), got.step, want.step, 0.05));
    }
    all
}

#[test]
fn predictions_hold_for_every_family() {
    allreel_kernels::threads::start(THREADS);
    // What threads keep from their first product on is not the network's.
    let warm = config("bert", LARGER, WAYS[0]);
    measured(&warm, LARGER);
    let encoders = FAMILIES.into_iter().flat_map(|family| check(family, &WAYS, config));
    let on_words =
        ON_WORDS.into_iter().flat_map(|family| check(family, &WAYS_ON_WORDS, config_on_words));
    let wrong: Vec<String> = encoders.chain(on_words).collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
