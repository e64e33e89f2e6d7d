//! Models by their name on the Hub and the reviews by theirs, from servers that break off, send
//! damaged files, refuse, or are gone.

mod fake;
mod imdb;
mod server;

use std::{fs, path::PathBuf};

use candle_core::{DType, Device, Tensor};
use serde_json::Value;

use super::run::{Output, Workdir};
use fake::{COMMIT, FakeHub, Faults, REPO};

/// A directory with the trained model `first/best`, and a Hub that has it.
fn published() -> (Workdir, FakeHub) {
    let dir = Workdir::trained();
    let hub = FakeHub::of(&dir.path("first/best"));
    (dir, hub)
}

/// Runs `allreel` against the Hub at `url`.
fn online(dir: &Workdir, url: &str, args: &str) -> Output {
    let variables = [("HF_ENDPOINT", url), ("HF_HUB_OFFLINE", "0")];
    dir.allreel_in(&variables, &args.split_whitespace().collect::<Vec<_>>())
}

/// Where the cache has the model.
fn repo(dir: &Workdir) -> PathBuf {
    dir.path("hub/hub/models--test--tiny")
}

fn snapshot(dir: &Workdir) -> PathBuf {
    repo(dir).join("snapshots").join(COMMIT)
}

/// The snapshot has the same files as the model.
#[track_caller]
fn arrived(dir: &Workdir, place: &PathBuf) {
    let mut names: Vec<_> = fs::read_dir(dir.path("first/best"))
        .expect("a model")
        .map(|entry| entry.expect("an entry").file_name())
        .collect();
    names.sort();
    for name in &names {
        let (want, got) = (dir.path("first/best").join(name), place.join(name));
        assert!(fs::read(want).expect("a file") == fs::read(&got).expect("a file"), "{got:?}");
    }
    let mut found: Vec<_> = fs::read_dir(place)
        .expect("a directory")
        .map(|entry| entry.expect("an entry").file_name())
        .collect();
    found.sort();
    assert_eq!(found, names);
}

#[test]
fn a_model_is_fetched_once_and_then_needs_nobody() {
    let (dir, hub) = published();
    let shown = online(&dir, &hub.hub.url, "fetch test/tiny").ok();
    assert!(shown.out.contains("test/tiny: fetched 4 files"), "{}", shown.out);
    assert!(shown.out.ends_with("[model]\npath = \"test/tiny\"\n"), "{}", shown.out);
    assert!(shown.err.contains("fetching model.safetensors ("), "{}", shown.err);
    arrived(&dir, &snapshot(&dir));
    assert_eq!(fs::read_to_string(repo(&dir).join("refs/main")).expect("a ref"), COMMIT);
    let link = fs::read_link(snapshot(&dir).join("model.safetensors")).expect("a link");
    let blob = link.file_name().expect("a name").to_string_lossy().into_owned();
    assert_eq!((link.parent(), blob.len()), (Some("../../blobs".as_ref()), 64));
    hub.hub.requests();

    let shown = online(&dir, &hub.hub.url, "fetch test/tiny").ok();
    assert!(shown.out.contains("test/tiny is there already"), "{}", shown.out);
    let asked = hub.hub.requests();
    assert_eq!(asked.len(), 1, "only whether main has moved: {asked:?}");
    let at = format!("fetch {REPO}@{COMMIT}");
    online(&dir, &hub.hub.url, &at).ok();
    assert_eq!(hub.hub.requests().len(), 0, "a commit never moves");

    let gone = hub.hub.url.clone();
    drop(hub);
    let shown = online(&dir, &gone, "fetch test/tiny").ok();
    assert!(shown.err.contains("cannot reach"), "{}", shown.err);
    assert!(shown.out.contains("is there already"), "{}", shown.out);
    let shown = dir.allreel("fetch test/tiny").ok();
    assert_eq!(shown.err, "", "HF_HUB_OFFLINE asks nobody");
    let text = ["--text", "a splendid film"];
    let said = |model| dir.allreel_with(&[&["predict", model], &text[..]].concat()).ok().out;
    assert_eq!(said("test/tiny"), said("first/best"));
    let shown = dir.allreel("fetch test/other");
    assert_eq!(shown.code, 2);
    assert!(shown.err.contains("HF_HUB_OFFLINE is set"), "{}", shown.err);
}

