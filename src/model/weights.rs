//! The weights of a checkpoint: names mapped, shapes held to the architecture, new ones started.

use std::{collections::BTreeMap, path::Path};

use candle_core::{DType, Device, Tensor};
use rand_chacha::{ChaCha12Rng, rand_core::SeedableRng};
use rand_distr::{Distribution, Normal, Uniform};

use super::{
    family::Family,
    parameters::{Init, Spec},
    weight_files::WeightFiles,
};
use crate::{Error, Result};

/// How many missing tensors an error names.
const LISTED: usize = 8;

/// The tensors of a checkpoint, under the names of the architecture.
pub struct WeightFile {
    files: WeightFiles,
    family: Family,
    /// What nothing has taken yet: the name of the architecture, and that in the file.
    left: BTreeMap<String, String>,
    /// Parameters that were not in the file and start new.
    pub missing: Vec<String>,
}

impl WeightFile {
    /// Opens the weights in `dir` (see [`WeightFiles::open`]). Names are brought to those
    /// of the family's classifier (a bare encoder is saved without its prefix).
    ///
    /// # Errors
    /// `Data` if there are none or they are damaged.
    pub fn open(dir: &Path, family: Family) -> Result<Self> {
        let files = WeightFiles::open(dir)?;
        let left = files.names().map(|name| (canonical(name, family), name.to_owned())).collect();
        Ok(Self { files, family, left, missing: Vec::new() })
    }

    /// Fails unless every one of `specs` is there.
    ///
    /// # Errors
    /// `Data` listing those that are missing.
    pub fn require<'a>(&self, specs: impl Iterator<Item = &'a Spec>) -> Result<()> {
        let absent: Vec<&str> = specs
            .map(|spec| spec.name.as_str())
            .filter(|name| !self.left.contains_key(*name))
            .collect();
        let Some(first) = absent.get(..absent.len().min(LISTED)).filter(|f| !f.is_empty()) else {
            return Ok(());
        };
        let more = match absent.len() - first.len() {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        Err(Error::Data(format!(
            "{}: missing {}{more}; only the classification head may be new: config.json and weights \
             are not of one model",
            self.files.path().display(),
            first.join(", ")
        )))
    }

    /// The value of `spec` in f32. One that the file lacks starts new.
    ///
    /// # Errors
    /// `Data` naming the tensor if its shape differs.
    pub fn take(&mut self, spec: &Spec, seed: u64) -> Result<Tensor> {
        let Some(name) = self.left.remove(&spec.name) else {
            self.missing.push(spec.name.clone());
            return initial(spec, seed);
        };
        let mut shape = self.files.shape(&name).unwrap_or_default().to_vec();
        if spec.transposed {
            shape.reverse();
        }
        if shape != spec.shape {
            return Err(Error::Data(format!(
                "{}: tensor {} has shape {shape:?}, but the settings make it {:?}; {}",
                self.files.path_of(&name).display(),
                spec.name,
                spec.shape,
                match (shape.get(1..) == spec.shape.get(1..), shape.first()) {
                    (true, Some(rows))
                        if spec.name.contains("classifier") || spec.name.contains("score") =>
                        format!("set model.num_labels = {rows}, the classes of this checkpoint"),
                    _ => "use the config.json that was saved with these weights".into(),
                }
            )));
        }
        let tensor = self.files.read(&name)?;
        Ok(if spec.transposed { tensor.t()?.contiguous()? } else { tensor })
    }

    /// Names in the file that no parameter took, other than those that classification never uses
    /// (pretraining heads, stored position ids).
    pub fn unexpected(&self) -> Vec<&str> {
        let known = |name: &str| {
            self.family.unused().iter().any(|part| match part.starts_with('.') {
                true => name.ends_with(part),
                false => name.starts_with(part),
            })
        };
        self.left.keys().map(String::as_str).filter(|name| !known(name)).collect()
    }
}

/// The name as `...ForSequenceClassification` has it.
fn canonical(name: &str, family: Family) -> String {
    // Checkpoints converted from TensorFlow call a norm's weight gamma and its bias beta.
    let name = match name.strip_suffix("LayerNorm.gamma") {
        Some(stem) => format!("{stem}LayerNorm.weight"),
        None => match name.strip_suffix("LayerNorm.beta") {
            Some(stem) => format!("{stem}LayerNorm.bias"),
            None => name.to_owned(),
        },
    };
    let bare = family.roots().iter().any(|root| name.starts_with(root));
    if bare { format!("{}{name}", family.prefix()) } else { name }
}

