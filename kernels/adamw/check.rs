//! Several steps of several buckets and a table, clipped by the norm of all of them, against the formula in
//! f64, one element at a time.

use candle_core::{DType, Device, Result, Tensor};

use super::*;
use crate::common::check::{Checker, HIDDEN, Sizes, numbers, random};

const MAX_NORM: f64 = 5.0;
const SAMPLES: usize = 4;

/// What there is to update.
#[derive(Clone, Copy)]
struct Layout {
    /// (elements, decayed ones) of each bucket.
    buckets: &'static [(usize, usize)],
    /// Of the table.
    rows: usize,
    width: usize,
    /// Rows that have a gradient: every so many.
    every: usize,
}

/// Buckets of one element, of part of a piece, of several, of exactly one: seven pieces, so that the table's
/// sums of squares begin at an odd one. A table of eleven rows.
const ODD: Layout = Layout {
    buckets: &[(1, 0), (97, 60), (13_000, 5000), (4096, 0)],
    rows: 11,
    width: 37,
    every: 3,
};
/// A layer of DeBERTa-v3-base, and as many elements of its word table: all of it in f64 is two gigabytes.
const REAL: Layout = Layout {
    buckets: &[(12 * HIDDEN * HIDDEN + 13 * HIDDEN, 12 * HIDDEN * HIDDEN)],
    rows: 9216,
    width: HIDDEN,
    every: 16,
};

/// Three steps.
pub(crate) fn check(c: &mut Checker, sizes: Sizes) -> Result<()> {
    let layout = if sizes == Sizes::Odd { ODD } else { REAL };
    let (mut model, mut exact) = (Model::new(c.device(), layout)?, Exact::new(layout)?);
    let mut before: Option<Norm> = None;
    for number in 1..=3 {
        c.case(format!(
            "step {number}, {:?} and {} x {}",
            layout.buckets, layout.rows, layout.width
        ));
        model.draw(number)?;
        let norm = model.step(number, before.as_ref())?;
        let want = exact.step(&adamw(number), number)?;
        let (got, finite) = norm.read()?.wait()?;
        let scalar = |x: f64| Tensor::new(x, &Device::Cpu);
        c.check_against("norm / exact", &scalar(got / want)?, &scalar(1.0)?, &scalar(1.0)?, 1e-6)?;
        c.same("finite and clipped", (finite, want > MAX_NORM), (true, true));
        compare(c, &model, &exact)?;
        before = Some(norm);
    }
    Ok(())
}

fn adamw(step: u64) -> AdamW {
    AdamW { learning_rate: 1e-2, beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.1, step }
}

/// Numbers of a parameter's start or gradient, those that f32 holds.
fn drawn(n: usize, seed: u64) -> Result<Tensor> {
    random(&[n], seed)?.to_dtype(DType::F32)
}

impl Layout {
    /// Elements of every bucket, the table's last, each with a seed.
    fn states(&self) -> impl Iterator<Item = (usize, u64)> + use<> {
        let table = self.rows * self.width;
        self.buckets.iter().map(|(n, _)| *n).chain([table]).zip(50..)
    }

    fn ids(&self) -> Vec<u32> {
        (0..self.rows as u32).step_by(self.every).collect()
    }
}

fn seed(step: u64, bucket: usize) -> u64 {
    100 * step + bucket as u64
}

/// What the op updates: buckets, every other f32 alone, and a table of rows, the last of the states.
struct Model {
    layout: Layout,
    states: Vec<State>,
    gradients: Vec<Tensor>,
    rows: SparseRows,
}