#[test]
fn the_token_goes_to_the_hub_and_to_nobody_else() {
    let (dir, hub) = published();
    let variables =
        [("HF_ENDPOINT", hub.hub.url.as_str()), ("HF_HUB_OFFLINE", "0"), ("HF_TOKEN", "hf_secret")];
    dir.allreel_in(&variables, &["fetch", "test/tiny"]).ok();
    let (asked, stored) = (hub.hub.requests(), hub.store.requests());
    assert!(!asked.is_empty() && !stored.is_empty());
    for request in asked {
        assert_eq!(request.authorization.as_deref(), Some("Bearer hf_secret"), "{request:?}");
    }
    for request in stored {
        assert_eq!(request.authorization, None, "{request:?}");
    }
}

#[test]
fn a_dropped_connection_is_gone_on_with() {
    let (dir, hub) = published();
    hub.fail(Faults { drops: 3, busy: 1, ..Faults::default() });
    online(&dir, &hub.hub.url, "fetch test/tiny").ok();
    arrived(&dir, &snapshot(&dir));
    let size = fs::metadata(dir.path("first/best/model.safetensors")).expect("a file").len();
    let size = usize::try_from(size).expect("small");
    let ranges: Vec<_> = hub.store.requests().iter().map(|request| request.range).collect();
    let half = size / 2;
    let quarter = half + (size - half) / 2;
    let eighth = quarter + (size - quarter) / 2;
    assert_eq!(ranges, [None, Some(half), Some(quarter), Some(eighth)]);
}

#[test]
fn what_a_killed_fetch_has_left_is_gone_on_with() {
    let (dir, hub) = published();
    online(&dir, &hub.hub.url, "fetch test/tiny").ok();
    let link = snapshot(&dir).join("model.safetensors");
    let blob = fs::canonicalize(&link).expect("a blob");
    let bytes = fs::read(&blob).expect("a file");
    fs::write(blob.with_extension("incomplete"), &bytes[..1000]).expect("written");
    fs::remove_file(&blob).expect("removed");
    hub.store.requests();
    online(&dir, &hub.hub.url, "fetch test/tiny").ok();
    let ranges: Vec<_> = hub.store.requests().iter().map(|request| request.range).collect();
    assert_eq!(ranges, [Some(1000)]);
    arrived(&dir, &snapshot(&dir));
    assert!(!blob.with_extension("incomplete").exists());
}

#[test]
fn a_wrong_checksum_is_tried_again_once_and_then_refused() {
    let (dir, hub) = published();
    hub.fail(Faults { damages: 2, ..Faults::default() });
    let shown = online(&dir, &hub.hub.url, "fetch test/tiny");
    assert_eq!(shown.code, 2, "{}", shown.err);
    for say in ["model.safetensors arrived damaged twice", "not SHA-256"] {
        assert!(shown.err.contains(say), "no `{say}` in {}", shown.err);
    }
    assert_eq!(hub.store.requests().len(), 2);
    assert!(!snapshot(&dir).join("model.safetensors").exists());
    assert!(!repo(&dir).join("refs/main").exists());
    for entry in fs::read_dir(repo(&dir).join("blobs")).expect("blobs") {
        let name = entry.expect("an entry").file_name().into_string().expect("UTF-8");
        assert_eq!(name.len(), 40, "only small files are left, not {name}");
    }
    assert_eq!(dir.allreel("fetch test/tiny").code, 2, "nothing whole is there");

    hub.fail(Faults { damages: 1, ..Faults::default() });
    let shown = online(&dir, &hub.hub.url, "fetch test/tiny").ok();
    assert!(shown.err.contains("fetching it again"), "{}", shown.err);
    arrived(&dir, &snapshot(&dir));
}

