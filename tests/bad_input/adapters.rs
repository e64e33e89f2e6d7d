//! Adapters that do not fit: their model, its layers, or what is here.

use candle_core::{DType, Device, Tensor};

use super::{Workdir, fails, holds_all, refused};

/// A run directory's worth of settings for LoRA over the model of `first`.
fn lora(dir: &Workdir) {
    let first = dir.read("first.toml");
    let (data, rest) = first.split_once("[model]").expect("a section");
    let (_, train) = rest.split_once("[train]").expect("a section");
    let data = data.replace("tokenizer = \"wordpiece\"\n", "");
    let train = train.replace("\"first\"", "\"lora\"");
    let model = "[model]\npath = \"first/best\"\n[adapter]\nmethod = \"lora\"\nr = 4\n";
    dir.write("lora.toml", format!("{data}{model}[train]{train}"));
}

#[test]
fn an_adapter_that_does_not_fit_is_one_error() {
    let dir = Workdir::trained();
    lora(&dir);
    refused(
        &dir,
        "train lora.toml --set run.dir=x --set adapter.r=33",
        &["adapter.r = 33", "[32, 32]", "use at most 32"],
    );
    refused(
        &dir,
        "train lora.toml --set run.dir=x --set adapter.target_modules=[\"qurey\"]",
        &["adapter.target_modules", "\"qurey\"", "the nearest is \"query\""],
    );
    refused(
        &dir,
        "train lora.toml --set run.dir=x --set adapter.target_modules=[\"classifier\"]",
        &["\"classifier\"", "trains whole", "remove it"],
    );
    refused(
        &dir,
        "train lora.toml --set run.dir=x --set adapter.modules_to_save=[\"poler\"]",
        &["adapter.modules_to_save", "\"poler\"", "\"pooler\""],
    );
    // 32 columns are no whole blocks of 64.
    refused(
        &dir,
        "train lora.toml --set run.dir=x --set model.quantization=nf4",
        &["model.quantization = \"nf4\"", "query.weight", "64"],
    );
}

#[test]
fn an_adapter_for_another_model_is_one_error() {
    let dir = Workdir::trained();
    lora(&dir);
    dir.allreel("train lora.toml").ok();
    // Another model: the same kind, wider.
    dir.allreel("train first.toml --set run.dir=wide --set model.hidden_size=48").ok();
    let config = dir.read("lora/best/adapter_config.json");
    let base: serde_json::Value = serde_json::from_str(&config).expect("JSON");
    let base = base["base_model_name_or_path"].as_str().expect("a name");
    let other = dir.path("wide/best").display().to_string();
    dir.write("lora/best/adapter_config.json", config.replace(base, &other));
    refused(
        &dir,
        "predict lora/best --text good",
        &[
            "adapter_model.safetensors",
            "[4, 32]",
            "[4, 48]",
            "the model that the adapter was trained",
        ],
    );
    let gone = dir.path("gone").display().to_string();
    dir.write("lora/best/adapter_config.json", config.replace(base, &gone));
    refused(&dir, "predict lora/best --text good", &["is an adapter over", &gone, "allreel fetch"]);
    let dora = config.replace("\"r\": 4", "\"use_dora\": true, \"r\": 4");
    assert_ne!(dora, config);
    dir.write("lora/best/adapter_config.json", dora);
    refused(
        &dir,
        "predict lora/best --text good",
        &["adapter_config.json", "use_dora = true", "not supported"],
    );
}

/// A checkpoint whose classifier is in 8 bits, as a quantiser that forgot to leave it out saves it.
#[test]
fn a_quantised_head_is_one_error() {
    let dir = Workdir::trained();
    lora(&dir);
    let path = dir.path("first/best/model.safetensors");
    let mut tensors = candle_core::safetensors::load(&path, &Device::Cpu).expect("weights");
    let codes = Tensor::zeros((2, 32), DType::U8, &Device::Cpu).expect("codes");
    tensors.insert("classifier.weight".into(), codes);
    candle_core::safetensors::save(&tensors, &path).expect("saved");
    let lines = fails(&dir, "train lora.toml --set run.dir=x");
    assert_eq!(lines.len(), 1, "{lines:#?}");
    holds_all("train", &lines[0], &["model.safetensors", "classifier.weight", "quantised"]);
}
