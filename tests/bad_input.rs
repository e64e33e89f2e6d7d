//! What is wrong with a user's input is said in one line that names the file, the line, the value
//! and the remedy; the exit code is 2, and no file is touched.

mod adapters;
mod bench;
mod embed;
mod linear;
#[cfg(feature = "mpi")]
mod ranks;

use std::fs;

use super::run::{Output, Workdir, easy};

/// Beginnings of what a run says before it has looked at everything.
const NOTES: [&str; 3] =
    ["bert: ", "new (not in the checkpoint): ", "in the checkpoint but not used: "];

/// Runs `args`, which must end with code 2 and leave every file as it was; returns the lines of its
/// standard error, without notes.
#[track_caller]
fn fails(dir: &Workdir, args: &str) -> Vec<String> {
    let before = dir.files();
    let Output { code, out, err } = dir.allreel(args);
    assert_eq!(code, 2, "{args}: {err}");
    assert_eq!(out, "", "{args}");
    let after = dir.files();
    assert!(
        before.keys().eq(after.keys()),
        "{args}: {:#?} became {:#?}",
        before.keys(),
        after.keys()
    );
    for (path, bytes) in before {
        assert!(after[&path] == bytes, "{args} changed {}", path.display());
    }
    let note = |line: &str| {
        let line = line.strip_prefix("[rank 0] ").unwrap_or(line);
        NOTES.iter().any(|note| line.starts_with(note))
    };
    err.lines().filter(|line| !note(line)).map(str::to_owned).collect()
}

/// Runs `args`, which must be refused in one line that holds all of `says`.
#[track_caller]
fn refused(dir: &Workdir, args: &str, says: &[&str]) {
    let lines = fails(dir, args);
    assert_eq!(lines.len(), 1, "{args}: {lines:#?}");
    assert!(lines[0].starts_with("error: "), "{args}: {}", lines[0]);
    holds_all(args, &lines[0], says);
}

/// Runs `args`, which the command line's parser must refuse, once, in lines of its own.
#[track_caller]
fn misused(dir: &Workdir, args: &str, says: &[&str]) {
    let text = fails(dir, args).join("\n");
    assert!(text.starts_with("error: "), "{args}: {text}");
    for once in ["error: ", "--help"] {
        assert_eq!(text.matches(once).count(), 1, "{args}: {text}");
    }
    assert!(!text.contains("[rank "), "{args}: {text}");
    holds_all(args, &text, says);
}

#[track_caller]
fn holds_all(args: &str, text: &str, says: &[&str]) {
    for say in says {
        assert!(text.contains(say), "{args}: no `{say}` in\n{text}");
    }
}

/// Gives `file` to every command and key that reads reviews.
#[track_caller]
fn refused_everywhere(dir: &Workdir, file: &str, says: &[&str]) {
    for key in ["train", "validation", "test"] {
        let args = format!("train first.toml --set run.dir=second --set data.{key}={file}");
        refused(dir, &args, says);
    }
    refused(dir, &format!("eval first --data {file}"), says);
    let args = format!("predict first --data {file} --out labels.csv");
    refused(dir, &args, says);
    refused(dir, &format!("{args} --limit 1"), says);
}

#[test]
fn a_missing_file_is_named_wherever_it_is_read() {
    let dir = Workdir::trained();
    refused_everywhere(&dir, "gone.tsv", &["gone.tsv does not exist; check"]);
    refused(&dir, "train gone.toml", &["gone.toml", "No such file"]);
}

#[test]
fn an_empty_file_is_refused_wherever_it_is_read() {
    let dir = Workdir::trained();
    for (file, content) in
        [("empty.csv", ""), ("empty.jsonl", "\n\n"), ("header.tsv", "id\tsentiment\treview\n")]
    {
        dir.write(file, content);
        let says = format!("{file} holds no reviews; it needs at least one row");
        refused_everywhere(&dir, file, &[&says]);
    }
}

/// Three reviews, then `last`.
fn table(dir: &Workdir, file: &str, last: &[u8]) {
    dir.reviews(file, &easy(3, 3));
    let mut bytes = fs::read(dir.path(file)).expect("just written");
    bytes.extend_from_slice(last);
    dir.write(file, bytes);
}

#[test]
fn a_row_of_two_columns_is_refused_wherever_it_is_read() {
    let dir = Workdir::trained();
    let says = "line 5: 2 columns where the header names 3 (id,";
    table(&dir, "two.tsv", b"\"4_9\"\t\"good\"\n");
    refused_everywhere(&dir, "two.tsv", &["two.tsv", says, "complete the row"]);
    table(&dir, "two.csv", b"4_9,good\n");
    refused_everywhere(&dir, "two.csv", &["two.csv", says, "complete the row"]);
}

