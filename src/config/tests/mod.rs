//! What a config file may say and what it then means; what it may not say is in `refused`, adapters in
//! `adapter`.

mod adapter;
mod refused;

use std::path::{Path, PathBuf};

use super::*;

const PRETRAINED: &str = "[data]\ntrain = \"reviews.tsv\"\n[model]\npath = \"minilm\"\n";

const RANDOM: &str = "\
[data]
train = \"synthetic\"
tokenizer = \"wordpiece\"
max_length = 128
[model]
vocab_size = 1000
hidden_size = 64
num_hidden_layers = 2
num_attention_heads = 4
intermediate_size = 256
";

fn parse(text: &str) -> Config {
    Config::from_toml_str(text, Path::new("configs/a.toml")).unwrap()
}

/// The config of `text` with `overrides`, from a real file named `a.toml`.
fn load(text: &str, overrides: &[&str]) -> Result<Config> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.toml");
    std::fs::write(&path, text).unwrap();
    Config::load(&path, &overrides.iter().map(|&argument| argument.into()).collect::<Vec<_>>())
}

#[test]
fn defaults_are_the_documented_ones() {
    let config = parse(PRETRAINED);
    assert_eq!(config.data.train, Reviews::Path("reviews.tsv".into()));
    assert_eq!(config.data.validation, Validation::Share(0.1));
    assert_eq!((config.data.limit, config.data.max_length), (None, 512));
    assert_eq!(config.data.cleaning, Cleaning::Html);
    assert_eq!(config.data.truncation, Truncation::Head);
    assert_eq!(config.data.tokenizer, None);
    assert_eq!(config.model.weights, Weights::Pretrained("minilm".into()));
    assert_eq!(config.model.hidden_dropout_prob, None);
    assert_eq!((config.model.num_labels, config.model.trainable), (2, Trainable::All));
    assert_eq!((config.train.epochs, config.train.max_steps), (3, None));
    assert_eq!(config.train.batch(), Batch::Samples(16));
    assert_eq!(config.train.warmup(), Warmup::Steps(0));
    assert_eq!((config.train.micro_tokens, config.train.group_window), (8192, 8));
    assert_eq!((config.train.learning_rate, config.train.seed), (2e-5, 42));
    assert_eq!((config.checkpoint.every_steps, config.checkpoint.keep), (None, 2));
    assert_eq!(config.run.dir, PathBuf::from("runs/a"));
    assert_eq!(config.run.threads, None);
}

#[test]
fn a_new_encoder_keeps_what_is_given_and_has_dropout() {
    let config = parse(RANDOM);
    let Weights::Random(shape) = &config.model.weights else { panic!("{config:?}") };
    assert_eq!(shape.family(), Family::Bert);
    assert_eq!((shape.vocab_size, shape.num_attention_heads), (Some(1000), Some(4)));
    assert_eq!((shape.longest(), shape.type_vocab_size), (Some(512), None));
    assert_eq!(config.model.classifier_dropout, Some(0.1));
    assert_eq!(config.data.tokenizer, Some(TokenizerSource::WordPiece));
    assert_eq!(config.data.limit, Some(6000), "what the generator makes unless told");

    let dropped = load(RANDOM, &["model.hidden_dropout_prob=0.3"]).unwrap();
    assert_eq!(dropped.model.classifier_dropout, Some(0.3), "follows the hidden one, as in BERT");
    assert_eq!(dropped.model.attention_probs_dropout_prob, Some(0.1));
}

#[test]
fn a_shape_may_have_its_familys_own_keys() {
    let set = |arguments: &[&str]| load(RANDOM, arguments).unwrap().model.weights;
    let deberta = ["model.kind=deberta-v2", "model.position_buckets=32", "data.max_length=2000"];
    let Weights::Random(shape) = set(&deberta) else { panic!("a shape") };
    assert_eq!((shape.family(), shape.longest()), (Family::DebertaV2, None));
    assert_eq!(shape.fields()["position_buckets"], 32);
    assert!(!shape.fields().contains_key("kind"));
    let error = load(RANDOM, &["model.position_buckets=32"]).unwrap_err().to_string();
    let said = "--set model.position_buckets=32: is only for model.kind = \"deberta-v2\"";
    assert!(error.starts_with(said), "{error}");
}

