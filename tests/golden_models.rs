//! Logits, hidden states, loss and the gradient of every parameter of every family against Hugging Face.

use allreel::{
    batch::Batch,
    model::{Classifier, Pass, classifier::Ready, parameters::Bucket},
};
use allreel_kernels::embedding::SparseRows;
use candle_core::{Device, Tensor};

use crate::support::{Case, GRADIENTS, VALUES, classifier, dense, golden, loss, numbers};

/// Runs the case in `folder`, keeping or recomputing blocks in backward.
fn check(folder: &str) {
    let Some(golden) = golden() else { return };
    let dir = golden.join(folder);
    let case = Case::load(&dir.join("case.safetensors"));
    let (batch, places) = case.batch("");
    let labels = case.get("logits").dims()[1];
    let model = classifier(&dir, labels);
    hidden_states(&case, &batch, places, &model);
    gradients(&case, &batch, &model, false);
    gradients(&case, &batch, &classifier(&dir, labels), true);
}

fn hidden_states(case: &Case, batch: &Batch, places: Vec<u32>, model: &Classifier) {
    let mut i = 0;
    let places = Tensor::new(places, &Device::Cpu).expect("indices");
    model
        .hidden_states(batch, |hidden| {
            let want = case.get(&format!("hidden.{i}"));
            let width = want.dims()[2];
            let want =
                want.reshape(((), width)).and_then(|t| t.index_select(&places, 0)).expect("rows");
            VALUES.check(&format!("hidden.{i}"), &numbers(hidden), &numbers(&want));
            i += 1;
        })
        .expect("hidden states");
    assert_eq!(i, model.config.layers() + 1);
}

/// Logits, loss and gradients.
fn gradients(case: &Case, batch: &Batch, model: &Classifier, checkpoint: bool) {
    let pass = Pass { checkpoint, ..Pass::default() };
    let (logits, saved) = model.forward(batch, pass).expect("forward");
    VALUES.check("logits", &numbers(&logits), &case.numbers("logits"));
    let (loss, d_logits) = loss(&logits, &batch.labels, 0.0);
    let n = batch.labels.len() as f64;
    VALUES.check("loss", &[loss / n], &case.numbers("loss"));

    let mut words = SparseRows::empty(0, &Device::Cpu).expect("no rows");
    let mut ready = Vec::new();
    model
        .backward(batch, saved, &(d_logits / n).expect("mean"), pass, &mut |what| {
            match what {
                Ready::Words(rows) => words = rows,
                Ready::Bucket(bucket) => ready.push(bucket),
            }
            Ok(())
        })
        .expect("backward");
    let buckets = &model.parameters.buckets;
    assert_eq!(ready, (0..buckets.len() - 1).collect::<Vec<_>>(), "order of backward");

    let mut compared = 0;
    for bucket in buckets {
        for entry in &bucket.entries {
            let gradient = match &bucket.gradients {
                Some(flat) => Bucket::view(flat, entry).expect("view"),
                None => dense(&words, entry.shape[0]),
            };
            let gradient = model.parameters.relaid(&entry.name, &gradient).expect("layout");
            let name = format!("grad.{}", entry.name);
            let worst = GRADIENTS.check(&name, &numbers(&gradient), &case.numbers(&name));
            println!("{name}: {worst:.3} of the tolerance");
            compared += 1;
        }
    }
    assert_eq!(compared, case.names().filter(|name| name.starts_with("grad.")).count());
}

#[test]
fn golden_bert() {
    check("bert");
}

#[test]
fn golden_deberta_v3() {
    check("deberta_v3");
}

#[test]
fn golden_deberta_v3_log() {
    check("deberta_v3_log");
}

#[test]
fn golden_deberta_v2_conv() {
    check("deberta_v2_conv");
}

#[test]
fn golden_deberta_v2_noshare_clamp() {
    check("deberta_v2_noshare_clamp");
}

#[test]
fn golden_distilbert() {
    check("distilbert");
}

#[test]
fn golden_roberta() {
    check("roberta");
}

#[test]
fn golden_modernbert_cls() {
    check("modernbert_cls");
}

#[test]
fn golden_modernbert_mean() {
    check("modernbert_mean");
}

#[test]
fn golden_gpt2() {
    check("gpt2");
}

/// The Hub's spelling of ModernBERT's config makes the same network.
#[test]
fn golden_modernbert_config_of_the_hub() {
    let Some(golden) = golden() else { return };
    for folder in ["modernbert_cls", "modernbert_mean"] {
        let dir = golden.join(folder);
        let case = Case::load(&dir.join("case.safetensors"));
        let (batch, _) = case.batch("");
        let copy = tempfile::tempdir().expect("temporary directory");
        std::fs::copy(dir.join("config_hub_v4_style.json"), copy.path().join("config.json"))
            .expect("copied");
        std::fs::copy(dir.join("model.safetensors"), copy.path().join("model.safetensors"))
            .expect("copied");
        let model = classifier(copy.path(), case.get("logits").dims()[1]);
        let logits = model.logits(&batch).expect("logits");
        VALUES.check(folder, &numbers(&logits), &case.numbers("logits"));
    }
}
