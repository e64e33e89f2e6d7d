//! nvcc: where it is, and every `op.cu` through it. The build script embeds what it makes and
//! `kernels/report` tables what it cost, with the same flags. Asks for no GPU.

use std::collections::hash_map::DefaultHasher;
use std::env;
use std::fs;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use crate::sources;

/// One fatbin holds code for 8.x (A100 and its relatives), code for 9.0 (H100, H200), and PTX, which
/// the driver compiles at load for what came later. bf16 tensor cores need 8.0, so nothing is older.
/// Compressed: a third of the size, and the driver unpacks it once.
const FLAGS: [&str; 8] = [
    "-fatbin",
    "-O3",
    "-std=c++17",
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_90,code=sm_90",
    "-gencode=arch=compute_90,code=compute_90",
    "-Xfatbin=-compress-all",
    "-Xptxas=-v",
];

/// The first with everything that the kernels use; `launch/cuda-toolkit` says the same.
const OLDEST: (u32, u32) = (12, 4);

/// A compiler that runs and is recent enough.
pub struct Nvcc {
    /// The program.
    pub path: PathBuf,
    /// Major and minor.
    pub release: (u32, u32),
    /// All that `nvcc --version` says.
    version: String,
}

/// One room's device code.
pub struct Compiled {
    /// The room's name.
    pub room: String,
    /// The fatbin's file.
    pub fatbin: PathBuf,
    /// What nvcc printed: ptxas' account of each kernel, and warnings.
    pub log: String,
}

impl Nvcc {
    /// `$NVCC` or `$CUDA_HOME/bin/nvcc` where set; else what `launch/cuda-toolkit` brought, because
    /// it does so only where nothing else serves; else nvcc on `PATH` or in `/usr/local/cuda`.
    pub fn find(repository: &Path) -> Result<Self, String> {
        let set = |variable: &str| env::var_os(variable).filter(|value| !value.is_empty());
        if let Some(path) = set("NVCC") {
            return Self::at(PathBuf::from(path), "NVCC");
        }
        if let Some(home) = set("CUDA_HOME") {
            return Self::at(Path::new(&home).join("bin/nvcc"), "CUDA_HOME");
        }
        let brought = set("ALLREEL_CUDA_TOOLKIT")
            .map_or_else(|| repository.join("target/cuda-toolkit"), PathBuf::from);
        let path = set("PATH").unwrap_or_default();
        [brought.join("bin")]
            .into_iter()
            .chain(env::split_paths(&path))
            .chain([PathBuf::from("/usr/local/cuda/bin")])
            .map(|folder| folder.join("nvcc"))
            .find(|nvcc| nvcc.is_file())
            .ok_or_else(|| {
                "no nvcc in $NVCC, $CUDA_HOME, on PATH or in /usr/local/cuda; launch/cuda-toolkit \
                 brings one, no GPU needed"
                    .to_string()
            })
            .and_then(|nvcc| Self::at(nvcc, "PATH"))
    }

    fn at(path: PathBuf, variable: &str) -> Result<Self, String> {
        let shown = path.display();
        let output = Command::new(&path).arg("--version").output().map_err(|error| {
            format!("cannot run {shown} ({error}), where {variable} points; correct or unset it")
        })?;
        let version = String::from_utf8_lossy(&output.stdout).into_owned();
        match release(&version) {
            Some(release) if release >= OLDEST => Ok(Self { path, release, version }),
            Some((major, minor)) => Err(format!(
                "{shown} is CUDA {major}.{minor}; {}.{} or newer is needed: launch/cuda-toolkit \
                 brings one (and unset {variable})",
                OLDEST.0, OLDEST.1
            )),
            None => Err(format!("{shown} --version names no release: {}", version.trim())),
        }
    }

