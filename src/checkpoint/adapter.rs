//! The files of an adapter, in PEFT's format: what it trained, without the model beneath.
//!
//! Of a network that makes rows only the rows are kept, as in PEFT; read back, they are a table.

use std::path::Path;

use candle_core::Tensor;

use super::files::{load, save};
use crate::{
    Error, Result,
    adapter::{
        keys::{Keys, ROWS, WEIGHTS},
        peft::{self, Base, CONFIG},
    },
    config::Adapter,
    data::Tokenizer,
    model::{Classifier, layer::rows::LearntRows},
};

/// Writes `adapter_model.safetensors`, `adapter_config.json` and the tokenizer, such that
/// `PeftModel.from_pretrained` loads the directory over the model beneath.
///
/// # Errors
/// `Device` if it cannot be written.
pub fn save_adapter(
    dir: &Path,
    classifier: &Classifier,
    adapter: &Adapter,
    tokenizer: &Tokenizer,
) -> Result<()> {
    let keys = keys(classifier, adapter);
    let tensors = tensors(classifier)?;
    let tensors = tensors.into_iter().map(|(name, tensor)| (keys.key(&name), tensor)).collect();
    save(&dir.join(WEIGHTS), tensors)?;
    let updated: Vec<&str> = classifier.updated().collect();
    let json = peft::to_json(adapter, &base(classifier), &updated);
    let json = serde_json::to_vec_pretty(&json).map_err(|e| Error::Bug(e.to_string()))?;
    crate::atomic::write_atomic(&dir.join(CONFIG), &json)?;
    tokenizer.save(dir)
}

/// Puts the tensors of an adapter's directory into a network that was made for
/// [what is read](Adapter::without_network) of it.
///
/// # Errors
/// `Data` if the file is damaged or of another model.
pub fn load_adapter(dir: &Path, classifier: &Classifier, adapter: &Adapter) -> Result<()> {
    let path = dir.join(WEIGHTS);
    let mut found = load(&path)?;
    let shape = |tensor: &Tensor| tensor.dims().to_vec();
    let there: Vec<_> = found.iter().map(|(key, tensor)| (key.clone(), shape(tensor))).collect();
    let expected: Vec<_> =
        tensors(classifier)?.iter().map(|(name, tensor)| (name.clone(), shape(tensor))).collect();
    let keys = keys(classifier, adapter);
    keys.check(&path, &expected, &there)?;
    let parameters = &classifier.parameters;
    for (name, _) in &expected {
        let tensor = found.remove(&keys.key(name));
        let tensor = tensor.ok_or_else(|| Error::Bug(format!("{name} was there")))?;
        let (own, tensor) = match name.as_str() {
            ROWS => (LearntRows::table_name(), tensor),
            name => (name.to_owned(), parameters.relaid(name, &tensor)?),
        };
        let into = parameters.master(&own)?;
        into.slice_set(&tensor.to_dtype(into.dtype())?.to_device(into.device())?, 0, 0)?;
    }
    parameters.refresh()
}

/// How many classes the adapter in `dir` tells apart.
///
/// # Errors
/// `Data` if the file is damaged or holds no classifier.
pub fn labels(dir: &Path) -> Result<usize> {
    let path = dir.join(WEIGHTS);
    let classifier = |key: &str| {
        // Whole parts of names: DistilBERT has a `pre_classifier` too.
        [".classifier.weight", ".score.weight", ".out_proj.weight"]
            .iter()
            .any(|end| key.ends_with(end))
    };
    let found = load(&path)?.into_iter().find(|(key, _)| classifier(key));
    found.and_then(|(_, tensor)| tensor.dims().first().copied()).ok_or_else(|| {
        Error::Data(format!("{} holds no classifier; save the adapter with it", path.display()))
    })
}

fn keys(classifier: &Classifier, adapter: &Adapter) -> Keys {
    Keys::new(&adapter.method, &classifier.updated().collect::<Vec<_>>())
}

/// Everything that an adapter's file holds, under our names and as checkpoints lay it out.
fn tensors(classifier: &Classifier) -> Result<Vec<(String, Tensor)>> {
    let parameters = &classifier.parameters;
    let mut all = Vec::new();
    for name in parameters.trained().filter(|name| !LearntRows::owns(name)) {
        all.push((name.to_owned(), parameters.relaid(name, &parameters.value(name)?)?));
    }
    if let Some(rows) = classifier.learnt_rows()? {
        all.push((ROWS.to_owned(), rows));
    }
    Ok(all)
}

/// The model beneath, for PEFT.
fn base(classifier: &Classifier) -> Base {
    let config = &classifier.config;
    let named = classifier.training.base.clone();
    Base {
        name: named.as_ref().map(|base| base.name.clone()).unwrap_or_default(),
        revision: named.and_then(|base| base.revision),
        family: config.family,
        embedding_size: config.plan.embeddings.width,
        hidden_size: config.plan.hidden_size,
        layers: config.layers(),
        heads: config.plan.blocks.first().map_or(0, |block| block.heads()),
    }
}
