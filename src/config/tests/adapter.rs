//! `[adapter]`, and the settings of frozen weights that go with it.

use super::refused::refusal;
use super::*;

const P_TUNING: &str = "[adapter]\nmethod = \"p_tuning\"\n";
const PREFIX: &str = "[adapter]\nmethod = \"prefix_tuning\"\n";
const PROMPT: &str = "[adapter]\nmethod = \"prompt_tuning\"\n";
const LORA: &str = "[adapter]\nmethod = \"lora\"\n";

fn adapter(section: &str) -> Adapter {
    parse(&format!("{PRETRAINED}{section}")).adapter.unwrap()
}

#[test]
fn adapters_have_pefts_defaults() {
    assert_eq!(parse(PRETRAINED).adapter, None);
    let lora = Lora {
        r: 8,
        lora_alpha: 8.0,
        lora_dropout: 0.0,
        target_modules: None,
        bias: Bias::None,
        use_rslora: false,
    };
    let plain = |method| Adapter { method, modules_to_save: None, pool: PoolRow::FirstToken };
    assert_eq!(lora.scaling(), 1.0);
    assert_eq!(adapter(LORA), plain(Method::Lora(lora)));
    let prompt = PromptTuning { num_virtual_tokens: 20, prompt_tuning_init_text: None };
    assert_eq!(adapter(PROMPT), plain(Method::PromptTuning(prompt)));
    let network = PTuning {
        num_virtual_tokens: 20,
        encoder_reparameterization_type: Reparameterization::Mlp,
        encoder_hidden_size: None,
        encoder_num_layers: 2,
        encoder_dropout: 0.0,
    };
    assert_eq!(adapter(P_TUNING), plain(Method::PTuning(network)));
    let prefix = PrefixTuning { num_virtual_tokens: 20, projection: None };
    assert_eq!(adapter(PREFIX), plain(Method::PrefixTuning(prefix)));
}

#[test]
fn every_setting_of_an_adapter_is_read() {
    let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
    let lora = adapter(&format!(
        "{LORA}r = 4\nlora_alpha = 16\nlora_dropout = 0.1\ntarget_modules = [\"query\", \"value\"]\n\
         bias = \"lora_only\"\nuse_rslora = true\nmodules_to_save = [\"pooler\"]\n"
    ));
    assert_eq!(lora.modules_to_save, Some(names(&["pooler"])));
    let Method::Lora(lora) = lora.method else { panic!("{lora:?}") };
    assert_eq!((lora.r, lora.lora_alpha, lora.lora_dropout), (4, 16.0, 0.1));
    assert_eq!(lora.target_modules, Some(TargetModules::Names(names(&["query", "value"]))));
    assert_eq!((lora.bias, lora.use_rslora, lora.scaling()), (Bias::LoraOnly, true, 8.0));

    let all =
        ["adapter.method=lora", "adapter.target_modules=all-linear", "adapter.modules_to_save=[]"];
    let all = load(PRETRAINED, &all).unwrap().adapter.unwrap();
    let Method::Lora(lora) = all.method else { panic!("{all:?}") };
    assert_eq!(lora.target_modules, Some(TargetModules::Pattern("all-linear".into())));
    assert_eq!(all.modules_to_save, Some(vec![]));

    let prompt = adapter(&format!(
        "{PROMPT}prompt_tuning_init = \"TEXT\"\nprompt_tuning_init_text = \"Good or bad?\"\n\
         pool = \"first_position\"\n"
    ));
    assert_eq!((prompt.pool, prompt.virtual_tokens()), (PoolRow::FirstPosition, 20));
    let Method::PromptTuning(prompt) = prompt.method else { panic!("{prompt:?}") };
    assert_eq!(prompt.prompt_tuning_init_text.as_deref(), Some("Good or bad?"));

    let lstm = adapter(&format!(
        "{P_TUNING}num_virtual_tokens = 5\nencoder_reparameterization_type = \"LSTM\"\n\
         encoder_hidden_size = 128\nencoder_num_layers = 3\nencoder_dropout = 0.2\n"
    ));
    let Method::PTuning(lstm) = lstm.method else { panic!("{lstm:?}") };
    assert_eq!(lstm.encoder_reparameterization_type, Reparameterization::Lstm);
    assert_eq!((lstm.num_virtual_tokens, lstm.encoder_hidden_size), (5, Some(128)));
    assert_eq!((lstm.encoder_num_layers, lstm.encoder_dropout), (3, 0.2));

    let prefix = adapter(&format!("{PREFIX}prefix_projection = true\nencoder_hidden_size = 64\n"));
    let Method::PrefixTuning(prefix) = prefix.method else { panic!("{prefix:?}") };
    assert_eq!(prefix.projection, Some(64));
}