    /// Every room's `op.cu` below `kernels` as one fatbin each, in `cache`, several at a time; what
    /// is there of the same sources, flags and nvcc is not made again.
    ///
    /// One fatbin a room, rather than one of all: the driver loads one image of a fatbin, and
    /// images of several sources could only be joined without their PTX.
    pub fn compile(&self, kernels: &Path, cache: &Path) -> Result<Vec<Compiled>, String> {
        let sources = sources::kernels(kernels);
        let headers = sources::headers(kernels);
        let (next, workers) = (AtomicUsize::new(0), workers(sources.len()));
        let mut rooms: Vec<(usize, Result<Compiled, String>)> = thread::scope(|scope| {
            let work = || {
                let take = || Some(next.fetch_add(1, Ordering::Relaxed));
                std::iter::from_fn(take)
                    .take_while(|&index| index < sources.len())
                    .map(|index| (index, self.room(&sources[index], &headers, cache)))
                    .collect::<Vec<_>>()
            };
            let threads: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
            threads.into_iter().flat_map(|thread| thread.join().expect("a worker")).collect()
        });
        rooms.sort_by_key(|(index, _)| *index);
        rooms.into_iter().map(|(_, room)| room).collect()
    }

    fn room(&self, source: &Path, headers: &[PathBuf], cache: &Path) -> Result<Compiled, String> {
        let folder = source.parent().and_then(Path::file_name).expect("op.cu lies in its room");
        let room = folder.to_string_lossy().into_owned();
        let key = self.key(source, headers).map_err(|error| format!("{room}: {error}"))?;
        let (fatbin, log) =
            (cache.join(format!("{room}.fatbin")), cache.join(format!("{room}.log")));
        // The log opens with the key and is written last, so that it vouches for the fatbin.
        if let Ok(text) = fs::read_to_string(&log)
            && let Some((first, rest)) = text.split_once('\n')
            && first == key
        {
            return Ok(Compiled { room, fatbin, log: rest.to_string() });
        }
        let text = self.run(source, &fatbin)?;
        fs::write(&log, format!("{key}\n{text}"))
            .map_err(|error| format!("cannot write {}: {error}", log.display()))?;
        Ok(Compiled { room, fatbin, log: text })
    }

    /// Runs nvcc on one source; what it printed.
    fn run(&self, source: &Path, fatbin: &Path) -> Result<String, String> {
        let output = Command::new(&self.path)
            .args(FLAGS)
            .arg("-o")
            .arg(fatbin)
            .arg(source)
            .output()
            .map_err(|error| format!("cannot run {}: {error}", self.path.display()))?;
        let log = String::from_utf8_lossy(&output.stderr).into_owned();
        if output.status.success() {
            return Ok(log);
        }
        let errors = log.lines().filter(|line| !line.starts_with("ptxas info"));
        let errors = errors.collect::<Vec<_>>().join("\n");
        Err(format!("{} refuses {}:\n{errors}", self.path.display(), source.display()))
    }

    /// Stands for everything that decides what comes out.
    fn key(&self, source: &Path, headers: &[PathBuf]) -> std::io::Result<String> {
        let mut hasher = DefaultHasher::new();
        (&self.version, FLAGS).hash(&mut hasher);
        for file in headers.iter().map(PathBuf::as_path).chain([source]) {
            (file, fs::read(file)?).hash(&mut hasher);
        }
        Ok(format!("{:016x}", hasher.finish()))
    }
}

/// `13.0` of "Cuda compilation tools, release 13.0, V13.0.88".
fn release(version: &str) -> Option<(u32, u32)> {
    let (_, rest) = version.split_once("release ")?;
    let (major, minor) = rest.split(',').next()?.split_once('.')?;
    Some((major.parse().ok()?, minor.trim().parse().ok()?))
}

/// As many as cargo or the machine allows.
fn workers(most: usize) -> usize {
    let cargo = env::var("NUM_JOBS").ok().and_then(|jobs| jobs.parse().ok());
    let machine = || thread::available_parallelism().map_or(1, usize::from);
    cargo.unwrap_or_else(machine).min(most)
}
