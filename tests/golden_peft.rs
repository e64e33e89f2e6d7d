//! Logits, loss, rows and the gradient of everything that trains against PEFT, for every method and family.

use std::path::Path;

use allreel::{
    config::{Adapter, Method},
    device::Placement,
    model::{Classifier, Dropouts, Pass, classifier::Ready, parameters::Bucket},
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
fn network(dir: &Path, adapter: Adapter, case: &Case) -> Classifier {
    let base = dir.join(base_name(dir));
    let labels = case.get("logits").dims()[1];
    let (model, report) =
        Classifier::load(&Placement::CPU, &base, Dropouts::OFF, adapter, labels, 0)
            .expect("a checkpoint");
    assert_eq!(report, Default::default(), "missing or unexpected tensors");
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

fn base_name(dir: &Path) -> String {
    let text = std::fs::read_to_string(dir.join("adapter_config.json")).expect("a config");
    let config: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    config["base_model_name_or_path"].as_str().expect("a name").to_owned()
}

fn check(folder: &str) {
    let Some(golden) = golden() else { return };
    let dir = golden.join("peft").join(folder);
    let case = Case::load(&dir.join("case.safetensors"));
    let adapter = adapter(&dir);
    for checkpoint in [false, true] {
        let model = network(&dir, adapter.clone(), &case);
        compare(&case, &model, Pass { dropout: None, checkpoint });
    }
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

fn adapter(dir: &Path) -> Adapter {
    use allreel::config::*;
    let text = std::fs::read_to_string(dir.join("adapter_config.json")).expect("a config");
    let c: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    let n = c["num_virtual_tokens"].as_u64().unwrap_or(0) as usize;
    let names =
        |v: &serde_json::Value| -> Option<Vec<String>> { serde_json::from_value(v.clone()).ok() };
    let method = match c["peft_type"].as_str().unwrap() {
        "LORA" => Method::Lora(Lora {
            r: c["r"].as_u64().unwrap() as usize,
            lora_alpha: c["lora_alpha"].as_f64().unwrap(),
            lora_dropout: 0.0,
            target_modules: Some(TargetModules::Names(names(&c["target_modules"]).unwrap())),
            bias: Bias::None,
            use_rslora: c["use_rslora"].as_bool().unwrap(),
        }),
        "PROMPT_TUNING" => Method::PromptTuning(PromptTuning {
            num_virtual_tokens: n,
            prompt_tuning_init_text: None,
        }),
        "P_TUNING" => Method::PTuning(PTuning {
            num_virtual_tokens: n,
            encoder_reparameterization_type: serde_json::from_value(
                c["encoder_reparameterization_type"].clone(),
            )
            .unwrap(),
            encoder_hidden_size: c["encoder_hidden_size"].as_u64().map(|x| x as usize),
            encoder_num_layers: 2,
            encoder_dropout: 0.0,
        }),
        _ => Method::PrefixTuning(PrefixTuning {
            num_virtual_tokens: n,
            projection: (c["prefix_projection"] == true)
                .then(|| c["encoder_hidden_size"].as_u64().unwrap() as usize),
        }),
    };
    Adapter { method, modules_to_save: names(&c["modules_to_save"]), pool: PoolRow::FirstPosition }
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
    golden_gpt2_prompt_tuning "gpt2_prompt_tuning",
    golden_lora_all_linear "lora_all_linear",
    golden_lora_qv "lora_qv",
    golden_lora_qv_pooler_saved "lora_qv_pooler_saved",
    golden_lora_rslora_qkv "lora_rslora_qkv",
    golden_modernbert_lora_all_linear "modernbert_lora_all_linear",
    golden_modernbert_mean_prompt_tuning "modernbert_mean_prompt_tuning",
    golden_p_tuning_mlp "p_tuning_mlp",
    golden_prompt_tuning "prompt_tuning",
    golden_roberta_prefix_tuning "roberta_prefix_tuning",
    golden_roberta_prefix_tuning_proj "roberta_prefix_tuning_proj",
    golden_roberta_prompt_tuning "roberta_prompt_tuning",
);
