//! N ranks as threads of one process: what the tests of world-size invariance run on.

use std::{
    sync::{Arc, Barrier, Mutex},
    time::Instant,
};

use allreel_kernels::common::host;
use candle_core::Tensor;

use super::{Collective, Pending};
use crate::{Error, Result};

/// One rank of a group in this process.
pub struct Threads {
    rank: usize,
    shared: Arc<Shared>,
}

struct Shared {
    slots: Vec<Mutex<Vec<u8>>>,
    barrier: Barrier,
}

impl Threads {
    /// A group of `world` ranks; each goes to a thread of its own.
    pub fn group(world: usize) -> Vec<Self> {
        let slots = (0..world).map(|_| Mutex::default()).collect();
        let shared = Arc::new(Shared { slots, barrier: Barrier::new(world) });
        (0..world).map(|rank| Self { rank, shared: shared.clone() }).collect()
    }

    /// Runs `body` as `world` ranks and returns their results in rank order.
    ///
    /// # Panics
    /// If a rank does.
    pub fn run<R: Send>(world: usize, body: impl Fn(&mut Self) -> R + Sync) -> Vec<R> {
        std::thread::scope(|scope| {
            let ranks: Vec<_> = Self::group(world)
                .into_iter()
                .map(|mut rank| {
                    scope.spawn({
                        let body = &body;
                        move || body(&mut rank)
                    })
                })
                .collect();
            ranks.into_iter().map(|rank| rank.join().expect("a rank panicked")).collect()
        })
    }
}

impl Collective for Threads {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world(&self) -> usize {
        self.shared.slots.len()
    }

    fn local_rank(&self) -> usize {
        self.rank
    }

    fn local_world(&self) -> usize {
        self.world()
    }

    fn all_reduce_sum(&mut self, bucket: &Tensor) -> Result<Pending> {
        let start = Instant::now();
        let mine: Vec<u8> = bytemuck::cast_slice(&host::read::<f32>(bucket)?).to_vec();
        let all = self.all_gather(&mine)?;
        host::write::<f32, _>(bucket, |sum| {
            sum.fill(0.0);
            for bytes in &all {
                for (sum, value) in sum.iter_mut().zip(bytes.chunks_exact(4)) {
                    *sum += f32::from_le_bytes([value[0], value[1], value[2], value[3]]);
                }
            }
            Ok(())
        })?;
        Ok(Pending::done(mine.len(), start))
    }

    fn all_reduce_f64(&mut self, values: &mut [f64]) -> Result<()> {
        let all = self.all_gather(bytemuck::cast_slice(values))?;
        values.fill(0.0);
        for bytes in &all {
            for (sum, value) in values.iter_mut().zip(bytes.chunks_exact(8)) {
                *sum +=
                    f64::from_le_bytes(value.try_into().map_err(|_| Error::Bug("8 bytes".into()))?);
            }
        }
        Ok(())
    }

    fn all_gather(&mut self, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        let poisoned = |_| Error::Bug("another rank panicked".into());
        let slots = &self.shared.slots;
        *slots[self.rank].lock().map_err(|_| Error::Bug("another rank panicked".into()))? =
            bytes.to_vec();
        self.shared.barrier.wait();
        let all = slots
            .iter()
            .map(|slot| slot.lock().map(|bytes| bytes.clone()).map_err(poisoned))
            .collect();
        // Nobody may write the next round before everybody has read this one.
        self.shared.barrier.wait();
        all
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::collective::{agree, must_be_equal};

    #[test]
    fn sums_and_gathers() {
        let results = Threads::run(3, |c| -> Result<_> {
            let mine = c.rank() as f32;
            let bucket = Tensor::new(&[mine, 10.0], &Device::Cpu)?;
            c.all_reduce_sum(&bucket)?.wait()?;
            let mut numbers = [1.0, c.rank() as f64];
            c.all_reduce_f64(&mut numbers)?;
            let gathered = c.all_gather(&vec![7; c.rank()])?;
            Ok((bucket.to_vec1::<f32>()?, numbers, gathered))
        });
        for result in results {
            let (bucket, numbers, gathered) = result.expect("no error");
            assert_eq!((bucket, numbers), (vec![3.0, 30.0], [3.0, 3.0]));
            assert_eq!(gathered, [vec![], vec![7], vec![7, 7]]);
        }
    }

    #[test]
    fn a_failure_of_one_is_everybodys() {
        let results = Threads::run(3, |c| {
            let mine = if c.rank() == 1 { Err(Error::Data("no file".into())) } else { Ok(()) };
            agree(c, mine).map_err(|e| (e.exit_code(), e.to_string()))
        });
        let messages: Vec<String> = results
            .into_iter()
            .map(|r| {
                let (code, message) = r.expect_err("an error");
                assert_eq!(code, 2);
                message
            })
            .collect();
        assert_eq!(messages[1], "no file");
        assert_ne!(messages[0], "no file");
    }

    #[test]
    fn a_rank_with_another_config_is_named() {
        let results = Threads::run(3, |c| {
            let config = format!("a = 1\nb = {}", usize::from(c.rank() == 2));
            must_be_equal(c, "config", &config)
        });
        let error = results.into_iter().next().and_then(Result::err).expect("an error");
        assert_eq!(error.exit_code(), 4);
        let text = error.to_string();
        assert!(text.starts_with("rank 2") && text.contains("b = 1"), "{text}");
    }
}