#[test]
fn every_file_in_configs_can_be_read() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs");
    let mut count = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let config = Config::load(&path, &[]).unwrap_or_else(|error| panic!("{error}"));
        let name = path.file_stem().unwrap();
        assert_eq!(config.run.dir, Path::new("runs").join(name), "each run has its own directory");
        count += 1;
    }
    assert!(count >= 23, "{count} files");
}

#[test]
fn every_name_of_an_enum_is_read() {
    let set = |argument: &str| load(RANDOM, &[argument]).unwrap();
    assert_eq!(set("data.cleaning=none").data.cleaning, Cleaning::None);
    assert_eq!(set("data.cleaning=words").data.cleaning, Cleaning::Words);
    assert_eq!(set("data.cleaning=letters").data.cleaning, Cleaning::Letters);
    let words = set("data.tokenizer=words").data;
    assert_eq!((words.tokenizer, words.min_count), (Some(TokenizerSource::Words), Some(2)));
    assert_eq!(set("data.truncation=head+tail").data.truncation, Truncation::HeadTail);
    assert_eq!(set("model.trainable=last_block").model.trainable, Trainable::LastBlock);
    assert_eq!(set("model.trainable=head").model.trainable, Trainable::Head);
    assert_eq!(set("train.schedule=cosine").train.schedule, Schedule::Cosine);
    assert_eq!(set("train.schedule=constant").train.schedule, Schedule::Constant);
    for (name, activation) in
        [("gelu", Activation::Gelu), ("gelu_new", Activation::GeluNew), ("relu", Activation::Relu)]
    {
        let config = set(&format!("model.hidden_act={name}"));
        let Weights::Random(shape) = config.model.weights else { panic!("{name}") };
        assert_eq!(shape.hidden_act, Some(activation));
    }
}

#[test]
fn the_resolved_file_reads_back_to_the_same_settings() {
    let tokens = "train.batch_tokens=4096";
    let ratio = "train.warmup_ratio=0.1";
    let all = [
        "data.validation=dev.tsv",
        "data.test=test.tsv",
        "data.limit=100",
        "data.cleaning=words",
        "data.truncation=head+tail",
        "data.tokenizer=bert/tokenizer.json",
        "data.cache_dir=/var/cache/a",
        "model.trainable=head",
        "model.gradient_checkpointing=true",
        "model.hidden_act=gelu_new",
        "train.max_steps=70",
        tokens,
        ratio,
        "train.learning_rate=3.0000000000000004e-5",
        "train.schedule=cosine",
        "train.seed=9223372036854775807",
        "train.eval_steps=5",
        "train.early_stopping_patience=2",
        "checkpoint.every_steps=10",
        "run.threads=3",
    ];
    for config in [parse(PRETRAINED), parse(RANDOM), load(RANDOM, &all).unwrap()] {
        let text = config.to_toml().unwrap();
        // Another name, so that run.dir has to come from the text.
        let back = Config::from_toml_str(&text, Path::new("runs/x/config.toml")).unwrap();
        assert_eq!(back, config, "{text}");
        assert_eq!(back.difference(&config).unwrap(), None);
        assert_eq!(back.to_toml().unwrap(), text);
    }
}

