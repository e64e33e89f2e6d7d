//! What `torch.save` writes, for tests: a state dict zipped as since PyTorch 1.6, or as before.

use std::io::{Cursor, Write};

/// One tensor: name, shape, torch's storage class, its bytes.
pub(super) struct Saved {
    pub(super) name: &'static str,
    pub(super) shape: Vec<u16>,
    pub(super) class: &'static str,
    pub(super) width: usize,
    pub(super) bytes: Vec<u8>,
}

impl Saved {
    /// A tensor of f32.
    pub(super) fn f32(name: &'static str, shape: &[u16], values: &[f32]) -> Self {
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        Self { name, shape: shape.to_vec(), class: "FloatStorage", width: 4, bytes }
    }

    /// A tensor of halves.
    pub(super) fn f16(name: &'static str, shape: &[u16], values: &[f32]) -> Self {
        let bytes = values.iter().flat_map(|v| half::f16::from_f32(*v).to_le_bytes()).collect();
        Self { name, shape: shape.to_vec(), class: "HalfStorage", width: 2, bytes }
    }

    fn count(&self) -> usize {
        self.bytes.len() / self.width
    }
}

fn text(pickle: &mut Vec<u8>, text: &str) {
    pickle.push(b'X');
    pickle.extend((text.len() as u32).to_le_bytes());
    pickle.extend(text.as_bytes());
}

fn numbers(pickle: &mut Vec<u8>, numbers: &[u16]) {
    pickle.push(b'(');
    for number in numbers {
        pickle.push(b'M');
        pickle.extend(number.to_le_bytes());
    }
    pickle.push(b't');
}

/// The pickle of a state dict whose storage `i` has the key `i`. Before 1.6 a storage also said of
/// what it was a view.
fn state_dict(tensors: &[Saved], legacy: bool) -> Vec<u8> {
    let mut pickle = b"\x80\x02}(".to_vec();
    for (key, tensor) in tensors.iter().enumerate() {
        text(&mut pickle, tensor.name);
        pickle.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
        text(&mut pickle, "storage");
        pickle.extend(format!("ctorch\n{}\n", tensor.class).bytes());
        text(&mut pickle, &key.to_string());
        text(&mut pickle, "cpu");
        pickle.push(b'M');
        pickle.extend((tensor.count() as u16).to_le_bytes());
        pickle.extend(if legacy { &b"NtQ"[..] } else { b"tQ" });
        // Offset, shape, strides, requires_grad, hooks.
        pickle.extend(b"K\x00");
        numbers(&mut pickle, &tensor.shape);
        let stride = |i: usize| tensor.shape[i + 1..].iter().product();
        numbers(&mut pickle, &(0..tensor.shape.len()).map(stride).collect::<Vec<u16>>());
        pickle.extend(b"\x89}tR");
    }
    pickle.extend(b"u.");
    pickle
}

/// `torch.save` since 1.6.
pub(super) fn zipped(tensors: &[Saved]) -> Vec<u8> {
    let mut archive = zip::ZipWriter::new(Cursor::new(Vec::new()));
    let stored =
        zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
    let mut add = |name: String, bytes: &[u8]| {
        archive.start_file(name, stored).expect("a new entry");
        archive.write_all(bytes).expect("written");
    };
    add("archive/data.pkl".into(), &state_dict(tensors, false));
    for (key, tensor) in tensors.iter().enumerate() {
        add(format!("archive/data/{key}"), &tensor.bytes);
    }
    archive.finish().expect("an archive").into_inner()
}

/// `torch.save` before 1.6.
pub(super) fn legacy(tensors: &[Saved]) -> Vec<u8> {
    let mut file = super::pickle::LEGACY.to_vec();
    // Protocol 1001, and what the writer's types were.
    file.extend(b"\x80\x02M\xe9\x03.");
    file.extend(b"\x80\x02}(");
    text(&mut file, "little_endian");
    file.extend(b"\x88u.");
    file.extend(state_dict(tensors, true));
    file.extend(b"\x80\x02](");
    for key in 0..tensors.len() {
        text(&mut file, &key.to_string());
    }
    file.extend(b"e.");
    for tensor in tensors {
        file.extend((tensor.count() as u64).to_le_bytes());
        file.extend(&tensor.bytes);
    }
    file
}