impl Model {
    fn new(device: &Device, layout: Layout) -> Result<Self> {
        let zeros = |n, dtype| Tensor::zeros(n, dtype, device);
        let state = |(i, (n, seed)): (usize, (usize, u64))| {
            let values = drawn(n, seed)?.to_device(device)?;
            let copy = (i % 2 == 0).then(|| zeros(n, DType::BF16)).transpose()?;
            let (exp_avg, exp_avg_sq) = (zeros(n, DType::F32)?, zeros(n, DType::F32)?);
            Ok(State { values, exp_avg, exp_avg_sq, copy })
        };
        Ok(Self {
            layout,
            states: layout.states().enumerate().map(state).collect::<Result<_>>()?,
            gradients: Vec::new(),
            rows: SparseRows::empty(layout.width, device)?,
        })
    }

    /// The gradients of a step, in memory of their own.
    fn draw(&mut self, step: u64) -> Result<()> {
        let device = self.states[0].values.device().clone();
        let Layout { buckets, width, .. } = self.layout;
        let draw = |n, bucket| drawn(n, seed(step, bucket))?.to_device(&device);
        self.gradients =
            (buckets.iter().enumerate()).map(|(i, (n, _))| draw(*n, i)).collect::<Result<_>>()?;
        let ids = self.layout.ids();
        let values = draw(ids.len() * width, buckets.len())?;
        self.rows = SparseRows { ids, values, width };
        Ok(())
    }

    fn update(&self) -> Result<Update<'_>> {
        let states = self.states.iter().zip(&self.gradients).zip(self.layout.buckets);
        let buckets = states
            .map(|((state, gradients), (_, decayed))| Bucket {
                state,
                gradients,
                decayed: *decayed,
            })
            .collect();
        let table = &self.states[self.layout.buckets.len()];
        Update::new(buckets, Some(Table { state: table, rows: &self.rows }))
    }

    fn step(&self, step: u64, before: Option<&Norm>) -> Result<Norm> {
        let update = self.update()?;
        let norm = update.norm(SAMPLES, MAX_NORM, before)?;
        update.step(&adamw(step), &norm)?;
        Ok(norm)
    }
}

/// `[p, m, v]` of each bucket and the table, in f64.
struct Exact {
    layout: Layout,
    states: Vec<[Vec<f64>; 3]>,
}

impl Exact {
    fn new(layout: Layout) -> Result<Self> {
        let state = |(n, seed)| Ok([numbers(&drawn(n, seed)?)?, vec![0.0; n], vec![0.0; n]]);
        Ok(Self { layout, states: layout.states().map(state).collect::<Result<_>>()? })
    }

    /// The gradients of a step; the table's as long as the table.
    fn gradients(&self, step: u64) -> Result<Vec<Vec<f64>>> {
        let Layout { buckets, rows, width, .. } = self.layout;
        let draw = |n, bucket| numbers(&drawn(n, seed(step, bucket))?);
        let mut all = (buckets.iter().enumerate())
            .map(|(i, (n, _))| draw(*n, i))
            .collect::<Result<Vec<_>>>()?;
        let (ids, mut table) = (self.layout.ids(), vec![0.0; rows * width]);
        let values = draw(ids.len() * width, buckets.len())?;
        for (id, row) in ids.iter().zip(values.chunks(width)) {
            table[*id as usize * width..][..width].copy_from_slice(row);
        }
        all.push(table);
        Ok(all)
    }

    /// One step; the norm of the mean gradient.
    fn step(&mut self, adamw: &AdamW, number: u64) -> Result<f64> {
        let AdamW { learning_rate: lr, beta1, beta2, epsilon, weight_decay, step } = *adamw;
        let gradients = self.gradients(number)?;
        let squares: f64 = gradients.iter().flatten().map(|g| g * g).sum();
        let norm = squares.sqrt() / SAMPLES as f64;
        let scale = clip_coefficient(norm, MAX_NORM) / SAMPLES as f64;
        let (c1, c2) = (1.0 - beta1.powi(step as i32), 1.0 - beta2.powi(step as i32));
        let decayed = self.layout.buckets.iter().map(|(_, decayed)| *decayed).chain([usize::MAX]);
        for (([p, m, v], gradients), decayed) in self.states.iter_mut().zip(&gradients).zip(decayed)
        {
            for (i, g) in gradients.iter().map(|g| g * scale).enumerate() {
                if i < decayed {
                    p[i] *= 1.0 - lr * weight_decay;
                }
                m[i] = beta1 * m[i] + (1.0 - beta1) * g;
                v[i] = beta2 * v[i] + (1.0 - beta2) * g * g;
                p[i] -= lr / c1 * m[i] / (v[i].sqrt() / c2.sqrt() + epsilon);
            }
        }
        Ok(norm)
    }
}

