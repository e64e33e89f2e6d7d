//! Weight files in Hugging Face's formats: what tensors they hold, and each of them in f32 when it
//! is asked for, so that no more than one is in memory twice.
//!
//! | file | owns |
//! |---|---|
//! | this | one file or an index of shards; halves and doubles into f32 |
//! | `safetensors` | `*.safetensors` |
//! | `pickle` | `*.bin` of PyTorch, zipped (since 1.6) and before |
//!
//! Which of several forms is read is [`crate::hub::files`]' to say. Quantised weights are refused.

mod pickle;
#[cfg(test)]
mod pickled;
mod safetensors;
#[cfg(test)]
mod tests;

use std::{
    collections::HashMap,
    fs::File,
    io::Read,
    path::{Path, PathBuf},
};

use candle_core::{Device, Tensor};

use crate::{
    Error, Result,
    hub::files::{self, WEIGHTS},
};
use pickle::{Legacy, Zipped};
use safetensors::Safetensors;

/// The weight files of one directory.
pub struct WeightFiles {
    /// The only file, or the index.
    path: PathBuf,
    files: Vec<WeightFile>,
    /// Which file holds a tensor.
    holder: HashMap<String, usize>,
}

/// One of them.
struct WeightFile {
    path: PathBuf,
    reader: Box<dyn Reader>,
}

/// What every format can do. Errors say what is wrong with the file.
trait Reader {
    /// Names of all tensors.
    fn names(&self) -> Vec<String>;
    /// The shape of one that is there.
    fn shape(&self, name: &str) -> Option<Vec<usize>>;
    /// Its values, in f32.
    fn read(&self, name: &str) -> Result<Tensor, String>;
}

impl WeightFiles {
    /// Opens the best form of weights in `dir`; reads no tensor yet.
    ///
    /// # Errors
    /// `Data` if there are none, or a file is missing or damaged.
    pub fn open(dir: &Path) -> Result<Self> {
        let Some(name) = WEIGHTS.into_iter().find(|name| dir.join(name).is_file()) else {
            return Err(Error::Data(format!(
                "{} holds neither model.safetensors nor pytorch_model.bin, nor an index of either; \
                 model.path must be a directory with a Hugging Face checkpoint",
                dir.display()
            )));
        };
        let path = dir.join(name);
        let names = match files::is_index(name) {
            true => files::shards(&path)?,
            false => vec![name.to_owned()],
        };
        let mut all = Self { path, files: Vec::new(), holder: HashMap::new() };
        for name in names {
            all.add(dir.join(name))?;
        }
        if files::is_index(name) {
            all.check_index()?;
        }
        Ok(all)
    }

    /// The only file, or the index.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Names of all tensors.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.holder.keys().map(String::as_str)
    }

    /// The file that holds a tensor; the whole's if none does.
    pub fn path_of(&self, name: &str) -> &Path {
        self.holder.get(name).map_or(&self.path, |holder| &self.files[*holder].path)
    }

    /// The shape of a tensor, if there is such a one.
    pub fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.files[*self.holder.get(name)?].reader.shape(name)
    }

    /// A tensor in f32.
    ///
    /// # Errors
    /// `Data` if it is not there, not of floating-point numbers, or the file changed meanwhile.
    pub fn read(&self, name: &str) -> Result<Tensor> {
        let wrong =
            |e: &str| Error::Data(format!("{}: tensor {name}: {e}", self.path_of(name).display()));
        let holder = self.holder.get(name).ok_or_else(|| wrong("is not there"))?;
        self.files[*holder].reader.read(name).map_err(|e| wrong(&e))
    }

    fn add(&mut self, path: PathBuf) -> Result<()> {
        if !path.is_file() {
            return Err(Error::Data(format!(
                "{} is missing, and {} names it; fetch the model again",
                path.display(),
                self.path.display()
            )));
        }
        let reader = open(&path).map_err(|e| {
            Error::Data(format!(
                "{} is damaged or not a weight file ({e}); fetch it again",
                path.display()
            ))
        })?;
        let holder = self.files.len();
        self.holder.extend(reader.names().into_iter().map(|name| (name, holder)));
        self.files.push(WeightFile { path, reader });
        Ok(())
    }

    /// Every tensor is where the index says.
    fn check_index(&self) -> Result<()> {
        for (name, shard) in files::weight_map(&self.path)? {
            let holder = self.files.iter().find(|file| file.path.ends_with(&shard));
            if holder.is_none_or(|holder| holder.reader.shape(&name).is_none()) {
                return Err(Error::Data(format!(
                    "{} names {name}, which its shard {shard} does not hold; the files are not of \
                     one model: fetch them again",
                    self.path.display()
                )));
            }
        }
        Ok(())
    }
}

/// Opens a file by its first bytes.
fn open(path: &Path) -> Result<Box<dyn Reader>, String> {
    let mut first = Vec::new();
    let file = File::open(path).map_err(|e| e.to_string())?;
    file.take(pickle::LEGACY.len() as u64).read_to_end(&mut first).map_err(|e| e.to_string())?;
    if first.starts_with(b"version https:") {
        return Err("it is a Git LFS pointer to the weights: `git lfs pull` gets them".into());
    }
    Ok(match path.extension().is_some_and(|e| e == "safetensors") {
        true => Box::new(Safetensors::open(path)?),
        false if first == pickle::LEGACY => Box::new(Legacy::open(path)?),
        false => Box::new(Zipped::open(path)?),
    })
}

/// A number format that weights come in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Float {
    F16,
    BF16,
    F32,
    F64,
}

impl Float {
    fn bytes(self) -> usize {
        match self {
            Self::F16 | Self::BF16 => 2,
            Self::F32 => 4,
            Self::F64 => 8,
        }
    }

    /// A tensor of little-endian numbers from `source`, in f32.
    fn read(self, mut source: impl Read, shape: &[usize]) -> Result<Tensor, String> {
        let count: usize = shape.iter().product();
        let mut values = Vec::with_capacity(count);
        let mut buffer = vec![0; 1 << 20];
        let mut left = count * self.bytes();
        while left > 0 {
            let part = left.min(buffer.len());
            let bytes = &mut buffer[..part];
            source.read_exact(bytes).map_err(|e| e.to_string())?;
            match self {
                Self::F16 => extend(&mut values, bytes, |b| half::f16::from_le_bytes(b).to_f32()),
                Self::BF16 => extend(&mut values, bytes, |b| half::bf16::from_le_bytes(b).to_f32()),
                Self::F32 => extend(&mut values, bytes, f32::from_le_bytes),
                Self::F64 => extend(&mut values, bytes, |b| f64::from_le_bytes(b) as f32),
            }
            left -= part;
        }
        Tensor::from_vec(values, shape, &Device::Cpu).map_err(|e| e.to_string())
    }
}

fn extend<const N: usize>(values: &mut Vec<f32>, bytes: &[u8], value: impl Fn([u8; N]) -> f32) {
    values.extend(bytes.as_chunks().0.iter().map(|bytes| value(*bytes)));
}
