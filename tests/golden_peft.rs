//! Logits, loss, rows and the gradient of everything that trains against PEFT, for every method and family.

use std::path::Path;

use allreel::{
    adapter::peft::{self, CONFIG, Description},
    checkpoint::adapter::{labels, load_adapter},
    config::Adapter,
    device::Placement,
    model::{Classifier, Dropouts, Pass, Training, classifier::Ready, parameters::Bucket},
};
use candle_core::DType;

use crate::support::{Case, GRADIENTS, VALUES, golden, loss, numbers};

/// Our name of a parameter that PEFT's training calls `name`.
fn ours(name: &str) -> String {
    let name = name.replace(".modules_to_save.default", "").replace(".default", "");
    let name = name.strip_prefix("base_model.model.").unwrap_or(&name);
    name.strip_prefix("base_model.").unwrap_or(name).to_owned()
}

/// The network of a case, with the values that it trained.
fn network(dir: &Path, case: &Case) -> Classifier {
    let model = base_with(dir, case, |adapter| adapter);
    let mut taken = 0;
    for name in case.names().filter(|name| name.starts_with("trainable.")) {
        let own = ours(&name["trainable.".len()..]);
        let value = model.parameters.relaid(&own, case.get(name)).expect("layout");
        let into = model.parameters.master(&own).expect("a parameter");
        into.slice_set(&value.to_dtype(DType::F32).expect("f32"), 0, 0).expect("the same shape");
        taken += 1;
    }
    assert_eq!(taken, model.parameters.trained().count(), "what trains");
    model
}

/// The model beneath the adapter in `dir`, made for what `reading` makes of it.
fn base_with(dir: &Path, case: &Case, reading: impl Fn(Adapter) -> Adapter) -> Classifier {
    let file = dir.join(CONFIG);
    let Description { adapter, base } = peft::read(&file).expect("a config");
    let base = dir.join(base.expect("a base model"));
    let training =
        Training { adapter: Some(reading(adapter)), file: Some(file), ..Training::default() };
    let labels = case.get("logits").dims()[1];
    let (model, report) =
        Classifier::load(&Placement::CPU, &base, Dropouts::OFF, training, labels, 0)
            .expect("a checkpoint");
    assert_eq!(report, Default::default(), "missing or unexpected tensors");
    model
}

/// What PEFT saved, as `allreel predict` reads it.
fn check_file(dir: &Path, case: &Case) {
    let adapter = peft::read(&dir.join(CONFIG)).expect("a config").adapter;
    let model = base_with(dir, case, |adapter| adapter.without_network());
    load_adapter(dir, &model, &adapter).expect("PEFT's tensors");
    assert_eq!(labels(dir).expect("a classifier"), case.get("logits").dims()[1]);
    let batch = case.batch("").0.with_prompt(model.virtual_tokens()).expect("a batch");
    let logits = model.logits(&batch).expect("logits");
    VALUES.check("logits of the file", &numbers(&logits), &case.numbers("logits"));
}

fn check(folder: &str) {
    let Some(golden) = golden() else { return };
    let dir = golden.join("peft").join(folder);
    let case = Case::load(&dir.join("case.safetensors"));
    for checkpoint in [false, true] {
        let model = network(&dir, &case);
        compare(&case, &model, Pass { checkpoint, ..Pass::default() });
    }
    check_file(&dir, &case);
}

