//! One run of a tiny configuration, its processes, and the notion of a run's end ([`Run::end`]):
//! every file it leaves, without what depends on the clock. Signals no process but those that carry
//! the mark of a test's own child.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use serde_json::Value;

/// 108 steps; saved every 7, judged every 13, and several times better than before.
const CONFIG: &str = r#"
[data]
train = "synthetic"
limit = 480
validation = 0.1
max_length = 48
tokenizer = "wordpiece"
cache_dir = "CACHE"
[model]
kind = "bert"
vocab_size = 600
hidden_size = 32
num_hidden_layers = 2
num_attention_heads = 4
intermediate_size = 64
max_position_embeddings = 48
hidden_dropout_prob = 0.1
attention_probs_dropout_prob = 0.1
[train]
epochs = 3
batch_size = 12
learning_rate = 1e-2
eval_steps = 13
[checkpoint]
every_steps = 7
[run]
dir = "DIR"
threads = 1
"#;
pub const STEPS: usize = 108;
/// Far beyond what anything here takes, on however busy a machine.
const PATIENCE: Duration = Duration::from_secs(90);
/// The environment variable that all processes of one [`Process`] carry.
const MARK: &str = "ALLREEL_KILL_TEST";
/// What depends on the clock, or on the process that ended a run; and the hash of a file with that.
const TIMED: [&str; 7] = [
    "seconds",
    "train_seconds",
    "samples_per_second",
    "tokens_per_second",
    "peak_host_bytes",
    "allreduce",
    "state.json",
];

/// Contents of all files of a run by their path, without what depends on the clock.
pub type End = BTreeMap<String, Vec<u8>>;

/// What a run consists of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ranks {
    /// A process without a launcher.
    One,
    /// Two ranks of mpirun's.
    Mpi,
    /// Two processes that meet over TCP.
    Tcp,
}

impl Ranks {
    pub fn count(self) -> usize {
        if self == Self::One { 1 } else { 2 }
    }
}

/// One run directory and the way its run is started.
pub struct Run {
    pub dir: PathBuf,
    pub config: PathBuf,
    pub ranks: Ranks,
}

impl Run {
    pub fn new(root: &Path, name: &str, ranks: Ranks) -> Self {
        let (dir, config) = (root.join(name), root.join(format!("{name}.toml")));
        let cache = root.join(format!("{name}-cache"));
        let text = CONFIG
            .replace("CACHE", &cache.to_string_lossy())
            .replace("DIR", &dir.to_string_lossy());
        fs::write(&config, text).expect("a config file");
        Self { dir, config, ranks }
    }

    /// The command of a first start or of a resume, after the words `before`.
    pub fn command(&self, before: &[&str], resume: bool) -> Command {
        let mut words: Vec<String> = before.iter().map(|word| (*word).into()).collect();
        words.push(env!("CARGO_BIN_EXE_allreel").into());
        let backend = match self.ranks {
            Ranks::One => None,
            Ranks::Mpi => Some("mpirun"),
            Ranks::Tcp => Some("processes"),
        };
        if let Some(backend) = backend {
            words.extend(["launch", "-n", "2", "--backend", backend, "--"].map(String::from));
        }
        words.extend(["train".into(), self.config.to_string_lossy().into_owned()]);
        words.extend(resume.then(|| "--resume".into()));
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]);
        command
    }

    pub fn start(&self, resume: bool) -> Process {
        Process::start(self.command(&[], resume), self.config.with_extension("log"))
    }

    /// Goes on to the end, which must come in good order; returns what was said.
    pub fn resume(&self) -> String {
        let ended = self.start(true).wait();
        assert_eq!(ended.code, Some(0), "resume failed: {}", ended.said);
        ended.said
    }

    /// Removes all that it left, but not its directory, which may be a file system of its own.
    pub fn clear(&self) {
        for path in names(&self.dir).into_iter().map(|name| self.dir.join(name)) {
            let removed =
                if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
            removed.expect("removed");
        }
    }

    /// Lines of `metrics.jsonl` so far.
    pub fn lines(&self) -> usize {
        let text = fs::read(self.dir.join("metrics.jsonl")).unwrap_or_default();
        text.iter().filter(|byte| **byte == b'\n').count()
    }

    /// Whether a directory is being written whose name starts so.
    pub fn is_writing(&self, what: &str) -> bool {
        let start = format!(".unfinished-{what}");
        ["", "checkpoints"]
            .iter()
            .any(|dir| names(&self.dir.join(dir)).iter().any(|name| name.starts_with(&start)))
    }

    /// Complete checkpoints, oldest first.
    pub fn checkpoints(&self) -> Vec<PathBuf> {
        let root = self.dir.join("checkpoints");
        let steps = names(&root).into_iter().filter(|name| name.starts_with("step-"));
        steps.map(|name| root.join(name)).collect()
    }

    /// What a finished run leaves.
    pub fn end(&self) -> End {
        let files = files(&self.dir).into_iter();
        files.map(|(path, bytes)| (path.clone(), timeless(&path, bytes))).collect()
    }

    /// Every byte of the checkpoints and the best model.
    pub fn saved(&self) -> End {
        let mut saved = files(&self.dir);
        saved.retain(|path, _| path.contains('/'));
        saved
    }

    pub fn must_end_as(&self, unbroken: &End, story: &str) {
        let end = self.end();
        let paths = |end: &End| end.keys().cloned().collect::<Vec<_>>();
        assert_eq!(paths(&end), paths(unbroken), "{story}: files of the run");
        for (path, bytes) in &end {
            let (lines, want) = (text(bytes), text(&unbroken[path]));
            let differs = lines.lines().zip(want.lines()).find(|(got, want)| got != want);
            assert!(bytes == &unbroken[path], "{story}: {path} differs: {differs:?}");
        }
    }
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Names in a directory in order; none if it is not there.
pub fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let mut names: Vec<String> =
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// All files below a directory.
fn files(dir: &Path) -> End {
    let mut all = End::new();
    for name in names(dir) {
        let path = dir.join(&name);
        if path.is_dir() {
            all.extend(files(&path).into_iter().map(|(below, b)| (format!("{name}/{below}"), b)));
        } else {
            all.insert(name, fs::read(&path).expect("a file of the run"));
        }
    }
    all
}

