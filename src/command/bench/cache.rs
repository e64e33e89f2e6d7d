//! Emptying the caches between two runs, by writing more than they hold.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    sync::Mutex,
};

use candle_core::{DType, Device, Result, Tensor};

/// Where a machine does not say how large its caches are.
const UNKNOWN: usize = 256 << 20;

/// Bytes of all data caches of a CPU, or of a GPU's L2: what may still hold the last run's data.
///
/// # Errors
/// If a GPU does not answer.
pub fn bytes(device: &Device) -> Result<usize> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(cuda) => {
            use candle_core::cuda_backend::cudarc::driver::sys::CUdevice_attribute as Attribute;
            let l2 = Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE;
            let bytes = cuda.cuda_stream().context().attribute(l2);
            Ok(bytes.map_err(candle_core::Error::wrap)?.max(0) as usize)
        }
        _ => Ok(listed(Path::new("/sys/devices/system/cpu")).unwrap_or(UNKNOWN)),
    }
}

/// The caches that Linux lists below `root`, each once however many processors share it. All sockets
/// count: nobody knows which of them a thread will run on.
fn listed(root: &Path) -> Option<usize> {
    let entries = |dir: &Path| -> Vec<PathBuf> {
        let entries = fs::read_dir(dir).into_iter().flatten();
        entries.filter_map(|entry| Some(entry.ok()?.path())).collect()
    };
    let mut caches = BTreeMap::new();
    for processor in entries(root) {
        for cache in entries(&processor.join("cache")) {
            let read = |name: &str| fs::read_to_string(cache.join(name)).ok();
            let (Some(kind), Some(size)) = (read("type"), read("size")) else { continue };
            if kind.trim() != "Instruction" {
                caches.insert((read("level"), kind, read("shared_cpu_list")), kibibytes(&size)?);
            }
        }
    }
    let sum: usize = caches.values().sum();
    (sum > 0).then_some(sum << 10)
}

fn kibibytes(size: &str) -> Option<usize> {
    size.trim().strip_suffix('K')?.parse().ok()
}

/// A buffer twice as large as the caches: they replace lines by guess, not in order.
pub struct Flush(Memory);

enum Memory {
    /// A part for each worker, so that a core empties its own caches as well as the shared ones.
    Host(Vec<Mutex<Vec<u64>>>),
    Device(Tensor),
}

impl Flush {
    /// For the caches of `device`, and on a CPU for the worker threads that run already.
    ///
    /// # Errors
    /// If there is no memory for it.
    pub fn new(device: &Device) -> Result<Self> {
        let bytes = 2 * bytes(device)?;
        if !device.is_cpu() {
            return Ok(Self(Memory::Device(Tensor::zeros(bytes, DType::U8, device)?)));
        }
        let workers = rayon::current_num_threads();
        let part = || Mutex::new(vec![0; bytes.div_ceil(8 * workers)]);
        Ok(Self(Memory::Host((0..workers).map(|_| part()).collect())))
    }

    /// Size of the buffer.
    pub fn bytes(&self) -> usize {
        match &self.0 {
            Memory::Host(parts) => parts.iter().map(|part| 8 * lock(part).len()).sum(),
            Memory::Device(buffer) => buffer.elem_count(),
        }
    }

    /// Writes all of it.
    ///
    /// # Errors
    /// If the device fails.
    pub fn run(&self) -> Result<()> {
        match &self.0 {
            Memory::Host(parts) => {
                rayon::broadcast(|worker| {
                    // Read as well as written: plain stores of this size may go past the caches.
                    for word in lock(&parts[worker.index()]).iter_mut() {
                        *word = word.wrapping_add(1);
                    }
                });
                Ok(())
            }
            Memory::Device(buffer) => buffer.one_set(),
        }
    }
}

/// A part, for the one worker that uses it.
pub fn lock<T>(part: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // A panic in a worker has ended the command already.
    part.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_cache_of_every_socket_counts_once() {
        let root = tempfile::tempdir().unwrap();
        let cache = |cpu: usize, index: usize, [level, kind, size, shared]: [&str; 4]| {
            let dir = root.path().join(format!("cpu{cpu}/cache/index{index}"));
            fs::create_dir_all(&dir).unwrap();
            for (name, value) in
                [("level", level), ("type", kind), ("size", size), ("shared_cpu_list", shared)]
            {
                fs::write(dir.join(name), format!("{value}\n")).unwrap();
            }
        };
        assert_eq!(listed(root.path()), None);
        for cpu in 0..4 {
            let own = cpu.to_string();
            cache(cpu, 0, ["1", "Data", "32K", &own]);
            cache(cpu, 1, ["1", "Instruction", "64K", &own]);
            let socket = if cpu < 2 { "0-1" } else { "2-3" };
            cache(cpu, 2, ["3", "Unified", "8192K", socket]);
        }
        assert_eq!(listed(root.path()), Some((4 * 32 + 2 * 8192) << 10));
    }

    #[test]
    fn a_flush_writes_more_than_the_caches_hold() {
        let flush = Flush::new(&Device::Cpu).unwrap();
        let caches = bytes(&Device::Cpu).unwrap();
        assert!(caches >= 1 << 15, "{caches} bytes of cache");
        assert!(flush.bytes() >= 2 * caches, "{} for {caches}", flush.bytes());
        flush.run().unwrap();
        flush.run().unwrap();
        let Memory::Host(parts) = &flush.0 else { panic!("a CPU's memory") };
        assert!(parts.iter().all(|part| lock(part).iter().all(|word| *word == 2)));
    }
}