#[test]
fn a_full_disk_is_named_and_what_arrived_is_kept() {
    let (dir, hub) = published();
    // Ignored, the signal for a file too large becomes the error EFBIG.
    let limited = r#"trap '' XFSZ; ulimit -f 32; exec "$0" fetch test/tiny"#;
    let output = std::process::Command::new("bash")
        .args(["-c", limited, env!("CARGO_BIN_EXE_allreel")])
        .env("HF_HOME", dir.path("hub"))
        .env("HF_ENDPOINT", &hub.hub.url)
        .output()
        .expect("bash");
    let err = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(3), "{err}");
    for say in ["cannot write ", ".incomplete: ", "free some space"] {
        assert!(err.contains(say), "no `{say}` in {err}");
    }
    hub.store.requests();
    online(&dir, &hub.hub.url, "fetch test/tiny").ok();
    let ranges: Vec<_> = hub.store.requests().iter().map(|request| request.range).collect();
    assert_eq!(ranges, [Some(32 << 10)]);
    arrived(&dir, &snapshot(&dir));
}

#[test]
fn what_the_hub_refuses_is_explained() {
    let (dir, hub) = published();
    let url = hub.hub.url.clone();
    for (status, name, token, says) in [
        (401, "GatedRepo", "", ["without a token (401)", "set HF_TOKEN", "/settings/tokens"]),
        (403, "GatedRepo", "hf_x", ["token in HF_TOKEN (403)", "accept its terms", "test/tiny"]),
        (404, "RepoNotFound", "", ["neither a directory here nor a model", "/models", "test/tiny"]),
        (404, "RevisionNotFound", "", ["no revision \"main\"", "/tree/main", "test/tiny"]),
    ] {
        hub.fail(Faults { status: Some((status, name)), ..Faults::default() });
        let variables =
            [("HF_ENDPOINT", url.as_str()), ("HF_HUB_OFFLINE", "0"), ("HF_TOKEN", token)];
        let shown = dir.allreel_in(&variables, &["fetch", "test/tiny"]);
        assert_eq!(shown.code, 2, "{}", shown.err);
        assert_eq!(shown.err.lines().count(), 1, "{}", shown.err);
        for say in says {
            assert!(shown.err.contains(say), "{status}: no `{say}` in {}", shown.err);
        }
        assert!(!shown.err.contains("hf_x"), "the token is nobody's business: {}", shown.err);
    }
    drop(hub);
    let shown = online(&dir, &url, "fetch test/tiny");
    assert_eq!(shown.code, 3, "{}", shown.err);
    for say in [url.as_str(), "HF_HUB_OFFLINE=1", "check the network"] {
        assert!(shown.err.contains(say), "no `{say}` in {}", shown.err);
    }
}

#[test]
fn a_model_without_weights_that_are_read_is_refused() {
    let (dir, _) = published();
    dir.write("other/config.json", "{}");
    dir.write("other/tf_model.h5", "");
    let hub = FakeHub::of(&dir.path("other"));
    let shown = online(&dir, &hub.hub.url, "fetch test/tiny");
    assert_eq!(shown.code, 2);
    for say in ["lacks config.json or weights", "tf_model.h5", "pytorch_model.bin"] {
        assert!(shown.err.contains(say), "no `{say}` in {}", shown.err);
    }
}

#[test]
fn a_model_can_go_into_a_directory() {
    let (dir, hub) = published();
    let shown = online(&dir, &hub.hub.url, "fetch test/tiny --revision main --out mine").ok();
    assert!(shown.out.ends_with("path = \"mine\"\n"), "{}", shown.out);
    arrived(&dir, &dir.path("mine"));
    assert!(!repo(&dir).exists());
    hub.store.requests();
    let shown = online(&dir, &hub.hub.url, "fetch test/tiny --out mine").ok();
    assert!(shown.out.contains("is there already"), "{}", shown.out);
    assert_eq!(hub.store.requests().len(), 0);
    // What is there and is another file is replaced.
    dir.write("mine/config.json", "{}");
    let shown = online(&dir, &hub.hub.url, "fetch test/tiny --out mine").ok();
    assert!(shown.out.contains("fetched 1 file into"), "{}", shown.out);
    arrived(&dir, &dir.path("mine"));
}

/// A config that goes on with the model `path`.
fn second(dir: &Workdir, path: &str) {
    let text = format!(
        "[data]\ntrain = \"train.csv\"\nvalidation = \"validation.csv\"\nmax_length = 48\n\n\
         [model]\npath = \"{path}\"\n\n[train]\nepochs = 1\nlearning_rate = 1e-3\n"
    );
    dir.write("second.toml", text);
}

