//! What bitsandbytes 0.50.2 stored of one matrix, and the definitions beside it, bit for bit.

use candle_core::safetensors::BufferedSafetensors;

use super::*;
use crate::{
    quantized::{four_bit::quantize_blocks, nested},
    testing::reference,
};

/// A file of reference data; its accessors fail the test where a tensor is missing.
struct Golden(BufferedSafetensors);

impl Golden {
    fn open(file: &str) -> Option<Self> {
        let path = reference("ALLREEL_GOLDEN")?.join("quant").join(file);
        let bytes = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        Some(Self(BufferedSafetensors::new(bytes).expect("a safetensors file")))
    }

    fn tensor(&self, name: &str) -> Tensor {
        self.0.load(name, &Device::Cpu).unwrap_or_else(|e| panic!("{name}: {e}"))
    }

    /// Holds f32s to those in the file, bit for bit, but for the sign of a zero: the definitions were computed in
    /// floats and keep one, which codes do not.
    fn same_bits(&self, name: &str, values: &[f32]) {
        let bits = |value: f32| if value == 0.0 { 0 } else { value.to_bits() };
        let want = self.tensor(name).flatten_all().and_then(|t| t.to_vec1::<f32>());
        let want = want.unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(values.len(), want.len(), "{name}");
        for (i, (&got, want)) in values.iter().zip(want).enumerate() {
            assert!(bits(got) == bits(want), "{name}[{i}]: {got:e}, expected {want:e}");
        }
    }

    /// Holds bytes to those in the file, whatever their type there: candle has no i8.
    fn same_bytes(&self, name: &str, bytes: &[u8]) {
        let tensor = self.0.get(name).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert!(bytes == tensor.data(), "{name}: {bytes:?}, expected {:?}", tensor.data());
    }

    /// Holds whole numbers to those in the file.
    fn same_numbers(&self, name: &str, numbers: &[i64]) {
        let want = self.tensor(name).flatten_all().and_then(|t| t.to_vec1::<i64>());
        assert_eq!(numbers, want.unwrap_or_else(|e| panic!("{name}: {e}")), "{name}");
    }
}

const KINDS: [(Kind, &str); 2] = [(Kind::Nf4, "nf4"), (Kind::Fp4, "fp4")];

/// A weight `[N, K]` in 4-bit blocks whose scales are not quantised: packed codes, scales, dequantised.
fn plain(weight: &Tensor, kind: Kind) -> Result<(Vec<u8>, Vec<f32>, Vec<f32>)> {
    let values = weight.flatten_all()?.to_vec1::<f32>()?;
    let (mut packed, mut absmax) = (vec![0; values.len() / 2], vec![0.0; values.len() / BLOCK]);
    quantize_blocks(&values, kind, &mut packed, &mut absmax);
    let mut near = vec![f32::NAN; values.len()];
    let blocks = packed.chunks(BLOCK / 2).zip(near.chunks_mut(BLOCK));
    for ((packed, near), &absmax) in blocks.zip(&absmax) {
        kind.codes().dequantize(packed, absmax, near);
    }
    Ok((packed, absmax, near))
}

#[test]
fn quantized_four_bit_matches_golden_bitsandbytes() -> Result<()> {
    let Some(golden) = Golden::open("bitsandbytes_cpu.safetensors") else { return Ok(()) };
    let weight = golden.tensor("w");
    for (kind, name) in KINDS {
        let of = |part: &str| format!("{name}.{part}");
        golden.same_bits(&of("code"), &kind.codes().values);
        let (packed, absmax, near) = plain(&weight, kind)?;
        golden.same_bytes(&of("packed_u8"), &packed);
        golden.same_bits(&of("absmax"), &absmax);
        golden.same_bits(&of("deq"), &near);

        let double = FourBit::quantize(&weight, kind)?;
        let nested = double.absmax.borrow()?;
        let scales: Vec<f32> = (0..absmax.len()).map(|i| nested.get(i)).collect();
        golden.same_bytes(&of("double.packed_u8"), &double.packed.to_vec1::<u8>()?);
        golden.same_bytes(&of("double.qabsmax_u8"), &double.absmax.codes.to_vec1::<u8>()?);
        golden.same_bits(&of("double.state2_absmax"), &double.absmax.absmax.to_vec1::<f32>()?);
        golden.same_bits(&of("double.offset"), &[double.absmax.offset]);
        golden.same_bits(&of("double.state2_code"), &*nested::CODE);
        golden.same_bits(&of("double.absmax_deq"), &scales);
        let near = Quantized::from(double.clone()).dequantize()?;
        golden.same_bits(&of("double.deq"), &near.flatten_all()?.to_vec1()?);
    }
    Ok(())
}

#[test]
fn quantized_four_bit_matches_the_golden_definition() -> Result<()> {
    let Some(golden) = Golden::open("four_bit_definition.safetensors") else { return Ok(()) };
    let weight = golden.tensor("w");
    for (kind, name) in KINDS {
        let of = |part: &str| format!("{name}.{part}");
        golden.same_bits(&of("code"), &kind.codes().values);
        let (packed, absmax, near) = plain(&weight, kind)?;
        let codes: Vec<i64> =
            packed.iter().flat_map(|&byte| [byte >> 4, byte & 15].map(i64::from)).collect();
        golden.same_numbers(&of("index"), &codes);
        let packed: Vec<i64> = packed.into_iter().map(i64::from).collect();
        golden.same_numbers(&of("packed"), &packed);
        golden.same_bits(&of("absmax"), &absmax);
        golden.same_bits(&of("deq"), &near);
    }
    Ok(())
}