#[test]
fn a_label_of_seven_is_refused_wherever_it_is_read() {
    let dir = Workdir::trained();
    let remedy = "use 0, 1, negative or positive";
    for (file, row, line) in [
        ("seven.tsv", "\"4_9\"\t7\t\"good\"\n", 5),
        ("seven.csv", "4_9,good,7\n", 5),
        ("seven.jsonl", "{\"text\": \"good\", \"label\": 7}\n", 4),
    ] {
        table(&dir, file, row.as_bytes());
        let says = format!("{file}, line {line}: label \"7\" is unknown");
        refused_everywhere(&dir, file, &[&says, remedy]);
    }
}

#[test]
fn bytes_that_are_not_utf8_are_refused_wherever_they_are_read() {
    let dir = Workdir::trained();
    let remedy = "convert the file";
    table(&dir, "latin.csv", b"4_9,na\xefve,1\n");
    let says = "latin.csv, line 5: byte 0xEF is not valid UTF-8";
    refused_everywhere(&dir, "latin.csv", &[says, remedy]);
    dir.reviews("tree", &easy(4, 3));
    dir.write("tree/neg/9_1.txt", b"first\nna\xefve");
    refused_everywhere(&dir, "tree", &["9_1.txt, line 2: byte 0xEF", remedy]);
}

#[test]
fn reviews_without_labels_can_only_be_predicted() {
    let dir = Workdir::trained();
    dir.write("plain.csv", "text\ngood\nbad\n");
    let says = ["plain.csv has no labels", "sentiment", "label"];
    for key in ["train", "validation", "test"] {
        let args = format!("train first.toml --set run.dir=second --set data.{key}=plain.csv");
        refused(&dir, &args, &says);
    }
    refused(&dir, "eval first --data plain.csv", &says);
    dir.allreel("predict first --data plain.csv --out labels.csv").ok();
}

/// A model directory `model` to break, and `second.toml` that starts from it.
fn pretrained() -> Workdir {
    let dir = Workdir::trained();
    fs::rename(dir.path("first/best"), dir.path("model")).expect("moved");
    let text = "[data]\ntrain = \"train.csv\"\nmax_length = 48\n[model]\npath = \"model\"\n";
    dir.write("second.toml", text);
    dir
}

#[test]
fn a_truncated_weight_file_is_named() {
    let dir = pretrained();
    let whole = fs::read(dir.path("model/model.safetensors")).expect("weights");
    for keep in [0, 7, 100, whole.len() / 2, whole.len() - 1] {
        dir.write("model/model.safetensors", &whole[..keep]);
        let says = ["model/model.safetensors is damaged", "fetch it again"];
        refused(&dir, "train second.toml", &says);
        refused(&dir, "predict model --text good", &says);
    }
    fs::remove_file(dir.path("model/model.safetensors")).expect("removed");
    let says = ["model holds neither model.safetensors nor pytorch_model.bin", "Hugging Face"];
    refused(&dir, "train second.toml", &says);
    dir.write("model/pytorch_model.bin", &whole[..100]);
    let says = ["model/pytorch_model.bin is damaged", "fetch it again"];
    refused(&dir, "train second.toml", &says);
}

#[test]
fn a_model_that_is_neither_here_nor_in_the_cache_is_named() {
    let dir = pretrained();
    let offline = ["is no directory here", "HF_HUB_OFFLINE is set", "run `allreel fetch "];
    let (path, name) = (" does not exist, and is no name of a model", "org/name@revision");
    for (given, says) in [
        ("gone", &[&["gone "], &offline[..]].concat()[..]),
        ("org/gone@v1", &[&["org/gone@v1 "], &offline[..]].concat()),
        ("./gone", &["./gone", path, name, "check the path"]),
        ("models/of/mine", &["models/of/mine", path, name]),
    ] {
        refused(&dir, &format!("train second.toml --set model.path={given}"), says);
    }
    for (args, says) in [
        ("fetch ./model", "./model is no name of a model on the Hub"),
        ("fetch a/b --revision ../x", "--revision ../x is no branch, tag or commit"),
        ("fetch a/b c/d --out x", "one thing at a time"),
        ("fetch a/b --url http://x", "another address for models is HF_ENDPOINT"),
        ("fetch imdb --revision v1", "imdb has none"),
    ] {
        refused(&dir, args, &[says]);
    }
    misused(&dir, "fetch", &["MODEL|imdb"]);
}

