//! Holding what a device computes to the CPU implementation in f64, room by room: what `allreel check` runs,
//! and the tests of the kernels on the host. Each room's `check.rs` says over what and how closely; here is
//! what they share. A comparison that fails is a [`Finding`] like any other: nothing here panics.

use std::fmt;

use candle_core::{DType, Device, Result, Tensor, bail};
use rand::{Rng, SeedableRng, rngs::StdRng};

use super::{Dropout, DropoutKey, Ragged};

/// How large operands are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sizes {
    /// Small ones that divide nothing: every edge of a tile.
    Odd,
    /// Those of DeBERTa-v3-base on reviews: 4,096 tokens, 768 columns, 12 heads. A room takes less where
    /// its f64 reference would take long.
    Real,
}

/// One comparison.
#[derive(Clone, Debug)]
pub struct Finding {
    /// The op.
    pub room: &'static str,
    /// What was compared, of which case.
    pub what: String,
    /// Largest difference of an element; NaN where one is not a number, or where the op failed.
    pub worst: f64,
    /// What it may be.
    pub allowed: f64,
}

impl Finding {
    /// Whether it is within what is allowed; NaN is not.
    pub fn ok(&self) -> bool {
        self.worst <= self.allowed
    }

    /// [`worst`](Self::worst) as a share of what is allowed.
    pub fn share(&self) -> f64 {
        if self.worst == 0.0 { 0.0 } else { self.worst / self.allowed }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { room, what, worst, allowed } = self;
        write!(f, "{room}: {what}: off by {worst:.1e}, allowed {allowed:.1e}")
    }
}

/// An op whose kernels can be checked.
#[derive(Clone, Copy)]
pub struct Room {
    /// As its module is called.
    pub name: &'static str,
    check: fn(&mut Checker, Sizes) -> Result<()>,
}

/// Every op, in the order of `lib.rs`.
pub const ROOMS: [Room; 17] = [
    Room { name: "embedding", check: crate::embedding::check::check },
    Room { name: "linear", check: crate::linear::check::check },
    Room { name: "quantized", check: crate::quantized::check::check },
    Room { name: "activation", check: crate::activation::check::check },
    Room { name: "dropout", check: crate::dropout::check::check },
    Room { name: "norm", check: crate::norm::check::check },
    Room { name: "rotary", check: crate::rotary::check::check },
    Room { name: "attention", check: crate::attention::check::check },
    Room { name: "disentangled", check: crate::disentangled::check::check },
    Room { name: "prefix", check: crate::prefix::check::check },
    Room { name: "recurrence", check: crate::recurrence::check::check },
    Room { name: "convolution", check: crate::convolution::check::check },
    Room { name: "pooling", check: crate::pooling::check::check },
    Room { name: "attention_pooling", check: crate::attention_pooling::check::check },
    Room { name: "capsule", check: crate::capsule::check::check },
    Room { name: "cross_entropy", check: crate::cross_entropy::check::check },
    Room { name: "adamw", check: crate::adamw::check::check },
];

/// Runs ops on a device and notes how far they are from the CPU's f64.
pub struct Checker {
    device: Device,
    stored: Vec<DType>,
    room: &'static str,
    case: String,
    findings: Vec<Finding>,
}

impl Checker {
    /// For ops on `device` whose tensors hold each of `stored` in turn.
    pub fn new(device: Device, stored: Vec<DType>) -> Self {
        Self { device, stored, room: "", case: String::new(), findings: Vec::new() }
    }

    /// All comparisons of a room. If an op fails that is a finding too, and the room's last.
    pub fn run(&mut self, room: Room, sizes: Sizes) -> Vec<Finding> {
        self.room = room.name;
        self.case = "start".into();
        if let Err(error) = (room.check)(self, sizes) {
            let what = format!("{}: {error}", self.case);
            self.findings.push(Finding { room: room.name, what, worst: f64::NAN, allowed: 0.0 });
        }
        self.take()
    }

    /// The findings so far.
    pub(crate) fn take(&mut self) -> Vec<Finding> {
        std::mem::take(&mut self.findings)
    }

    pub(crate) fn device(&self) -> &Device {
        &self.device
    }

    pub(crate) fn stored(&self) -> Vec<DType> {
        self.stored.clone()
    }

    /// What attention is checked in: bf16 where there are kernels, which take nothing else.
    pub(crate) fn attention_dtype(&self) -> DType {
        if self.stored.contains(&DType::BF16) { DType::BF16 } else { DType::F32 }
    }

    /// Says of which case the next comparisons are.
    pub(crate) fn case(&mut self, case: impl Into<String>) {
        self.case = case.into();
    }

    /// `tensor` rounded to `dtype`, on the device: what an op reads.
    pub(crate) fn rounded(&self, tensor: &Tensor, dtype: DType) -> Result<Tensor> {
        tensor.to_dtype(dtype)?.to_device(&self.device)
    }

    /// [`random`] numbers as an op reads them.
    pub(crate) fn random(&self, shape: &[usize], seed: u64, dtype: DType) -> Result<Tensor> {
        self.rounded(&random(shape, seed)?, dtype)
    }

    /// Holds what an op wrote to the `exact` f64 results. A stored element may be twice as wrong as the
    /// exact result rounded to what it is stored as, and besides by `arithmetic`, relative to the largest
    /// magnitude (at least 1): what f32 arithmetic loses before it is stored.
    pub(crate) fn check(
        &mut self,
        what: &str,
        got: &Tensor,
        exact: &Tensor,
        arithmetic: f64,
    ) -> Result<()> {
        let rounded = exact.to_dtype(got.dtype())?;
        self.check_against(what, got, exact, &rounded, arithmetic)
    }

