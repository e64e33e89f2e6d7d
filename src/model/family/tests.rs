use serde_json::json;

use super::*;
use crate::model::{Dropouts, ModelConfig, plan::BlockPlan};

fn fields(value: Value) -> Map<String, Value> {
    value.as_object().cloned().expect("an object")
}

fn plan(family: Family, value: Value) -> Result<Plan, String> {
    family.plan(&fields(value), 2)
}

/// What of the published configs decides what is computed, abridged.
fn published() -> [(Family, Value, f64); 7] {
    let deberta = json!({
        "attention_probs_dropout_prob": 0.1, "hidden_act": "gelu", "hidden_dropout_prob": 0.1,
        "hidden_size": 768, "initializer_range": 0.02, "intermediate_size": 3072,
        "max_position_embeddings": 512, "relative_attention": true, "position_buckets": 256,
        "norm_rel_ebd": "layer_norm", "share_att_key": true, "pos_att_type": "p2c|c2p",
        "layer_norm_eps": 1e-7, "max_relative_positions": -1, "position_biased_input": false,
        "num_attention_heads": 12, "num_hidden_layers": 12, "type_vocab_size": 0,
        "vocab_size": 128100,
    });
    let mut xxlarge = deberta.clone();
    for (key, value) in [
        ("hidden_size", json!(1536)),
        ("intermediate_size", json!(6144)),
        ("num_attention_heads", json!(24)),
        ("num_hidden_layers", json!(48)),
        ("attention_head_size", json!(64)),
        ("conv_kernel_size", json!(3)),
        ("conv_act", json!("gelu")),
    ] {
        xxlarge[key] = value;
    }
    let roberta = json!({
        "max_position_embeddings": 514, "type_vocab_size": 1, "vocab_size": 50265,
        "pad_token_id": 1, "layer_norm_eps": 1e-5,
    });
    [
        (Family::Bert, json!({}), 109.5),
        (Family::DistilBert, json!({}), 67.0),
        (Family::Roberta, roberta, 124.6),
        (Family::DebertaV2, deberta, 184.4),
        (Family::DebertaV2, xxlarge, 1567.0),
        (Family::ModernBert, json!({}), 149.6),
        (Family::Gpt2, json!({}), 124.4),
    ]
}

/// The parameters of the encoder and head, in millions, are those that the model cards name.
#[test]
fn published_checkpoints_have_their_number_of_parameters() {
    for (family, config, millions) in published() {
        let plan = plan(family, config).expect("a plan");
        let groups = crate::model::classifier::groups(&plan);
        let specs = groups.iter().flat_map(|group| &group.specs);
        let count: usize = specs.map(|spec| spec.shape.iter().product::<usize>()).sum();
        let count = count as f64 / 1e6;
        assert!((count - millions).abs() < 0.002 * millions, "{family:?}: {count} M");
    }
}

#[test]
fn what_cannot_be_run_is_refused() {
    let deberta = |key: &str, value: Value| json!({"relative_attention": true, key: value});
    for (family, config, says) in [
        (Family::Bert, json!({"num_attention_heads": 7}), "does not divide hidden_size 768"),
        (Family::Bert, json!({"hidden_act": "mish"}), "hidden_act \"mish\" is unknown"),
        (Family::Bert, json!({"position_embedding_type": "relative_key"}), "relative_key"),
        (Family::Bert, json!({"vocab_size": 0}), "vocab_size is 0"),
        (Family::Bert, json!({"hidden_size": "wide"}), "hidden_size: invalid type"),
        (Family::Roberta, json!({"max_position_embeddings": 1}), "leaves no position"),
        (Family::DebertaV2, deberta("pos_att_type", json!(["c2p", "p2p"])), "p2p"),
        (Family::DebertaV2, deberta("position_buckets", json!(1)), "position_buckets 1"),
        (Family::DebertaV2, deberta("position_buckets", json!(1022)), "largest distance of 512"),
        (Family::DebertaV2, deberta("norm_rel_ebd", json!("batch")), "batch"),
        (Family::DebertaV2, json!({"conv_kernel_size": 4}), "must be odd"),
        (Family::DebertaV2, json!({"attention_head_size": 10}), "attention_head_size"),
        (Family::Bert, json!({"initializer_range": 0.0}), "initializer_range 0 must be"),
        (Family::Bert, json!({"hidden_dropout_prob": 10}), "hidden_dropout_prob 10 must lie"),
        (Family::ModernBert, json!({"global_rope_theta": -1.0}), "global_rope_theta -1"),
        (Family::ModernBert, json!({"num_attention_heads": 256}), "it must be even"),
        (Family::ModernBert, json!({"layer_types": ["full_attention"]}), "layer 1"),
        (Family::Gpt2, json!({"activation_function": "quick_gelu"}), "quick_gelu"),
    ] {
        let error = plan(family, config).expect_err("refused");
        assert!(error.contains(says), "{error}");
    }
}

