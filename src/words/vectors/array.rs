//! Matrices of floating-point numbers in a pickle: NumPy's arrays and PyTorch's tensors.

use std::io::Cursor;

use super::pickle::{self, Value};

/// A matrix by rows, in f32.
#[derive(Debug)]
pub(super) struct Matrix {
    pub(super) columns: usize,
    pub(super) values: Vec<f32>,
}

/// How its elements are stored.
#[derive(Debug, Clone, Copy)]
struct Element {
    width: usize,
    big_endian: bool,
}

impl Element {
    fn decode(self, bytes: &[u8]) -> Vec<f32> {
        let ordered = |element: &[u8]| {
            let mut whole = [0; 8];
            whole[..self.width].copy_from_slice(element);
            if self.big_endian {
                whole[..self.width].reverse();
            }
            whole
        };
        let value = |element: &[u8]| match (self.width, ordered(element)) {
            (2, [a, b, ..]) => half::f16::from_le_bytes([a, b]).to_f32(),
            (4, [a, b, c, d, ..]) => f32::from_le_bytes([a, b, c, d]),
            (_, whole) => f64::from_le_bytes(whole) as f32,
        };
        bytes.chunks_exact(self.width).map(value).collect()
    }
}

/// The matrix that a value is.
pub(super) fn matrix(value: &Value) -> Result<Matrix, String> {
    // `nn.Parameter`
    if let Some((arguments, _)) = value.called("_rebuild_parameter") {
        return matrix(arguments.first().unwrap_or(&Value::None));
    }
    if let Some((arguments, _)) = value.called("_rebuild_tensor_v2") {
        return torch(&arguments).ok_or_else(|| {
            "is a PyTorch tensor that is no contiguous matrix of f16, f32 or f64 on the CPU".into()
        });
    }
    numpy(value).ok_or_else(|| {
        "is neither a NumPy array nor a PyTorch tensor with two dimensions, of f16, f32 or f64"
            .into()
    })
}

fn numpy(value: &Value) -> Option<Matrix> {
    let (shape, dtype, columns_first, bytes) = match value.called("_frombuffer") {
        // Protocol 5: bytes, dtype, shape, order.
        Some((arguments, _)) => {
            let [bytes, dtype, shape, order] = arguments.try_into().ok()?;
            (shape, dtype, order.as_text()? == "F", bytes)
        }
        // The array is made empty, and then given version, shape, dtype, whether columns come first, bytes.
        None => {
            let (_, state) = value.called("_reconstruct")?;
            let [_, shape, dtype, columns_first, bytes] = state.to_items()?.try_into().ok()?;
            (shape, dtype, matches!(columns_first, Value::Bool(true)), bytes)
        }
    };
    let element = element(&dtype)?;
    let (rows, columns) = shape_of(&shape)?;
    let bytes = to_bytes(&bytes)?;
    if bytes.len() != rows.checked_mul(columns)?.checked_mul(element.width)? {
        return None;
    }
    let values = element.decode(&bytes);
    let values = match columns_first {
        true => (0..rows * columns).map(|i| values[i % columns * rows + i / columns]).collect(),
        false => values,
    };
    Some(Matrix { columns, values })
}

/// What `numpy.dtype("f4", False, True)`, with `(3, "<", ...)` as its state, says.
fn element(dtype: &Value) -> Option<Element> {
    let (arguments, state) = dtype.called("dtype")?;
    let width = match arguments.first()?.as_text()? {
        "f2" => 2,
        "f4" => 4,
        "f8" => 8,
        _ => return None,
    };
    let big_endian = state.to_items()?.get(1)?.as_text()? == ">";
    Some(Element { width, big_endian })
}

fn shape_of(shape: &Value) -> Option<(usize, usize)> {
    let [rows, columns] = shape.to_items()?.try_into().ok()?;
    let (rows, columns) = (rows.to_size()?, columns.to_size()?);
    (rows > 0 && columns > 0).then_some((rows, columns))
}

/// Bytes as they are, or as protocol 2 writes them: `_codecs.encode("...", "latin1")`; a bytearray is
/// made of either.
fn to_bytes(value: &Value) -> Option<Vec<u8>> {
    if let Value::Bytes(bytes) = value {
        return Some(bytes.to_vec());
    }
    if let Some((arguments, _)) = value.called("bytearray") {
        return to_bytes(arguments.first()?);
    }
    let (arguments, _) = value.called("encode")?;
    arguments.first()?.as_text()?.chars().map(|c| u8::try_from(u32::from(c)).ok()).collect()
}

/// A tensor: storage, first element, shape, strides. Its storage is a file of `torch.save` as before
/// PyTorch 1.6: magic number, protocol, type sizes, the storage's description, keys, then for the one key
/// how many elements there are, and these.
fn torch(arguments: &[Value]) -> Option<Matrix> {
    let [storage, first, shape, strides, ..] = arguments else { return None };
    let (loaded, _) = storage.called("_load_from_bytes")?;
    let bytes = to_bytes(loaded.first()?)?;
    let mut file = Cursor::new(&bytes[..]);
    for _ in ["magic number", "protocol", "type sizes"] {
        pickle::load(&mut file).ok()?;
    }
    let (described, _) = pickle::load(&mut file).ok()?.called("persistent")?;
    let Some(Value::Global(class)) = described.get(1) else { return None };
    let width = match class.rsplit('.').next()? {
        "HalfStorage" => 2,
        "FloatStorage" => 4,
        "DoubleStorage" => 8,
        _ => return None,
    };
    pickle::load(&mut file).ok()?;
    let at = usize::try_from(file.position()).ok()?.checked_add(8)?;
    let (rows, columns) = shape_of(shape)?;
    let (down, along) = shape_of(strides)?;
    if down != columns || along != 1 {
        return None;
    }
    let from = at.checked_add(first.to_size()?.checked_mul(width)?)?;
    let size = rows.checked_mul(columns)?.checked_mul(width)?;
    let elements = bytes.get(from..from.checked_add(size)?)?;
    Some(Matrix { columns, values: Element { width, big_endian: false }.decode(elements) })
}