#[test]
fn frozen_weights_are_quantised_beside_an_adapter_or_below_a_head() {
    let low = "quantization = \"nf4\"\nquantize_embeddings = true\n";
    let model = parse(&format!("{PRETRAINED}{low}{LORA}")).model;
    assert_eq!((model.quantization, model.quantize_embeddings), (Some(Quantization::Nf4), true));
    assert_eq!(model.llm_int8_threshold, None);
    let head = parse(&format!("{PRETRAINED}{low}trainable = \"head\"\n")).model;
    assert_eq!(head.quantization, Some(Quantization::Nf4));
    let int8 = ["model.quantization=int8", "model.llm_int8_threshold=6", "adapter.method=lora"];
    assert_eq!(load(PRETRAINED, &int8).unwrap().model.llm_int8_threshold, Some(6.0));
    let offload = ["train.offload=true", "model.gradient_checkpointing=true"];
    assert!(load(PRETRAINED, &offload).unwrap().train.offload);
}

#[test]
fn the_resolved_file_of_an_adapter_reads_back_to_the_same_settings() {
    let all = [
        LORA.to_owned(),
        format!("{LORA}target_modules = \"all-linear\"\nlora_alpha = 3.5\nmodules_to_save = []\n"),
        PROMPT.to_owned(),
        format!(
            "{PROMPT}prompt_tuning_init = \"TEXT\"\nprompt_tuning_init_text = \"a \\\"b\\\"\"\n"
        ),
        format!("{P_TUNING}pool = \"first_position\"\n"),
        format!("{P_TUNING}encoder_reparameterization_type = \"LSTM\"\nencoder_num_layers = 1\n"),
        PREFIX.to_owned(),
        format!("{PREFIX}prefix_projection = true\nencoder_hidden_size = 64\n"),
    ];
    for section in all {
        let config = parse(&format!("{PRETRAINED}quantization = \"fp4\"\n{section}"));
        let text = config.to_toml().unwrap();
        let back = Config::from_toml_str(&text, Path::new("runs/x/config.toml")).unwrap();
        assert_eq!(back, config, "{text}");
        assert_eq!(back.to_toml().unwrap(), text);
    }
    assert!(!parse(PRETRAINED).to_toml().unwrap().contains("[adapter]"));
}

#[test]
fn an_adapter_is_part_of_the_fingerprint() {
    let (none, lora) = (parse(PRETRAINED), parse(&format!("{PRETRAINED}{LORA}")));
    let difference = |a: &Config, b: &Config| a.difference(b).unwrap();
    assert_eq!(
        difference(&none, &lora).as_deref(),
        Some("adapter.bias is unset, not \"none\""),
        "the first key, in the order of their names"
    );
    assert_eq!(difference(&lora, &none).as_deref(), Some("adapter.bias is \"none\", not unset"));
    let other = load(&format!("{PRETRAINED}{LORA}"), &["adapter.r=9"]).unwrap();
    assert_eq!(difference(&lora, &other).as_deref(), Some("adapter.r is 8, not 9"));
    assert!(lora.fingerprint().unwrap().contains("adapter.method = \"lora\"\n"));
    let spelled = load(&format!("{PRETRAINED}{LORA}"), &["adapter.r=8"]).unwrap();
    assert_eq!(spelled.fingerprint().unwrap(), lora.fingerprint().unwrap());
}