/// Replaces what stands once in a file.
fn replace(dir: &Workdir, file: &str, from: &str, to: &str) {
    let text = dir.read(file);
    assert_eq!(text.matches(from).count(), 1, "{from} in {file}");
    dir.write(file, text.replace(from, to));
}

#[test]
fn a_shape_that_config_json_does_not_make_is_named() {
    let dir = pretrained();
    let (from, to) = ("\"intermediate_size\": 64", "\"intermediate_size\": 96");
    replace(&dir, "model/config.json", from, to);
    let says = [
        "model/model.safetensors: tensor bert.encoder.layer.0.intermediate.dense.weight",
        "[64, 32]",
        "[96, 32]",
        "use the config.json that was saved with these weights",
    ];
    refused(&dir, "train second.toml", &says);
    refused(&dir, "eval model --data train.csv", &says);
    replace(&dir, "model/config.json", to, from);
    let (from, to) = ("\"num_hidden_layers\": 1", "\"num_hidden_layers\": 2");
    replace(&dir, "model/config.json", from, to);
    let says = ["model/model.safetensors: missing bert.encoder.layer.1.", "and 8 more"];
    refused(&dir, "train second.toml", &says);
}

#[test]
fn a_vocabulary_smaller_than_an_id_is_refused() {
    let dir = pretrained();
    let words: String = dir.read("model/tokenizer.json");
    // The same words under ids from 1000.
    let mut json: serde_json::Value = serde_json::from_str(&words).expect("JSON");
    for id in json["model"]["vocab"].as_object_mut().expect("a vocabulary").values_mut() {
        let old = id.as_u64().expect("an id");
        *id = (if old < 5 { old } else { old + 1000 }).into();
    }
    dir.write("other/tokenizer.json", json.to_string());
    let outside = ["token id 1", "is outside"];
    let says = [&outside[..], &["model/config.json", "vocab_size of 300", "saved with"]].concat();
    let args = "train second.toml --set data.tokenizer=other";
    refused(&dir, args, &says);
    let says = [&outside[..], &["model.vocab_size = 300"]].concat();
    let args = "train first.toml --set run.dir=third --set data.tokenizer=other";
    refused(&dir, args, &says);
    dir.write("model/tokenizer.json", json.to_string());
    let says = [&outside[..], &["model/config.json", "vocab_size of 300"]].concat();
    refused(&dir, "train second.toml", &says);
    refused(&dir, "predict model --text splendid", &says);
    refused(&dir, "eval model --data train.csv", &says);
}

#[test]
fn unknown_keys_name_the_nearest_known_one() {
    let dir = Workdir::prepared();
    replace(&dir, "first.toml", "batch_size", "batchsize");
    let nearest = "unknown key train.batchsize; the nearest known one is train.batch_size";
    refused(&dir, "train first.toml", &["first.toml:18: train.batchsize = 16", nearest]);
    dir.config("first");
    refused(
        &dir,
        "train first.toml --set train.batchsize=8",
        &["--set train.batchsize=8", nearest],
    );
    let args = "train first.toml --set train.batch_size=many";
    refused(&dir, args, &["train.batch_size=many", "a whole number"]);
    replace(&dir, "first.toml", "[model]", "[modell]");
    let says = ["first.toml:7: ", "[modell]", "[model]"];
    refused(&dir, "train first.toml", &says);
}

#[test]
fn a_warmup_longer_than_the_run_is_refused() {
    let dir = Workdir::prepared();
    let remedy = "Use at most 19";
    let args = "train first.toml --set train.warmup_steps=20";
    refused(&dir, args, &["train.warmup_steps = 20", "run of 20", remedy]);
    let args = "train first.toml --set train.warmup_ratio=1.0";
    refused(&dir, args, &["train.warmup_ratio = 1", "run of 20", remedy]);
    let args = "train first.toml --set train.warmup_steps=9 --set train.max_steps=5";
    let says = ["train.warmup_steps=9", "after 5 steps"];
    refused(&dir, args, &says);
}

#[test]
fn a_length_beyond_the_positions_is_refused() {
    let dir = pretrained();
    let args = "train second.toml --set data.max_length=65";
    let says = ["data.max_length = 65", "must be at most 64", "the model's positions end there"];
    refused(&dir, args, &says);
    let args = "train first.toml --set run.dir=third --set data.max_length=65";
    let says = ["data.max_length=65", "max_position_embeddings", "64"];
    refused(&dir, args, &says);
    let says = ["max_length 65", "64 positions", "use at most 64"];
    refused(&dir, "eval model --data train.csv --max-length 65", &says);
    refused(&dir, "predict model --text a --max-length 65", &says);
    let says = ["max_length = 2 leaves no room for text", "at least 3"];
    refused(&dir, "predict model --text a --max-length 2", &says);
}

