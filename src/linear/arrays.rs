//! Flat arrays by name, as safetensors on disk.

use std::{collections::HashMap, path::Path};

use safetensors::{Dtype, SafeTensors, tensor::TensorView};

use crate::{Error, Result};

/// An array to write.
pub struct Array<'a> {
    dtype: Dtype,
    bytes: &'a [u8],
    length: usize,
}

/// What arrays are made of.
pub trait Element: bytemuck::Pod {
    /// What safetensors calls it.
    const DTYPE: Dtype;
}

impl Element for f32 {
    const DTYPE: Dtype = Dtype::F32;
}

impl Element for f64 {
    const DTYPE: Dtype = Dtype::F64;
}

impl Element for u64 {
    const DTYPE: Dtype = Dtype::U64;
}

impl<'a> Array<'a> {
    /// A view of `values`.
    pub fn of<T: Element>(values: &'a [T]) -> Self {
        Self { dtype: T::DTYPE, bytes: bytemuck::cast_slice(values), length: values.len() }
    }
}

/// Writes arrays by name.
///
/// # Errors
/// `Device` if the file cannot be written.
pub fn write_arrays<S: AsRef<str>>(path: &Path, arrays: &[(S, Array<'_>)]) -> Result<()> {
    let views = arrays
        .iter()
        .map(|(name, array)| {
            let view = TensorView::new(array.dtype, vec![array.length], array.bytes);
            Ok((name.as_ref(), view.map_err(|e| Error::Bug(e.to_string()))?))
        })
        .collect::<Result<Vec<_>>>()?;
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    safetensors::serialize_to_file(views, Some(metadata), path).map_err(|e| Error::writing(path, e))
}

/// The bytes of a file of arrays.
pub struct Arrays<'p> {
    path: &'p Path,
    bytes: Vec<u8>,
}

impl<'p> Arrays<'p> {
    /// Reads the file.
    ///
    /// # Errors
    /// `Data` if it cannot be read.
    pub fn read(path: &'p Path) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(|e| Error::reading(path, e))?;
        Ok(Self { path, bytes })
    }

    /// The array of this name.
    ///
    /// # Errors
    /// `Data` if there is none of this type.
    pub fn get<T: Element>(&self, name: &str) -> Result<Vec<T>> {
        let file =
            SafeTensors::deserialize(&self.bytes).map_err(|e| Error::reading(self.path, e))?;
        match file.tensor(name) {
            Ok(view) if view.dtype() == T::DTYPE => Ok(bytemuck::pod_collect_to_vec(view.data())),
            _ => Err(Error::Data(format!(
                "{} has no array {name} of {:?}; it is damaged or of another program: train the model again",
                self.path.display(),
                T::DTYPE
            ))),
        }
    }
}
