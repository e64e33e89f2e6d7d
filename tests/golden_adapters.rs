//! Adapters that PEFT saved: each `adapter_config.json` is understood and written again with PEFT's own
//! values, each model gets the tensors that `adapter_model.safetensors` holds, under its names.

use std::{collections::BTreeSet, path::Path};

use allreel::{
    adapter::{
        keys::{Keys, ROWS, WEIGHTS},
        peft::{self, Base, CONFIG},
        saved_modules, saves, targets_of_file,
    },
    config::{Adapter, Method, PoolRow},
    model::{Family, ModelConfig, Overrides},
};
use serde_json::Value;

use crate::support::{Case, golden};

type Shapes = Vec<(String, Vec<usize>)>;

fn shapes(path: &Path) -> Shapes {
    let case = Case::load(path);
    case.names().map(|name| (name.to_owned(), case.get(name).dims().to_vec())).collect()
}

/// The linear layers of a checkpoint: its matrices that are no tables. GPT-2 stores `[K, N]`.
fn linears(family: Family, parameters: &Shapes) -> Vec<(String, usize, usize)> {
    let tables = ["embeddings.weight", "wte.weight", "wpe.weight"];
    let layer = |(name, shape): &(String, Vec<usize>)| {
        let module = name.strip_suffix(".weight")?;
        let [outputs, inputs] = shape[..] else { return None };
        let transposed = family == Family::Gpt2 && module != "score";
        let (outputs, inputs) = if transposed { (inputs, outputs) } else { (outputs, inputs) };
        let table = tables.iter().any(|table| name.ends_with(table));
        (!table).then(|| (module.to_owned(), outputs, inputs))
    };
    parameters.iter().filter_map(layer).collect()
}

/// The parameters that the adapter trains and saves, by our names.
fn trained(
    adapter: &Adapter,
    base: &Base,
    parameters: &Shapes,
    updated: &[(String, usize, usize)],
) -> Shapes {
    let modules = saved_modules(adapter, base.family);
    let whole = parameters.iter().filter(|(name, _)| saves(&modules, name)).cloned();
    let added: Shapes = match &adapter.method {
        Method::Lora(lora) => updated
            .iter()
            .flat_map(|(name, outputs, inputs)| {
                [
                    (format!("{name}.lora_A.weight"), vec![lora.r, *inputs]),
                    (format!("{name}.lora_B.weight"), vec![*outputs, lora.r]),
                ]
            })
            .collect(),
        Method::PromptTuning(_) | Method::PTuning(_) => {
            vec![(ROWS.into(), vec![adapter.virtual_tokens(), base.embedding_size])]
        }
        Method::PrefixTuning(_) => {
            vec![(ROWS.into(), vec![adapter.virtual_tokens(), base.layers * 2 * base.hidden_size])]
        }
    };
    whole.chain(added).collect()
}

/// Our object has PEFT's values, and beside them only `pool`, which says what PEFT does anyway.
fn same_values(ours: &Value, pefts: &Value, case: &str) {
    let set = |value: &Value| -> Option<BTreeSet<String>> {
        Some(value.as_array()?.iter().filter_map(Value::as_str).map(str::to_owned).collect())
    };
    for (key, value) in ours.as_object().expect("an object") {
        match (set(value), set(&pefts[key])) {
            _ if key == "pool" => assert_eq!(value, "first_position", "{case}"),
            (Some(ours), Some(theirs)) => assert_eq!(ours, theirs, "{case}: {key}"),
            _ => assert_eq!(*value, pefts[key], "{case}: {key}"),
        }
    }
}

#[test]
fn golden_adapters_of_peft_are_understood_and_written_as_peft_does() {
    let Some(root) = golden() else { return };
    let mut cases = 0;
    for entry in std::fs::read_dir(root.join("peft")).expect("peft") {
        let dir = entry.expect("an entry").path();
        let case = dir.display().to_string();
        let path = dir.join(CONFIG);
        let Ok(text) = std::fs::read_to_string(&path) else { continue };
        let peft::Description { adapter, base } = peft::read(&path).expect(&case);
        let at = dir.join(base.as_deref().expect("a base model"));
        let config = ModelConfig::read(&at.join("config.json"), 2, Overrides::default());
        let plan = config.expect(&case);
        let base = Base {
            name: base.expect("a base model"),
            revision: None,
            family: plan.family,
            embedding_size: plan.plan.embeddings.width,
            hidden_size: plan.plan.hidden_size,
            layers: plan.layers(),
            heads: 4,
        };
        let parameters = shapes(&at.join("model.safetensors"));
        let all = linears(base.family, &parameters);
        let chosen = targets_of_file(&adapter, base.family, &all, &path).expect(&case);
        let updated: Vec<_> = chosen.into_iter().map(|i| all[i].clone()).collect();
        let names: Vec<&String> = updated.iter().map(|(name, ..)| name).collect();

        let keys = Keys::new(&adapter.method, &names);
        let expected = trained(&adapter, &base, &parameters, &updated);
        let found = shapes(&dir.join(WEIGHTS));
        keys.check(&dir.join(WEIGHTS), &expected, &found).expect(&case);
        for (key, _) in &found {
            assert_eq!(keys.key(&keys.name(key).expect(&case)), *key);
        }

        let written = peft::to_json(&adapter, &base, &names);
        same_values(&written, &serde_json::from_str(&text).expect("JSON"), &case);
        let prompts = matches!(adapter.method, Method::PromptTuning(_) | Method::PTuning(_));
        assert_eq!(adapter.pool == PoolRow::FirstPosition, prompts, "{case}");
        cases += 1;
    }
    assert!(cases >= 21, "{cases} adapters");
}