#[test]
fn virtual_tokens_take_room() {
    let set =
        |tokens: &str| load(RANDOM, &["data.max_length=500", tokens, "adapter.method=p_tuning"]);
    set("adapter.num_virtual_tokens=12").unwrap();
    let error = set("adapter.num_virtual_tokens=13").unwrap_err().to_string();
    let said = "--set data.max_length=500: must be at most 499: model.max_position_embeddings ends at \
                512, of which adapter.num_virtual_tokens takes 13";
    assert_eq!(error, said);
    let error = set("adapter.num_virtual_tokens=512").unwrap_err().to_string();
    assert!(
        error.starts_with("--set adapter.num_virtual_tokens=512: must be below 512"),
        "{error}"
    );
    let prefix = parse(&format!("{PRETRAINED}{PREFIX}"));
    prefix.check_length(None).unwrap();
    prefix.check_length(Some(532)).unwrap();
    let error = prefix.check_length(Some(531)).unwrap_err();
    assert_eq!(
        error.to_string(),
        "data.max_length = 512: must be at most 511: the model's positions end at 531, of which \
         adapter.num_virtual_tokens takes 20"
    );
    assert_eq!(error.exit_code(), 2);
    let lora = parse(&format!("{PRETRAINED}{LORA}"));
    lora.check_length(Some(512)).unwrap();
    let error = lora.check_length(Some(511)).unwrap_err().to_string();
    assert!(error.ends_with("must be at most 511: the model's positions end there"), "{error}");
}

#[test]
fn settings_of_an_adapter_that_cannot_be_are_refused() {
    for (section, said) in [
        ("[adapter]\n", "a.toml: adapter.method: missing: write method = \"lora\""),
        ("[adapter]\nr = 8\n", "a.toml: adapter.method: missing: write method = \"lora\""),
        (
            "[adapter]\nmethod = \"lorra\"\n",
            "a.toml:6: adapter.method = \"lorra\": expected one of `lora`, `prompt_tuning`, \
             `p_tuning`, `prefix_tuning`; the nearest is `lora`",
        ),
        (
            "[adapter]\nmethod = \"lora\"\nrank = 8\n",
            "a.toml:7: adapter.rank = 8: unknown key adapter.rank; the nearest known one is adapter.r",
        ),
        (
            "[adapter]\nmethod = \"lora\"\npool = \"first_token\"\n",
            "a.toml:7: adapter.pool = \"first_token\": is only for adapter.method = \
             \"prompt_tuning\", \"p_tuning\"; remove it",
        ),
        (
            "[adapter]\nmethod = \"lora\"\nnum_virtual_tokens = 9\n",
            "a.toml:7: adapter.num_virtual_tokens = 9: is only for adapter.method = \
             \"prompt_tuning\", \"p_tuning\", \"prefix_tuning\"; remove it",
        ),
        (
            "[adapter]\nmethod = \"p_tuning\"\nr = 8\n",
            "a.toml:7: adapter.r = 8: is only for adapter.method = \"lora\"; remove it",
        ),
        (
            "[adapter]\nmethod = \"prompt_tuning\"\nencoder_hidden_size = 9\n",
            "a.toml:7: adapter.encoder_hidden_size = 9: is only for adapter.method = \"p_tuning\", \
             \"prefix_tuning\"; remove it",
        ),
        (
            "[adapter]\nmethod = \"lora\"\ntarget_modules = \".*query\"\n",
            "a.toml:7: adapter.target_modules = \".*query\": must be a list of names such as",
        ),
        (
            "[adapter]\nmethod = \"lora\"\ntarget_modules = []\n",
            "a.toml:7: adapter.target_modules = []: must be a list of names such as",
        ),
        (
            "[adapter]\nmethod = \"lora\"\ntarget_modules = 3\n",
            "a.toml:7: adapter.target_modules = 3: expected a list of names, or \"all-linear\"",
        ),
        (
            "[adapter]\nmethod = \"lora\"\nmodules_to_save = \"pooler\"\n",
            "a.toml:7: adapter.modules_to_save = \"pooler\": expected a list, in brackets",
        ),
        (
            "[adapter]\nmethod = \"lora\"\nmodules_to_save = [\"\"]\n",
            "a.toml:7: adapter.modules_to_save = [\"\"]: must hold names of modules",
        ),
        (
            "[adapter]\nmethod = \"prompt_tuning\"\nprompt_tuning_init = \"TEXT\"\n",
            "a.toml: adapter.prompt_tuning_init_text: missing: adapter.prompt_tuning_init = \"TEXT\"",
        ),
        (
            "[adapter]\nmethod = \"prompt_tuning\"\nprompt_tuning_init_text = \"x\"\n",
            "a.toml:7: adapter.prompt_tuning_init_text = \"x\": is only read with \
             adapter.prompt_tuning_init = \"TEXT\"",
        ),
        (
            "[adapter]\nmethod = \"prompt_tuning\"\nprompt_tuning_init_text = 3\n",
            "a.toml:7: adapter.prompt_tuning_init_text = 3: expected text, in quotes",
        ),
        (
            "[adapter]\nmethod = \"p_tuning\"\nencoder_num_layers = 3\n",
            "a.toml:7: adapter.encoder_num_layers = 3: is only for \
             adapter.encoder_reparameterization_type = \"LSTM\"; remove it",
        ),
        (
            "[adapter]\nmethod = \"p_tuning\"\nencoder_dropout = 0.1\n",
            "a.toml:7: adapter.encoder_dropout = 0.1: is only for",
        ),
        (
            "[adapter]\nmethod = \"prefix_tuning\"\nencoder_hidden_size = 9\n",
            "a.toml:7: adapter.encoder_hidden_size = 9: is only read with \
             adapter.prefix_projection = true",
        ),
        (
            "[adapter]\nmethod = \"prefix_tuning\"\nprefix_projection = true\n",
            "a.toml: adapter.encoder_hidden_size: missing: adapter.prefix_projection = true needs",
        ),
        (
            "trainable = \"head\"\n[adapter]\nmethod = \"lora\"\n",
            "a.toml:5: model.trainable = \"head\": given together with [adapter]",
        ),
        (
            "quantization = \"nf4\"\n",
            "a.toml:5: model.quantization = \"nf4\": weights in so few bits cannot train: add \
             [adapter], or set model.trainable = \"head\", or remove it",
        ),
        (
            "quantize_embeddings = true\ntrainable = \"last_block\"\n",
            "a.toml:5: model.quantize_embeddings = true: weights in so few bits cannot train",
        ),
        (
            "quantization = \"int4\"\n[adapter]\nmethod = \"lora\"\n",
            "a.toml:5: model.quantization = \"int4\": expected one of `int8`, `nf4`, `fp4`",
        ),
        (
            "quantization = \"nf4\"\nllm_int8_threshold = 6.0\n[adapter]\nmethod = \"lora\"\n",
            "a.toml:6: model.llm_int8_threshold = 6.0: is only for model.quantization = \"int8\"",
        ),
        (
            "[train]\noffload = true\n",
            "a.toml:6: train.offload = true: is only for layers that are run again; set \
             model.gradient_checkpointing = true",
        ),
    ] {
        let refusal = refusal(&format!("{PRETRAINED}{section}"));
        assert!(refusal.starts_with(said), "{section:?}: {refusal}");
    }
}

