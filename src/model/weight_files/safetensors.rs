//! `*.safetensors`: a length, a JSON header with names, shapes and places, then the bytes.
//!
//! Read with plain seeks: the crate's own reader wants the whole file in memory or mapped.

use std::{
    fs::File,
    io::{Read, Seek, SeekFrom},
    path::Path,
};

use ::safetensors::{Dtype, tensor::Metadata};
use candle_core::Tensor;

use super::{Float, Reader};

/// The crate's own limit, against lengths that are no lengths.
const LONGEST_HEADER: u64 = 100_000_000;
/// Bytes of the length before the header.
const LENGTH: u64 = 8;

/// One open file.
pub(super) struct Safetensors {
    file: File,
    header: Metadata,
    /// Where the tensors begin.
    start: u64,
}

impl Safetensors {
    /// Reads the header, and holds the file's length to it.
    pub(super) fn open(path: &Path) -> Result<Self, String> {
        let mut file = File::open(path).map_err(|e| e.to_string())?;
        let size = file.metadata().map_err(|e| e.to_string())?.len();
        let mut length = [0; LENGTH as usize];
        file.read_exact(&mut length).map_err(|e| e.to_string())?;
        let length = u64::from_le_bytes(length);
        if length > LONGEST_HEADER.min(size - LENGTH) {
            return Err(format!("its header would have {length} bytes"));
        }
        let mut header = vec![0; length as usize];
        file.read_exact(&mut header).map_err(|e| e.to_string())?;
        let header: Metadata =
            serde_json::from_slice(&header).map_err(|e| format!("its header: {e}"))?;
        let start = LENGTH + length;
        let promised = start + header.data_len() as u64;
        if promised != size {
            return Err(format!("it has {size} bytes, and its header promises {promised}"));
        }
        Ok(Self { file, header, start })
    }
}

impl Reader for Safetensors {
    fn names(&self) -> Vec<String> {
        self.header.offset_keys()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.header.info(name).map(|info| info.shape.clone())
    }

    fn read(&self, name: &str) -> Result<Tensor, String> {
        let info = self.header.info(name).ok_or("is not there")?;
        let float = match info.dtype {
            Dtype::F16 => Float::F16,
            Dtype::BF16 => Float::BF16,
            Dtype::F32 => Float::F32,
            Dtype::F64 => Float::F64,
            other => {
                return Err(format!(
                    "has dtype {other:?}; weights are F16, BF16, F32 or F64: save the model unquantised"
                ));
            }
        };
        let mut file = &self.file;
        let begin = SeekFrom::Start(self.start + info.data_offsets.0 as u64);
        file.seek(begin).map_err(|e| e.to_string())?;
        float.read(file, &info.shape)
    }
}
