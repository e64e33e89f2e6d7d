//! What parameters hold, and what is held while they are read, as `model/parameters.rs` lays them out.

use super::{
    kernels::Machine,
    ledger::{Component, Held, Ledger},
};
use crate::{
    config::Quantization,
    model::parameters::{ALIGNMENT, Group, Spec},
};

/// Everything that stays from loading on.
#[derive(Debug, Default)]
pub struct Parameters {
    /// Whether values are read from a checkpoint, which may hold them transposed.
    pretrained: bool,
    _held: Vec<Held>,
    /// Elements of everything that trains, by parameter.
    trained: Vec<usize>,
    /// Elements of what a checkpoint's writer brings into the host's memory as f32, where it is not yet.
    copied: Vec<usize>,
    /// Elements of the largest matrix that is dequantised to be read.
    dequantized: usize,
}

/// Bytes of a quantised matrix in memory (`quantized/int8.rs`, `four_bit.rs`, `nested.rs`).
pub fn quantized_bytes(quantization: Quantization, rows: usize, columns: usize) -> usize {
    /// Bytes are padded to these.
    const WORD: usize = 16;
    let padded = |bytes: usize| bytes.next_multiple_of(WORD);
    match quantization {
        Quantization::Int8 => padded(rows * columns) + rows * 4,
        Quantization::Nf4 | Quantization::Fp4 => {
            let blocks = rows * columns / 64;
            // Codes, codes of their scales, scales of those, and the table of 256.
            padded(blocks * 32) + padded(blocks) + blocks.div_ceil(256) * 4 + 256 * 4
        }
    }
}

impl Parameters {
    /// Reads the groups, one parameter after the other, as `Parameters::new` does.
    pub fn load(machine: &Machine, groups: &[Group], pretrained: bool) -> Self {
        let mut parameters = Self { pretrained, ..Self::default() };
        for group in groups {
            if group.trains() {
                parameters.bucket(machine, group);
            }
            for spec in group.specs.iter().filter(|spec| !spec.trains) {
                parameters.frozen(machine, spec);
            }
        }
        parameters
    }

    fn bucket(&mut self, machine: &Machine, group: &Group) {
        let host = |elements: usize| machine.host.hold(Component::Workspace, elements * 4);
        let specs: Vec<&Spec> = group.specs.iter().filter(|spec| spec.trains).collect();
        let read: Vec<Held> = specs.iter().map(|spec| self.read(&machine.host, spec)).collect();
        let (mut base, mut added) = (0, 0);
        for spec in specs {
            let part = if spec.added { &mut added } else { &mut base };
            *part += spec.len().next_multiple_of(ALIGNMENT);
            self.trained.push(spec.len());
            self.copied.extend((machine.cuda || spec.transposed).then_some(spec.len()));
        }
        let len = base + added;
        let joined = machine.cuda.then(|| host(len));
        let rounded = machine.cuda.then(|| host(len / 2));
        let value = 4 + if machine.cuda { 2 } else { 0 };
        let mut held = |component, bytes| self._held.push(machine.ledger.hold(component, bytes));
        held(Component::Weights, base * value);
        held(Component::Adapters, added * value);
        held(Component::Optimizer, len * 2 * 4);
        if !group.table {
            held(Component::Gradients, len * 4);
        }
        drop((read, joined, rounded));
    }

    /// A parameter in f32 on the host, as its file or its generator gives it.
    fn read(&self, host: &Ledger, spec: &Spec) -> Held {
        let as_stored = host.hold(Component::Workspace, spec.len() * 4);
        if !(spec.transposed && self.pretrained) {
            return as_stored;
        }
        host.hold(Component::Workspace, spec.len() * 4)
    }

    fn frozen(&mut self, machine: &Machine, spec: &Spec) {
        let len = spec.len();
        let hold = |bytes| machine.ledger.hold(Component::Weights, bytes);
        if let (Some(quantization), [rows, columns]) = (spec.quantization, spec.shape.as_slice()) {
            let value = self.read(&machine.host, spec);
            let bytes = quantized_bytes(quantization, *rows, *columns);
            let of_host = machine.cuda.then(|| machine.host.hold(Component::Workspace, bytes));
            self._held.push(hold(bytes));
            self.dequantized = self.dequantized.max(len);
            self.copied.push(len);
            drop((value, of_host));
            return;
        }
        // On the CPU the value is the one that was read.
        let element = if spec.shape.len() > 1 { machine.element() } else { 4 };
        let value = self.read(&machine.host, spec);
        if !machine.cuda {
            drop(value);
        } else {
            machine.host.touch(len * element);
        }
        self._held.push(hold(len * element));
        self.copied.extend((machine.cuda || spec.transposed).then_some(len));
    }

    /// Elements of everything that trains.
    pub fn trained(&self) -> usize {
        self.trained.iter().sum()
    }

    /// `command/train/start.rs`: the values are read one by one, to be compared between ranks.
    pub fn compare(&self, machine: &Machine) {
        let whole = machine.numbers(self.dequantized);
        if machine.cuda {
            machine.host.touch(self.dequantized * 4);
        }
        drop(whole);
    }

    /// `checkpoint/files.rs`: what is not f32 in the host's memory is brought there, all of it before anything is
    /// written. With an `adapter` only what trained is.
    pub fn save(&self, machine: &Machine, adapter: bool) {
        let write = |elements: &mut dyn Iterator<Item = &usize>| {
            let hold = |len: &usize| machine.host.hold(Component::Workspace, len * 4);
            drop(elements.map(hold).collect::<Vec<_>>());
        };
        match adapter {
            true if machine.cuda => write(&mut self.trained.iter()),
            true => {}
            false => write(&mut self.copied.iter()),
        }
        if machine.cuda {
            // Both moments.
            write(&mut self.trained.iter().chain(&self.trained));
        }
    }
}

#[cfg(test)]
mod tests {
    use allreel_kernels::quantized::{FourBit, Int8, Kind, Quantized};
    use candle_core::{DType, Device, Tensor};

    use super::*;

    #[test]
    fn quantised_matrices_hold_what_the_kernels_keep() -> crate::Result<()> {
        let (rows, columns) = (300, 640);
        let matrix = Tensor::ones((rows, columns), DType::F32, &Device::Cpu)?;
        for (quantization, quantized) in [
            (Quantization::Int8, Quantized::from(Int8::quantize(&matrix)?)),
            (Quantization::Nf4, FourBit::quantize(&matrix, Kind::Nf4)?.into()),
            (Quantization::Fp4, FourBit::quantize(&matrix, Kind::Fp4)?.into()),
        ] {
            // The table of 256 codes and padding are not of its rows.
            let beside = quantized_bytes(quantization, rows, columns) - quantized.bytes();
            let table = if quantization == Quantization::Int8 { 0 } else { 256 * 4 };
            assert!((table..table + 32).contains(&beside), "{quantization:?}: {beside}");
        }
        Ok(())
    }
}
