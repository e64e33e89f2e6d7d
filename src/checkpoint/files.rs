//! The files of a model directory, in Hugging Face's format, and the optimizer's.

use std::{collections::HashMap, path::Path};

use allreel_kernels::common::host;
use candle_core::{DType, Device, Tensor};
use safetensors::{Dtype, tensor::TensorView};

use crate::{
    Error, Result,
    data::Tokenizer,
    device::to_host,
    model::{Classifier, parameters::Bucket},
};

const WEIGHTS: &str = "model.safetensors";
const TRAINED: &str = "trained.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";

/// Writes `model.safetensors`, `config.json` and the tokenizer, such that
/// `AutoModelForSequenceClassification.from_pretrained` loads the directory. Low-rank updates are folded into
/// the weights.
///
/// # Errors
/// `Device` if it cannot be written.
pub fn save_model(dir: &Path, classifier: &Classifier, tokenizer: &Tokenizer) -> Result<()> {
    let parameters = &classifier.parameters;
    let values = parameters
        .names()
        .filter(|name| !parameters.is_added(name))
        .map(|name| Ok((name.to_owned(), parameters.relaid(name, &classifier.merged(name)?)?)))
        .collect::<Result<_>>()?;
    save(&dir.join(WEIGHTS), values)?;
    let config = serde_json::to_vec_pretty(&classifier.config_json())
        .map_err(|e| Error::Bug(e.to_string()))?;
    crate::atomic::write_atomic(&dir.join("config.json"), &config)?;
    tokenizer.save(dir)
}

/// Writes every parameter that trains, where the model's own files do not have them all: an adapter's keep the
/// rows that a network made, not the network.
///
/// # Errors
/// `Device` if it cannot be written.
pub fn save_trained(dir: &Path, classifier: &Classifier) -> Result<()> {
    let parameters = &classifier.parameters;
    let values = parameters
        .trained()
        .map(|name| Ok((name.to_owned(), parameters.relaid(name, &parameters.value(name)?)?)))
        .collect::<Result<_>>()?;
    save(&dir.join(TRAINED), values)
}

/// Writes the moments of every parameter that trains.
///
/// # Errors
/// `Device` if it cannot be written.
pub fn save_optimizer(dir: &Path, classifier: &Classifier) -> Result<()> {
    let mut tensors = Vec::new();
    each_moment(classifier, |name, view| {
        tensors.push((name, view.clone()));
        Ok(())
    })?;
    save(&dir.join(OPTIMIZER), tensors)
}

/// Puts what a checkpoint trained, and its moments, into `classifier`; what is frozen came from where the run
/// began.
///
/// # Errors
/// `Data` if the checkpoint does not fit it.
pub fn restore(dir: &Path, classifier: &Classifier) -> Result<()> {
    let parameters = &classifier.parameters;
    let trained = dir.join(TRAINED);
    let mut weights = load(&if trained.is_file() { trained } else { dir.join(WEIGHTS) })?;
    for (name, tensor) in &mut weights {
        if tensor.rank() == 2 {
            *tensor = parameters.relaid(name, tensor)?;
        }
    }
    for name in parameters.trained() {
        copy(&weights, name, &parameters.master(name)?, dir)?;
    }
    parameters.refresh()?;
    let moments = load(&dir.join(OPTIMIZER))?;
    each_moment(classifier, |name, view| copy(&moments, &name, view, dir))
}

/// Names and views of all moments.
fn each_moment(
    classifier: &Classifier,
    mut body: impl FnMut(String, &Tensor) -> Result<()>,
) -> Result<()> {
    for bucket in &classifier.parameters.buckets {
        for entry in &bucket.entries {
            let name = |moment: &str| format!("{moment}.{}", entry.name);
            body(name("exp_avg"), &Bucket::view(&bucket.state.exp_avg, entry)?)?;
            body(name("exp_avg_sq"), &Bucket::view(&bucket.state.exp_avg_sq, entry)?)?;
        }
    }
    Ok(())
}

pub(super) fn load(path: &Path) -> Result<HashMap<String, Tensor>> {
    let bytes = std::fs::read(path).map_err(|e| Error::reading(path, e))?;
    candle_core::safetensors::load_buffer(&bytes, &Device::Cpu).map_err(|e| Error::reading(path, e))
}

fn copy(tensors: &HashMap<String, Tensor>, name: &str, into: &Tensor, dir: &Path) -> Result<()> {
    let fitting = tensors.get(name).filter(|tensor| tensor.dims() == into.dims());
    let tensor = fitting.ok_or_else(|| {
        Error::Data(format!("checkpoint {} does not fit this model: {name}", dir.display()))
    })?;
    into.slice_set(&tensor.to_dtype(into.dtype())?.to_device(into.device())?, 0, 0)?;
    Ok(())
}

pub(super) fn save(path: &Path, tensors: Vec<(String, Tensor)>) -> Result<()> {
    let tensors = tensors
        .into_iter()
        .map(|(name, tensor)| Ok((name, to_host(&tensor)?.to_dtype(DType::F32)?)))
        .collect::<Result<Vec<_>>>()?;
    let hosts = tensors
        .iter()
        .map(|(_, tensor)| host::read::<f32>(tensor))
        .collect::<candle_core::Result<Vec<_>>>()?;
    let views = tensors
        .iter()
        .zip(&hosts)
        .map(|((name, tensor), values)| {
            let bytes = bytemuck::cast_slice(values);
            let view = TensorView::new(Dtype::F32, tensor.dims().to_vec(), bytes);
            view.map(|view| (name, view)).map_err(|e| Error::Bug(e.to_string()))
        })
        .collect::<Result<Vec<_>>>()?;
    // transformers refuses a file that does not say which framework's layout it has.
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    safetensors::serialize_to_file(views, Some(metadata), path).map_err(|e| Error::writing(path, e))
}