#[test]
fn overrides_win_over_the_file_and_the_last_over_the_first() {
    let config = load(
        PRETRAINED,
        &[
            "train.learning_rate=1e-4",
            "train.epochs = 7",
            "data.train=a b/reviews.csv",
            "model.path=\"other\"",
            "data.validation=dev.tsv",
            "train.epochs=8",
            "model.gradient_checkpointing=true",
            "run.dir=2024",
            "data.test=2024-01-01",
            "train.weight_decay=0",
        ],
    )
    .unwrap();
    assert_eq!((config.train.learning_rate, config.train.epochs), (1e-4, 8));
    assert_eq!(config.data.train, Reviews::Path("a b/reviews.csv".into()));
    assert_eq!(config.model.weights, Weights::Pretrained("other".into()));
    assert_eq!(config.data.validation, Validation::Path("dev.tsv".into()));
    assert!(config.model.gradient_checkpointing);
    assert_eq!(config.run.dir, PathBuf::from("2024"), "a number where only a path fits");
    assert_eq!(config.data.test, Some("2024-01-01".into()), "a date where only a path fits");
    assert_eq!(config.train.weight_decay, 0.0, "an integer where a float fits");
}

#[test]
fn the_fingerprint_covers_what_changes_the_result_and_nothing_else() {
    let plain = load(RANDOM, &[]).unwrap();
    let fingerprint = plain.fingerprint().unwrap();
    for neutral in [
        "run.dir=elsewhere",
        "run.threads=7",
        "checkpoint.keep=9",
        "checkpoint.every_steps=9",
        "data.cache_dir=elsewhere",
        // Spelled out, but what it is anyway.
        "train.batch_size=16",
        "train.learning_rate=0.00002",
    ] {
        let other = load(RANDOM, &[neutral]).unwrap();
        assert_eq!(other.fingerprint().unwrap(), fingerprint, "{neutral}");
        assert_eq!(plain.difference(&other).unwrap(), None, "{neutral}");
    }
    for (decisive, said) in [
        ("data.limit=7", "data.limit is 6000, not 7"),
        ("data.test=t.tsv", "data.test is unset, not \"t.tsv\""),
        ("model.hidden_size=128", "model.hidden_size is 64, not 128"),
        ("train.batch_tokens=4096", "train.batch_size is 16, not unset"),
        ("train.seed=1", "train.seed is 42, not 1"),
    ] {
        let other = load(RANDOM, &[decisive]).unwrap();
        assert_ne!(other.fingerprint().unwrap(), fingerprint, "{decisive}");
        assert_eq!(plain.difference(&other).unwrap().as_deref(), Some(said));
    }
    let pretrained = parse(PRETRAINED);
    assert_eq!(
        plain.difference(&pretrained).unwrap().as_deref(),
        Some("data.limit is 6000, not unset")
    );
    assert!(fingerprint.contains("\ntrain.seed = 42\n"), "{fingerprint}");
}

#[test]
fn the_cache_goes_where_the_config_or_the_environment_says() {
    let plain = parse(PRETRAINED).data;
    let given = load(PRETRAINED, &["data.cache_dir=here"]).unwrap().data;
    let with = |data: &Data, set: &[(&str, &str)]| {
        data.cache_dir_with(|name| {
            set.iter().find(|(key, _)| *key == name).map(|(_, value)| value.into())
        })
    };
    let (own, xdg, home) = (("ALLREEL_CACHE", "/own"), ("XDG_CACHE_HOME", "/xdg"), ("HOME", "/h"));
    assert_eq!(with(&given, &[own]).unwrap(), Path::new("here"));
    assert_eq!(with(&plain, &[home, xdg, own]).unwrap(), Path::new("/own"));
    assert_eq!(with(&plain, &[home, xdg]).unwrap(), Path::new("/xdg/allreel"));
    assert_eq!(
        with(&plain, &[home, ("ALLREEL_CACHE", "")]).unwrap(),
        Path::new("/h/.cache/allreel")
    );
    let error = with(&plain, &[]).unwrap_err().to_string();
    assert!(error.contains("set data.cache_dir or $ALLREEL_CACHE"), "{error}");
}

#[test]
fn windows_line_ends_and_a_byte_order_mark_are_no_obstacle() {
    let text = format!("\u{feff}{}", PRETRAINED.replace('\n', "\r\n"));
    assert_eq!(parse(&text), parse(PRETRAINED));
    let refusal = refused::refusal(&format!("{text}num_label = 3\r\n"));
    assert!(refusal.starts_with("a.toml:5: model.num_label = 3: unknown key"), "{refusal}");
}