#[test]
fn weight_decay_is_for_neither_biases_nor_norms() {
    for (family, config, _) in published() {
        let plan = plan(family, config).expect("a plan");
        let groups = crate::model::classifier::groups(&plan);
        for spec in groups.iter().flat_map(|group| &group.specs) {
            // Tables, linear weights and convolutions have two or three dimensions.
            assert_eq!(spec.decays, spec.shape.len() > 1, "{family:?} {}", spec.name);
        }
    }
}

/// The Hub's config.json of ModernBERT has keys of BERT beside its own.
#[test]
fn keys_that_transformers_ignores_are_ignored() {
    let config = json!({"norm_eps": 1e-5, "layer_norm_eps": 0.5, "hidden_act": "relu"});
    let plan = plan(Family::ModernBert, config).expect("a plan");
    assert_eq!(plan.final_norm.expect("a norm").eps, 1e-5);
    let BlockPlan::PreNorm(block) = &plan.blocks[0] else { panic!("post-norm") };
    assert_eq!(block.activation, Activation::Gelu);
    assert!(super::Family::DebertaV2.plan(&fields(json!({"pos_att_type": null})), 2).is_ok());
}

#[test]
fn modernbert_alternates_as_its_config_says() {
    let windows = |config: Value| -> Vec<(Option<usize>, f64)> {
        let blocks = plan(Family::ModernBert, config).expect("a plan").blocks;
        let blocks = blocks.iter().map(|block| match block {
            BlockPlan::PreNorm(block) => block,
            _ => panic!("not of its kind"),
        });
        blocks.map(|block| (block.span.window, block.rotary_theta.unwrap_or(0.0))).collect()
    };
    let (global, local) = ((None, 160_000.0), (Some(64), 10_000.0));
    let hub = windows(json!({"num_hidden_layers": 5}));
    assert_eq!(hub, [global, local, local, global, local]);
    let own = windows(json!({
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "full_attention": {"rope_theta": 5.0, "rope_type": "default"},
            "sliding_attention": {"rope_theta": 7.0},
        },
    }));
    assert_eq!(own, [(Some(64), 7.0), (None, 5.0)]);
}

#[test]
fn a_new_config_is_complete_and_overrides_dropout_under_the_familys_names() {
    let shape =
        fields(json!({"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}));
    let dropouts = Dropouts { hidden: Some(0.25), attention: Some(0.5), classifier: Some(0.125) };
    let new = |family| {
        ModelConfig::fresh(family, &shape, 3, dropouts.into()).expect("a config").to_json()
    };
    let distilbert = new(Family::DistilBert);
    assert_eq!((&distilbert["dim"], &distilbert["n_layers"]), (&json!(64), &json!(2)));
    assert_eq!(distilbert["dropout"], 0.25);
    assert_eq!(distilbert["seq_classif_dropout"], 0.125);
    assert_eq!(distilbert["id2label"]["2"], "LABEL_2");
    assert_eq!(distilbert["architectures"][0], "DistilBertForSequenceClassification");
    assert_eq!(new(Family::Roberta)["pad_token_id"], 1);
    let gpt2 = new(Family::Gpt2);
    assert_eq!((&gpt2["pad_token_id"], &gpt2["dtype"]), (&json!(50256), &json!("float32")));
    assert_eq!((&gpt2["n_embd"], &gpt2["resid_pdrop"]), (&json!(64), &json!(0.25)));
    let deberta = new(Family::DebertaV2);
    assert_eq!(
        (&deberta["position_buckets"], &deberta["share_att_key"]),
        (&json!(256), &json!(true))
    );
    assert!(deberta.get("attention_head_size").is_none());
}

#[test]
fn names_of_a_bare_encoder_and_of_pretraining_heads_are_known() {
    for family in Family::ENCODERS {
        assert!(family.roots().iter().all(|root| root.ends_with('.')));
        assert!(family.prefix().ends_with('.'));
        assert_eq!(json!(family), family.model_type());
    }
}
