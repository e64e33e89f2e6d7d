//! PyTorch's AdamW, clipping and cross-entropy, and transformers' schedules.

use allreel::{
    config::{self, Warmup},
    step::schedule::Schedule,
};
use allreel_kernels::adamw::{self, AdamW, Bucket, State, Update};
use candle_core::{DType, Device, Tensor};

use crate::support::{Case, GRADIENTS, Tolerance, VALUES, golden, loss, numbers};

/// f32 against f32 over five steps: rounding only.
const STATE: Tolerance = Tolerance { relative: 2e-6, absolute: 1e-8, at_least_one: true };

#[test]
fn golden_adamw() {
    let Some(golden) = golden() else { return };
    let case = Case::load(&golden.join("optim/adamw.safetensors"));
    let readme = std::fs::read_to_string(golden.join("optim/README.json")).expect("README.json");
    let readme: serde_json::Value = serde_json::from_str(&readme).expect("JSON");
    let settings = readme["adamw"]["hyper"].as_object().expect("settings");
    assert!(!settings.is_empty());
    let flat = |prefix: &str| {
        let part = |name: &str| case.get(&format!("{prefix}{name}")).flatten_all().expect("flat");
        Tensor::cat(&[part("w"), part("b")], 0).expect("one bucket")
    };
    for (name, hyper) in settings {
        let number = |key: &str| hyper[key].as_f64().expect("a number");
        let values = flat("p0.");
        let zeros = || values.zeros_like().expect("zeros");
        let (exp_avg, exp_avg_sq) = (zeros(), zeros());
        let state = State { exp_avg, exp_avg_sq, values: values.clone(), copy: None };
        let decayed = case.get("p0.w").elem_count();
        let steps = case
            .names()
            .filter(|n| {
                n.starts_with(&format!("{name}.step"))
                    && n.ends_with(".w")
                    && !n.contains("exp_avg")
            })
            .count();
        assert!(steps > 0);
        for step in 1..=steps {
            let adamw = AdamW {
                learning_rate: number("lr"),
                beta1: hyper["betas"][0].as_f64().expect("beta1"),
                beta2: hyper["betas"][1].as_f64().expect("beta2"),
                epsilon: number("eps"),
                weight_decay: number("weight_decay"),
                step: step as u64,
            };
            let gradients = flat(&format!("g{step}.")).copy().expect("a copy");
            let bucket = Bucket { state: &state, gradients: &gradients, decayed };
            let update = Update::new(vec![bucket], None).expect("one bucket");
            let norm = update.norm(1, 0.0, None).expect("a norm");
            update.step(&adamw, &norm).expect("a step");
            let at = format!("{name}.step{step}.");
            STATE.check(&at, &numbers(&state.values), &numbers(&flat(&at)));
            let moments = [(&state.exp_avg, "exp_avg."), (&state.exp_avg_sq, "exp_avg_sq.")];
            for (moment, part) in moments {
                STATE.check(part, &numbers(moment), &numbers(&flat(&format!("{at}{part}"))));
            }
        }
    }
}

#[test]
fn golden_clip() {
    let Some(golden) = golden() else { return };
    let case = Case::load(&golden.join("optim/clip.safetensors"));
    let cases: Vec<&str> = case.names().filter_map(|n| n.strip_suffix(".max_norm")).collect();
    assert!(!cases.is_empty());
    for name in cases {
        let parts = [0, 1].map(|i| case.get(&format!("{name}.g{i}")).flatten_all().expect("flat"));
        let states = parts.each_ref().map(|part| State {
            values: part.clone(),
            exp_avg: part.clone(),
            exp_avg_sq: part.clone(),
            copy: None,
        });
        let buckets = states.iter().zip(&parts);
        let buckets =
            buckets.map(|(state, gradients)| Bucket { state, gradients, decayed: 0 }).collect();
        let update = Update::new(buckets, None).expect("buckets");
        let norm = update.norm(1, 0.0, None).and_then(|norm| norm.read()?.wait()).expect("norm").0;
        VALUES.check("norm", &[norm], &case.numbers(&format!("{name}.total_norm")));
        let coefficient =
            adamw::clip_coefficient(norm, case.numbers(&format!("{name}.max_norm"))[0]);
        for (i, part) in parts.iter().enumerate() {
            let clipped: Vec<f64> = numbers(part).iter().map(|g| g * coefficient).collect();
            STATE.check(name, &clipped, &case.numbers(&format!("{name}.out{i}")));
        }
    }
}

#[test]
fn golden_schedule() {
    let Some(golden) = golden() else { return };
    let case = Case::load(&golden.join("optim/schedule.safetensors"));
    let mut compared = 0;
    for name in case.names() {
        let mut parts = name.split('.');
        let kind = match parts.next() {
            Some("linear") => config::Schedule::Linear,
            Some("cosine") => config::Schedule::Cosine,
            other => panic!("a schedule {other:?} that is not known"),
        };
        let mut number = || parts.next().and_then(|n| n.parse::<usize>().ok()).expect("a number");
        let (warmup, total) = (number(), number());
        let schedule =
            Schedule::new(kind, Warmup::Steps(warmup), total as u64).expect("a schedule");
        let want = case.numbers(name);
        // Past the end the linear one stays at 0; transformers' cosine comes up again, and no
        // run of ours goes there.
        let steps = if kind == config::Schedule::Linear { want.len() } else { total + 1 };
        let got: Vec<f64> = (0..steps as u64).map(|s| schedule.multiplier(s)).collect();
        STATE.check(name, &got, &want[..steps]);
        compared += 1;
    }
    assert!(compared >= 4);
}

#[test]
fn golden_cross_entropy() {
    let Some(golden) = golden() else { return };
    let case = Case::load(&golden.join("losses/cross_entropy.safetensors"));
    let labels: Vec<u32> = case.numbers("labels").iter().map(|l| *l as u32).collect();
    let (n, labels) = (labels.len() as f64, labels.into());
    for (name, smoothing, divisor) in
        [("mean", 0.0, n), ("sum", 0.0, 1.0), ("label_smoothing_0.1", 0.1, n)]
    {
        let logits = case.get("logits").to_dtype(DType::F32).expect("f32");
        assert!(logits.device().same_device(&Device::Cpu));
        let (loss, d_logits) = loss(&logits, &labels, smoothing);
        VALUES.check(name, &[loss / divisor], &case.numbers(&format!("{name}.loss")));
        let gradient: Vec<f64> = numbers(&d_logits).iter().map(|g| g / divisor).collect();
        GRADIENTS.check(name, &gradient, &case.numbers(&format!("{name}.grad")));
    }
}