#[test]
fn train_takes_the_name_of_a_model() {
    let (dir, hub) = published();
    second(&dir, "test/tiny");
    let shown = online(&dir, &hub.hub.url, "train second.toml").ok();
    assert!(shown.err.contains("fetching model.safetensors"), "{}", shown.err);
    assert!(dir.read("runs/second/config.toml").contains("path = \"test/tiny\""));
    assert_eq!(dir.summary("runs/second")["model"], "tiny");
    second(&dir, "first/best");
    let args = "train second.toml --set run.dir=third";
    dir.allreel(args).ok();
    assert_eq!(dir.losses("runs/second"), dir.losses("third"), "the same model as a directory");
    drop(hub);
    second(&dir, "test/tiny");
    dir.allreel("train second.toml --set run.dir=fourth").ok();
    assert_eq!(dir.losses("fourth"), dir.losses("third"), "from the cache, offline");
    dir.allreel("train second.toml --resume").ok();
}

#[cfg(feature = "mpi")]
#[test]
fn mpi_ranks_fetch_a_model_once() {
    if !super::run::mpirun() {
        return;
    }
    let (dir, hub) = published();
    second(&dir, "test/tiny");
    online(&dir, &hub.hub.url, "launch -n 3 -- train second.toml").ok();
    assert_eq!(hub.store.requests().len(), 1);
    let listings = hub.hub.requests();
    assert_eq!(listings.iter().filter(|r| r.path.starts_with("/api/")).count(), 1);
    // What fails on the rank that fetches ends all of them, with one error.
    hub.fail(Faults { status: Some((404, "RepoNotFound")), ..Faults::default() });
    let shown = online(&dir, &hub.hub.url, "launch -n 3 -- train second.toml --set run.dir=third");
    assert_eq!(shown.code, 2, "{}", shown.err);
    assert_eq!(shown.err.matches("error").count(), 1, "{}", shown.err);
}

/// Splits `first/best` into two shards of bf16 with an index, in `sharded`.
fn shard(dir: &Workdir) {
    let names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
    let path = dir.path("first/best/model.safetensors");
    let tensors = candle_core::safetensors::load(path, &Device::Cpu).expect("weights");
    let mut shards = [Vec::new(), Vec::new()];
    let mut map = serde_json::Map::new();
    for (i, (name, tensor)) in tensors.into_iter().enumerate() {
        map.insert(name.clone(), names[i % 2].into());
        shards[i % 2].push((name, tensor.to_dtype(DType::BF16).expect("bf16")));
    }
    for name in ["config.json", "tokenizer.json", "tokenizer_config.json"] {
        dir.write(&format!("sharded/{name}"), dir.read(&format!("first/best/{name}")));
    }
    for (name, tensors) in names.iter().zip(shards) {
        let tensors: std::collections::HashMap<String, Tensor> = tensors.into_iter().collect();
        let path = dir.path("sharded").join(name);
        candle_core::safetensors::save(&tensors, path).expect("written");
    }
    let index = serde_json::json!({"metadata": {}, "weight_map": Value::Object(map)});
    dir.write("sharded/model.safetensors.index.json", index.to_string());
}

#[test]
fn train_takes_shards_of_bf16() {
    let dir = Workdir::trained();
    shard(&dir);
    let hub = FakeHub::of(&dir.path("sharded"));
    second(&dir, "test/tiny");
    online(&dir, &hub.hub.url, "train second.toml --set train.max_steps=1").ok();
    assert_eq!(hub.store.requests().len(), 2);
    second(&dir, "first/best");
    dir.allreel("train second.toml --set train.max_steps=1 --set run.dir=third").ok();
    let (halves, whole) = (dir.losses("runs/second")[0], dir.losses("third")[0]);
    // bf16 keeps eight bits of each weight.
    assert!(halves != whole && (halves - whole).abs() < 0.02 * whole, "{halves} and {whole}");
    // A directory with shards is a model to evaluate as well.
    let eval = |model: &str| {
        let shown = dir.allreel(&format!("eval {model} --data validation.csv")).ok();
        let accuracy = shown.out.split_whitespace().nth(1).expect("accuracy A");
        accuracy.parse::<f64>().expect("a number")
    };
    let (halves, whole) = (eval("sharded"), eval("first/best"));
    assert!((halves - whole).abs() < 0.05, "{halves} and {whole}");
}
