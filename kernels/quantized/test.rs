//! The codes are held to bitsandbytes' bit for bit (in `golden`), the products to the linear room's.

use std::sync::Mutex;

use candle_core::{DType, Device, Result, Tensor};

use super::*;
use crate::{
    linear,
    testing::{assert_close, check_gradient, narrow, random, weighted},
};

mod golden;
mod llm_int8;

/// All three formats of one random weight `[n, k]`; of a `k` that is no whole number of blocks, int8 only.
fn formats(n: usize, k: usize) -> Result<Vec<Quantized>> {
    let weight = random(&[n, k], 2)?.to_dtype(DType::F32)?;
    let mut formats = vec![Int8::quantize(&weight)?.into()];
    if k.is_multiple_of(BLOCK) {
        for kind in [Kind::Nf4, Kind::Fp4] {
            formats.push(FourBit::quantize(&weight, kind)?.into());
        }
    }
    Ok(formats)
}

/// Sizes `(T, K, N)` on both sides of every edge of a tile.
const SIZES: [(usize, usize, usize); 6] =
    [(1, 64, 1), (3, 1, 5), (97, 131, 33), (5, 576, 193), (1030, 64, 200), (257, 513, 385)];

fn bits(tensor: &Tensor) -> Result<Vec<u32>> {
    Ok(tensor.flatten_all()?.to_vec1::<f32>()?.into_iter().map(f32::to_bits).collect())
}

/// Holds `got` to `want` where each is a sum of `terms` products, of magnitudes that add up to `magnitude`.
fn assert_sums(
    what: &str,
    got: &Tensor,
    want: &Tensor,
    magnitude: &Tensor,
    terms: usize,
) -> Result<()> {
    assert_eq!(got.dims(), want.dims(), "{what}");
    let wide = |t: &Tensor| t.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>();
    let (got, want, magnitude) = (wide(got)?, wide(want)?, wide(magnitude)?);
    // Each product and each sum is rounded once, in any order: Higham's bound.
    let each = (terms + 1) as f64 * f64::from(f32::EPSILON) / 2.0;
    for (i, ((got, want), magnitude)) in got.iter().zip(&want).zip(&magnitude).enumerate() {
        let close = (got - want).abs() <= each * magnitude;
        assert!(close, "{what}[{i}]: {got}, expected {want} within {}", each * magnitude);
    }
    Ok(())
}

#[test]
fn quantized_products_are_the_linears_over_the_dequantized_weight() -> Result<()> {
    for (t, k, n) in SIZES {
        let (x, bias, dy) = (random(&[t, k], 1)?, random(&[n], 3)?, random(&[t, n], 4)?);
        for weight in formats(n, k)? {
            let full = weight.dequantize()?.to_dtype(DType::F64)?;
            let y = forward(&x, &weight, Some(&bias))?;
            let dx = backward_input(&dy, &weight)?;
            let sum = random(&[t, k], 5)?;
            let before = sum.copy()?;
            backward_input_into(&dy, &weight, &sum)?;
            assert_close("dx +=", &sum, &(before + &dx)?, 1e-12)?;
            assert_close("y", &y, &linear::forward(&x, &full, Some(&bias))?, 1e-12)?;
            assert_close(
                "y, no bias",
                &forward(&x, &weight, None)?,
                &x.matmul(&full.t()?)?,
                1e-12,
            )?;
            assert_close("dx", &dx, &linear::backward_input(&dy, &full)?, 1e-12)?;
        }
    }
    Ok(())
}

#[test]
fn quantized_products_in_f32_are_those_in_f64_to_rounding() -> Result<()> {
    for (t, k, n) in SIZES {
        // Rounded first, so that what is compared is the sums alone.
        let small = narrow(&[&random(&[t, k], 1)?, &random(&[n], 3)?, &random(&[t, n], 4)?])?;
        let [x, bias, dy] = [0, 1, 2].map(|i| small[i].to_dtype(DType::F64));
        let (x, bias, dy) = (x?, bias?, dy?);
        for weight in formats(n, k)? {
            let size = weight.dequantize()?.to_dtype(DType::F64)?.abs()?;
            let y = forward(&small[0], &weight, Some(&small[1]))?;
            let exact = forward(&x, &weight, Some(&bias))?;
            let magnitude = linear::forward(&x.abs()?, &size, Some(&bias.abs()?))?;
            assert_sums("y", &y, &exact, &magnitude, k + 1)?;
            let dx = backward_input(&small[2], &weight)?;
            let magnitude = linear::backward_input(&dy.abs()?, &size)?;
            assert_sums("dx", &dx, &backward_input(&dy, &weight)?, &magnitude, n)?;
        }
    }
    Ok(())
}

