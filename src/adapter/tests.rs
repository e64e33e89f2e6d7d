//! Names of modules, what PEFT's files may ask for, and tensors that do not fit.

use std::path::Path;

use serde_json::{Value, json};

use super::keys::Keys;
use super::peft::{Base, Description, read, to_json};
use super::*;
use crate::config::{Bias, PTuning, PoolRow, PrefixTuning, PromptTuning, Reparameterization};

fn lora(targets: &[&str]) -> Adapter {
    let names = targets.iter().map(|name| (*name).to_owned()).collect();
    let lora = Lora { target_modules: Some(TargetModules::Names(names)), ..Lora::default() };
    Adapter { method: Method::Lora(lora), modules_to_save: None, pool: PoolRow::default() }
}

fn with(adapter: Adapter, change: impl FnOnce(&mut Lora)) -> Adapter {
    let Method::Lora(mut lora) = adapter.method else { panic!("{adapter:?}") };
    change(&mut lora);
    Adapter { method: Method::Lora(lora), ..adapter }
}

fn all_linear() -> Adapter {
    let pattern = TargetModules::Pattern("all-linear".into());
    with(lora(&[]), |lora| lora.target_modules = Some(pattern))
}

fn saving(adapter: Adapter, modules: &[&str]) -> Adapter {
    let modules = modules.iter().map(|name| (*name).to_owned()).collect();
    Adapter { modules_to_save: Some(modules), ..adapter }
}

const DEBERTA: [(&str, usize, usize); 8] = [
    ("deberta.encoder.layer.0.attention.self.query_proj", 32, 32),
    ("deberta.encoder.layer.0.attention.self.key_proj", 32, 32),
    ("deberta.encoder.layer.0.attention.self.value_proj", 32, 32),
    ("deberta.encoder.layer.0.attention.output.dense", 32, 32),
    ("deberta.encoder.layer.0.intermediate.dense", 64, 32),
    ("deberta.encoder.layer.0.output.dense", 32, 64),
    ("pooler.dense", 32, 32),
    ("classifier", 2, 32),
];

const DISTILBERT: [(&str, usize, usize); 4] = [
    ("distilbert.transformer.layer.0.attention.q_lin", 32, 32),
    ("distilbert.transformer.layer.0.ffn.lin1", 64, 32),
    ("pre_classifier", 32, 32),
    ("classifier", 2, 32),
];

const ROBERTA: [(&str, usize, usize); 3] = [
    ("roberta.encoder.layer.0.output.dense", 32, 64),
    ("classifier.dense", 32, 32),
    ("classifier.out_proj", 2, 32),
];

#[test]
fn targets_are_matched_as_peft_matches_them() {
    let deberta = |adapter: &Adapter| targets(adapter, Family::DebertaV2, &DEBERTA).unwrap();
    assert_eq!(deberta(&lora(&["query_proj", "value_proj"])), [0, 2]);
    assert_eq!(deberta(&with(lora(&[]), |lora| lora.target_modules = None)), [0, 2]);
    assert_eq!(deberta(&lora(&["output.dense"])), [3, 5]);
    assert_eq!(deberta(&lora(&["attention.output.dense", DEBERTA[1].0])), [1, 3]);
    assert_eq!(deberta(&lora(&["dense"])), [3, 4, 5], "the pooler trains whole");
    assert_eq!(deberta(&saving(lora(&["dense"]), &[])), [3, 4, 5, 6]);
    assert_eq!(deberta(&all_linear()), [0, 1, 2, 3, 4, 5]);
    assert_eq!(deberta(&saving(all_linear(), &[])), [0, 1, 2, 3, 4, 5, 6]);
    let distilbert = |adapter: &Adapter| targets(adapter, Family::DistilBert, &DISTILBERT).unwrap();
    assert_eq!(distilbert(&all_linear()), [0, 1]);
    let roberta = |adapter: &Adapter| targets(adapter, Family::Roberta, &ROBERTA).unwrap();
    assert_eq!(roberta(&all_linear()), [0]);
    assert_eq!(roberta(&lora(&["dense"])), [0]);
    let prompt = PromptTuning { num_virtual_tokens: 5, prompt_tuning_init_text: None };
    let prompt = Adapter { method: Method::PromptTuning(prompt), ..lora(&[]) };
    assert_eq!(deberta(&prompt), [0; 0]);
}