/// The start of a new parameter: a function of the seed and its name alone, so that it does not
/// depend on what else is new or on the number of ranks.
///
/// # Errors
/// Never for the shapes of an architecture.
pub fn initial(spec: &Spec, seed: u64) -> Result<Tensor> {
    let shape = spec.shape.as_slice();
    let values = match spec.init {
        Init::Zeros => return Ok(Tensor::zeros(shape, DType::F32, &Device::Cpu)?),
        Init::Ones => return Ok(Tensor::ones(shape, DType::F32, &Device::Cpu)?),
        Init::OnesFrom { first, len } => {
            let one = |i: usize| if (first..first + len).contains(&i) { 1.0 } else { 0.0 };
            (0..spec.len()).map(one).collect()
        }
        Init::Orthogonal => orthogonal(spec, seed)?,
        Init::Normal(deviation) => normal(spec, seed, deviation, f64::INFINITY)?,
        Init::TruncatedNormal { deviation, cutoff } => normal(spec, seed, deviation, cutoff)?,
        Init::Uniform(bound) => {
            let between = Uniform::new_inclusive(-bound, bound)
                .map_err(|e| Error::Bug(format!("bound {bound}: {e}")))?;
            drawn(spec, seed, |rng| between.sample(rng))
        }
    };
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
}

/// Independent values of a generator that depends on seed and name alone.
fn drawn(spec: &Spec, seed: u64, mut draw: impl FnMut(&mut ChaCha12Rng) -> f64) -> Vec<f32> {
    let mut hash = blake3::Hasher::new();
    hash.update(&seed.to_le_bytes()).update(spec.name.as_bytes());
    let mut rng = ChaCha12Rng::from_seed(*hash.finalize().as_bytes());
    (0..spec.len()).map(|_| draw(&mut rng) as f32).collect()
}

/// Normal values of which none is more than `cutoff` deviations from zero.
fn normal(spec: &Spec, seed: u64, deviation: f64, cutoff: f64) -> Result<Vec<f32>> {
    let normal = Normal::new(0.0, deviation)
        .map_err(|e| Error::Bug(format!("deviation {deviation}: {e}")))?;
    let near = |x: f64| cutoff.is_infinite() || x.abs() <= cutoff * deviation;
    Ok(drawn(spec, seed, |rng| {
        loop {
            let x = normal.sample(rng);
            if near(x) {
                return x;
            }
        }
    }))
}

