//! One process alone.

use std::time::Instant;

use candle_core::Tensor;

use super::{Collective, Pending};
use crate::{Error, Result};

/// The only rank of a world of one.
pub struct Solo(());

impl Solo {
    /// The collective of a process that was started as one of `world`.
    ///
    /// # Errors
    /// `User` if there are others: they would each train alone.
    pub fn new(world: usize) -> Result<Self> {
        if world > 1 {
            return Err(Error::User(format!(
                "started as one of {world} ranks, which must meet over MPI or TCP: each would work alone"
            )));
        }
        Ok(Self(()))
    }
}

impl Collective for Solo {
    fn rank(&self) -> usize {
        0
    }

    fn world(&self) -> usize {
        1
    }

    fn local_rank(&self) -> usize {
        0
    }

    fn local_world(&self) -> usize {
        1
    }

    fn all_reduce_sum(&mut self, _: &Tensor) -> Result<Pending> {
        Ok(Pending::done(0, Instant::now()))
    }

    fn all_reduce_f64(&mut self, _: &mut [f64]) -> Result<()> {
        Ok(())
    }

    fn all_gather(&mut self, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        Ok(vec![bytes.to_vec()])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn solo_refuses_company() {
        let error = Solo::new(2).err().expect("an error");
        assert!(error.to_string().contains("one of 2 ranks"), "{error}");
        assert_eq!(Solo::new(1).map(|solo| solo.world()).unwrap_or(0), 1);
    }
}
