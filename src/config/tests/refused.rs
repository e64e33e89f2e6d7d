//! What is said about settings that may not be.

use super::*;

/// What is said about `text`, which must be refused as the user's to mend.
pub(super) fn refusal(text: &str) -> String {
    let error = Config::from_toml_str(text, Path::new("a.toml")).unwrap_err();
    assert!(matches!(error, Error::User(_)), "{error:?}");
    error.to_string()
}

/// What is said about one override to `PRETRAINED`.
fn set_refusal(argument: &str) -> String {
    let error = load(PRETRAINED, &[argument]).unwrap_err();
    assert!(matches!(error, Error::User(_)), "{error:?}");
    error.to_string()
}

#[test]
fn unknown_names_are_refused_with_the_nearest_known_one() {
    for (text, said) in [
        (
            "[train]\n\nlr = 1",
            "a.toml:3: train.lr = 1: unknown key train.lr; the nearest known one is train.learning_rate",
        ),
        (
            "[train]\nwarmup_step = 1",
            "a.toml:2: train.warmup_step = 1: unknown key train.warmup_step; the nearest known one is train.warmup_steps",
        ),
        (
            "[train]\nmax_length = 9",
            "unknown key train.max_length; the nearest known one is data.max_length",
        ),
        ("[train]\nnum_train_epochs = 9", "the nearest known one is train.epochs"),
        ("[train]\nseed.x = 9", "a.toml:2: train.seed = seed: expected a whole number, 0 or more"),
        (
            "learning_rate = 1",
            "a.toml:1: unknown key learning_rate; the nearest known one is train.learning_rate",
        ),
        (
            "\n[trian]\nseed = 1",
            "a.toml:2: unknown section [trian]; the nearest known one is [train]",
        ),
        ("data = 1", "a.toml:1: data is a section; write [data] and its keys below"),
        ("[[data]]\nlimit = 1", "a.toml:1: data is a section; write [data] and its keys below"),
    ] {
        let refusal = refusal(text);
        assert!(refusal.contains(said), "{text:?}: {refusal}");
    }
}

#[test]
fn wrong_types_are_refused_with_what_is_expected() {
    for (text, said) in [
        ("[data]\ntrain = 3", "a.toml:2: data.train = 3: expected a path, in quotes"),
        ("[data]\ntest = 1", "a.toml:2: data.test = 1: expected a path, in quotes"),
        (
            "[data]\nvalidation = true",
            "a.toml:2: data.validation = true: expected a share of the training reviews such as 0.1, or a path",
        ),
        (
            "[train]\nepochs = \"3\"",
            "a.toml:2: train.epochs = \"3\": expected a whole number, 0 or more",
        ),
        ("[train]\nepochs = -3", "a.toml:2: train.epochs = -3: expected a whole number"),
        ("[train]\nepochs = 1.5", "a.toml:2: train.epochs = 1.5: expected a whole number"),
        (
            "[train]\nlearning_rate = \"\"\"a\nb\"\"\"",
            "a.toml:2: train.learning_rate = \"\"\"a: expected a number",
        ),
        (
            "[model]\ngradient_checkpointing = 1",
            "a.toml:2: model.gradient_checkpointing = 1: expected true or false",
        ),
        ("[train]\nschedule = 1", "expected one of `linear`, `cosine`, `constant`"),
        (
            "[train]\nschedule = \"liner\"",
            "expected one of `linear`, `cosine`, `constant`; the nearest is `linear`",
        ),
        (
            "[model]\nkind = \"deberta-v3\"",
            "a.toml:2: model.kind = \"deberta-v3\": expected one of `bert`, `distilbert`, `roberta`, \
             `deberta-v2`",
        ),
        (
            "[train]\nseed = 99999999999999999999",
            "a.toml:2: train.seed = 99999999999999999999: too large a number",
        ),
    ] {
        let refusal = refusal(text);
        assert!(refusal.contains(said), "{text:?}: {refusal}");
    }
}

