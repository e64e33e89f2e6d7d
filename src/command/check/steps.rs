//! Training steps of a small DeBERTa, with the same weights, batches and counted dropout here and there.

use allreel_kernels::{common::check::Finding, threads};
use candle_core::DType;

use super::layers::small;
use crate::{
    Error, Result,
    collective::{Traffic, solo::Solo},
    config::{Schedule as Curve, Train, Trainable, Warmup},
    data::TokenSet,
    device::Placement,
    model::{Classifier, Family},
    step::{Trainer, schedule::Schedule},
};

const ROOM: &str = "training steps";
/// Sequences of a step.
const SAMPLES: u32 = 8;
/// Losses differ by less than this in f32, summed in another order: measured below 1e-6 in 20 steps.
const IN_F32: f64 = 1e-4;
/// In bf16: about twice the 8.9e-4 that 20 steps were off by with the kernels run on the host.
const IN_BF16: f64 = 2e-3;
/// Micro-batches of the run that the CPU is compared with itself by.
const FEW_TOKENS: usize = 64;

/// The losses of `steps` steps on the device against the CPU's in f32, and both side by side. On the CPU in
/// f32, against itself with one thread and small micro-batches.
///
/// # Errors
/// If the CPU cannot train.
pub(super) fn check(placement: &Placement, steps: u64) -> Result<(Vec<Finding>, Vec<String>)> {
    let want = losses(&Placement::CPU, steps, usize::MAX)?;
    let itself = placement.device.is_cpu() && placement.dtype == DType::F32;
    let got = if itself { alone(steps) } else { losses(placement, steps, usize::MAX) };
    let (allowed, other) = match itself {
        true => (IN_F32, "the same on one thread in micro-batches of 64 tokens".to_owned()),
        false => (IN_BF16, format!("{} in {:?}", placement.name(), placement.dtype)),
    };
    let got = match got {
        Ok(got) => got,
        Err(error) => {
            let what = error.to_string();
            return Ok((vec![Finding { room: ROOM, what, worst: f64::NAN, allowed }], vec![]));
        }
    };
    let mut remarks = vec![format!("losses of a small DeBERTa: CPU in F32, {other}")];
    let mut findings = Vec::new();
    for (i, (want, got)) in want.iter().zip(&got).enumerate() {
        let (step, worst) = (i + 1, (got - want).abs());
        findings.push(Finding { room: ROOM, what: format!("loss of step {step}"), worst, allowed });
        if step == 1 || step % 5 == 0 {
            remarks.push(format!("  step {step:2}   {want:.6}   {got:.6}"));
        }
    }
    Ok((findings, remarks))
}

/// [`losses`] on the CPU, on one thread, in small micro-batches.
fn alone(steps: u64) -> Result<Vec<f64>> {
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(1)
        .start_handler(|_| threads::flush_denormals())
        .build()
        .map_err(|e| Error::Device(format!("cannot start a thread: {e}")))?;
    pool.install(|| losses(&Placement::CPU, steps, FEW_TOKENS))
}

/// The loss of each step.
fn losses(placement: &Placement, steps: u64, micro_tokens: usize) -> Result<Vec<f64>> {
    let config = small(Family::DebertaV2, 2, 0.02)?;
    let classifier = Classifier::new(placement, config, Trainable::All, 7)?;
    let mut settings = Train::default();
    (settings.micro_tokens, settings.learning_rate) = (micro_tokens, 1e-3);
    let mut trainer = Trainer {
        classifier: &classifier,
        collective: &mut Solo::new(1)?,
        settings: &settings,
        schedule: Schedule::new(Curve::Constant, Warmup::Steps(0), steps)?,
        checkpoint: false,
        traffic: Traffic::default(),
        before: None,
    };
    let set = set(steps as u32 * SAMPLES);
    let lengths = set.lengths();
    let step = |step: u64| {
        let first = (step as u32 - 1) * SAMPLES;
        let samples: Vec<u32> = (first..first + SAMPLES).collect();
        Ok(trainer.step(&set, &lengths, &samples, step, false)?.loss())
    };
    (1..=steps).map(step).collect()
}

/// Sequences of 1 to 40 tokens; the label is whether token 7 is among them.
fn set(count: u32) -> TokenSet {
    let mut state = 12345u64;
    let mut random = move |n: u64| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) % n
    };
    let (mut tokens, mut offsets) = (Vec::new(), vec![0]);
    for i in 0..count {
        let length = 1 + random(40);
        let marked = random(length);
        tokens.extend((0..length).map(|at| match i % 2 == 1 && at == marked {
            true => 7,
            false => 10 + random(290) as u32,
        }));
        offsets.push(tokens.len() as u64);
    }
    TokenSet {
        tokens,
        offsets,
        labels: (0..count).map(|i| Some(i % 2)).collect(),
        ids: vec![String::new(); count as usize],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::check::layers;
    use candle_core::Device;

    /// The CUDA kernels, run on the host: what a CUDA device is allowed is derived from this.
    #[test]
    fn host_check_of_layers() -> Result<()> {
        if !allreel_kernels::HOST_KERNELS {
            assert!(
                std::env::var_os("CI").is_none(),
                "this is CI, but not built with host-kernels"
            );
            eprintln!("SKIPPED: not built with allreel-kernels/host-kernels; nothing was compared");
            return Ok(());
        }
        let placement = Placement { device: Device::Cpu, dtype: DType::BF16 };
        let mut findings = layers::check(&placement, |_| ());
        let (losses, lines) = check(&placement, 5)?;
        findings.extend(losses);
        println!("{}", lines.join("\n"));
        for finding in &findings {
            println!("{finding}");
        }
        for finding in findings {
            // Half: the tolerance is twice what is measured here.
            assert!(finding.worst <= finding.allowed / 2.0, "{finding}");
        }
        Ok(())
    }
}
