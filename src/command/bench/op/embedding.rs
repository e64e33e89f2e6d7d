//! A word table: the rows of a batch, and the gradient of those that it names. Ids are drawn evenly,
//! the worst case for the caches.

use allreel_kernels::{
    Mirror,
    embedding::{self, Lookup},
};
use candle_core::{Result, Tensor};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha12Rng;

use super::{Case, Pass, Setup, Work};
use crate::command::bench::measure::Body;

/// Forward and both.
pub fn cases(setup: &Setup) -> Vec<Case> {
    let sizes = &setup.sizes;
    let (tokens, hidden, vocabulary) = (sizes.tokens, sizes.hidden, sizes.vocabulary);
    let mut distinct = ids(setup);
    distinct.sort_unstable();
    distinct.dedup();
    let case = |pass: Pass| {
        let work = work(tokens, hidden, distinct.len(), setup.element(), pass);
        let name = format!("embedding {}", pass.name());
        let sizes = format!("{tokens} tokens, {vocabulary} x {hidden}");
        Case::new(name, sizes, work, move |setup| run(setup, pass))
    };
    Pass::ALL.map(case).into()
}

/// Forward reads ids and as many rows and writes y; backward reads dy and ids and writes the ids and
/// f32 rows of the distinct ones.
pub fn work(tokens: usize, hidden: usize, distinct: usize, element: f64, pass: Pass) -> Work {
    let (t, h, d) = (tokens as f64, hidden as f64, distinct as f64);
    pass.work(
        Work { bytes: 4.0 * t + 2.0 * element * t * h, flops: 0.0 },
        Work { bytes: 4.0 * t + element * t * h + 4.0 * d + 4.0 * d * h, flops: 0.0 },
    )
}

fn ids(setup: &Setup) -> Vec<u32> {
    let mut rng = ChaCha12Rng::seed_from_u64(1);
    let rows = setup.sizes.vocabulary as u32;
    (0..setup.sizes.tokens).map(|_| rng.random_range(0..rows)).collect()
}

fn run(setup: &Setup, pass: Pass) -> Result<Body> {
    let (hidden, ids) = (setup.sizes.hidden, Mirror::from(ids(setup)));
    // Ones, not zeros: those would share one page of memory.
    let table = Tensor::ones((setup.sizes.vocabulary, hidden), setup.dtype, &setup.device)?;
    let dy = setup.normal((ids.len(), hidden))?;
    Ok(Box::new(move || {
        embedding::forward(&[Lookup::new(&table, &ids)])?;
        if pass == Pass::Both {
            embedding::backward_sparse(&dy, &ids, None)?;
        }
        Ok(())
    }))
}