#[test]
fn text_that_is_not_toml_is_refused_with_its_line() {
    for (text, said) in [
        ("\n\nfoo", "a.toml:3: key with no value, expected `=`, in `foo`"),
        ("[data]\ntrain = \"x\"\ntrain = \"y\"", "a.toml:3: duplicate key, in `train = \"y\"`"),
        ("[data]\ntrain = é", "a.toml:2: "),
        ("[data]\n# é\nü = 1", "a.toml:3: "),
        ("[data\n", "a.toml:1: "),
    ] {
        let refusal = refusal(text);
        assert!(refusal.starts_with(said), "{text:?}: {refusal}");
        assert_eq!(refusal.lines().count(), 1, "{refusal}");
    }
}

#[test]
fn bad_overrides_are_refused_by_name() {
    for (argument, said) in [
        ("train.seed", "no value; write section.key=value"),
        ("train.seed=", "no value; write section.key=value"),
        ("seed=1", "no section; write section.key=value"),
        ("train.sed=1", "unknown key train.sed; the nearest known one is train.seed"),
        ("trian.seed=1", "unknown key trian.seed; the nearest known one is train.seed"),
        ("train.seed.x=1", "unknown key train.seed.x; the nearest known one is train.seed"),
        ("train.seed=abc", "expected a whole number, 0 or more"),
        ("train.seed=1\nepochs=3", "expected a whole number, 0 or more"),
        ("data.test=\"a", "invalid basic string"),
        ("data.cleaning=word", "the nearest is `words`"),
        ("train.learning_rate=-1", "must be greater than 0 and finite; 2e-5 is usual"),
    ] {
        let refusal = set_refusal(argument);
        assert!(refusal.starts_with(&format!("--set {argument}: ")), "{refusal}");
        assert!(refusal.contains(said), "{argument}: {refusal}");
    }
}

#[test]
fn settings_that_exclude_or_need_each_other_are_named() {
    let after = |text: &str, more: &str| refusal(&format!("{text}{more}"));
    for (refusal, said) in [
        (refusal(""), "a.toml: data.train: missing: write train = \"reviews.tsv\""),
        (refusal("[data]\ntrain = \"x\""), "a.toml: model.path: missing: give the directory"),
        (
            after(PRETRAINED, "hidden_act = \"relu\""),
            "a.toml:5: model.hidden_act = \"relu\": model.path is given too, and minilm/config.json",
        ),
        (
            refusal(&RANDOM.replace("hidden_size = 64\n", "")),
            "a.toml: model.hidden_size: missing: a new encoder needs it",
        ),
        (
            refusal(&RANDOM.replace("tokenizer = \"wordpiece\"\n", "")),
            "a.toml: data.tokenizer: missing: without model.path there is no tokenizer",
        ),
        (
            refusal(&PRETRAINED.replace("[model]", "tokenizer = \"wordpiece\"\n[model]")),
            "a.toml:3: data.tokenizer = \"wordpiece\": a tokenizer trained anew does not fit",
        ),
        (
            refusal(&PRETRAINED.replace("[model]", "tokenizer = \"words\"\n[model]")),
            "a.toml:3: data.tokenizer = \"words\": a tokenizer trained anew does not fit",
        ),
        (
            refusal(&RANDOM.replace("max_length = 128", "min_count = 3")),
            "a.toml:4: data.min_count = 3: is only for data.tokenizer = \"words\"; remove it",
        ),
        (
            refusal(&RANDOM.replace("= 128", "= 513")),
            "a.toml:4: data.max_length = 513: must be at most 512: model.max_position_embeddings ends",
        ),
        (
            after(PRETRAINED, "[train]\nbatch_size = 8\nbatch_tokens = 4096"),
            "a.toml:7: train.batch_tokens = 4096: given together with train.batch_size",
        ),
        (
            after(PRETRAINED, "[train]\nwarmup_steps = 8\nwarmup_ratio = 0.1"),
            "a.toml:7: train.warmup_ratio = 0.1: given together with train.warmup_steps",
        ),
        (
            after(PRETRAINED, "[train]\nwarmup_steps = 8\nmax_steps = 7"),
            "a.toml:6: train.warmup_steps = 8: longer than the run, which train.max_steps ends \
             after 7 steps",
        ),
        (
            refusal(&PRETRAINED.replace("[model]", "max_length = 8193\n[model]")),
            "a.toml: train.micro_tokens = 8192 (the default): must hold one review of \
             data.max_length; use at least 8193",
        ),
        (
            after(PRETRAINED, "[train]\nbatch_tokens = 511"),
            "a.toml:6: train.batch_tokens = 511: must hold one review of data.max_length; use at \
             least 512",
        ),
    ] {
        assert!(refusal.starts_with(said), "{refusal}");
    }
}