#[test]
fn targets_that_cannot_be_are_refused() {
    let refusal = |adapter: &Adapter| {
        let error = targets(adapter, Family::DebertaV2, &DEBERTA).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        error.to_string()
    };
    for (adapter, said) in [
        (
            lora(&["query_proj", "valu_proj"]),
            "adapter.target_modules names \"valu_proj\", and the model has no linear layer of that \
             name; the nearest is \"value_proj\" (there are classifier, dense, key_proj, query_proj, \
             value_proj,",
        ),
        (
            lora(&["proj"]),
            "adapter.target_modules names \"proj\", and the model has no linear layer",
        ),
        (
            lora(&["encoder.layer.9.output.dense"]),
            "adapter.target_modules names \"encoder.layer.9.output.dense\", and the model has no \
             linear layer of that name; the nearest is \"deberta.encoder.layer.0.output.dense\"",
        ),
        (
            lora(&["query_proj", "classifier"]),
            "adapter.target_modules names \"classifier\", which trains whole, being in the classifier \
             or in adapter.modules_to_save (pooler, classifier, score); remove it",
        ),
        (
            lora(&["pooler.dense"]),
            "adapter.target_modules names \"pooler.dense\", which trains whole",
        ),
        (
            with(lora(&["query_proj", "intermediate.dense"]), |lora| lora.r = 33),
            "adapter.r = 33: above the smaller side of \
             deberta.encoder.layer.0.attention.self.query_proj, which is [32, 32]; use at most 32",
        ),
    ] {
        let refusal = refusal(&adapter);
        assert!(refusal.starts_with(said), "{refusal}");
    }
    let whole_side = with(lora(&["intermediate.dense"]), |lora| lora.r = 32);
    assert_eq!(targets(&whole_side, Family::DebertaV2, &DEBERTA).unwrap(), [4]);
}

#[test]
fn a_file_may_name_the_classifier_among_its_targets_as_pefts_do() {
    let file = Path::new("adapter_config.json");
    let of = |adapter: &Adapter| targets_of_file(adapter, Family::Roberta, &ROBERTA, file);
    assert_eq!(of(&lora(&["output.dense", "classifier.dense", "out_proj"])).unwrap(), [0]);
    let error = of(&lora(&["c_attn", "c_proj"])).unwrap_err().to_string();
    assert_eq!(
        error,
        "adapter_config.json: target_modules (c_attn, c_proj) are no linear layers of this model, which \
         has dense, out_proj; give the model that the adapter was trained on"
    );
}

#[test]
fn what_trains_whole_is_matched_as_peft_matches_it() {
    let modules = |family| saved_modules(&all_linear(), family);
    let deberta = modules(Family::DebertaV2);
    assert_eq!(deberta, ["pooler", "classifier", "score"]);
    for (name, whole) in [
        ("pooler.dense.weight", true),
        ("classifier.bias", true),
        ("deberta.encoder.layer.0.output.dense.weight", false),
        ("deberta.encoder.rel_embeddings.weight", false),
    ] {
        assert_eq!(saves(&deberta, name), whole, "{name}");
    }
    assert!(saves(&modules(Family::DistilBert), "pre_classifier.bias"));
    assert!(saves(&modules(Family::Roberta), "classifier.dense.weight"));
    assert!(saves(&modules(Family::Bert), "bert.pooler.dense.weight"));
    assert!(saves(&modules(Family::ModernBert), "head.norm.weight"));
    assert!(!saves(&modules(Family::ModernBert), "model.final_norm.weight"));
    assert!(saves(&modules(Family::Gpt2), "score.weight"));
    let bare = saved_modules(&saving(all_linear(), &[]), Family::DebertaV2);
    assert!(!saves(&bare, "pooler.dense.weight") && saves(&bare, "classifier.weight"));

    let names =
        ["deberta.encoder.layer.0.output.dense.bias", "pooler.dense.bias", "classifier.bias"];
    check_saved(&saving(all_linear(), &["pooler", "classifier", "score"]), &names).unwrap();
    check_saved(&all_linear(), &names).unwrap();
    let error = check_saved(&saving(all_linear(), &["poolr"]), &names).unwrap_err();
    assert_eq!(
        error.to_string(),
        "adapter.modules_to_save names \"poolr\", and the model has no module of that name; the nearest \
         is \"pooler\""
    );
}

