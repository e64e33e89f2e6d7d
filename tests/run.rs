//! Running the binary as a user does: in a directory of its own that goes when the test ends, with
//! a token cache of its own, on a training so small that it takes half a second.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use allreel::data::Review;
use candle_core::Tensor;
use rand::{Rng, SeedableRng, rngs::StdRng};
use serde_json::Value;
use tempfile::TempDir;

/// What a finished process left.
#[derive(Debug)]
pub struct Output {
    pub code: i32,
    pub out: String,
    pub err: String,
}

impl Output {
    /// Itself, if the command succeeded.
    #[track_caller]
    pub fn ok(self) -> Self {
        assert_eq!(self.code, 0, "{self:#?}");
        self
    }
}

/// Where a test runs the binary: every path it gives is relative to this directory.
pub struct Workdir(TempDir);

impl Workdir {
    pub fn new() -> Self {
        Self(tempfile::tempdir().expect("a temporary directory"))
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().expect("a parent")).expect("a directory");
        fs::write(path, content).expect("written");
    }

    pub fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
    }

    /// Runs `allreel` with `args`, which spaces separate.
    pub fn allreel(&self, args: &str) -> Output {
        self.allreel_with(&args.split_whitespace().collect::<Vec<_>>())
    }

    /// The same with arguments that hold spaces.
    pub fn allreel_with(&self, args: &[&str]) -> Output {
        self.allreel_in(&[], args)
    }

    /// The same with variables of the environment. Without any, models come from a Hub's cache
    /// here, and no test asks the real Hub.
    pub fn allreel_in(&self, variables: &[(&str, &str)], args: &[&str]) -> Output {
        let output = Command::new(env!("CARGO_BIN_EXE_allreel"))
            .args(args)
            .current_dir(self.0.path())
            .env("ALLREEL_CACHE", self.path("cache"))
            // An error must stay one line even where backtraces are asked for.
            .env("RUST_BACKTRACE", "1")
            .env_remove("RAYON_NUM_THREADS")
            .env("HF_HOME", self.path("hub"))
            .env("HF_HUB_OFFLINE", "1")
            .env_remove("HF_HUB_CACHE")
            .env_remove("HF_TOKEN")
            .env("NO_PROXY", "127.0.0.1")
            .envs(variables.iter().copied())
            .output()
            .expect("the binary starts");
        let text = |bytes| String::from_utf8(bytes).expect("UTF-8");
        Output {
            code: output.status.code().unwrap_or(-1),
            out: text(output.stdout),
            err: text(output.stderr),
        }
    }

    /// Writes `name`.toml: a small BERT from random weights on the reviews of `train.csv`, judged
    /// by those of `validation.csv`, into the run directory `name`.
    pub fn config(&self, name: &str) {
        let text = format!(
            r#"[data]
train = "train.csv"
validation = "validation.csv"
max_length = 48
tokenizer = "wordpiece"

[model]
vocab_size = 300
hidden_size = 32
num_hidden_layers = 1
num_attention_heads = 2
intermediate_size = 64
max_position_embeddings = 64
initializer_range = 0.1

[train]
epochs = 2
batch_size = 16
learning_rate = 1e-2

[run]
dir = "{name}"
"#
        );
        self.write(&format!("{name}.toml"), text);
    }

    /// Writes a review file, or an aclImdb tree if the name has no ending.
    pub fn reviews(&self, name: &str, reviews: &[Review]) {
        let label = |review: &Review| review.label.expect("a label");
        let quote = |text: &str| format!("\"{}\"", text.replace('"', "\\\""));
        let line = |review: &Review| match Path::new(name).extension().and_then(|e| e.to_str()) {
            Some("tsv") => {
                let (id, text) = (quote(&review.id), quote(&review.text));
                format!("{id}\t{}\t{text}\n", label(review))
            }
            Some("jsonl") => format!(
                "{}\n",
                serde_json::json!({"id": review.id, "text": review.text, "label": label(review)})
            ),
            _ => {
                let quote = |text: &str| format!("\"{}\"", text.replace('"', "\"\""));
                let sentiment = ["negative", "positive"][label(review) as usize];
                let (id, text) = (quote(&review.id), quote(&review.text));
                format!("{id},{text},{sentiment}\n")
            }
        };
        let header = match name.rsplit_once('.') {
            None => {
                for review in reviews {
                    let class = ["neg", "pos"][label(review) as usize];
                    self.write(&format!("{name}/{class}/{}.txt", review.id), &review.text);
                }
                return;
            }
            Some((_, "tsv")) => "id\tsentiment\treview\n",
            Some((_, "jsonl")) => "",
            Some(_) => "id,review,sentiment\n",
        };
        let lines: String = reviews.iter().map(line).collect();
        self.write(name, format!("{header}{lines}"));
    }

    /// What most tests start from: `train.csv`, `validation.csv` and `first.toml`.
    pub fn prepared() -> Self {
        let dir = Self::new();
        dir.reviews("train.csv", &easy(160, 1));
        dir.reviews("validation.csv", &easy(50, 2));
        dir.config("first");
        dir
    }

    /// The same with the run `first` finished.
    pub fn trained() -> Self {
        let dir = Self::prepared();
        dir.allreel("train first.toml").ok();
        dir
    }

    /// The records of a run's `metrics.jsonl` whose event is `event`.
    pub fn records(&self, run: &str, event: &str) -> Vec<Value> {
        let text = self.read(&format!("{run}/metrics.jsonl"));
        text.lines()
            .map(|line| serde_json::from_str(line).expect("a JSON object a line"))
            .filter(|record: &Value| record["event"] == event)
            .collect()
    }

    /// The losses of a run's steps.
    pub fn losses(&self, run: &str) -> Vec<f64> {
        let records = self.records(run, "step");
        records.iter().map(|step| step["loss"].as_f64().expect("a number")).collect()
    }

    pub fn summary(&self, run: &str) -> Value {
        serde_json::from_str(&self.read(&format!("{run}/summary.json"))).expect("JSON")
    }

    /// The weights in a model directory.
    pub fn weights(&self, model: &str) -> BTreeMap<String, Vec<f32>> {
        let path = self.path(model).join("model.safetensors");
        let flat = |tensor: Tensor| tensor.flatten_all().and_then(|t| t.to_vec1()).expect("f32");
        candle_core::safetensors::load(path, &candle_core::Device::Cpu)
            .expect("a weight file")
            .into_iter()
            .map(|(name, tensor)| (name, flat(tensor)))
            .collect()
    }

    /// Every file with its content, but for the token cache and for locks.
    pub fn files(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        let (mut files, mut folders) = (BTreeMap::new(), vec![self.0.path().to_owned()]);
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).expect("a folder") {
                let path = entry.expect("an entry").path();
                if path.ends_with(".lock") {
                    continue;
                }
                if path.is_file() {
                    let content = fs::read(&path).expect("a file");
                    files.insert(path, content);
                } else if path != self.path("cache") {
                    folders.push(path);
                }
            }
        }
        files
    }
}