#[test]
fn values_of_an_adapter_out_of_range_are_refused() {
    let lora = [
        "r=0",
        "lora_alpha=0",
        "lora_alpha=inf",
        "lora_alpha=nan",
        "lora_dropout=1",
        "lora_dropout=-0.1",
    ];
    let prompt = [
        "num_virtual_tokens=0",
        "encoder_hidden_size=0",
        "encoder_num_layers=0",
        "encoder_dropout=1",
    ];
    let lstm = format!("{P_TUNING}encoder_reparameterization_type = \"LSTM\"\n");
    let of = |section: &str, key: &str| {
        let argument = format!("adapter.{key}");
        let error =
            load(&format!("{PRETRAINED}{section}"), &[&argument]).expect_err(key).to_string();
        assert!(error.starts_with(&format!("--set {argument}: must ")), "{error}");
    };
    lora.iter().for_each(|key| of(LORA, key));
    prompt.iter().for_each(|key| of(&lstm, key));
    of(PROMPT, "num_virtual_tokens=0");
    of(&format!("{PREFIX}prefix_projection = true\n"), "encoder_hidden_size=0");
    of(&format!("{PROMPT}prompt_tuning_init = \"TEXT\"\n"), "prompt_tuning_init_text=\" \"");
    for limit in ["-1", "inf", "nan"] {
        let argument = format!("model.llm_int8_threshold={limit}");
        let settings = ["model.quantization=int8", "adapter.method=lora", &argument];
        let error = load(PRETRAINED, &settings).expect_err(limit).to_string();
        assert!(error.starts_with(&format!("--set {argument}: must be 0")), "{error}");
    }
}
