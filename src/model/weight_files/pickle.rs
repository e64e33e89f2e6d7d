//! `*.bin` as `torch.save` writes it. Pickles are read by candle, which runs nothing of what they
//! contain.
//!
//! Since PyTorch 1.6 it is a zip archive. Before, and on the Hub that is many an old model, it was
//!
//! ```text
//! pickle of a magic number, of the protocol's version, of the writer's type sizes
//! pickle of the state dict, whose tensors point into storages by key
//! pickle of the list of keys
//! for each key: number of elements (8 bytes), the elements
//! ```

use std::{
    collections::HashMap,
    fs::File,
    io::{BufReader, Read, Seek, SeekFrom},
    path::Path,
};

use candle_core::{
    DType, Tensor,
    pickle::{Object, PthTensors, Stack, TensorInfo},
};

use super::{Float, Reader};

/// How a file from before 1.6 begins: the pickle of the magic number.
pub(super) const LEGACY: &[u8] = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19\x2e";

/// An archive.
pub(super) struct Zipped(PthTensors);

impl Zipped {
    pub(super) fn open(path: &Path) -> Result<Self, String> {
        PthTensors::new(path, None).map(Self).map_err(|e| e.to_string())
    }
}

impl Reader for Zipped {
    fn names(&self) -> Vec<String> {
        self.0.tensor_infos().keys().cloned().collect()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.0.tensor_infos().get(name).map(|info| info.layout.dims().to_vec())
    }

    fn read(&self, name: &str) -> Result<Tensor, String> {
        let read = || self.0.get(name)?.map(|t| t.to_dtype(DType::F32)?.contiguous()).transpose();
        read().map_err(|e| e.to_string())?.ok_or_else(|| "is not there".into())
    }
}

/// A file from before 1.6.
pub(super) struct Legacy {
    file: File,
    tensors: HashMap<String, TensorInfo>,
    /// First byte of the elements of each storage.
    storages: HashMap<String, u64>,
}

impl Legacy {
    pub(super) fn open(path: &Path) -> Result<Self, String> {
        let file = File::open(path).map_err(|e| e.to_string())?;
        let size = file.metadata().map_err(|e| e.to_string())?.len();
        let mut reader = BufReader::new(file);
        // The magic number has ten bytes, more than candle's integers.
        reader.seek(SeekFrom::Start(LEGACY.len() as u64)).map_err(|e| e.to_string())?;
        for _ in ["protocol", "type sizes"] {
            object(&mut reader)?;
        }
        let state = object(&mut reader)?;
        let keys = object(&mut reader)?;
        let tensors = tensors(state)?;
        let mut elements: HashMap<&str, (u64, u64)> = HashMap::new();
        for tensor in tensors.values() {
            let bytes = tensor.dtype.size_in_bytes() as u64;
            elements.insert(&tensor.path, (tensor.storage_size as u64, bytes));
        }
        let mut at = reader.stream_position().map_err(|e| e.to_string())?;
        let mut storages = HashMap::new();
        let Object::List(keys) = keys else { return Err("it lists no storages".into()) };
        for key in keys {
            let key = format!("/{}", key.unicode().map_err(|key| format!("storage {key:?}"))?);
            let mut count = [0; 8];
            reader.seek(SeekFrom::Start(at)).map_err(|e| e.to_string())?;
            reader.read_exact(&mut count).map_err(|e| e.to_string())?;
            let count = u64::from_le_bytes(count);
            let (want, bytes) = *elements.get(key.as_str()).ok_or("a storage has no tensor")?;
            let end = count.checked_mul(bytes).and_then(|bytes| (at + 8).checked_add(bytes));
            let Some(end) = end.filter(|end| count == want && *end <= size) else {
                return Err(format!("storage {key} has {count} elements of {want}"));
            };
            storages.insert(key, at + 8);
            at = end;
        }
        Ok(Self { file: reader.into_inner(), tensors, storages })
    }
}

/// The next pickle.
fn object(reader: &mut BufReader<File>) -> Result<Object, String> {
    let mut stack = Stack::empty();
    stack.read_loop(reader).map_err(|e| e.to_string())?;
    stack.finalize().map_err(|e| e.to_string())
}

/// The tensors of a state dict, by name.
fn tensors(state: Object) -> Result<HashMap<String, TensorInfo>, String> {
    let entries = state.dict().map_err(|_| "it holds no state dict")?;
    let mut tensors = HashMap::new();
    for (name, value) in entries {
        let info = value.into_tensor_info(name, Path::new("")).map_err(|e| e.to_string())?;
        tensors.extend(info.map(|info| (info.name.clone(), info)));
    }
    Ok(tensors)
}

impl Reader for Legacy {
    fn names(&self) -> Vec<String> {
        self.tensors.keys().cloned().collect()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.tensors.get(name).map(|info| info.layout.dims().to_vec())
    }

    fn read(&self, name: &str) -> Result<Tensor, String> {
        let info = self.tensors.get(name).ok_or("is not there")?;
        let storage = self.storages.get(&info.path).ok_or("its storage is not there")?;
        let float = match info.dtype {
            DType::F16 => Float::F16,
            DType::BF16 => Float::BF16,
            DType::F32 => Float::F32,
            DType::F64 => Float::F64,
            other => return Err(format!("has dtype {other:?}; weights are floating-point")),
        };
        let count = info.layout.shape().elem_count();
        // candle gives the first element's place in bytes.
        let first = info.layout.start_offset();
        if !info.layout.is_contiguous() || first / float.bytes() + count > info.storage_size {
            return Err(
                "is a view that is not read; save the model again with a newer PyTorch".into()
            );
        }
        let mut file = &self.file;
        file.seek(SeekFrom::Start(storage + first as u64)).map_err(|e| e.to_string())?;
        float.read(file, info.layout.dims())
    }
}