fn base(family: Family) -> Base {
    let name = "org/model".to_owned();
    let (embedding_size, hidden_size, layers, heads) = (16, 32, 2, 4);
    Base { name, revision: None, family, embedding_size, hidden_size, layers, heads }
}

/// What [`read`] says of a file that holds `value`.
fn described(value: &Value) -> Result<Description> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("adapter_config.json");
    std::fs::write(&path, value.to_string()).unwrap();
    read(&path).map_err(|error| {
        assert!(matches!(error, Error::Data(_)), "{error:?}");
        let place = format!("{}: ", path.display());
        let said = error.to_string();
        Error::Data(said.strip_prefix(&place).expect("the file").to_owned())
    })
}

#[test]
fn what_is_written_reads_back_to_the_same_adapter() {
    let lstm = PTuning {
        encoder_hidden_size: Some(64),
        encoder_num_layers: 3,
        encoder_dropout: 0.1,
        ..PTuning::new(5, Reparameterization::Lstm)
    };
    let text = Some("Good or bad?".to_owned());
    let methods = [
        Method::PromptTuning(PromptTuning { num_virtual_tokens: 5, prompt_tuning_init_text: text }),
        Method::PTuning(lstm),
        Method::PrefixTuning(PrefixTuning { num_virtual_tokens: 7, projection: Some(48) }),
        Method::PrefixTuning(PrefixTuning { num_virtual_tokens: 7, projection: None }),
    ];
    let all = methods.map(|method| Adapter { method, ..saving(lora(&[]), &["pooler"]) });
    let other = with(saving(lora(&["key_proj"]), &[]), |lora| {
        (lora.r, lora.lora_alpha, lora.lora_dropout) = (4, 2.5, 0.05);
        (lora.bias, lora.use_rslora) = (Bias::LoraOnly, true);
    });
    for adapter in all.into_iter().chain([other]) {
        let json = to_json(&adapter, &base(Family::DebertaV2), &["not", "these"]);
        let back = described(&json).unwrap();
        assert_eq!(back.adapter, adapter, "{json}");
        assert_eq!(back.base.as_deref(), Some("org/model"));
    }
    let updated = ["transformer.h.0.attn.c_attn"];
    let json = to_json(&all_linear(), &base(Family::Gpt2), &updated);
    assert_eq!((&json["target_modules"], &json["fan_in_fan_out"]), (&json!(updated), &json!(true)));
    assert_eq!(json["lora_alpha"], json!(8), "an integer, as in PEFT");
    let revised = Base { revision: Some("v2".into()), ..base(Family::Bert) };
    let back = described(&to_json(&lora(&["key"]), &revised, &updated)).unwrap();
    assert_eq!(back.base.as_deref(), Some("org/model@v2"));
    assert_eq!(back.adapter.modules_to_save, Some(vec!["pooler".to_owned()]), "BERT's usual head");
}

