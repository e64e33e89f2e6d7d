//! Adapters: which modules of a model they update, which train whole, and PEFT's files of them.
//!
//! | file | owns |
//! |---|---|
//! | this | names of modules: what LoRA updates, what trains whole |
//! | [`peft`] | `adapter_config.json` |
//! | [`keys`] | the names inside `adapter_model.safetensors` |
//!
//! Names are matched as PEFT 0.21 matches them, so that an adapter updates and saves the same modules in
//! either program; where PEFT is silent about a name that does nothing, a run's settings are refused.

pub mod keys;
pub mod peft;

#[cfg(test)]
mod tests;

use std::collections::BTreeSet;

use crate::config::{Adapter, Family, Lora, Method, TargetModules};
use crate::{Error, Result};

/// What PEFT always trains whole and saves in a classifier, under either name.
const CLASSIFIERS: [&str; 2] = ["classifier", "score"];

/// The modules that LoRA updates where `target_modules` is not given: PEFT's
/// `TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING`, and the like for the two families that it lacks.
fn usual_targets(family: Family) -> &'static [&'static str] {
    match family {
        Family::Bert | Family::Roberta => &["query", "value"],
        Family::DebertaV2 => &["query_proj", "value_proj"],
        Family::Gpt2 => &["c_attn"],
        Family::DistilBert => &["q_lin", "v_lin"],
        Family::ModernBert => &["Wqkv"],
        // Refused by the settings.
        _ => &[],
    }
}

/// What of the head stands before the classifier in a module of its own name. PEFT leaves it as it is;
/// DeBERTa's and ModernBERT's are new where a pretrained encoder becomes a classifier.
fn usual_saves(family: Family) -> &'static [&'static str] {
    match family {
        Family::Bert | Family::DebertaV2 => &["pooler"],
        Family::ModernBert => &["head"],
        // Below a name that ends in `classifier`, or not there.
        _ => &[],
    }
}

/// The modules that train whole: `modules_to_save`, or the family's head, and the classifier under both
/// names that it may have.
pub fn saved_modules(adapter: &Adapter, family: Family) -> Vec<String> {
    let mut modules = adapter
        .modules_to_save
        .clone()
        .unwrap_or_else(|| usual_saves(family).iter().map(|module| (*module).to_owned()).collect());
    for classifier in CLASSIFIERS {
        if !modules.iter().any(|module| module == classifier) {
            modules.push(classifier.to_owned());
        }
    }
    modules
}

/// Whether the parameter `name` lies in one of `modules` (of [`saved_modules`]): a module is meant by any
/// end of its path, not only by whole parts of it, as in PEFT; so `classifier` means DistilBERT's
/// `pre_classifier` too.
pub fn saves(modules: &[String], name: &str) -> bool {
    let mut paths = name.match_indices('.').map(|(at, _)| &name[..at]);
    paths.any(|path| modules.iter().any(|module| path.ends_with(module.as_str())))
}

/// Refuses a name in `modules_to_save` that no module of the model has, which PEFT passes over: `names`
/// are the model's parameters.
///
/// # Errors
/// `User` with the nearest name.
pub fn check_saved<N: AsRef<str>>(adapter: &Adapter, names: &[N]) -> Result<()> {
    for module in adapter.modules_to_save.iter().flatten() {
        let alone = std::slice::from_ref(module);
        if !CLASSIFIERS.contains(&module.as_str())
            && !names.iter().any(|name| saves(alone, name.as_ref()))
        {
            let modules = names.iter().flat_map(|name| name.as_ref().rsplit('.').skip(1));
            return Err(Error::User(format!(
                "adapter.modules_to_save names {module:?}, and the model has no module of that name; \
                 the nearest is {:?}",
                nearest(module, modules)
            )));
        }
    }
    Ok(())
}

/// Which of the model's linear layers `adapter` updates, in their order; none if it is no LoRA.
/// `linears` are all there are, head and classifier too: `(name, outputs, inputs)`.
///
/// # Errors
/// `User` for a name in `target_modules` that stands for no linear layer or only for such as train
/// whole, and for a rank above the smaller side of a layer.
pub fn targets<N: AsRef<str>>(
    adapter: &Adapter,
    family: Family,
    linears: &[(N, usize, usize)],
) -> Result<Vec<usize>> {
    let Method::Lora(lora) = &adapter.method else { return Ok(Vec::new()) };
    let saved = saved_modules(adapter, family);
    for target in wanted(lora, family).unwrap_or_default() {
        check_target(&target, &saved, linears)?;
    }
    let chosen = chosen(lora, family, &saved, linears);
    for &i in &chosen {
        let (name, outputs, inputs) = &linears[i];
        let most = *outputs.min(inputs);
        if lora.r > most {
            return Err(Error::User(format!(
                "adapter.r = {}: above the smaller side of {}, which is [{outputs}, {inputs}]; use at \
                 most {most}, or leave that layer out of adapter.target_modules",
                lora.r,
                name.as_ref()
            )));
        }
    }
    Ok(chosen)
}