#[test]
fn quantized_input_gradient_matches_finite_differences() -> Result<()> {
    let (x, dy) = (random(&[7, 128], 1)?, random(&[7, 11], 4)?);
    for weight in formats(11, 128)? {
        let dx = backward_input(&dy, &weight)?;
        check_gradient("x", &x, &dx, |x| weighted(&forward(x, &weight, None)?, &dy))?;
    }
    Ok(())
}

#[test]
fn quantized_is_the_same_on_any_number_of_threads() -> Result<()> {
    let (t, k, n) = (1030, 576, 449);
    let small = narrow(&[&random(&[t, k], 1)?, &random(&[n], 3)?, &random(&[t, n], 4)?])?;
    let on = |threads: usize| -> Result<Vec<u32>> {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
        pool.map_err(candle_core::Error::wrap)?.install(|| {
            let mut all = Vec::new();
            for weight in formats(n, k)? {
                all.extend(bits(&weight.dequantize()?)?);
                all.extend(bits(&forward(&small[0], &weight, Some(&small[1]))?)?);
                all.extend(bits(&backward_input(&small[2], &weight)?)?);
                if let Quantized::Int8(weight) = &weight {
                    all.extend(bits(&forward_int8(&small[0], weight, Some(0.99), None)?)?);
                }
            }
            Ok(all)
        })
    };
    let alone = on(1)?;
    assert!(on(2)? == alone && on(3)? == alone);
    Ok(())
}

#[test]
fn quantized_products_dequantize_each_element_once_into_a_small_tile() -> Result<()> {
    let (t, k, n) = (7, 2048, 1500);
    let (x, weight) = (random(&[t, k], 1)?.to_vec2::<f64>()?.concat(), &formats(n, k)?[1]);
    let (weight, mut y) = (weight.borrow()?, vec![f64::NAN; t * n]);
    let asked = Mutex::new((0, 0));
    cpu::product(&x, (t, n, k), &mut y, false, |depth, columns, tile| {
        let mut asked = asked.lock().expect("no panic under the lock");
        *asked = (asked.0 + tile.len(), asked.1.max(tile.len()));
        weight.tile(columns, depth.clone(), tile);
        linear::View::rows(tile.as_ptr(), depth.len()).transposed()
    });
    let (all, largest) = asked.into_inner().expect("no panic under the lock");
    assert_eq!(all, n * k);
    assert_eq!(largest, cpu::TILE);
    // A thirtieth of this matrix; the same 384 KiB for any other.
    assert_eq!(cpu::TILE * size_of::<f32>(), 384 << 10);
    assert!(y.iter().all(|y| y.is_finite()));
    Ok(())
}

#[test]
fn quantized_rows_are_a_part_in_the_same_memory() -> Result<()> {
    // 3 blocks a row, 450 in all: parts start in the middle of 256 scales.
    let (n, k) = (150, 192);
    let (x, dy) = (random(&[5, k], 1)?, random(&[5, 70], 4)?);
    for weight in formats(n, k)? {
        let full = weight.dequantize()?;
        let part = weight.rows(40, 100)?.rows(10, 70)?;
        let want = full.narrow(0, 50, 70)?;
        assert_eq!(part.dims(), (70, k));
        assert_eq!(bits(&part.dequantize()?)?, bits(&want)?);
        let want = want.to_dtype(DType::F64)?.copy()?;
        assert_close("y", &forward(&x, &part, None)?, &linear::forward(&x, &want, None)?, 1e-12)?;
        let dx = linear::backward_input(&dy, &want)?;
        assert_close("dx", &backward_input(&dy, &part)?, &dx, 1e-12)?;
        // Parts have what the whole has, but that each would have its own offset and last scale of scales.
        let parts = weight.rows(0, 75)?.bytes() + weight.rows(75, 75)?.bytes();
        assert!(parts - weight.bytes() <= 8, "{parts} bytes of {}", weight.bytes());
    }
    Ok(())
}

