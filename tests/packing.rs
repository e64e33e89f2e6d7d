//! A batch of sequences equals the sequences alone, forward and backward, dropout on, for every
//! family.

use allreel::{
    batch::Batch,
    config::Trainable,
    device::Placement,
    model::{Classifier, Family, Pass, classifier::Ready},
};
use allreel_kernels::{DropoutKey, Ragged, embedding::SparseRows};
use candle_core::{Device, Tensor};

use crate::support::{Tolerance, numbers, small};

const LENGTHS: [usize; 7] = [97, 1, 257, 2, 512, 97, 64];
/// f32 sums of the same terms in another order: 2e-6 of the largest is the most seen.
const SAME: Tolerance = Tolerance { relative: 2e-5, absolute: 1e-7, at_least_one: false };

/// The sequences called `ids`, each always of the same tokens.
fn batch(ids: &[u32]) -> Batch {
    let lengths: Vec<usize> = ids.iter().map(|id| LENGTHS[*id as usize]).collect();
    let token = |id: u32, i: usize| 3 + (id as usize * 131 + i * i * 17 + i * 7) as u32 % 290;
    let tokens: Vec<u32> = ids
        .iter()
        .zip(&lengths)
        .flat_map(|(id, length)| (0..*length).map(move |i| token(*id, i)))
        .collect();
    Batch {
        prompt: None,
        token_types: vec![0; tokens.len()].into(),
        tokens: tokens.into(),
        ragged: Ragged::new(&lengths, ids).expect("lengths"),
        labels: ids.iter().map(|id| id % 2).collect::<Vec<_>>().into(),
    }
}

/// Logits of the sequences called `ids`; their gradients are added to those of `model`.
fn run(model: &Classifier, ids: &[u32], words: &mut SparseRows) -> Vec<f64> {
    let batch = batch(ids);
    let key = DropoutKey { seed: 9, step: 4, stream: 0 };
    let pass = Pass { dropout: Some(key), ..Pass::default() };
    let (logits, saved) = model.forward(&batch, pass).expect("forward");
    let d_logits: Vec<f32> = ids.iter().flat_map(|id| [0.3 + *id as f32, -0.7]).collect();
    let d_logits = Tensor::from_vec(d_logits, (ids.len(), 2), &Device::Cpu).expect("gradient");
    model
        .backward(&batch, saved, &d_logits, pass, &mut |ready| {
            if let Ready::Words(rows) = ready {
                words.merge(&rows)?;
            }
            Ok(())
        })
        .expect("backward");
    numbers(&logits)
}

fn check(family: Family) {
    let new = || {
        Classifier::new(&Placement::CPU, small(family), Trainable::All, 3).expect("a classifier")
    };
    let (together, alone) = (new(), new());
    let width = together.config.plan.embeddings.width;
    let words = || SparseRows::empty(width, &Device::Cpu).expect("no rows");
    let (mut words_together, mut words_alone) = (words(), words());
    let ids: Vec<u32> = (0..LENGTHS.len() as u32).collect();
    let logits = run(&together, &ids, &mut words_together);
    let singles: Vec<f64> =
        ids.iter().flat_map(|id| run(&alone, &[*id], &mut words_alone)).collect();
    SAME.check("logits", &logits, &singles);
    assert_eq!(words_together.ids, words_alone.ids);
    SAME.check("words", &numbers(&words_together.values), &numbers(&words_alone.values));
    for (a, b) in together.parameters.buckets.iter().zip(&alone.parameters.buckets) {
        if let (Some(a_gradients), Some(b_gradients)) = (&a.gradients, &b.gradients) {
            let worst = SAME.check(&a.name, &numbers(a_gradients), &numbers(b_gradients));
            println!("{}: {worst:.3} of the tolerance", a.name);
        }
    }
}

#[test]
fn bert_does_not_depend_on_packing() {
    check(Family::Bert);
}

#[test]
fn distilbert_does_not_depend_on_packing() {
    check(Family::DistilBert);
}

#[test]
fn roberta_does_not_depend_on_packing() {
    check(Family::Roberta);
}

#[test]
fn deberta_does_not_depend_on_packing() {
    check(Family::DebertaV2);
}

#[test]
fn modernbert_does_not_depend_on_packing() {
    check(Family::ModernBert);
}

#[test]
fn gpt2_does_not_depend_on_packing() {
    check(Family::Gpt2);
}

#[test]
fn networks_on_words_do_not_depend_on_packing() {
    for family in Family::ON_WORDS {
        println!("{family:?}");
        check(family);
    }
}
