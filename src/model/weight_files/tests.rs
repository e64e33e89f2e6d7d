//! Every form of weights reads to the same numbers; what is missing or damaged is named.

use std::{collections::HashMap, fs};

use candle_core::{DType, Device, Tensor};

use super::{
    WeightFiles,
    pickled::{self, Saved},
};
use crate::Result;

/// Exact in every format.
const VALUES: [f32; 6] = [1.0, -2.5, 0.0, 0.15625, 384.0, -0.00390625];

fn flat(tensor: &Tensor) -> Vec<f32> {
    assert_eq!(tensor.dtype(), DType::F32);
    tensor.flatten_all().and_then(|t| t.to_vec1()).expect("f32")
}

struct Dir(tempfile::TempDir);

impl Dir {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("a directory"))
    }

    fn write(&self, name: &str, bytes: impl AsRef<[u8]>) {
        fs::write(self.0.path().join(name), bytes).expect("written");
    }

    fn safetensors(&self, name: &str, tensors: &[(&'static str, Tensor)]) {
        let tensors: HashMap<&str, Tensor> = tensors.iter().cloned().collect();
        let path = self.0.path().join(name);
        candle_core::safetensors::save(&tensors, path).expect("written");
    }

    fn open(&self) -> Result<WeightFiles> {
        WeightFiles::open(self.0.path())
    }

    /// The error of opening, which must be one of bad input.
    #[track_caller]
    fn refused(&self, says: &[&str]) {
        let error = self.open().err().expect("an error");
        assert_eq!(error.exit_code(), 2);
        for say in says {
            assert!(error.to_string().contains(say), "no `{say}` in {error}");
        }
    }
}

fn tensor(values: &[f32], shape: &[usize], dtype: DType) -> Tensor {
    Tensor::from_slice(values, shape, &Device::Cpu).and_then(|t| t.to_dtype(dtype)).expect("shape")
}

#[test]
fn every_precision_of_safetensors_becomes_f32() -> Result<()> {
    let dir = Dir::new();
    for dtype in [DType::F16, DType::BF16, DType::F32, DType::F64] {
        let tensors = [
            ("a", tensor(&VALUES, &[2, 3], dtype)),
            ("b", tensor(&VALUES[1..], &[5], dtype)),
            ("empty", tensor(&[], &[0, 4], dtype)),
        ];
        dir.safetensors("model.safetensors", &tensors);
        let files = dir.open()?;
        assert_eq!(files.shape("a"), Some(vec![2, 3]));
        assert_eq!(files.shape("c"), None);
        assert_eq!(flat(&files.read("b")?), VALUES[1..], "{dtype:?}");
        assert_eq!(flat(&files.read("a")?), VALUES, "{dtype:?}");
        assert_eq!(files.read("empty")?.dims(), [0, 4]);
    }
    Ok(())
}

#[test]
fn tensors_longer_than_the_buffer_are_read_whole() -> Result<()> {
    let dir = Dir::new();
    // Three buffers of halves, and a rest.
    let values: Vec<f32> = (0..(3 << 19) + 17).map(|i| (i % 251) as f32).collect();
    let long = tensor(&values, &[values.len()], DType::BF16);
    dir.safetensors("model.safetensors", &[("long", long)]);
    assert!(flat(&dir.open()?.read("long")?) == values);
    Ok(())
}

#[test]
fn integers_are_refused_only_when_asked_for() -> Result<()> {
    let dir = Dir::new();
    let ids = Tensor::arange(0u32, 4, &Device::Cpu)?;
    dir.safetensors("model.safetensors", &[("ids", ids)]);
    let error = dir.open()?.read("ids").unwrap_err().to_string();
    assert!(error.contains("tensor ids: has dtype U32; weights are F16"), "{error}");
    Ok(())
}

fn saved() -> [Saved; 2] {
    [Saved::f32("a", &[2, 3], &VALUES), Saved::f16("b", &[5], &VALUES[1..])]
}

#[test]
fn pytorch_files_of_both_kinds_are_read() -> Result<()> {
    for bytes in [pickled::zipped(&saved()), pickled::legacy(&saved())] {
        let dir = Dir::new();
        dir.write("pytorch_model.bin", bytes);
        let files = dir.open()?;
        let mut names: Vec<&str> = files.names().collect();
        names.sort_unstable();
        assert_eq!(names, ["a", "b"]);
        assert_eq!(files.shape("a"), Some(vec![2, 3]));
        assert_eq!(flat(&files.read("a")?), VALUES);
        assert_eq!(flat(&files.read("b")?), VALUES[1..]);
    }
    Ok(())
}

#[test]
fn damaged_files_are_named() {
    let dir = Dir::new();
    dir.safetensors("model.safetensors", &[("a", tensor(&VALUES, &[6], DType::F32))]);
    let whole = fs::read(dir.0.path().join("model.safetensors")).expect("a file");
    for length in [0, 7, 20, whole.len() - 1] {
        dir.write("model.safetensors", &whole[..length]);
        dir.refused(&["model.safetensors is damaged", "fetch it again"]);
    }
    dir.write("model.safetensors", [whole, vec![0]].concat());
    dir.refused(&["model.safetensors is damaged", "promises"]);
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n";
    dir.write("model.safetensors", pointer);
    dir.refused(&["model.safetensors", "Git LFS pointer"]);

    let dir = Dir::new();
    for whole in [pickled::zipped(&saved()), pickled::legacy(&saved())] {
        for length in [0, 17, whole.len() / 2, whole.len() - 1] {
            dir.write("pytorch_model.bin", &whole[..length]);
            dir.refused(&["pytorch_model.bin is damaged", "fetch it again"]);
        }
    }
}

fn index(shards: &[(&str, &str)]) -> String {
    let map: HashMap<&str, &str> = shards.iter().copied().collect();
    serde_json::json!({"metadata": {"total_size": 1}, "weight_map": map}).to_string()
}

#[test]
fn shards_of_both_formats_are_one_model() -> Result<()> {
    let dir = Dir::new();
    let (one, two) = ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin");
    dir.write("pytorch_model.bin.index.json", index(&[("a", one), ("b", two)]));
    let [a, b] = saved();
    dir.write(one, pickled::zipped(&[a]));
    dir.write(two, pickled::legacy(&[b]));
    let files = dir.open()?;
    assert_eq!(flat(&files.read("a")?), VALUES);
    assert_eq!(flat(&files.read("b")?), VALUES[1..]);
    assert!(files.path_of("b").ends_with(two));

    // Safetensors come first where there are both.
    let (one, two) = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors");
    dir.write("model.safetensors.index.json", index(&[("a", one), ("b", two), ("c", two)]));
    dir.safetensors(one, &[("a", tensor(&VALUES[..2], &[2], DType::BF16))]);
    let b = tensor(&VALUES[2..], &[2, 2], DType::F32);
    dir.safetensors(two, &[("b", b), ("c", tensor(&VALUES[..1], &[1], DType::F16))]);
    let files = dir.open()?;
    assert_eq!(flat(&files.read("a")?), VALUES[..2]);
    assert_eq!(flat(&files.read("b")?), VALUES[2..]);
    assert_eq!(flat(&files.read("c")?), VALUES[..1]);
    Ok(())
}

#[test]
fn shards_that_are_missing_damaged_or_wrong_are_named() {
    let dir = Dir::new();
    let (one, two) = ("one.safetensors", "two.safetensors");
    dir.write("model.safetensors.index.json", index(&[("a", one), ("b", two)]));
    dir.safetensors(one, &[("a", tensor(&VALUES, &[6], DType::F32))]);
    dir.refused(&["two.safetensors is missing", "model.safetensors.index.json names it"]);
    dir.write(two, "not weights");
    dir.refused(&["two.safetensors is damaged"]);
    dir.safetensors(two, &[("other", tensor(&VALUES, &[6], DType::F32))]);
    dir.refused(&["names b, which its shard two.safetensors does not hold"]);
    dir.write("model.safetensors.index.json", "{}");
    dir.refused(&["model.safetensors.index.json", "no index of weights"]);
}