#[test]
fn quantized_weights_are_made_piece_by_piece() -> Result<()> {
    let (n, k) = (201, 192);
    let weight = random(&[n, k], 2)?.to_dtype(DType::F32)?;
    let mut asked = Vec::new();
    let mut part = |rows: Range<usize>| {
        asked.push(rows.clone());
        weight.narrow(0, rows.start, rows.len())
    };
    let (int8, four_bit) =
        (Int8::from_rows(n, k, &mut part)?, FourBit::from_rows(n, k, Kind::Nf4, &mut part)?);
    assert_eq!(asked.len(), 2 * n.div_ceil(PIECE / k));
    assert!(asked.iter().all(|rows| rows.len() * k <= PIECE));

    // Rows of int8 know nothing of each other; the scales of all 4-bit blocks are quantised together.
    let alone =
        (0..n).map(|row| Quantized::from(Int8::quantize(&weight.narrow(0, row, 1)?)?).dequantize());
    let alone = Tensor::cat(&alone.collect::<Result<Vec<_>>>()?, 0)?;
    assert_eq!(bits(&Quantized::from(int8).dequantize()?)?, bits(&alone)?);
    let values = weight.flatten_all()?.to_vec1::<f32>()?;
    let (mut packed, mut absmax) = (vec![0; n * k / 2], vec![0.0; n * k / BLOCK]);
    four_bit::quantize_blocks(&values, Kind::Nf4, &mut packed, &mut absmax);
    let scales = nested::Nested::quantize(&absmax)?;
    assert_eq!(four_bit.packed.to_vec1::<u8>()?, packed);
    assert_eq!(four_bit.absmax.codes.to_vec1::<u8>()?, scales.codes.to_vec1::<u8>()?);
    assert_eq!(bits(&four_bit.absmax.absmax)?, bits(&scales.absmax)?);
    assert_eq!(four_bit.absmax.offset.to_bits(), scales.offset.to_bits());

    // What is not finite is named by its place in the whole.
    let bad = |rows: Range<usize>| match rows.contains(&150) {
        true => Tensor::full(f32::NAN, (rows.len(), k), &Device::Cpu),
        false => weight.narrow(0, rows.start, rows.len()),
    };
    let first = 150 / (PIECE / k) * (PIECE / k);
    let error = Int8::from_rows(n, k, bad).unwrap_err().to_string();
    assert!(error.contains(&format!("weight [{first}, 0] is NaN")), "{error}");
    Ok(())
}

#[test]
fn quantized_weights_of_bf16_are_those_widened() -> Result<()> {
    let weight = random(&[9, 192], 2)?.to_dtype(DType::BF16)?;
    let wide = weight.to_dtype(DType::F32)?;
    let pairs: [(Quantized, Quantized); 2] = [
        (Int8::quantize(&weight)?.into(), Int8::quantize(&wide)?.into()),
        (
            FourBit::quantize(&weight, Kind::Nf4)?.into(),
            FourBit::quantize(&wide, Kind::Nf4)?.into(),
        ),
    ];
    for (from_bf16, from_f32) in pairs {
        assert_eq!(bits(&from_bf16.dequantize()?)?, bits(&from_f32.dequantize()?)?);
    }
    Ok(())
}

#[test]
fn quantized_weights_are_as_close_as_their_codes_allow() -> Result<()> {
    let weight = random(&[16, 256], 2)?.to_dtype(DType::F32)?;
    let exact = weight.flatten_all()?.to_vec1::<f32>()?;
    // How many weights share a scale; the widest gap between codes, in parts of the scale; and by how much the
    // code of a scale may be off, in parts of the scales' largest distance from their mean: half of
    // 0.9 / 64, and half a step of 2 / 65,535.
    let nested = 0.45 / 64.0 + 1.0 / 65_535.0;
    let parts = [(256, 1.0 / 127.0, 0.0), (BLOCK, 0.3039, nested), (BLOCK, 1.0 / 3.0, nested)];
    for (weight, (group, gap, nested)) in formats(16, 256)?.iter().zip(parts) {
        let near = weight.dequantize()?.flatten_all()?.to_vec1::<f32>()?;
        let largest: Vec<f32> = exact.chunks(group).map(largest_magnitude).collect();
        let mean = largest.iter().sum::<f32>() / largest.len() as f32;
        let spread = largest.iter().fold(0.0f32, |max, largest| max.max((largest - mean).abs()));
        for (i, (near, exact)) in near.iter().zip(&exact).enumerate() {
            // 1e-6: the roundings of the scale, of the quotient and of the product.
            let allowed = largest[i / group] * (gap / 2.0 + 1e-6) + nested * spread;
            let off = (near - exact).abs();
            assert!(off <= allowed, "[{i}]: {near} for {exact}, allowed {allowed}");
        }
    }
    Ok(())
}

#[test]
fn quantized_zeros_and_a_single_block_are_exact() -> Result<()> {
    let zeros = Tensor::zeros((2, 64), DType::F32, &Device::Cpu)?;
    // One block's scale is its own mean, without a distance to quantise.
    let ones = Tensor::full(-3.5f32, (1, 64), &Device::Cpu)?;
    for weight in [zeros, ones] {
        let formats: [Quantized; 3] = [
            Int8::quantize(&weight)?.into(),
            FourBit::quantize(&weight, Kind::Nf4)?.into(),
            FourBit::quantize(&weight, Kind::Fp4)?.into(),
        ];
        for quantized in formats {
            assert_eq!(quantized.dequantize()?.to_vec2::<f32>()?, weight.to_vec2::<f32>()?);
        }
    }
    Ok(())
}