/// Square blocks one below the other, each uniform among the orthogonal matrices: normal rows, made orthogonal
/// to those before (Gram and Schmidt, twice over, which leaves nothing but rounding).
fn orthogonal(spec: &Spec, seed: u64) -> Result<Vec<f32>> {
    let n = *spec.shape.last().unwrap_or(&1);
    let mut values = normal(spec, seed, 1.0, f64::INFINITY)?;
    let mut row = vec![0f64; n];
    for block in values.chunks_mut(n * n) {
        for i in 0..block.len() / n {
            let (done, rest) = block.split_at_mut(i * n);
            row.iter_mut().zip(&rest[..n]).for_each(|(x, value)| *x = f64::from(*value));
            for earlier in done.chunks(n).chain(done.chunks(n)) {
                let pairs = row.iter().zip(earlier);
                let along: f64 = pairs.map(|(x, e)| x * f64::from(*e)).sum();
                row.iter_mut().zip(earlier).for_each(|(x, e)| *x -= along * f64::from(*e));
            }
            let length = row.iter().map(|x| x * x).sum::<f64>().sqrt();
            rest[..n].iter_mut().zip(&row).for_each(|(value, x)| *value = (x / length) as f32);
        }
    }
    Ok(values)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    #[test]
    fn names_are_brought_to_one_form() {
        for (family, name, want) in [
            (Family::Gpt2, "h.0.ln_1.weight", "transformer.h.0.ln_1.weight"),
            (Family::Gpt2, "transformer.wte.weight", "transformer.wte.weight"),
            (Family::ModernBert, "layers.3.mlp.Wi.weight", "model.layers.3.mlp.Wi.weight"),
            (Family::ModernBert, "head.dense.weight", "head.dense.weight"),
            (
                Family::DistilBert,
                "transformer.layer.1.ffn.lin1.bias",
                "distilbert.transformer.layer.1.ffn.lin1.bias",
            ),
            (
                Family::DebertaV2,
                "encoder.rel_embeddings.weight",
                "deberta.encoder.rel_embeddings.weight",
            ),
            (Family::Roberta, "lm_head.bias", "lm_head.bias"),
        ] {
            assert_eq!(canonical(name, family), want);
        }
        for (name, want) in [
            (
                "encoder.layer.0.output.LayerNorm.gamma",
                "bert.encoder.layer.0.output.LayerNorm.weight",
            ),
            ("bert.embeddings.LayerNorm.beta", "bert.embeddings.LayerNorm.bias"),
            ("pooler.dense.weight", "bert.pooler.dense.weight"),
            ("classifier.bias", "classifier.bias"),
            ("cls.predictions.bias", "cls.predictions.bias"),
        ] {
            assert_eq!(canonical(name, Family::Bert), want);
        }
    }

    #[test]
    fn new_weights_depend_on_seed_and_name_only() -> Result<()> {
        let spec = |name: &str| Spec::new(name, &[100, 100], Init::Normal(0.02));
        let values = |name: &str, seed| {
            initial(&spec(name), seed)?.flatten_all()?.to_vec1::<f32>().map_err(Error::from)
        };
        let a = values("a", 1)?;
        assert_eq!(a, values("a", 1)?);
        assert_ne!(a, values("b", 1)?);
        assert_ne!(a, values("a", 2)?);
        let deviation = (a.iter().map(|x| f64::from(x * x)).sum::<f64>() / 1e4).sqrt();
        assert!((deviation - 0.02).abs() < 0.001, "{deviation}");
        let init = Init::TruncatedNormal { deviation: 0.5, cutoff: 2.0 };
        let cut =
            initial(&Spec::new("a", &[100, 100], init), 1)?.flatten_all()?.to_vec1::<f32>()?;
        let largest = cut.iter().fold(0f32, |m, x| m.max(x.abs()));
        assert!((0.95..=1.0).contains(&largest), "{largest}");
        Ok(())
    }

    #[test]
    fn recurrent_weights_start_orthogonal_gate_by_gate() -> Result<()> {
        let spec = Spec::new("weight_hh_l0", &[4 * 24, 24], Init::Orthogonal);
        let all = initial(&spec, 7)?.to_dtype(DType::F64)?;
        for gate in 0..4 {
            let w = all.narrow(0, gate * 24, 24)?;
            let product = w.matmul(&w.t()?)?.to_vec2::<f64>()?;
            for (i, row) in product.iter().enumerate() {
                for (j, x) in row.iter().enumerate() {
                    let want = if i == j { 1.0 } else { 0.0 };
                    assert!((x - want).abs() <= 1e-6, "gate {gate} [{i}, {j}]: {x}");
                }
            }
        }
        let first = all.narrow(0, 0, 24)?.to_vec2::<f64>()?;
        assert_ne!(first, all.narrow(0, 24, 24)?.to_vec2::<f64>()?, "each gate has its own");
        let bias = Spec::new("bias_ih_l0", &[8], Init::OnesFrom { first: 2, len: 2 });
        let want = [0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0];
        assert_eq!(initial(&bias, 7)?.to_vec1::<f32>()?, want);
        Ok(())
    }

    #[test]
    fn truncated_files_and_wrong_shapes_are_named() -> Result<()> {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("model.safetensors");
        assert!(WeightFile::open(dir.path(), Family::Bert).is_err());
        let tensor = Tensor::ones((4, 2), DType::F16, &Device::Cpu)?;
        candle_core::safetensors::save(&HashMap::from([("x.weight", tensor)]), &path)?;
        let mut file = WeightFile::open(dir.path(), Family::Bert)?;
        let names = (0..10).map(|i| Spec::new(format!("y.{i}"), &[1], Init::Ones));
        let error = file.require(names.collect::<Vec<_>>().iter()).unwrap_err().to_string();
        assert!(error.contains("missing y.0, y.1,") && error.contains("y.7 and 2 more"), "{error}");
        let error = file.take(&Spec::new("x.weight", &[2, 2], Init::Ones), 0).unwrap_err();
        assert!(error.to_string().contains("x.weight has shape [4, 2]"), "{error}");
        let mut file = WeightFile::open(dir.path(), Family::Bert)?;
        assert_eq!(file.unexpected(), ["x.weight"]);
        assert_eq!(file.take(&Spec::new("x.weight", &[4, 2], Init::Ones), 0)?.dtype(), DType::F32);
        let bytes = std::fs::read(&path).expect("read");
        std::fs::write(&path, &bytes[..bytes.len() - 3]).expect("written");
        let error = WeightFile::open(dir.path(), Family::Bert).err().expect("an error");
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains("model.safetensors is damaged"), "{error}");
        Ok(())
    }
}
