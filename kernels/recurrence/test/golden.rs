//! A bidirectional LSTM of two layers by PyTorch over packed sequences: what it gives, and its gradients.

use candle_core::{D, DType, safetensors::BufferedSafetensors};

use super::*;
use crate::testing::reference;

struct Golden {
    case: BufferedSafetensors,
    model: BufferedSafetensors,
    ragged: Ragged,
}

/// What a layer's two directions leave: h beside each other, and what backward needs of each.
struct Layer {
    x: Tensor,
    h: Tensor,
    saved: [Saved; 2],
}

const DIRECTIONS: [(bool, &str); 2] = [(false, ""), (true, "_reverse")];

impl Golden {
    fn open() -> Option<Self> {
        let folder = reference("ALLREEL_GOLDEN")?.join("lstm");
        let open = |file| {
            let path = folder.join(file);
            let bytes = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
            BufferedSafetensors::new(bytes).expect("a safetensors file")
        };
        let case = open("case.safetensors");
        let lengths = case.load("lengths", &Device::Cpu).and_then(|l| l.to_vec1::<i64>());
        let lengths: Vec<usize> = lengths.expect("lengths").iter().map(|n| *n as usize).collect();
        let ragged = Ragged::new(&lengths, &[0, 1, 2]).expect("lengths");
        Some(Self { case, model: open("model.safetensors"), ragged })
    }

    fn weight(&self, name: &str) -> Result<Tensor> {
        self.model.load(name, &Device::Cpu)
    }

    fn want(&self, name: &str) -> Result<Tensor> {
        self.case.load(name, &Device::Cpu)
    }

    /// `[T, _]` of `[B, longest, _]`.
    fn packed(&self, padded: &Tensor) -> Result<Tensor> {
        let own = |i| padded.get(i)?.narrow(0, 0, self.ragged.range(i).len());
        Tensor::cat(&(0..self.ragged.sequences()).map(own).collect::<Result<Vec<_>>>()?, 0)
    }

    fn op(&self, reverse: bool) -> Recurrence<'_> {
        Recurrence { cell: Cell::Lstm, ragged: &self.ragged, reverse }
    }

    fn forward(&self, x: Tensor, layer: usize) -> Result<Layer> {
        let run = |(reverse, suffix)| {
            let weight = |of| self.weight(&format!("lstm.{of}_l{layer}{suffix}"));
            let gx = linear::forward(&x, &weight("weight_ih")?, Some(&weight("bias_ih")?))?;
            let (w_hh, b_hh) = (weight("weight_hh")?, weight("bias_hh")?);
            let weights = Weights { w_hh: &w_hh, b_hh: Some(&b_hh) };
            forward(self.op(reverse), gx, weights, None)
        };
        let [(one, saved), (other, saved_reverse)] = [run(DIRECTIONS[0])?, run(DIRECTIONS[1])?];
        let h = Tensor::cat(&[&one, &other], 1)?;
        Ok(Layer { x, h, saved: [saved, saved_reverse] })
    }

    /// dx; holds the gradients of the parameters to PyTorch's.
    fn backward(&self, of: Layer, layer: usize, dh: &Tensor) -> Result<Tensor> {
        let hidden = dh.dim(1)? / 2;
        let dx = zeros(&of.x)?;
        for ((i, (reverse, suffix)), saved) in DIRECTIONS.into_iter().enumerate().zip(of.saved) {
            let name = |of: &str| format!("lstm.{of}_l{layer}{suffix}");
            let w_hh = self.weight(&name("weight_hh"))?;
            let w_ih = self.weight(&name("weight_ih"))?;
            let (dw, db) = (zeros(&w_hh)?, Tensor::zeros(w_hh.dim(0)?, DType::F32, &Device::Cpu)?);
            let own = dh.narrow(1, i * hidden, hidden)?.contiguous()?;
            let into = Weights { w_hh: &dw, b_hh: Some(&db) };
            let d_gx = backward(self.op(reverse), saved, &w_hh, &own, into)?.gx;
            self.holds(&name("weight_hh"), &dw)?;
            self.holds(&name("bias_hh"), &db)?;
            let (dw, db) = (zeros(&w_ih)?, zeros(&db)?);
            linear::backward_weight(&d_gx, &of.x, &dw)?;
            linear::backward_bias(&d_gx, &db)?;
            self.holds(&name("weight_ih"), &dw)?;
            self.holds(&name("bias_ih"), &db)?;
            linear::backward_input_into(&d_gx, &w_ih, &dx)?;
        }
        Ok(dx)
    }

    /// What the README of the reference data suggests for gradients: 1e-4 of the largest, and 1e-6.
    fn holds(&self, name: &str, got: &Tensor) -> Result<()> {
        let want = self.want(&format!("grad.{name}"))?;
        let largest = f64::from(want.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?);
        let tolerance = 1e-4 * largest + 1e-6;
        assert_close(name, got, &want, tolerance / largest.max(1.0))
    }

    /// Rows of the final states of both directions, `[B, 2H]`: at the true end, and at step 0.
    fn ends(&self, h: &Tensor) -> Result<Tensor> {
        let hidden = h.dim(1)? / 2;
        let own = |i| {
            let rows = self.ragged.range(i);
            let (last, first) = (h.get(rows.end - 1)?, h.get(rows.start)?);
            Tensor::cat(&[last.narrow(0, 0, hidden)?, first.narrow(0, hidden, hidden)?], 0)
        };
        Tensor::stack(&(0..self.ragged.sequences()).map(own).collect::<Result<Vec<_>>>()?, 0)
    }
}

