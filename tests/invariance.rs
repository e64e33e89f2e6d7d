//! What must not change a result: the number of ranks, micro-batches, packing, recomputation.

use allreel::{
    collective::{Collective, Traffic, solo::Solo, threads::Threads},
    config::{self, Adapter, Config, Trainable, Warmup},
    data::TokenSet,
    device::Placement,
    model::{Classifier, Family, Training},
    step::{Trainer, evaluate::evaluate, schedule::Schedule},
};
use std::path::Path;

use crate::{adapters::adapters, support::small};

const STEPS: usize = 50;
/// Largest relative difference of a step's loss between two ways of summing the same numbers.
const LOSS: f64 = 1e-5;

/// 203 sequences of 1 to 40 tokens; the label is whether the first is token 7.
fn samples() -> TokenSet {
    let (mut tokens, mut offsets, mut labels) = (vec![], vec![0], vec![]);
    let mut x = 12345u64;
    let mut random = move |n: u64| {
        x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (x >> 33) % n
    };
    for _ in 0..203 {
        let length = 1 + random(40);
        let label = random(2) as u32;
        for i in 0..length {
            let token = 10 + random(290) as u32;
            tokens.push(if label == 1 && i == length / 2 { 7 } else { token });
        }
        offsets.push(tokens.len() as u64);
        labels.push(Some(label));
    }
    let ids = vec![String::new(); labels.len()];
    TokenSet { tokens, offsets, labels, ids }
}

/// What is trained.
#[derive(Clone)]
struct Subject {
    family: Family,
    training: Training,
}

impl From<Family> for Subject {
    fn from(family: Family) -> Self {
        Self { family, training: Trainable::All.into() }
    }
}

impl From<(Family, Adapter)> for Subject {
    fn from((family, adapter): (Family, Adapter)) -> Self {
        Self { family, training: adapter.into() }
    }
}

fn settings(subject: &Subject, micro_tokens: usize) -> config::Train {
    // A pre-norm network learns this faster, and at 2e-3 turns rounding errors into large ones; an adapter needs
    // more to learn as much.
    let learning_rate = match (subject.family, &subject.training.adapter) {
        (_, Some(_)) => 5e-3,
        (Family::ModernBert | Family::Gpt2, None) => 1e-3,
        (family, None) if family.is_on_words() => 5e-3,
        _ => 2e-3,
    };
    let text = format!(
        "[data]\ntrain = \"none.tsv\"\nmax_length = 40\n[model]\npath = \"none\"\n[train]\n\
         micro_tokens = {micro_tokens}\nlearning_rate = {learning_rate}\nseed = 5\nbatch_size = 16\n"
    );
    Config::from_toml_str(&text, Path::new("test.toml")).expect("a config").train
}

