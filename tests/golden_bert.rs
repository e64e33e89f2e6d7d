//! Logits, hidden states, loss and the gradient of every parameter against Hugging Face's BERT.

use allreel::model::{Pass, classifier::Ready, parameters::Bucket};
use allreel_kernels::{cross_entropy::cross_entropy, embedding::SparseRows};
use candle_core::{DType, Device, Tensor};

use crate::support::{Case, GRADIENTS, VALUES, classifier, golden, numbers};

/// Runs the case in `folder`, with or without recomputing blocks in backward.
fn check(folder: &str, checkpoint: bool) {
    let Some(golden) = golden() else { return };
    let dir = golden.join(folder);
    let case = Case::load(&dir.join("case.safetensors"));
    let (batch, places) = case.batch("");
    let model = classifier(&dir, case.get("logits").dims()[1]);

    let mut i = 0;
    let places = Tensor::new(places, &Device::Cpu).expect("indices");
    model
        .hidden_states(&batch, |hidden| {
            let want = case.get(&format!("hidden.{i}"));
            let width = want.dims()[2];
            let want =
                want.reshape(((), width)).and_then(|t| t.index_select(&places, 0)).expect("rows");
            VALUES.check(&format!("hidden.{i}"), &numbers(hidden), &numbers(&want));
            i += 1;
        })
        .expect("hidden states");
    assert_eq!(i, model.config.num_hidden_layers + 1);

    let pass = Pass { dropout: None, checkpoint };
    let (logits, saved) = model.forward(&batch, pass).expect("forward");
    VALUES.check("logits", &numbers(&logits), &case.numbers("logits"));
    let result = cross_entropy(&logits, &batch.labels, 0.0).expect("loss");
    let n = batch.labels.len() as f64;
    VALUES.check("loss", &[result.loss / n], &case.numbers("loss"));

    let mut words = SparseRows::default();
    let mut ready = Vec::new();
    model
        .backward(&batch, saved, &(result.d_logits / n).expect("mean"), pass, &mut |what| {
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
            let name = format!("grad.{}", entry.name);
            let worst = GRADIENTS.check(&name, &numbers(&gradient), &case.numbers(&name));
            println!("{name}: {worst:.3} of the tolerance");
            compared += 1;
        }
    }
    assert_eq!(compared, case.names().filter(|name| name.starts_with("grad.")).count());
}

fn dense(rows: &SparseRows, count: usize) -> Tensor {
    let mut values = vec![0f32; count * rows.width];
    for (id, row) in rows.ids.iter().zip(rows.values.chunks(rows.width)) {
        values[*id as usize * rows.width..][..rows.width].copy_from_slice(row);
    }
    Tensor::from_vec(values, (count, rows.width), &Device::Cpu)
        .and_then(|t| t.to_dtype(DType::F32))
        .expect("dense gradient")
}

#[test]
fn golden_bert() {
    check("bert", false);
}

#[test]
fn golden_bert_with_checkpointing() {
    check("bert", true);
}