#[test]
fn values_out_of_range_are_refused() {
    for argument in [
        "data.train=\"\"",
        "data.validation=0",
        "data.validation=1.0",
        "data.validation=-0.1",
        "data.validation=nan",
        "data.validation=\"\"",
        "data.test=\"\"",
        "data.tokenizer=\"\"",
        "data.cache_dir=\"\"",
        "data.limit=0",
        "data.min_count=0",
        "data.max_length=0",
        "model.vocab_size=0",
        "model.vocab_size=4294967296",
        "model.hidden_size=0",
        "model.num_hidden_layers=0",
        "model.num_attention_heads=0",
        "model.num_attention_heads=3",
        "model.intermediate_size=0",
        "model.max_position_embeddings=0",
        "model.type_vocab_size=0",
        "model.layer_norm_eps=0",
        "model.layer_norm_eps=inf",
        "model.initializer_range=0",
        "model.initializer_range=nan",
        "model.hidden_dropout_prob=1",
        "model.attention_probs_dropout_prob=-0.1",
        "model.classifier_dropout=nan",
        "model.num_labels=1",
        "train.epochs=0",
        "train.max_steps=0",
        "train.batch_size=0",
        "train.batch_tokens=0",
        "train.micro_tokens=0",
        "train.group_window=0",
        "train.learning_rate=0",
        "train.learning_rate=inf",
        "train.learning_rate=nan",
        "train.warmup_ratio=1.5",
        "train.warmup_ratio=-0.5",
        "train.weight_decay=-0.1",
        "train.weight_decay=inf",
        "train.adam_beta1=1",
        "train.adam_beta2=-0.1",
        "train.adam_epsilon=0",
        "train.max_grad_norm=-1",
        "train.max_grad_norm=inf",
        "train.label_smoothing=1",
        "train.eval_steps=0",
        "train.early_stopping_patience=0",
        "checkpoint.every_steps=0",
        "checkpoint.keep=0",
        "run.dir=\"\"",
        "run.threads=0",
    ] {
        let error = load(RANDOM, &[argument]).expect_err(argument).to_string();
        assert!(
            error.starts_with(&format!("--set {argument}: must ")) || error.contains("share must"),
            "{error}"
        );
    }
    let empty = refusal(&PRETRAINED.replace("minilm", ""));
    assert!(empty.starts_with("a.toml:4: model.path = \"\": must not be empty"), "{empty}");
}

#[test]
fn a_config_changed_in_code_is_checked_again() {
    let mut config = parse(PRETRAINED);
    config.check().unwrap();
    config.train.seed = 1 << 63;
    let error = config.check().unwrap_err().to_string();
    assert_eq!(error, "train.seed = 9223372036854775808: must be below 2^63");
}

#[test]
fn a_file_that_cannot_be_read_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let missing = dir.path().join("none.toml");
    let error = Config::load(&missing, &[]).unwrap_err().to_string();
    assert!(error.starts_with(&format!("cannot read {}: ", missing.display())), "{error}");
    let binary = dir.path().join("binary.toml");
    std::fs::write(&binary, [0xff, 0xfe]).unwrap();
    let error = Config::load(&binary, &[]).unwrap_err();
    assert_eq!(error.exit_code(), 2);
    assert!(error.to_string().contains("UTF-8"), "{error}");
}