/// Runs `body` with a trainer of a new network.
fn with_trainer<R>(
    subject: impl Into<Subject>,
    collective: &mut dyn Collective,
    micro_tokens: usize,
    checkpoint: bool,
    body: impl FnOnce(&mut Trainer<'_>) -> R,
) -> R {
    let subject = subject.into();
    let settings = settings(&subject, micro_tokens);
    let Subject { family, training } = subject;
    let classifier =
        Classifier::new(&Placement::CPU, small(family), training, 3).expect("a classifier");
    let schedule = Schedule::new(config::Schedule::Linear, Warmup::Steps(5), STEPS as u64);
    body(&mut Trainer {
        classifier: &classifier,
        collective,
        settings: &settings,
        schedule: schedule.expect("a schedule"),
        checkpoint,
        traffic: Traffic::default(),
        before: None,
    })
}

/// The losses of 50 steps over several epochs, and the final evaluation loss.
fn losses(
    subject: impl Into<Subject>,
    collective: &mut dyn Collective,
    micro_tokens: usize,
    checkpoint: bool,
) -> Vec<f64> {
    with_trainer(subject, collective, micro_tokens, checkpoint, |trainer| {
        let set = samples();
        let (lengths, batch) = (trainer.classifier.lengths(&set), trainer.settings.batch());
        let batches =
            (1..).flat_map(|epoch| allreel::batch::plan::epoch(&lengths, batch, 4, 5, epoch));
        let mut losses: Vec<f64> = batches
            .take(STEPS)
            .zip(1..)
            .map(|(batch, step)| {
                trainer.step(&set, &lengths, &batch, step, false).expect("a step").loss()
            })
            .collect();
        let evaluation = evaluate(trainer.classifier, &set, 500, trainer.collective);
        losses.push(evaluation.expect("evaluation").loss);
        losses
    })
}

fn alone(subject: impl Into<Subject>, micro_tokens: usize, checkpoint: bool) -> Vec<f64> {
    losses(subject, &mut Solo::new(1).expect("alone"), micro_tokens, checkpoint)
}

/// The largest relative difference; NaN counts as infinite.
fn difference(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let differences = a.iter().zip(b).map(|(a, b)| ((a - b) / b).abs());
    differences.map(|d| if d.is_nan() { f64::INFINITY } else { d }).fold(0.0, f64::max)
}

/// Adapters take less: as few ranks and micro-batches as show that none of it depends on them.
#[test]
fn adapters_do_not_depend_on_ranks_micro_batches_or_recomputing() {
    let families = [Family::Bert, Family::DebertaV2, Family::ModernBert, Family::Gpt2];
    for ((what, adapter), family) in adapters().into_iter().zip(families.into_iter().cycle()) {
        let subject = || (family, adapter.clone());
        let reference = alone(subject(), 8192, false);
        let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
        let (first, last) = (mean(&reference[..15]), mean(&reference[STEPS - 15..STEPS]));
        println!("{family:?}, {what}: loss {first:.4}, then {last:.4}");
        assert!(last < first, "{family:?}, {what} does not learn: {first} to {last}");
        let worst = difference(&alone(subject(), 100, false), &reference);
        println!("{family:?}, {what}: micro-batches {worst:.1e}");
        assert!(worst < LOSS, "{family:?}, {what}, micro-batches: {worst:e}");
        let all = Threads::run(2, |rank| losses(subject(), rank, 150, false));
        let worst = difference(&all[0], &reference);
        println!("{family:?}, {what}: 2 ranks {worst:.1e}");
        assert!(worst < LOSS, "{family:?}, {what}, 2 ranks: {worst:e}");
        assert_eq!(alone(subject(), 150, true), alone(subject(), 150, false), "{family:?}, {what}");
    }
}

/// Ranks over TCP add in the same order as ranks in one process: the same bits.
#[test]
fn tcp_ranks_train_as_ranks_in_one_process_do() {
    for (family, world) in [(Family::Bert, 1), (Family::Bert, 2), (Family::DebertaV2, 4)] {
        let over_tcp = crate::tcp::ranks(world, |rank| losses(family, rank, 150, false));
        let threads = Threads::run(world, |rank| losses(family, rank, 150, false));
        assert_eq!(over_tcp, threads, "{family:?}, {world} ranks");
    }
}

fn check(family: Family) {
    let reference = alone(family, 8192, false);
    assert!(reference[STEPS] < 0.8 * reference[0], "it does not learn: {reference:?}");
    for micro_tokens in [40, 100, 333] {
        let worst = difference(&alone(family, micro_tokens, false), &reference);
        println!("micro-batches of {micro_tokens} tokens: {worst:.1e}");
        assert!(worst < LOSS, "micro-batches of {micro_tokens} tokens: {worst:e}");
    }
    for world in [2, 4] {
        let all = Threads::run(world, |rank| losses(family, rank, 150, false));
        let worst = difference(&all[0], &reference);
        println!("{world} ranks: {worst:.1e}");
        assert!(worst < LOSS, "{world} ranks: {worst:e}");
        assert!(all.iter().all(|losses| *losses == all[0]), "ranks differ among themselves");
    }
    assert_eq!(alone(family, 150, true), alone(family, 150, false), "recomputing changes bits");
}

#[test]
fn bert_does_not_depend_on_ranks_micro_batches_or_recomputing() {
    check(Family::Bert);
}

#[test]
fn distilbert_does_not_depend_on_ranks_micro_batches_or_recomputing() {
    check(Family::DistilBert);
}

#[test]
fn roberta_does_not_depend_on_ranks_micro_batches_or_recomputing() {
    check(Family::Roberta);
}

#[test]
fn deberta_does_not_depend_on_ranks_micro_batches_or_recomputing() {
    check(Family::DebertaV2);
}

#[test]
fn modernbert_does_not_depend_on_ranks_micro_batches_or_recomputing() {
    check(Family::ModernBert);
}

#[test]
fn gpt2_does_not_depend_on_ranks_micro_batches_or_recomputing() {
    check(Family::Gpt2);
}

#[test]
fn networks_on_words_do_not_depend_on_ranks_micro_batches_or_recomputing() {
    for family in Family::ON_WORDS {
        println!("{family:?}");
        check(family);
    }
}

#[test]
fn more_ranks_than_samples_in_a_batch_still_train() {
    let all = Threads::run(2, |rank| {
        with_trainer(Family::Bert, rank, 8192, false, |trainer| {
            let set = samples();
            let mut step = |step| {
                trainer.step(&set, &set.lengths(), &[17], step, false).expect("a step").loss()
            };
            [step(2), step(3)]
        })
    });
    assert_eq!(all[0], all[1]);
    assert!(all[0][0].is_finite() && all[0][0] != all[0][1]);
}

#[test]
fn a_rank_over_tcp_that_dies_is_named_and_nobody_hangs() {
    let errors = crate::tcp::ranks(3, |rank| {
        let number = rank.rank();
        with_trainer(Family::Bert, rank, 8192, false, |trainer| {
            let set = samples();
            let lengths = set.lengths();
            let mut step = |step| trainer.step(&set, &lengths, &[1, 2, 3], step, false);
            step(2).and_then(|_| step(3)).expect("two steps");
            // It returns, and its connections close, as a process that dies closes them.
            (number != 2).then(|| step(4).expect_err("an error"))
        })
    });
    for error in errors.iter().take(2) {
        let error = error.as_ref().expect("these two went on");
        assert_eq!(error.exit_code(), 4);
        assert!(error.to_string().starts_with("rank 2: its connection has ended"), "{error}");
    }
}

#[test]
fn a_loss_that_is_not_finite_stops_every_rank_before_the_update() {
    let results = Threads::run(2, |rank| {
        with_trainer(Family::Bert, rank, 8192, false, |trainer| {
            let set = samples();
            let buckets = &trainer.classifier.parameters.buckets;
            // One weight of one bucket is NaN on every rank, as after a blown-up step.
            allreel_kernels::common::host::write::<f32, _>(&buckets[0].state.values, |v| {
                v[0] = f32::NAN;
                Ok(())
            })
            .expect("written");
            let values = || buckets[1].state.values.to_vec1::<f32>().expect("f32");
            let before = values();
            let lengths = set.lengths();
            let error = trainer.step(&set, &lengths, &[1, 2, 3], 1, false).expect_err("an error");
            (error.exit_code(), error.to_string(), before == values())
        })
    });
    for (code, text, untouched) in results {
        assert_eq!(code, 2);
        assert!(text.contains("step 1: loss NaN") && text.contains("learning_rate"), "{text}");
        assert!(untouched);
    }
}