/// The format of 4-bit scales, here of a whole matrix: 48 scales alone would not show every rounding.
#[test]
fn quantized_scales_match_golden_dynamic_codes() -> Result<()> {
    let Some(golden) = Golden::open("bitsandbytes_cpu.safetensors") else { return Ok(()) };
    golden.same_bits("dynamic8.code", &*nested::CODE);
    let values = golden.tensor("w").flatten_all()?.to_vec1::<f32>()?;
    for block in [64, 256] {
        let of = |part: &str| format!("dynamic8.b{block}.{part}");
        let mut codes = vec![0; values.len()];
        let blocks = values.chunks(block).zip(codes.chunks_mut(block));
        let absmax: Vec<f32> =
            blocks.map(|(values, codes)| nested::quantize_block(values, codes)).collect();
        let near: Vec<f32> = codes
            .iter()
            .enumerate()
            .map(|(i, &code)| nested::CODE[usize::from(code)] * absmax[i / block])
            .collect();
        golden.same_bytes(&of("q_u8"), &codes);
        golden.same_bits(&of("absmax"), &absmax);
        golden.same_bits(&of("deq"), &near);
    }
    Ok(())
}

#[test]
fn quantized_int8_matches_the_golden_definition() -> Result<()> {
    let Some(golden) = Golden::open("int8_linear.safetensors") else { return Ok(()) };
    let weight = Int8::quantize(&golden.tensor("w"))?;
    let codes = weight.codes.to_vec1::<u8>()?;
    let codes: Vec<i64> = codes.into_iter().map(|code| i64::from(code.cast_signed())).collect();
    golden.same_numbers("rowwise_int8.q_as_i64", &codes);
    golden.same_bits("rowwise_int8.absmax", &weight.absmax.to_vec1::<f32>()?);
    let near = Quantized::from(weight).dequantize()?;
    golden.same_bits("rowwise_int8.deq", &near.flatten_all()?.to_vec1()?);
    Ok(())
}

#[test]
fn quantized_int8_matches_golden_bitsandbytes() -> Result<()> {
    let Some(golden) = Golden::open("bitsandbytes_cpu.safetensors") else { return Ok(()) };
    let (x, exact) = (golden.tensor("x"), golden.tensor("llmint8.w"));
    let weight = Int8::quantize(&exact)?;
    let absmax = weight.absmax.to_vec1::<f32>()?;
    golden.same_bytes("llmint8.w_q_i8", &weight.codes.to_vec1::<u8>()?);
    golden.same_bits("llmint8.w_absmax", &absmax);

    // The linear with the weight as it was: off by half a step of each code, and f32's roundings.
    let y = forward(&x, &weight.clone().into(), None)?.to_vec2::<f32>()?;
    let want = golden.tensor("llmint8.y_exact_fp32").to_vec2::<f32>()?;
    for (t, x) in x.to_vec2::<f32>()?.iter().enumerate() {
        let size: f32 = x.iter().map(|x| x.abs()).sum();
        for (n, absmax) in absmax.iter().enumerate() {
            let allowed = size * absmax * (0.5 / 127.0 + 65.0 * f32::EPSILON);
            let off = (y[t][n] - want[t][n]).abs();
            assert!(off <= allowed, "y[{t}, {n}]: off by {off}, allowed {allowed}");
        }
    }
    Ok(())
}

#[test]
fn quantized_activations_match_golden_llm_int8() -> Result<()> {
    let Some(golden) = Golden::open("bitsandbytes_cpu.safetensors") else { return Ok(()) };
    let (x, weight) = (golden.tensor("x"), Int8::quantize(&golden.tensor("llmint8.w"))?);
    let scales = weight.absmax.to_vec1::<f32>()?;
    let full = Quantized::from(weight.clone()).dequantize()?.to_vec2::<f32>()?;
    let rows = x.to_vec2::<f32>()?;
    let outliers = golden.tensor("llmint8.outlier_cols").to_vec1::<i64>()?;
    assert!(!outliers.is_empty());
    for (name, threshold, outliers) in
        [("llmint8", Some(6.0), &outliers[..]), ("int8_nothreshold", None, &[])]
    {
        let of = |part: &str| format!("{name}.{part}");
        let (codes, absmax) = llm_int8::codes(&x, threshold)?;
        golden.same_bytes(&of("x_q_i8"), &codes);
        golden.same_bits(&of("x_absmax"), &absmax);
        let y = forward_int8(&x, &weight, threshold, None)?.to_vec2::<f32>()?;
        let want = golden.tensor(&of("y")).to_vec2::<f32>()?;
        for (t, n) in (0..y.len()).flat_map(|t| (0..scales.len()).map(move |n| (t, n))) {
            // bitsandbytes has 6.200124e-5 here, not 1/127² (1.82e-5 more), of the whole numbers' part; beyond
            // that, roundings: four of that part, and of the outliers' two each and those of their sum.
            let at_most = |k: &i64| (rows[t][*k as usize] * full[n][*k as usize]).abs();
            let outside: f32 = outliers.iter().map(at_most).sum();
            let inside = want[t][n].abs() + outside;
            let eps = f32::EPSILON / 2.0;
            let allowed =
                inside * (1.82e-5 + 5.0 * eps) + outside * (3 + outliers.len()) as f32 * eps;
            let off = (y[t][n] - want[t][n]).abs();
            assert!(off <= allowed, "{name} y[{t}, {n}]: off by {off}, allowed {allowed}");
        }
    }
    Ok(())
}