#[test]
fn the_least_that_peft_takes_is_read_with_its_defaults() {
    let read = described(&json!({"peft_type": "LORA", "task_type": "SEQ_CLS"})).unwrap();
    let untargeted = with(lora(&[]), |lora| lora.target_modules = None);
    assert_eq!(read.adapter, saving(untargeted, &[]));
    assert_eq!(read.base, None);
    let prompt = json!({"peft_type": "P_TUNING", "task_type": "SEQ_CLS", "num_virtual_tokens": 5,
        "encoder_num_layers": 0, "modules_to_save": ["pooler", "classifier", "pooler"]});
    let read = described(&prompt).unwrap();
    let method = Method::PTuning(PTuning::new(5, Reparameterization::Mlp));
    let expected =
        Adapter { method, pool: PoolRow::FirstPosition, ..saving(lora(&[]), &["pooler"]) };
    assert_eq!(read.adapter, expected, "pooled as PEFT does, and no layers of an LSTM in an MLP");
    let prefix = json!({"peft_type": "PREFIX_TUNING", "task_type": "SEQ_CLS", "token_dim": 32,
        "num_virtual_tokens": 5, "prefix_projection": true});
    let Method::PrefixTuning(read) = described(&prefix).unwrap().adapter.method else { panic!() };
    assert_eq!(read.projection, Some(32));
}

#[test]
fn what_peft_would_compute_otherwise_is_refused_by_name() {
    let refusal = |kind: &str, key: &str, value: &Value| {
        let mut file = json!({"peft_type": kind, "task_type": "SEQ_CLS", "num_virtual_tokens": 5});
        file[key] = value.clone();
        described(&file).map(|read| panic!("{key}: {read:?}")).unwrap_err().to_string()
    };
    for (key, value) in [
        ("use_dora", json!(true)),
        ("use_qalora", json!(true)),
        ("lora_bias", json!(true)),
        ("rank_pattern", json!({"query": 4})),
        ("alpha_pattern", json!({"query": 4})),
        ("layers_to_transform", json!([0])),
        ("layers_to_transform", json!(0)),
        ("layer_replication", json!([[0, 2]])),
        ("exclude_modules", json!(["query"])),
        ("exclude_modules", json!(".*query")),
        ("megatron_config", json!({"a": 1})),
        ("trainable_token_indices", json!([1])),
        ("target_parameters", json!(["weight"])),
        ("alora_invocation_tokens", json!([1])),
        ("a_variant_to_come", json!(true)),
    ] {
        let said = refusal("LORA", key, &value);
        let start = format!("{key} = {value}: not supported, and it may change what the adapter");
        assert!(said.starts_with(&start), "{said}");
    }
    for (kind, key, value, start) in [
        ("LORA", "task_type", json!("CAUSAL_LM"), "task_type = \"CAUSAL_LM\": only classifiers"),
        ("LORA", "task_type", Value::Null, "task_type = null: only classifiers"),
        ("IA3", "r", json!(1), "peft_type = \"IA3\": only LORA, PROMPT_TUNING"),
        ("LORA", "peft_type", Value::Null, "peft_type = null: missing"),
        (
            "LORA",
            "init_lora_weights",
            json!("pissa"),
            "init_lora_weights = \"pissa\": it starts from",
        ),
        (
            "LORA",
            "init_lora_weights",
            json!("pissa_niter_4"),
            "init_lora_weights = \"pissa_niter_4\"",
        ),
        (
            "LORA",
            "init_lora_weights",
            json!("olora"),
            "init_lora_weights = \"olora\": it starts from",
        ),
        (
            "LORA",
            "init_lora_weights",
            json!("loftq"),
            "init_lora_weights = \"loftq\": it starts from",
        ),
        ("LORA", "target_modules", json!(".*q"), "target_modules = \".*q\": regular expressions"),
        ("LORA", "target_modules", json!([]), "target_modules = []: must be a list of names"),
        ("LORA", "target_modules", json!(3), "target_modules = 3: expected a list of names"),
        ("LORA", "r", json!(0), "r = 0: must be at least 1"),
        ("LORA", "r", json!("8"), "r = \"8\": expected a whole number"),
        ("LORA", "bias", json!("some"), "bias = \"some\": expected \"none\", \"all\" or"),
        ("LORA", "lora_alpha", json!(-1), "lora_alpha = -1.0: must be greater than 0"),
        ("P_TUNING", "num_virtual_tokens", Value::Null, "num_virtual_tokens = null: missing"),
        ("P_TUNING", "num_virtual_tokens", json!(0), "num_virtual_tokens = 0: must be at least 1"),
        (
            "PROMPT_TUNING",
            "num_transformer_submodules",
            json!(2),
            "num_transformer_submodules = 2: one encoder",
        ),
        ("PREFIX_TUNING", "prefix_projection", json!(true), "token_dim = absent: missing"),
    ] {
        let said = refusal(kind, key, &value);
        assert!(said.starts_with(start), "{said}");
    }
    for (key, value) in [
        ("init_lora_weights", json!("gaussian")),
        ("init_lora_weights", json!(false)),
        ("loftq_config", json!({"loftq_bits": 4})),
        ("inference_mode", json!(false)),
        ("a_size_to_come", json!(16)),
    ] {
        described(&json!({"peft_type": "LORA", "task_type": "SEQ_CLS", key: value})).unwrap();
    }
}

