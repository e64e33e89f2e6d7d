//! The kernels of op.cu, run on the host, against the CPU implementation: several steps of several
//! buckets and a table, clipped by the norm of all of them.

use candle_core::{Result, Tensor};

use super::{test::state, *};
use crate::{
    common::host_run::in_every_order,
    testing::{check_against, random},
};

const MAX_NORM: f64 = 5.0;
const SAMPLES: usize = 4;
/// Of a row of the table, which has eleven.
const WIDTH: usize = 37;
/// (elements, decayed ones) of the buckets: one of one element, of part of a piece, of several, of
/// exactly one.
const BUCKETS: [(usize, usize); 4] = [(1, 0), (97, 60), (9000, 5000), (4096, 0)];

fn adamw(step: u64) -> AdamW {
    AdamW { learning_rate: 1e-2, beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.1, step }
}

fn flat(n: usize, seed: u64) -> Result<Tensor> {
    random(&[n], seed)?.to_dtype(DType::F32)
}

/// Several buckets, every other f32 alone, and a table of rows.
struct Model {
    buckets: Vec<State>,
    table: State,
    gradients: Vec<Tensor>,
    rows: SparseRows,
}

impl Model {
    fn new() -> Result<Self> {
        let bucket = |(i, (n, decayed))| state(n, i as u64, decayed > 0);
        Ok(Self {
            buckets: BUCKETS.into_iter().enumerate().map(bucket).collect::<Result<_>>()?,
            table: state(11 * WIDTH, 50, true)?,
            gradients: BUCKETS.map(|(n, _)| flat(n, 0)).into_iter().collect::<Result<_>>()?,
            rows: SparseRows { ids: vec![0, 3, 4, 10], values: flat(4 * WIDTH, 0)?, width: WIDTH },
        })
    }

    /// The gradients of a step, in memory of their own.
    fn draw(&mut self, step: u64) -> Result<()> {
        for (i, (n, _)) in BUCKETS.into_iter().enumerate() {
            self.gradients[i] = flat(n, 100 * step + i as u64)?;
        }
        self.rows.values = flat(4 * WIDTH, 7 * step)?;
        Ok(())
    }

    fn update(&self) -> Result<Update<'_>> {
        let buckets = self.buckets.iter().zip(&self.gradients).zip(BUCKETS);
        let buckets = buckets
            .map(|((state, gradients), (_, decayed))| Bucket { state, gradients, decayed })
            .collect();
        Update::new(buckets, Some(Table { state: &self.table, rows: &self.rows }))
    }

    /// All that a step may change, as f64.
    fn values(&self) -> Result<Vec<Tensor>> {
        let of = |state: &State| {
            let State { values, exp_avg, exp_avg_sq, copy } = state.clone();
            [Some(values), Some(exp_avg), Some(exp_avg_sq), copy]
        };
        let states = self.buckets.iter().chain([&self.table]).flat_map(of).flatten();
        states.chain(self.gradients.iter().cloned()).map(|x| x.to_dtype(DType::F64)).collect()
    }

    /// The values and both averages of `other`, and its zeroed gradients; the copies are the values.
    fn check(&self, other: &Self) -> Result<()> {
        let states = self.buckets.iter().chain([&self.table]);
        for (got, want) in states.zip(other.buckets.iter().chain([&other.table])) {
            let pairs = [
                (&got.values, &want.values),
                (&got.exp_avg, &want.exp_avg),
                (&got.exp_avg_sq, &want.exp_avg_sq),
            ];
            for (got, want) in pairs {
                // The same f32 operations, but for fused multiply-adds on the CPU.
                check_against("state", got, want, want, 1e-6)?;
            }
            if let Some(copy) = &got.copy {
                let rounded = got.values.to_dtype(DType::BF16)?;
                check_against("copy", copy, &rounded, &rounded, 0.0)?;
            }
        }
        for gradients in &self.gradients {
            assert!(gradients.to_vec1::<f32>()?.iter().all(|g| *g == 0.0));
        }
        Ok(())
    }
}

/// One step by the kernels.
fn step(model: &Model, step: u64, before: Option<&Norm>) -> Result<Norm> {
    let update = model.update()?;
    let norm = device::norm(&update, SAMPLES, MAX_NORM, before)?;
    device::step(&update, &adamw(step), &norm)?;
    Ok(norm)
}

#[test]
fn host_steps_match_the_cpu() -> Result<()> {
    in_every_order(|| {
        let (mut model, mut cpu) = (Model::new()?, Model::new()?);
        let mut before: Option<Norm> = None;
        for number in 1..=3 {
            model.draw(number)?;
            cpu.draw(number)?;
            let norm = step(&model, number, before.as_ref())?;
            let update = cpu.update()?;
            let want = update.norm(SAMPLES, MAX_NORM, None)?;
            update.step(&adamw(number), &want)?;
            let ((got, finite), (want, _)) = (norm.read()?.wait()?, want.read()?.wait()?);
            assert!((got - want).abs() <= 1e-6 * want, "norm {got}, expected {want}");
            assert!(finite && want > MAX_NORM, "clipping is tested");
            model.check(&cpu)?;
            before = Some(norm);
        }
        Ok(())
    })
}

#[test]
fn host_norms_are_clipped_only_where_asked() -> Result<()> {
    let mut model = Model::new()?;
    model.draw(1)?;
    let update = model.update()?;
    let scale = |max_norm| -> Result<f64> {
        Ok(device::norm(&update, SAMPLES, max_norm, None)?.0.to_vec1::<f64>()?[1])
    };
    assert_eq!(scale(0.0)?, 0.25);
    assert_eq!(scale(1e9)?, 0.25);
    assert!(scale(MAX_NORM)? < 0.25);
    Ok(())
}

#[test]
fn host_nothing_changes_from_a_gradient_on_that_is_not_finite() -> Result<()> {
    let mut model = Model::new()?;
    model.draw(1)?;
    let good = step(&model, 1, None)?;
    model.draw(2)?;
    let mut rows = model.rows.values.to_vec1::<f32>()?;
    rows[1] = f32::INFINITY;
    model.rows.values = Tensor::new(rows, model.table.values.device())?;
    let before = model.values()?;
    let bad = step(&model, 2, Some(&good))?;
    assert!(!bad.read()?.wait()?.1);
    // The next has rows that are finite again, and gradients that were not zeroed.
    model.rows.values = flat(4 * WIDTH, 3)?;
    let next = step(&model, 3, Some(&bad))?;
    let (norm, finite) = next.read()?.wait()?;
    assert!(norm.is_finite() && !finite);
    for (now, before) in model.values()?.iter().zip(&before) {
        assert_eq!(now.to_vec1::<f64>()?, before.to_vec1::<f64>()?);
    }
    Ok(())
}