#[test]
fn golden_lstm_of_two_directions_and_two_layers() -> Result<()> {
    let Some(golden) = Golden::open() else { return Ok(()) };
    let ids = golden.packed(&golden.want("input_ids")?.unsqueeze(2)?)?.flatten_all()?;
    let x = golden.weight("embedding.weight")?.index_select(&ids, 0)?;
    let first = golden.forward(x, 0)?;
    let second = golden.forward(first.h.clone(), 1)?;
    assert_close("output", &second.h, &golden.packed(&golden.want("output")?)?, 1e-5)?;
    let h_n = golden.want("h_n")?;
    for (i, layer) in [&first, &second].into_iter().enumerate() {
        let want = Tensor::cat(&[h_n.get(2 * i)?, h_n.get(2 * i + 1)?], 1)?;
        assert_close("h_n", &golden.ends(&layer.h)?, &want, 1e-5)?;
    }

    let (ends, fc) = (golden.ends(&second.h)?, golden.weight("fc.weight")?);
    let logits = linear::forward(&ends, &fc, Some(&golden.weight("fc.bias")?))?;
    assert_close("logits", &logits, &golden.want("logits")?, 1e-5)?;
    let exp = logits.exp()?;
    let likely = exp.broadcast_div(&exp.sum_keepdim(D::Minus1)?)?;
    let labels = golden.want("labels")?.unsqueeze(1)?;
    let one = Tensor::ones((3, 1), DType::F32, &Device::Cpu)?;
    let d_logits = (likely - zeros(&logits)?.scatter_add(&labels, &one, 1)?)?;
    let d_ends = linear::backward_input(&(d_logits / 3.0)?, &fc)?.to_vec2::<f32>()?;
    let hidden = d_ends[0].len() / 2;
    let mut dh = vec![vec![0f32; 2 * hidden]; golden.ragged.tokens()];
    for (i, d_end) in d_ends.iter().enumerate() {
        let rows = golden.ragged.range(i);
        dh[rows.end - 1][..hidden].copy_from_slice(&d_end[..hidden]);
        dh[rows.start][hidden..].copy_from_slice(&d_end[hidden..]);
    }
    let dh = golden.backward(second, 1, &Tensor::new(dh, &Device::Cpu)?)?;
    let dx = golden.backward(first, 0, &dh)?;
    let table = Tensor::zeros((200, 10), DType::F32, &Device::Cpu)?.index_add(&ids, &dx, 0)?;
    golden.holds("embedding.weight", &table)
}