#[test]
fn quantized_bytes_are_a_quarter_and_an_eighth() -> Result<()> {
    let weight = random(&[768, 768], 2)?.to_dtype(DType::F32)?;
    let int8: Quantized = Int8::quantize(&weight)?.into();
    let four_bit: Quantized = FourBit::quantize(&weight, Kind::Nf4)?.into();
    assert_eq!(int8.bytes(), 768 * 768 + 4 * 768);
    assert_eq!(four_bit.bytes(), 768 * 768 / 2 + 768 * 12 + 4 * 36 + 4);
    assert_eq!((int8.dims(), four_bit.dims()), ((768, 768), (768, 768)));
    Ok(())
}

#[test]
fn quantized_refuses_bad_input_by_name() -> Result<()> {
    let weight = &formats(4, 64)?[1];
    let f32s = |dims: &[usize]| random(dims, 1)?.to_dtype(DType::F32);
    let mut infinite = vec![1f32; 3 * 64];
    infinite[64 + 7] = f32::INFINITY;
    let infinite = Tensor::from_vec(infinite, (3, 64), &Device::Cpu)?;
    let nan = Tensor::full(f32::NAN, (1, 64), &Device::Cpu)?;
    let none = Tensor::zeros((0, 64), DType::F32, &Device::Cpu)?;
    let (bias, half) = (f32s(&[5])?, f32s(&[2, 64])?.to_dtype(DType::BF16)?);
    let cases = [
        (forward(&f32s(&[2, 32])?, weight, None).err(), "x [2, 32] does not fit weight [4, 64]"),
        (forward(&f32s(&[2, 64])?, weight, Some(&bias)).err(), "bias has shape [5], expected [4]"),
        (backward_input(&f32s(&[2, 3])?, weight).err(), "dy [2, 3] does not fit weight [4, 64]"),
        (
            backward_input_into(&f32s(&[2, 4])?, weight, &f32s(&[2, 4])?).err(),
            "dx has shape [2, 4], expected [2, 64]",
        ),
        (weight.rows(2, 3).err(), "no 3 rows from 2 on in a matrix of 4"),
        (weight.rows(2, 0).err(), "no 0 rows from 2 on in a matrix of 4"),
        (
            FourBit::from_rows(4, 64, Kind::Nf4, |_| f32s(&[4, 32])).err(),
            "a piece of the weight has shape [4, 32], expected [4, 64]",
        ),
        (
            forward_int8(&f32s(&[2, 64])?, &Int8::quantize(&f32s(&[4, 64])?)?, Some(0.0), None)
                .err(),
            "a threshold of 0 for outliers",
        ),
        (
            forward_int8(&half, &Int8::quantize(&f32s(&[4, 64])?)?, None, None).err(),
            "activations in 8 bits have no implementation for BF16",
        ),
        (
            forward(&f32s(&[2, 64])?.to_dtype(DType::U32)?, weight, None).err(),
            "no implementation for U32",
        ),
        (
            FourBit::quantize(&f32s(&[4, 100])?, Kind::Nf4).err(),
            "[4, 100] has 100 columns, no multiple of the 64",
        ),
        (FourBit::quantize(&infinite, Kind::Fp4).err(), "weight [1, 7] is inf"),
        (Int8::quantize(&infinite).err(), "weight [1, 7] is inf"),
        (Int8::quantize(&nan).err(), "weight [0, 0] is NaN"),
        (FourBit::quantize(&nan, Kind::Nf4).err(), "weight [0, 0] is NaN"),
        (Int8::quantize(&none).err(), "weight [0, 64] is no matrix of at least one element"),
        (Int8::quantize(&bias).err(), "weight [5] is no matrix"),
        (Int8::quantize(&random(&[2, 2], 1)?).err(), "a weight of F64"),
    ];
    for (error, message) in cases {
        let error = error.map(|error| error.to_string()).unwrap_or_default();
        assert!(error.contains("quantized: ") && error.contains(message), "{error:?}: {message}");
    }
    Ok(())
}

#[test]
fn quantized_takes_no_tokens() -> Result<()> {
    for weight in formats(4, 64)? {
        let x = Tensor::zeros((0, 64), DType::F32, &Device::Cpu)?;
        assert_eq!(forward(&x, &weight, None)?.dims(), [0, 4]);
        let dy = Tensor::zeros((0, 4), DType::F32, &Device::Cpu)?;
        assert_eq!(backward_input(&dy, &weight)?.dims(), [0, 64]);
    }
    Ok(())
}