/// The values and both averages, zeroed gradients, and the copies, which are the values rounded.
fn compare(c: &mut Checker, model: &Model, exact: &Exact) -> Result<()> {
    for (state, [p, m, v]) in model.states.iter().zip(&exact.states) {
        let pairs =
            [("p", &state.values, p), ("m", &state.exp_avg, m), ("v", &state.exp_avg_sq, v)];
        for (what, got, want) in pairs {
            // Relative to the largest: averages of clipped gradients are small. f32 throughout, measured
            // 3e-7 after three steps.
            let largest = want.iter().fold(0.0f64, |m, x| m.max(x.abs()));
            let got = (Tensor::new(numbers(got)?, &Device::Cpu)? / largest)?;
            let want = (Tensor::new(want.as_slice(), &Device::Cpu)? / largest)?;
            c.check_against(what, &got, &want, &want, 1e-6)?;
        }
        if let Some(copy) = &state.copy {
            let rounded = state.values.to_device(&Device::Cpu)?.to_dtype(DType::BF16)?;
            c.check_against("copy", copy, &rounded, &rounded, 0.0)?;
        }
    }
    for gradients in &model.gradients {
        c.same("gradients left", numbers(gradients)?.iter().any(|g| *g != 0.0), false);
    }
    Ok(())
}

#[cfg(all(test, feature = "host-kernels"))]
mod host {
    use super::*;
    use crate::testing::on_host;

    #[test]
    fn host_steps_match_the_formula() -> Result<()> {
        on_host(|c| check(c, Sizes::Odd))
    }

    fn model() -> Result<Model> {
        let mut model = Model::new(&Device::Cpu, ODD)?;
        model.draw(1)?;
        Ok(model)
    }

    /// One step by the kernels.
    fn step(model: &Model, step: u64, before: Option<&Norm>) -> Result<Norm> {
        let update = model.update()?;
        let norm = device::norm(&update, SAMPLES, MAX_NORM, before)?;
        device::step(&update, &adamw(step), &norm)?;
        Ok(norm)
    }

    /// All that a step may change.
    fn values(model: &Model) -> Result<Vec<Vec<f64>>> {
        let of = |state: &State| {
            let State { values, exp_avg, exp_avg_sq, copy } = state.clone();
            [Some(values), Some(exp_avg), Some(exp_avg_sq), copy]
        };
        let states = model.states.iter().flat_map(of).flatten();
        states.chain(model.gradients.iter().cloned()).map(|x| numbers(&x)).collect()
    }

    #[test]
    fn host_norms_are_clipped_only_where_asked() -> Result<()> {
        let model = model()?;
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
        let mut model = model()?;
        let good = step(&model, 1, None)?;
        model.draw(2)?;
        let mut rows = model.rows.values.to_vec1::<f32>()?;
        let n = rows.len();
        rows[1] = f32::INFINITY;
        model.rows.values = Tensor::new(rows, &Device::Cpu)?;
        let before = values(&model)?;
        let bad = step(&model, 2, Some(&good))?;
        assert!(!bad.read()?.wait()?.1);
        // The next has rows that are finite again, and gradients that were not zeroed.
        model.rows.values = drawn(n, 3)?;
        let next = step(&model, 3, Some(&bad))?;
        let (norm, finite) = next.read()?.wait()?;
        assert!(norm.is_finite() && !finite);
        assert_eq!(values(&model)?, before);
        Ok(())
    }
}
