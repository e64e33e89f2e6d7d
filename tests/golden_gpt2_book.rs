//! GPT-2 as a classifier the way of Raschka's book (ch. 6): a head with a bias, on the last position
//! of a batch whose padding is attended to like text, or on the last real token.
//!
//! The book's checkpoint has names and a layout of its own; they are brought to Hugging Face's here.

use std::{collections::HashMap, path::Path};

use allreel::{
    batch::Batch,
    model::{Classifier, Pass, classifier::Ready, parameters::Bucket},
};
use allreel_kernels::{Ragged, embedding::SparseRows};
use candle_core::{Device, Tensor};

use crate::support::{Case, GRADIENTS, VALUES, classifier, dense, golden, loss, numbers};

/// Hugging Face's name for a parameter of the book, whether it is stored transposed there, and
/// which of the three parts of `c_attn` it is.
fn renamed(name: &str) -> (String, bool, Option<usize>) {
    let flat = match name {
        "tok_emb.weight" => return ("transformer.wte.weight".into(), false, None),
        "pos_emb.weight" => return ("transformer.wpe.weight".into(), false, None),
        "out_head.weight" | "out_head.bias" => {
            return (name.replace("out_head", "score"), false, None);
        }
        name => {
            name.replace("final_norm", "transformer.ln_f").replace("trf_blocks", "transformer.h")
        }
    };
    let part = ["W_query", "W_key", "W_value"].iter().position(|part| flat.contains(part));
    let mut renamed = flat.replace(".scale", ".weight").replace(".shift", ".bias");
    for (book, own) in [
        (".norm1.", ".ln_1."),
        (".norm2.", ".ln_2."),
        (".att.W_query.", ".attn.c_attn."),
        (".att.W_key.", ".attn.c_attn."),
        (".att.W_value.", ".attn.c_attn."),
        (".att.out_proj.", ".attn.c_proj."),
        (".ff.layers.0.", ".mlp.c_fc."),
        (".ff.layers.2.", ".mlp.c_proj."),
    ] {
        renamed = renamed.replace(book, own);
    }
    let matrix = renamed.contains(".attn.") || renamed.contains(".mlp.");
    (renamed.clone(), matrix && renamed.ends_with("weight"), part)
}

/// The tensors of the book's file whose names start with `prefix`, under Hugging Face's names.
fn translated(case: &Case, prefix: &str) -> HashMap<String, Tensor> {
    let mut whole = HashMap::new();
    let mut parts: HashMap<String, [Option<Tensor>; 3]> = HashMap::new();
    for name in case.names().filter_map(|name| name.strip_prefix(prefix)) {
        let Some(tensor) = case.find(&format!("{prefix}{name}")) else { continue };
        let (own, transposed, part) = renamed(name);
        let tensor = if transposed { tensor.t().expect("a matrix") } else { tensor.clone() };
        match part {
            Some(part) => parts.entry(own).or_default()[part] = Some(tensor),
            None => drop(whole.insert(own, tensor.contiguous().expect("contiguous"))),
        }
    }
    for (name, parts) in parts {
        let parts = parts.map(|part| part.expect("query, key and value"));
        let last = parts[0].rank() - 1;
        whole.insert(name, Tensor::cat(&parts, last).expect("one matrix"));
    }
    whole
}

/// The fixture as a directory of Hugging Face's kind.
fn model(dir: &Path) -> Classifier {
    let text = std::fs::read_to_string(dir.join("config.json")).expect("config.json");
    let book: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    let config = serde_json::json!({
        "model_type": "gpt2", "vocab_size": book["vocab_size"], "n_embd": book["emb_dim"],
        "n_positions": book["context_length"], "n_head": book["n_heads"],
        "n_layer": book["n_layers"], "score_bias": true,
    });
    let copy = tempfile::tempdir().expect("temporary directory");
    std::fs::write(copy.path().join("config.json"), config.to_string()).expect("written");
    let weights = translated(&Case::load(&dir.join("model.safetensors")), "");
    candle_core::safetensors::save(&weights, copy.path().join("model.safetensors"))
        .expect("written");
    let labels = book["num_classes"].as_u64().expect("num_classes") as usize;
    classifier(copy.path(), labels)
}

/// The batch as the book pads it: every position is a token.
fn padded(case: &Case) -> Batch {
    let ids = case.get("input_ids");
    let (b, length) = ids.dims2().expect("[B, L]");
    let tokens: Vec<u32> = case.numbers("input_ids").iter().map(|id| *id as u32).collect();
    let samples: Vec<u32> = (0..b as u32).collect();
    Batch {
        prompt: None,
        token_types: vec![0; tokens.len()].into(),
        tokens: tokens.into(),
        ragged: Ragged::new(&vec![length; b], &samples).expect("lengths"),
        labels: case.numbers("labels").iter().map(|l| *l as u32).collect::<Vec<_>>().into(),
    }
}

fn check(case: &Case, batch: &Batch, model: &Classifier, prefix: &str) {
    let (logits, saved) = model.forward(batch, Pass::default()).expect("forward");
    VALUES.check("logits", &numbers(&logits), &case.numbers(&format!("{prefix}logits")));
    let (loss, d_logits) = loss(&logits, &batch.labels, 0.0);
    let n = batch.labels.len() as f64;
    VALUES.check("loss", &[loss / n], &case.numbers(&format!("{prefix}loss")));
    let mut words = SparseRows::empty(0, &Device::Cpu).expect("no rows");
    let d_logits = (d_logits / n).expect("mean");
    model
        .backward(batch, saved, &d_logits, Pass::default(), &mut |ready| {
            if let Ready::Words(rows) = ready {
                words = rows;
            }
            Ok(())
        })
        .expect("backward");
    let wanted = translated(case, &format!("{prefix}grad."));
    let mut compared = 0;
    for bucket in &model.parameters.buckets {
        for entry in &bucket.entries {
            let gradient = match &bucket.gradients {
                Some(flat) => Bucket::view(flat, entry).expect("view"),
                None => dense(&words, entry.shape[0]),
            };
            let gradient = model.parameters.relaid(&entry.name, &gradient).expect("layout");
            GRADIENTS.check(&entry.name, &numbers(&gradient), &numbers(&wanted[&entry.name]));
            compared += 1;
        }
    }
    assert_eq!(compared, wanted.len());
}

#[test]
fn golden_gpt2_raschka() {
    let Some(golden) = golden() else { return };
    let dir = golden.join("gpt2_raschka");
    let case = Case::load(&dir.join("case.safetensors"));
    check(&case, &padded(&case), &model(&dir), "");
    check(&case, &case.batch("").0, &model(&dir), "lastreal.");
}