/// Reviews in which every word tells, so that the small model learns them in two epochs; of every
/// ten, one has the wrong label, so that nothing reaches an accuracy of 1.
pub fn easy(count: usize, seed: u64) -> Vec<Review> {
    const WORDS: [[&str; 4]; 2] =
        [["dreadful", "boring", "clumsy", "awful"], ["splendid", "moving", "clever", "honest"]];
    let mut random = StdRng::seed_from_u64(seed);
    let mut review = |i: usize| {
        let told = random.random_range(0..2u32);
        let words = WORDS[told as usize];
        let words: Vec<&str> =
            (0..random.random_range(2..12)).map(|_| words[random.random_range(0..4)]).collect();
        let label = if i % 10 == 9 { 1 - told } else { told };
        Review {
            id: format!("{i:03}_{}", 1 + 8 * told),
            text: words.join(" , "),
            label: Some(label),
        }
    };
    (0..count).map(&mut review).collect()
}

/// Whether ranks can be started here; without mpirun a test of them says so and passes, except in
/// CI, where it fails.
#[cfg(feature = "mpi")]
pub fn mpirun() -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).any(|dir| dir.join("mpirun").is_file());
    assert!(found || std::env::var_os("CI").is_none(), "there is no mpirun, and this is CI");
    if !found {
        eprintln!("SKIPPED: there is no mpirun; this test started no ranks");
    }
    found
}