#[test]
fn parameters_have_other_names_in_pefts_files() {
    let query = "bert.encoder.layer.0.attention.self.query";
    let lora = Keys::new(&all_linear().method, &[query]);
    for (name, key) in [
        (format!("{query}.lora_A.weight"), format!("base_model.model.{query}.lora_A.weight")),
        (format!("{query}.bias"), format!("base_model.model.{query}.base_layer.bias")),
        ("classifier.bias".into(), "base_model.model.classifier.bias".into()),
    ] {
        assert_eq!((lora.key(&name), lora.name(&key)), (key.clone(), Some(name)));
    }
    for none in [
        "classifier.bias",
        "base_model.classifier.bias",
        "base_model.model.classifier.original_module.bias",
        "base_model.model.classifier.modules_to_save.bias",
        "base_model.model.classifier.base_layer.bias",
    ] {
        assert_eq!(lora.name(none), None, "{none}");
    }
    let prefix = PrefixTuning { num_virtual_tokens: 5, projection: None };
    let rows = Keys::new::<&str>(&Method::PrefixTuning(prefix), &[]);
    for (name, key) in [
        ("prompt_embeddings", "prompt_embeddings"),
        ("classifier.weight", "base_model.classifier.weight"),
    ] {
        assert_eq!((rows.key(name).as_str(), rows.name(key).as_deref()), (key, Some(name)));
    }
}

#[test]
fn tensors_of_another_models_adapter_are_refused_with_both_shapes() {
    let query = "bert.encoder.layer.0.attention.self.query";
    let keys = Keys::new(&all_linear().method, &[query]);
    let shaped = |name: &str, shape: &[usize]| (name.to_owned(), shape.to_vec());
    let expected = [
        shaped(&format!("{query}.lora_A.weight"), &[4, 32]),
        shaped(&format!("{query}.lora_B.weight"), &[32, 4]),
        shaped("classifier.bias", &[2]),
    ];
    let mut found: Vec<_> =
        expected.iter().map(|(name, shape)| (keys.key(name), shape.clone())).collect();
    found.push(shaped("base_model.model.classifier.original_module.bias", &[2]));
    let file = Path::new("a/adapter_model.safetensors");
    let check = |found: &[(String, Vec<usize>)]| keys.check(file, &expected, found);
    check(&found).unwrap();

    found[0].1 = vec![4, 64];
    let error = check(&found).unwrap_err();
    assert_eq!(error.exit_code(), 2);
    assert_eq!(
        error.to_string(),
        format!(
            "a/adapter_model.safetensors: base_model.model.{query}.lora_A.weight is [4, 64], and the model \
             needs [4, 32]; give the model that the adapter was trained on, and the adapter_config.json \
             that was saved with it"
        )
    );
    found.truncate(1);
    found.push(shaped("base_model.model.deberta.x.lora_A.weight", &[4, 8]));
    let error = check(&found).unwrap_err().to_string();
    for said in [
        "lora_A.weight is [4, 64], and the model needs [4, 32]; ",
        "; nothing in the model is base_model.model.deberta.x.lora_A.weight [4, 8]; ",
        "; there is no base_model.model.bert.encoder.layer.0.attention.self.query.lora_B.weight \
         [32, 4] (and 1 more such); ",
    ] {
        assert!(error.contains(said), "{error}");
    }
}
