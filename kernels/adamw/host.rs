//! The kernels of op.cu, run on the host, against the CPU implementation: several steps of several
//! buckets and a table, clipped by the norm of all of them.

use candle_core::{DType, Device, Result, Tensor};
use half::bf16;

use super::*;
use crate::{
    common::host_run::{Address, Buffer, check_within, in_every_order, kernels, launch},
    testing::random,
};

#[derive(Clone, Copy)]
#[repr(C)]
struct BucketParameters {
    values: Address,
    exp_avg: Address,
    exp_avg_sq: Address,
    gradients: Address,
    copy: Address,
    length: i64,
    decayed: i64,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct Piece {
    bucket: i32,
    index: i32,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct Norm {
    norm: f32,
    scale: f32,
    finite: u32,
}

#[repr(C)]
struct Squares {
    buckets: Address,
    pieces: Address,
    partials: Address,
}

#[repr(C)]
struct SquaresRows {
    values: Address,
    partials: Address,
    length: i64,
}

#[repr(C)]
struct Clip {
    partials: Address,
    norm: Address,
    parts: i32,
    scale: f32,
    max_norm: f32,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct Constants {
    beta1: f32,
    one_minus_beta1: f32,
    beta2: f32,
    one_minus_beta2: f32,
    step_size: f32,
    inverse_bias2: f32,
    epsilon: f32,
    keep: f32,
}

#[repr(C)]
struct Step {
    buckets: Address,
    pieces: Address,
    norm: Address,
    constants: Constants,
}

#[repr(C)]
struct StepRows {
    values: Address,
    exp_avg: Address,
    exp_avg_sq: Address,
    copy: Address,
    ids: Address,
    gradients: Address,
    norm: Address,
    table_rows: i32,
    columns: i32,
    rows: i32,
    constants: Constants,
}

kernels!(
    Squares: host_adamw_squares;
    SquaresRows: host_adamw_squares_rows;
    Clip: host_adamw_clip;
    Step: host_adamw_step;
    StepRows: host_adamw_step_rows;
);

/// Elements of one piece.
const PIECE: usize = 4096;
const MAX_NORM: f64 = 5.0;
/// One over the number of samples.
const SCALE: f64 = 0.25;

impl Constants {
    fn new(adamw: &AdamW) -> Self {
        let power = |beta: f64| 1.0 - beta.powf(adamw.step as f64);
        Self {
            beta1: adamw.beta1 as f32,
            one_minus_beta1: (1.0 - adamw.beta1) as f32,
            beta2: adamw.beta2 as f32,
            one_minus_beta2: (1.0 - adamw.beta2) as f32,
            step_size: (adamw.learning_rate / power(adamw.beta1)) as f32,
            inverse_bias2: (1.0 / power(adamw.beta2).sqrt()) as f32,
            epsilon: adamw.epsilon as f32,
            keep: (1.0 - adamw.learning_rate * adamw.weight_decay) as f32,
        }
    }
}

fn adamw(step: u64) -> AdamW {
    AdamW {
        learning_rate: 1e-2,
        beta1: 0.9,
        beta2: 0.999,
        epsilon: 1e-8,
        weight_decay: 0.1,
        step,
        scale: 1.0,
    }
}

/// One bucket on both sides, or a table whose gradient is rows.
struct Bucket {
    cpu: State,
    values: Buffer<f32>,
    exp_avg: Buffer<f32>,
    exp_avg_sq: Buffer<f32>,
    copy: Buffer<bf16>,
}

fn flat(n: usize, seed: u64) -> Result<Tensor> {
    random(&[n], seed)?.to_dtype(DType::F32)
}

impl Bucket {
    fn new(n: usize, seed: u64) -> Result<Self> {
        let values = flat(n, seed)?;
        let zeros = || Tensor::zeros(n, DType::F32, &Device::Cpu);
        Ok(Self {
            values: Buffer::tensor(&values)?,
            exp_avg: Buffer::of(&vec![0.0; n]),
            exp_avg_sq: Buffer::of(&vec![0.0; n]),
            copy: Buffer::poisoned(n),
            cpu: State { values, exp_avg: zeros()?, exp_avg_sq: zeros()? },
        })
    }

    /// The values and both averages, and the copy where there is one.
    fn check(&self, copied: bool) -> Result<()> {
        let State { values, exp_avg, exp_avg_sq } = &self.cpu;
        let sides = [(&self.values, values), (&self.exp_avg, exp_avg)];
        for (got, want) in sides.into_iter().chain([(&self.exp_avg_sq, exp_avg_sq)]) {
            let want = want.to_dtype(DType::F64)?.to_vec1::<f64>()?;
            // The same f32 operations, but for fused multiply-adds on the CPU.
            check_within("state", &got.wide(), &want, 0.0, 1e-6)?;
        }
        if copied {
            let rounded: Vec<bf16> =
                self.values.values().iter().map(|x| bf16::from_f32(*x)).collect();
            assert_eq!(self.copy.values(), rounded);
        }
        Ok(())
    }
}

/// What several buckets and one table of rows need for their steps.
struct Model {
    buckets: Vec<(Bucket, usize)>,
    table: Bucket,
    width: usize,
}

impl Model {
    /// The gradients of one step, on both sides; and what the kernels say of their norm.
    fn step(&self, step: u64, poison: bool) -> Result<Norm> {
        let mut gradients = Vec::new();
        for (i, (bucket, _)) in self.buckets.iter().enumerate() {
            let gradient = flat(bucket.values.values().len(), 100 * step + i as u64)?;
            gradients.push((Buffer::<f32>::tensor(&gradient)?, gradient));
        }
        let rows = SparseRows {
            ids: vec![0, 3, 4, 10],
            values: flat(4 * self.width, 7 * step)?.to_vec1()?,
            width: self.width,
        };
        let mut device_rows = rows.values.clone();
        if poison {
            device_rows[1] = f32::INFINITY;
        }
        let device_rows = Buffer::of(&device_rows);
        let norm = self.launch(step, &gradients, &rows.ids, &device_rows);
        if poison {
            return Ok(norm);
        }
        let mut squares = sum_of_squares_rows(&rows);
        for (_, gradient) in &gradients {
            squares += sum_of_squares(gradient)?;
        }
        let total = squares.sqrt() * SCALE;
        check_within("norm", &[f64::from(norm.norm)], &[total], 0.0, 1e-6)?;
        let adamw = AdamW { scale: SCALE * clip_coefficient(total, MAX_NORM), ..adamw(step) };
        for ((bucket, decayed), (left, gradient)) in self.buckets.iter().zip(&gradients) {
            super::step(&adamw, &bucket.cpu, gradient, *decayed)?;
            assert!(left.values().iter().all(|g| *g == 0.0));
        }
        step_rows(&adamw, &self.table.cpu, &rows)?;
        Ok(norm)
    }

    fn launch(
        &self,
        step: u64,
        gradients: &[(Buffer<f32>, Tensor)],
        ids: &[u32],
        rows: &Buffer<f32>,
    ) -> Norm {
        let parameters = |((bucket, decayed), (gradient, _)): (&(Bucket, usize), &(_, _))| {
            let gradient: &Buffer<f32> = gradient;
            BucketParameters {
                values: bucket.values.address(),
                exp_avg: bucket.exp_avg.address(),
                exp_avg_sq: bucket.exp_avg_sq.address(),
                gradients: gradient.address(),
                // Every other bucket is f32 alone.
                copy: if *decayed > 0 { bucket.copy.address() } else { Address::NULL },
                length: bucket.values.values().len() as i64,
                decayed: *decayed as i64,
            }
        };
        let all: Vec<BucketParameters> =
            self.buckets.iter().zip(gradients).map(parameters).collect();
        let pieces: Vec<Piece> = (0..all.len())
            .flat_map(|bucket| {
                let pieces = (all[bucket].length as usize).div_ceil(PIECE);
                (0..pieces).map(move |index| Piece { bucket: bucket as i32, index: index as i32 })
            })
            .collect();
        let row_parts = rows.values().len().div_ceil(PIECE);
        let (buckets, piece_buffer) = (Buffer::of(&all), Buffer::of(&pieces));
        let partials = Buffer::<f64>::poisoned(pieces.len() + row_parts);
        let norm = Buffer::<Norm>::poisoned(1);
        let squares = Squares {
            buckets: buckets.address(),
            pieces: piece_buffer.address(),
            partials: partials.address(),
        };
        launch(host_adamw_squares, [pieces.len(), 1, 1], 0, &squares);
        let squares = SquaresRows {
            values: rows.address(),
            partials: partials.address_of(pieces.len()),
            length: rows.values().len() as i64,
        };
        launch(host_adamw_squares_rows, [row_parts, 1, 1], 0, &squares);
        let clip = Clip {
            partials: partials.address(),
            norm: norm.address(),
            parts: (pieces.len() + row_parts) as i32,
            scale: SCALE as f32,
            max_norm: MAX_NORM as f32,
        };
        launch(host_adamw_clip, [1, 1, 1], 0, &clip);
        let constants = Constants::new(&adamw(step));
        let all = Step {
            buckets: buckets.address(),
            pieces: piece_buffer.address(),
            norm: norm.address(),
            constants,
        };
        launch(host_adamw_step, [pieces.len(), 1, 1], 0, &all);
        let (id_buffer, table_rows) =
            (Buffer::of(ids), self.table.values.values().len() / self.width);
        let all = StepRows {
            values: self.table.values.address(),
            exp_avg: self.table.exp_avg.address(),
            exp_avg_sq: self.table.exp_avg_sq.address(),
            copy: self.table.copy.address(),
            ids: id_buffer.address(),
            gradients: rows.address(),
            norm: norm.address(),
            table_rows: table_rows as i32,
            columns: self.width as i32,
            rows: ids.len() as i32,
            constants,
        };
        launch(host_adamw_step_rows, [table_rows.div_ceil(8), 1, 1], 0, &all);
        norm.values()[0]
    }
}

fn model() -> Result<Model> {
    let buckets = [(1, 0), (97, 60), (9000, 5000), (4096, 0)]
        .into_iter()
        .enumerate()
        .map(|(i, (n, d))| Ok((Bucket::new(n, i as u64)?, d)));
    let width = 37;
    Ok(Model {
        buckets: buckets.collect::<Result<Vec<_>>>()?,
        table: Bucket::new(11 * width, 50)?,
        width,
    })
}

#[test]
fn host_steps_match_the_cpu() -> Result<()> {
    in_every_order(|| {
        let model = model()?;
        for step in 1..=3 {
            let norm = model.step(step, false)?;
            assert!(norm.finite == 1 && f64::from(norm.norm) > MAX_NORM, "clipping is tested");
            model.buckets.iter().try_for_each(|(bucket, d)| bucket.check(*d > 0))?;
            model.table.check(true)?;
        }
        Ok(())
    })
}

#[test]
fn host_a_gradient_that_is_not_finite_changes_nothing() -> Result<()> {
    let model = model()?;
    model.step(1, false)?;
    let before = model.buckets[2].0.values.values().to_vec();
    assert_eq!(model.step(2, true)?.finite, 0);
    assert_eq!(model.buckets[2].0.values.values(), before);
    model.table.check(true)
}