#[test]
fn a_run_directory_is_used_once() {
    let dir = Workdir::trained();
    let says = ["first already holds a run", "--resume", "another run.dir"];
    refused(&dir, "train first.toml", &says);
    // Whichever of its parts is left.
    for part in ["summary.json", "metrics.jsonl", "checkpoints"] {
        let (from, to) = (dir.path("first").join(part), dir.path("gone"));
        fs::rename(&from, &to).expect("moved");
        refused(&dir, "train first.toml", &says);
        fs::rename(&to, &from).expect("moved");
    }
}

#[test]
fn resuming_with_other_settings_or_data_is_refused() {
    let dir = Workdir::trained();
    let args = "train first.toml --resume --set train.learning_rate=1e-3";
    let says = [
        "cannot resume first: train.learning_rate is 0.001, not 0.01 there",
        "use the settings it was started with",
    ];
    refused(&dir, args, &says);
    let args = "train first.toml --resume --set train.seed=7 --set train.epochs=3";
    refused(&dir, args, &["train.epochs is 3, not 2 there"]);
    for (file, count, seed) in [("validation.csv", 50, 2), ("train.csv", 160, 1)] {
        dir.reviews(file, &easy(count, 9));
        let says = ["cannot resume first: the training or validation data"];
        refused(&dir, "train first.toml --resume", &says);
        dir.reviews(file, &easy(count, seed));
    }
}

#[test]
fn predict_and_eval_need_a_trained_model() {
    let dir = Workdir::trained();
    dir.write("folder/note.txt", "nothing");
    for name in ["folder", "absent"] {
        let says = format!("{name} is neither a run directory (with config.toml) nor a model");
        refused(&dir, &format!("predict {name} --text good"), &[&says]);
        refused(&dir, &format!("eval {name} --data train.csv"), &[&says, "config.json"]);
    }
    fs::remove_dir_all(dir.path("first/best")).expect("removed");
    let says = ["first has no best model yet", "--resume"];
    refused(&dir, "predict first --text good", &says);
}

#[test]
fn predict_says_where_it_cannot_write_before_it_works() {
    let dir = Workdir::trained();
    // The input is missing too: what cannot be written is noticed first.
    let args = "predict first --data gone.csv --out";
    let says = ["--out", "absent"];
    refused(&dir, &format!("{args} absent/a.csv"), &says);
    let says = ["--out", "first is a directory"];
    refused(&dir, &format!("{args} first"), &says);
}

#[test]
fn a_misused_command_line_is_explained_once() {
    let dir = Workdir::trained();
    misused(&dir, "predict first", &["--data", "--text"]);
    misused(&dir, "predict first --data train.csv", &["--out"]);
    misused(&dir, "eval first", &["--data"]);
    misused(&dir, "trian first.toml", &["trian", "train"]);
    misused(&dir, "launch -n 2", &["<COMMAND>"]);
    let args = "launch -n two -- train first.toml";
    misused(&dir, args, &["two", "--ranks"]);
}

#[test]
fn what_launch_cannot_start_is_said_once() {
    let dir = Workdir::trained();
    let args = "launch -n 0 -- train first.toml";
    refused(&dir, args, &["-n 0", "at least one rank", "use -n 1"]);
    // What every rank would complain about.
    misused(&dir, "launch -n 2 -- predict first", &["--data", "--text"]);
    misused(&dir, "launch -n 2 -- trian first.toml", &["trian"]);
    let args = "launch -n 2 -- launch -n 2 -- train first.toml";
    refused(&dir, args, &["launch cannot start a launch"]);
    let args = "launch -n 2 --backend processes --mpirun absent -- train first.toml";
    refused(&dir, args, &["--mpirun is for mpirun", "leave --mpirun out"]);
}

#[cfg(feature = "mpi")]
#[test]
fn an_mpirun_that_is_none_is_named() {
    let dir = Workdir::prepared();
    let args = "launch -n 2 --mpirun absent -- train first.toml";
    refused(&dir, args, &["--mpirun names absent", "give the path"]);
}

#[cfg(not(feature = "mpi"))]
#[test]
fn launch_says_how_to_build_it() {
    let dir = Workdir::prepared();
    let args = "launch -n 2 --backend mpirun -- train first.toml";
    refused(&dir, args, &["without MPI", "--features mpi"]);
}
