//! What a run holds whatever its network: the program and its libraries, a device's context, the reviews.
//!
//! Numbers are measured where that was possible, and say how; the others are estimates, and say whose.

use std::path::Path;

use super::{
    Place,
    kernels::Machine,
    ledger::{Component, Held, Ledger},
};
use crate::config::{Data, Family, Reviews, TokenizerSource, Validation};

const MIB: usize = 1 << 20;

/// The program and its libraries, once a run has begun: 42 MB with 2 threads (`/usr/bin/time` of a run of one
/// step of a model of next to nothing).
const PROGRAM: usize = 36 * MIB;
/// What a thread keeps, the `gemm` crate's slab of the size of the second cache above all: 2 MiB for each from
/// 2 to 4.
const THREAD: usize = 2 * MIB;
/// A row of the vocabulary in a tokenizer: 150 bytes in BERT's WordPiece of 30,522 (whole words are kept
/// alike), 900 in GPT-2's BPE, 1,000
/// in DeBERTa-v3's Unigram of 128,000.
const WORDPIECE_ROW: usize = 150;
const ROW: usize = 1000;
/// Text of a review that the generator makes.
const SYNTHETIC_REVIEW: usize = 300;
/// Read, selected, cleaned and tokenised, reviews take so many times their text: 195 MB for Kaggle's 33 MB.
const READING: usize = 6;

/// What MPI's sums go through (`collective/mpi.rs`), and about what Open MPI takes itself.
const MPI: usize = (4 + 32) * MIB;
/// Driver and libraries of CUDA in the host's memory: an estimate, not measured here.
const CUDA_HOST: usize = 700 * MIB;
/// A context, with the kernels of this program, of candle and of cuBLAS, on the device: an estimate; drivers for
/// sm_80 to sm_90 take 400 to 600 MiB.
const CUDA_CONTEXT: usize = 600 * MIB;
/// cuBLAS' workspace on sm_90, by its documentation (`cublasSetWorkspace`); 4 MiB before.
const CUBLAS: usize = 32 * MIB;
/// NCCL's buffers on the device: an estimate for ranks of one node.
const NCCL: usize = 400 * MIB;

/// What a rank holds from its start, whatever it trains.
pub fn held(machine: &Machine, place: Place, texts: &Texts, vocabulary: usize) -> Vec<Held> {
    let Machine { host, ledger, .. } = machine;
    let program = PROGRAM + place.threads * THREAD + texts.tokenizer_row * vocabulary;
    let mut held = vec![host.hold(Component::Process, program)];
    if place.cuda {
        held.push(host.hold(Component::Process, CUDA_HOST));
        held.push(ledger.hold(Component::Process, CUDA_CONTEXT + CUBLAS));
    }
    if place.ranks > 1 {
        held.push(host.hold(Component::Communication, MPI));
        if place.cuda {
            held.push(ledger.hold(Component::Communication, NCCL));
        }
    }
    held
}

/// The files of a run's reviews.
#[derive(Clone, Debug)]
pub struct Texts {
    /// Bytes of text in all.
    bytes: usize,
    /// Whether every one was there, and a file.
    pub complete: bool,
    /// Bytes of a row of the tokenizer's vocabulary.
    tokenizer_row: usize,
}

impl Texts {
    /// Measures the files of `data`, which a tokenizer of `family` reads.
    pub fn of(data: &Data, family: Family) -> Self {
        let wordpiece = matches!(family, Family::Bert | Family::DistilBert)
            || matches!(data.tokenizer, Some(TokenizerSource::WordPiece | TokenizerSource::Words));
        let tokenizer_row = if wordpiece { WORDPIECE_ROW } else { ROW };
        let mut texts = Self { bytes: 0, complete: true, tokenizer_row };
        match &data.train {
            Reviews::Synthetic => texts.bytes += data.limit.unwrap_or(0) * SYNTHETIC_REVIEW,
            Reviews::Path(path) => texts.add(path),
        }
        if let Validation::Path(path) = &data.validation {
            texts.add(path);
        }
        data.test.iter().for_each(|path| texts.add(path));
        texts
    }

    fn add(&mut self, path: &Path) {
        let file = path.metadata().ok().filter(|file| file.is_file());
        let Some(file) = file else {
            self.complete = false;
            return;
        };
        // gzip makes two of five bytes of Kaggle's reviews.
        let packed = path.extension().is_some_and(|extension| extension == "gz");
        self.bytes += file.len() as usize * if packed { 5 } else { 2 } / 2;
    }

    /// Reads them all, and keeps the tokens: one for 4 bytes of text, each of 4 bytes.
    pub fn read(&self, host: &Ledger) -> Held {
        drop(host.hold(Component::Data, READING * self.bytes));
        host.hold(Component::Data, self.bytes)
    }
}

/// Memory that this process may use: this machine's, or its control group's where that is less; `None` where
/// Linux does not say.
pub fn memory() -> Option<u64> {
    let all = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = all.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim_end().parse().ok()?;
    let group = std::fs::read_to_string("/sys/fs/cgroup/memory.max").ok();
    let group = group.and_then(|max| max.trim().parse().ok());
    Some(group.unwrap_or(u64::MAX).min(kibibytes * 1024))
}

/// Whether Linux gives memory in huge pages to those who ask, as the allocator does.
pub fn huge_pages() -> bool {
    let setting = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled");
    setting.is_ok_and(|setting| !setting.contains("[never]"))
}