/// Logits, loss, rows and gradients.
fn compare(case: &Case, model: &Classifier, pass: Pass) {
    let batch = case.batch("").0.with_prompt(model.virtual_tokens()).expect("a batch");
    if let Some(rows) = model.learnt_rows().expect("rows") {
        VALUES.check("prompt_output", &numbers(&rows), &case.numbers("prompt_output"));
    }
    let (logits, saved) = model.forward(&batch, pass).expect("forward");
    VALUES.check("logits", &numbers(&logits), &case.numbers("logits"));
    let (loss, d_logits) = loss(&logits, &batch.labels, 0.0);
    let n = batch.labels.len() as f64;
    VALUES.check("loss", &[loss / n], &case.numbers("loss"));
    let mut ready = Vec::new();
    model
        .backward(&batch, saved, &(d_logits / n).expect("mean"), pass, &mut |what| {
            match what {
                Ready::Words(_) => panic!("the word table is frozen"),
                Ready::Bucket(bucket) => ready.push(bucket),
            }
            Ok(())
        })
        .expect("backward");
    let buckets = &model.parameters.buckets;
    assert_eq!(ready, (0..buckets.len()).collect::<Vec<_>>(), "order of backward");
    let mut compared = 0;
    for name in case.names().filter(|name| name.starts_with("grad.")) {
        let own = ours(&name["grad.".len()..]);
        let (bucket, entry) = buckets
            .iter()
            .find_map(|b| b.entries.iter().find(|entry| entry.name == own).map(|entry| (b, entry)))
            .unwrap_or_else(|| panic!("{own} does not train"));
        let flat = bucket.gradients.as_ref().expect("no table trains");
        let gradient = Bucket::view(flat, entry).expect("view");
        let gradient = model.parameters.relaid(&own, &gradient).expect("layout");
        let worst = GRADIENTS.check(name, &numbers(&gradient), &case.numbers(name));
        println!("{name}: {worst:.3} of the tolerance");
        compared += 1;
    }
    assert_eq!(compared, model.parameters.trained().count());
}

macro_rules! cases {
    ($($test:ident $folder:literal),* $(,)?) => {
        $(#[test]
        fn $test() {
            check($folder);
        })*
    };
}

cases!(
    golden_bert_lora_qv "bert_lora_qv",
    golden_bert_prefix_tuning "bert_prefix_tuning",
    golden_bert_prefix_tuning_proj "bert_prefix_tuning_proj",
    golden_bert_prompt_tuning "bert_prompt_tuning",
    golden_distilbert_prompt_tuning "distilbert_prompt_tuning_explicit_dims",
    golden_gpt2_lora_cattn "gpt2_lora_cattn",
    golden_gpt2_prefix_tuning "gpt2_prefix_tuning",
    golden_gpt2_prefix_tuning_proj "gpt2_prefix_tuning_proj",
    golden_lora_all_linear "lora_all_linear",
    golden_lora_qv "lora_qv",
    golden_lora_qv_pooler_saved "lora_qv_pooler_saved",
    golden_lora_rslora_qkv "lora_rslora_qkv",
    golden_modernbert_lora_all_linear "modernbert_lora_all_linear",
    golden_modernbert_mean_prompt_tuning "modernbert_mean_prompt_tuning",
    golden_p_tuning_lstm "p_tuning_lstm",
    golden_p_tuning_mlp "p_tuning_mlp",
    golden_prompt_tuning "prompt_tuning",
    golden_roberta_prefix_tuning "roberta_prefix_tuning",
    golden_roberta_prefix_tuning_proj "roberta_prefix_tuning_proj",
    golden_roberta_prompt_tuning "roberta_prompt_tuning",
);

/// PEFT's GPT-2 with virtual tokens reads the last position of the padded batch, so what it says of a text
/// depends on the others; only the longest text of the batch has its own last token there.
#[test]
fn golden_gpt2_prompt_tuning_of_the_longest_text() {
    let Some(golden) = golden() else { return };
    let dir = golden.join("peft/gpt2_prompt_tuning");
    let case = Case::load(&dir.join("case.safetensors"));
    let model = network(&dir, &case);
    let batch = case.batch("").0.with_prompt(model.virtual_tokens()).expect("a batch");
    let (got, want) = (model.logits(&batch).expect("logits"), case.get("logits"));
    let length = case.get("input_ids").dims()[1] + model.virtual_tokens();
    let mut compared = 0;
    for i in (0..batch.ragged.sequences()).filter(|i| batch.ragged.range(*i).len() == length) {
        let row = |logits: &candle_core::Tensor| numbers(&logits.get(i).expect("a row"));
        VALUES.check("logits", &row(&got), &row(want));
        compared += 1;
    }
    assert!(compared > 0, "no text fills the batch");
}