    /// What f32 loses in sums of `terms` products of numbers below 1, relative to the largest sum: an
    /// addition is off by up to 6e-8 of a partial sum in either direction, so the errors grow as the root of
    /// their number. Twice that; measured on CPUs and of kernels on the host: at most 0.7 times. On a CUDA
    /// device twelve times, not measured yet: tensor cores cut off what they add, which does not average out.
    pub(crate) fn of_sums(&self, terms: usize) -> f64 {
        let times = if self.device.is_cuda() { 12.0 } else { 2.0 };
        times * 6e-8 * (terms as f64).sqrt()
    }

    /// Holds what an op wrote to be at most twice as far from `exact` as a `naive` implementation of the
    /// same precision is, and besides by `arithmetic` as in [`check`](Self::check).
    pub(crate) fn check_against(
        &mut self,
        what: &str,
        got: &Tensor,
        exact: &Tensor,
        naive: &Tensor,
        arithmetic: f64,
    ) -> Result<()> {
        if (got.dims(), naive.dims()) != (exact.dims(), exact.dims()) {
            bail!("{what}: {:?}, expected {:?}", got.dims(), exact.dims());
        }
        let (got, want, naive) = (numbers(got)?, numbers(exact)?, numbers(naive)?);
        let scale = want.iter().fold(1.0f64, |m, x| m.max(x.abs()));
        let allowed = 2.0 * furthest(&want, &naive) + arithmetic * scale;
        self.note(what, furthest(&got, &want), allowed);
        Ok(())
    }

    /// Holds what has to be the same to being it.
    pub(crate) fn same<T: PartialEq>(&mut self, what: &str, got: T, want: T) {
        self.note(what, if got == want { 0.0 } else { f64::INFINITY }, 0.0);
    }

    fn note(&mut self, what: &str, worst: f64, allowed: f64) {
        let what = format!("{what} ({})", self.case);
        self.findings.push(Finding { room: self.room, what, worst, allowed });
    }
}

/// Uniform f64 values in [-1, 1), on the CPU.
pub(crate) fn random(shape: &[usize], seed: u64) -> Result<Tensor> {
    let mut rng = StdRng::seed_from_u64(seed);
    let n = shape.iter().product();
    let values: Vec<f64> = (0..n).map(|_| rng.random_range(-1.0..1.0)).collect();
    Tensor::from_vec(values, shape, &Device::Cpu)
}

/// `tensor` in f64 on the CPU, in memory of its own: what the exact result is computed from.
pub(crate) fn wide(tensor: &Tensor) -> Result<Tensor> {
    tensor.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.copy()
}

/// The elements of a tensor.
pub(crate) fn numbers(tensor: &Tensor) -> Result<Vec<f64>> {
    tensor.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.flatten_all()?.to_vec1()
}

/// The largest difference of two elements; NaN if there is one.
fn furthest(a: &[f64], b: &[f64]) -> f64 {
    // Not `f64::max`, which would overlook a NaN.
    let larger = |m: f64, e: f64| if m.is_nan() || e <= m { m } else { e };
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, larger)
}

/// A dropout that drops a good share.
pub(crate) fn dropout() -> Option<Dropout> {
    Dropout::new(0.3, DropoutKey { seed: 5 << 33 | 3, step: 2, stream: 1 }, 4)
}

/// A batch of these lengths with unrelated sample ids.
pub(crate) fn batch(lengths: &[usize]) -> Result<Ragged> {
    let samples: Vec<u32> = (0..lengths.len() as u32).map(|i| 100 * i + 7).collect();
    Ragged::new(lengths, &samples)
}

/// Lengths of 7 to 512 tokens, 4,096 together.
pub(crate) const LENGTHS: [usize; 16] =
    [7, 512, 233, 97, 301, 512, 64, 411, 128, 190, 350, 45, 256, 175, 333, 482];

/// Width of the model whose sizes are [`Sizes::Real`].
pub(crate) const HIDDEN: usize = 768;
/// Its heads.
pub(crate) const HEADS: usize = 12;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_room_is_within_its_tolerances_in_f32_on_the_cpu() {
        for room in ROOMS {
            let findings = Checker::new(Device::Cpu, vec![DType::F32]).run(room, Sizes::Odd);
            let worst = findings.iter().map(Finding::share).fold(0.0, f64::max);
            println!(
                "{}: {} comparisons, {worst:.2} of what is allowed",
                room.name,
                findings.len()
            );
            for finding in findings {
                assert!(finding.ok(), "{finding}");
            }
        }
    }

    #[test]
    fn what_is_not_a_number_is_a_finding_wherever_it_is() -> Result<()> {
        let mut checker = Checker::new(Device::Cpu, vec![DType::F32]);
        let exact = Tensor::new(&[1.0f64, 2.0, 3.0], &Device::Cpu)?;
        for at in 0..3 {
            let mut got = [1.0f32, 2.0, 3.0];
            got[at] = f32::NAN;
            checker.check("y", &Tensor::new(&got, &Device::Cpu)?, &exact, 1.0)?;
        }
        checker.check("y", &exact, &exact, 0.0)?;
        let ok: Vec<bool> = checker.take().iter().map(Finding::ok).collect();
        assert_eq!(ok, [false, false, false, true]);
        Ok(())
    }

    #[test]
    fn an_op_that_fails_is_a_finding() {
        let check: fn(&mut Checker, Sizes) -> Result<()> = |_, _| bail!("no device");
        let mut checker = Checker::new(Device::Cpu, vec![DType::F32]);
        let findings = checker.run(Room { name: "some", check }, Sizes::Odd);
        assert!(findings.len() == 1 && !findings[0].ok());
        assert!(findings[0].to_string().starts_with("some: start: no device"), "{}", findings[0]);
    }
}