fn timeless(path: &str, bytes: Vec<u8>) -> Vec<u8> {
    let lines = || text(&bytes).lines().map(str::to_owned).collect::<Vec<_>>();
    match path.rsplit('/').next() {
        Some("state.json" | "summary.json" | "MANIFEST.json") => untimed(&text(&bytes)).into(),
        Some("metrics.jsonl") => {
            let records: Vec<String> = lines().iter().map(|line| untimed(line)).collect();
            records.join("\n").into()
        }
        // It differs in the directories of its run alone.
        Some("config.toml") => {
            let mut lines = lines();
            lines.retain(|line| !line.starts_with("dir =") && !line.starts_with("cache_dir ="));
            lines.join("\n").into()
        }
        _ => bytes,
    }
}

/// JSON without what depends on the clock.
fn untimed(json: &str) -> String {
    fn forget(value: &mut Value) {
        if let Value::Object(fields) = value {
            fields.retain(|name, _| !TIMED.contains(&name.as_str()));
            fields.values_mut().for_each(forget);
        }
    }
    let mut value = serde_json::from_str(json).unwrap_or_else(|e| panic!("{e} in {json}"));
    forget(&mut value);
    value.to_string()
}

/// A started run, with all processes that belong to it. None outlives this.
pub struct Process {
    child: Child,
    mark: String,
    log: PathBuf,
}

/// How it ended.
pub struct Ended {
    /// `None` if a signal ended it.
    pub code: Option<i32>,
    /// Standard output and error.
    pub said: String,
}

impl Process {
    pub fn start(mut command: Command, log: PathBuf) -> Self {
        let since = std::time::UNIX_EPOCH.elapsed().expect("a clock after 1970");
        let mark = format!("{}-{}", std::process::id(), since.as_nanos());
        let out = File::create(&log).expect("a log file");
        command.env(MARK, &mark).stdin(Stdio::null());
        command.stderr(out.try_clone().expect("a second handle")).stdout(out);
        let child = command.spawn().expect("a process");
        Self { child, mark, log }
    }

    /// Living processes of this run with their rank, if they have one; zombies have none of it.
    pub fn living(&self) -> Vec<(u32, Option<usize>)> {
        let mark = format!("{MARK}={}", self.mark);
        let living = |name: String| {
            let environment = fs::read(format!("/proc/{name}/environ")).ok()?;
            let variables: Vec<String> = environment.split(|byte| *byte == 0).map(text).collect();
            let rank = |variable: &String| {
                let (name, value) = variable.split_once('=')?;
                let names = ["OMPI_COMM_WORLD_RANK", "PMI_RANK", "RANK"];
                names.contains(&name).then(|| value.parse().ok()).flatten()
            };
            let ours = variables.contains(&mark);
            ours.then_some((name.parse().ok()?, variables.iter().find_map(rank)))
        };
        names(Path::new("/proc")).into_iter().filter_map(living).collect()
    }

    pub fn pids(&self) -> Vec<u32> {
        self.living().into_iter().map(|(pid, _)| pid).collect()
    }

    /// The process itself: the run, or its launcher.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The process of a rank, once there is one.
    pub fn pid_of(&self, rank: usize) -> Option<u32> {
        let mut living = self.living().into_iter();
        living.find_map(|(pid, of)| (of == Some(rank)).then_some(pid))
    }

    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().expect("a child of ours").is_some()
    }

    /// Waits until `happened`; `false` if the process ended before.
    pub fn until(&mut self, happened: impl Fn(&Self) -> bool) -> bool {
        let started = Instant::now();
        while !happened(self) {
            if self.has_ended() {
                return false;
            }
            assert!(started.elapsed() < PATIENCE, "hangs: {}", self.said());
            std::thread::sleep(Duration::from_micros(200));
        }
        true
    }

    pub fn said(&self) -> String {
        text(&fs::read(&self.log).expect("the log file"))
    }

    /// SIGKILL for every process of the run; returns once all are gone.
    pub fn kill_all(mut self) {
        signal("KILL", &self.pids());
        self.until(|_| false);
        let started = Instant::now();
        while !self.living().is_empty() {
            assert!(started.elapsed() < PATIENCE, "still there: {:?}", self.living());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits for the end, which must be that of all its processes.
    pub fn wait(mut self) -> Ended {
        self.until(|_| false);
        let status = self.child.wait().expect("a child of ours");
        assert_eq!(self.living(), [], "outlived the run: {}", self.said());
        Ended { code: status.code(), said: self.said() }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        signal("KILL", &self.pids());
        let _ = self.child.wait();
    }
}

/// Sends a signal through the shell's own `kill`: the standard library has only SIGKILL, and that
/// for a child.
pub fn signal(name: &str, pids: &[u32]) {
    let pids: Vec<String> = pids.iter().map(u32::to_string).collect();
    if !pids.is_empty() {
        // One of them may have ended meanwhile, which is as good.
        let kill = format!("kill -s {name} {} 2>/dev/null", pids.join(" "));
        let _ = Command::new("sh").args(["-c", &kill]).status();
    }
}