/// The same for an adapter that was read from `file`, in which PEFT may have written names that stand for
/// nothing but the classifier, and any rank.
///
/// # Errors
/// `Data` if it is LoRA and updates nothing in this model.
pub fn targets_of_file<N: AsRef<str>>(
    adapter: &Adapter,
    family: Family,
    linears: &[(N, usize, usize)],
    file: &std::path::Path,
) -> Result<Vec<usize>> {
    let Method::Lora(lora) = &adapter.method else { return Ok(Vec::new()) };
    let chosen = chosen(lora, family, &saved_modules(adapter, family), linears);
    if chosen.is_empty() {
        let names = wanted(lora, family).unwrap_or_default().join(", ");
        return Err(Error::Data(format!(
            "{}: target_modules ({names}) are no linear layers of this model, which has {}; give the \
             model that the adapter was trained on",
            file.display(),
            last_parts(linears).into_iter().collect::<Vec<_>>().join(", ")
        )));
    }
    Ok(chosen)
}

/// The names that stand for modules; `None` for every linear layer.
fn wanted(lora: &Lora, family: Family) -> Option<Vec<String>> {
    match &lora.target_modules {
        Some(TargetModules::Pattern(_)) => None,
        Some(TargetModules::Names(names)) => Some(names.clone()),
        None => Some(usual_targets(family).iter().map(|name| (*name).to_owned()).collect()),
    }
}

fn chosen<N: AsRef<str>>(
    lora: &Lora,
    family: Family,
    saved: &[String],
    linears: &[(N, usize, usize)],
) -> Vec<usize> {
    let wanted = wanted(lora, family);
    let is_wanted = |name: &str| {
        wanted.as_ref().is_none_or(|targets| targets.iter().any(|target| is_meant(target, name)))
    };
    (0..linears.len())
        .filter(|&i| {
            is_wanted(linears[i].0.as_ref()) && !trains_whole(saved, linears[i].0.as_ref())
        })
        .collect()
}

/// Whether `target` is the module's whole name or its last parts.
fn is_meant(target: &str, module: &str) -> bool {
    module.strip_suffix(target).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

/// [`saves`] of a module.
fn trains_whole(saved: &[String], module: &str) -> bool {
    saves(saved, &format!("{module}.weight"))
}

fn check_target<N: AsRef<str>>(
    target: &str,
    saved: &[String],
    linears: &[(N, usize, usize)],
) -> Result<()> {
    let names = || linears.iter().map(|(name, ..)| name.as_ref());
    let mut meant = names().filter(|name| is_meant(target, name)).peekable();
    if meant.peek().is_none() {
        let parts = last_parts(linears);
        let near = match target.contains('.') {
            true => nearest(target, names()),
            false => nearest(target, parts.iter().copied()),
        };
        return Err(Error::User(format!(
            "adapter.target_modules names {target:?}, and the model has no linear layer of that name; \
             the nearest is {near:?} (there are {}, and any last parts of whole names)",
            parts.iter().copied().collect::<Vec<_>>().join(", ")
        )));
    }
    if meant.all(|name| trains_whole(saved, name)) {
        return Err(Error::User(format!(
            "adapter.target_modules names {target:?}, which trains whole, being in the classifier or in \
             adapter.modules_to_save ({}); remove it",
            saved.join(", ")
        )));
    }
    Ok(())
}

/// The last parts of the linear layers' names.
fn last_parts<N: AsRef<str>>(linears: &[(N, usize, usize)]) -> BTreeSet<&str> {
    linears.iter().filter_map(|(name, ..)| name.as_ref().rsplit('.').next()).collect()
}

fn nearest<'a>(name: &str, names: impl Iterator<Item = &'a str>) -> &'a str {
    let scored = names.map(|known| (strsim::jaro_winkler(known, name), known));
    scored.max_by(|a, b| a.0.total_cmp(&b.0)).map_or("", |(_, known)| known)
}
