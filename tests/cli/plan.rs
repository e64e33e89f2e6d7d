//! `allreel plan`: what it says of the largest models, and of a run as it then is.

use std::path::Path;

use serde_json::Value;

use super::number;
use crate::run::{Output, Workdir};

const GIB: f64 = (1u64 << 30) as f64;

/// A plan of a file of `configs/` with the shape of a published model, which `docs/models` has.
fn plan(config: &str, model: &str, more: &str) -> Output {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let config = root.join("configs").join(config).display().to_string();
    let model = format!("model.path={}", root.join("docs/models").join(model).display());
    let mut args = vec!["plan", &config, "--set", &model];
    args.extend(more.split_whitespace());
    Workdir::new().allreel_with(&args)
}

fn json(config: &str, model: &str, more: &str) -> Value {
    let shown = plan(config, model, &format!("{more} --json")).ok();
    serde_json::from_str(&shown.out).expect("one JSON object")
}

#[test]
fn four_bits_and_lora_bring_xxlarge_onto_this_machine_and_a_16_gib_gpu() {
    let (config, model) = ("deberta-v2-xxlarge-lora-nf4.toml", "deberta-v2-xxlarge");
    let host = json(config, model, "--set train.batch_size=2 --set train.micro_tokens=1024");
    assert!(number(&host["host"], "bytes") < 4.0 * GIB, "{host}");
    assert_eq!(host["device"], Value::Null);
    let device = json(config, model, "--gpu-memory 16GiB");
    assert!(number(&device["device"], "bytes") < 8.0 * GIB, "{device}");
    assert_eq!((&device["sequences"], &device["fits"]), (&16.into(), &true.into()));
    assert!(number(&device, "largest_sequences") >= 16.0, "{device}");
}

#[test]
fn the_largest_batch_fits_and_one_more_does_not() {
    let (config, model) = ("deberta-v3-large.toml", "deberta-v3-large");
    let largest = number(&json(config, model, "--gpu-memory 12GiB"), "largest_sequences") as usize;
    for (sequences, fits) in [(largest, true), (largest + 1, false)] {
        let tokens = 512 * sequences;
        let batch = format!("--set train.batch_size={sequences} --set train.micro_tokens={tokens}");
        let one = json(config, model, &format!("--gpu-memory 12GiB {batch}"));
        assert_eq!(one["fits"], Value::from(fits), "{sequences}: {one}");
    }
}

#[test]
fn what_does_not_fit_is_told_what_would() {
    let (config, model) = ("deberta-v2-xxlarge-lora-int8.toml", "deberta-v2-xxlarge");
    let off = "--set model.gradient_checkpointing=false";
    let shown = plan(config, model, &format!("--gpu-memory 4GiB {off}")).ok().out;
    assert!(shown.contains("saved activations"), "{shown}");
    assert!(
        shown.contains("does not fit") && shown.contains("'model.gradient_checkpointing=true'"),
        "{shown}"
    );
    let advice = &json(config, model, &format!("--gpu-memory 4GiB {off}"))["advice"];
    assert_eq!(advice["fits"], Value::from(true), "{advice}");
    assert!(number(advice, "bytes") <= 4.0 * GIB, "{advice}");
    // What trains has to stay as it is.
    let shown = plan("deberta-v2-xxlarge.toml", model, "--gpu-memory 16GiB").ok().out;
    assert!(shown.contains("not one sequence of 512 tokens fits in 16.00 GiB"), "{shown}");
    assert!(!shown.contains("model.quantization=") && shown.contains("[adapter]"), "{shown}");
}

/// Every review is filled up to `data.max_length`, as a plan takes them to be. Words repeat here, which it
/// does not know, so that the word table is small; the allocator's holes are the uncertain part.
#[test]
fn the_peak_of_a_run_is_the_plans() {
    let dir = Workdir::new();
    dir.write(
        "run.toml",
        "[data]\ntrain = \"synthetic\"\nlimit = 200\ntokenizer = \"wordpiece\"\nmax_length = 256\n\
         pad_to_max_length = true\n[model]\nkind = \"deberta-v2\"\nvocab_size = 2000\nhidden_size = 512\n\
         num_hidden_layers = 6\nnum_attention_heads = 8\nintermediate_size = 2048\n[train]\n\
         batch_size = 8\nmicro_tokens = 1024\nmax_steps = 2\n[run]\ndir = \"run\"\ndevice = \"cpu\"\nthreads = 2\n",
    );
    let planned: Value =
        serde_json::from_str(&dir.allreel("plan run.toml --json").ok().out).expect("JSON");
    let planned = number(&planned["host"], "bytes");
    dir.allreel("train run.toml").ok();
    let measured = number(&dir.summary("run"), "peak_host_bytes");
    let off = planned / measured - 1.0;
    println!("planned {planned}, measured {measured}: {:+.1} %", 100.0 * off);
    assert!(off.abs() <= 0.1, "planned {planned}, measured {measured}");
}

#[test]
fn a_shape_that_is_not_to_be_had_and_sizes_without_units_are_one_error() {
    let dir = Workdir::prepared();
    for (args, remedy) in [
        (vec!["plan", "first.toml", "--gpu-memory", "16"], "such as 16GiB"),
        (
            vec!["plan", "first.toml", "--gpu-memory", "16GiB", "--device", "cpu"],
            "leave one of them out",
        ),
        (vec!["plan", "first.toml", "--ranks", "0"], "--ranks"),
    ] {
        let shown = dir.allreel_with(&args);
        assert_eq!(shown.code, 2, "{shown:#?}");
        assert!(shown.err.contains(remedy), "{shown:#?}");
    }
    let config = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/deberta-v3-large.toml");
    let config = config.display().to_string();
    let shown = dir.allreel_in(&[("HF_HUB_OFFLINE", "1")], &["plan", &config]);
    assert_eq!((shown.code, shown.err.lines().count()), (2, 1), "{shown:#?}");
    assert!(shown.err.contains("--set model.path=DIR"), "{shown:#?}");
}
