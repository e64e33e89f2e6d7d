//! The names of the tensors in PEFT's `adapter_model.safetensors`, and whether a file of them fits a model.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use super::peft::CONFIG;
use crate::config::Method;
use crate::{Error, Result};

/// The file.
pub const WEIGHTS: &str = "adapter_model.safetensors";
/// The rows of prompt tuning, P-tuning (`[n, width]`) and prefix tuning (`[n, layers·2·H]`), here and there.
pub const ROWS: &str = "prompt_embeddings";

/// Names of the parameters here, `M.lora_A.weight` `[r, K]` and `M.lora_B.weight` `[N, r]` for a linear layer
/// `M`, [`ROWS`], and the base model's own for what trains whole; and of the same tensors in PEFT's
/// `adapter_model.safetensors`.
#[derive(Clone, Debug)]
pub struct Keys {
    lora: bool,
    /// Modules with LoRA.
    updated: HashSet<String>,
}

impl Keys {
    /// For an adapter; `updated` are the modules with LoRA.
    pub fn new<N: AsRef<str>>(method: &Method, updated: &[N]) -> Self {
        let updated = updated.iter().map(|module| module.as_ref().to_owned()).collect();
        Self { lora: matches!(method, Method::Lora(_)), updated }
    }

    /// What comes before a name of the base model.
    fn prefix(&self) -> &'static str {
        if self.lora { "base_model.model." } else { "base_model." }
    }

    /// PEFT's key of the parameter `name`.
    pub fn key(&self, name: &str) -> String {
        if !self.lora && name == ROWS {
            return name.to_owned();
        }
        match name.strip_suffix(".bias").filter(|module| self.updated.contains(*module)) {
            // A bias that trains beside LoRA, which has put the layer below itself.
            Some(module) => format!("{}{module}.base_layer.bias", self.prefix()),
            None => format!("{}{name}", self.prefix()),
        }
    }

    /// The parameter that PEFT's `key` is of. `None` if it cannot be one, or is one of the further copies
    /// that PEFT writes of the biases of what trains whole (`bias = "all"`).
    pub fn name(&self, key: &str) -> Option<String> {
        if !self.lora && key == ROWS {
            return Some(key.to_owned());
        }
        let name = key.strip_prefix(self.prefix()).filter(|_| !is_copy(key))?;
        let name = match name.strip_suffix(".base_layer.bias") {
            Some(module) => format!("{module}.bias"),
            None => name.to_owned(),
        };
        (self.key(&name) == key).then_some(name)
    }

    /// Holds the tensors of `file` to the parameters: `found` are PEFT's keys, `expected` our names, both
    /// with shapes.
    ///
    /// # Errors
    /// `Data` naming the file, and a key with both shapes for each way in which they differ.
    pub fn check(
        &self,
        file: &Path,
        expected: &[(String, Vec<usize>)],
        found: &[(String, Vec<usize>)],
    ) -> Result<()> {
        let expected: HashMap<String, &Vec<usize>> =
            expected.iter().map(|(name, shape)| (self.key(name), shape)).collect();
        let there: HashSet<&str> = found.iter().map(|(key, _)| key.as_str()).collect();
        let mut wrong = Vec::new();
        let mut unknown = Vec::new();
        for (key, shape) in found.iter().filter(|(key, _)| !is_copy(key)) {
            match expected.get(key) {
                Some(wanted) if *wanted != shape => {
                    wrong.push(format!("{key} is {shape:?}, and the model needs {wanted:?}"));
                }
                Some(_) => {}
                None => unknown.push(format!("nothing in the model is {key} {shape:?}")),
            }
        }
        let missing = expected.iter().filter(|(key, _)| !there.contains(key.as_str()));
        let missing = missing.map(|(key, shape)| format!("there is no {key} {shape:?}")).collect();
        let kinds: [Vec<String>; 3] = [wrong, unknown, missing];
        let said: Vec<String> = kinds.into_iter().filter_map(first_of).collect();
        if said.is_empty() {
            return Ok(());
        }
        Err(Error::Data(format!(
            "{}: {}; give the model that the adapter was trained on, and the {CONFIG} that was saved \
             with it",
            file.display(),
            said.join("; ")
        )))
    }
}

/// Whether `key` is of a copy that PEFT keeps beside what trains whole.
fn is_copy(key: &str) -> bool {
    key.contains(".original_module.") || key.contains(".modules_to_save.")
}

/// The first of them in the order of names, and how many more there are.
fn first_of(mut all: Vec<String>) -> Option<String> {
    all.sort();
    let more = match all.len() {
        0 | 1 => String::new(),
        n => format!(" (and {} more such)", n - 1),
    };
    all.into_iter().next().map(|first| first + &more)
}
