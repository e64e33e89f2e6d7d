use candle_core::{DType, Device, Result};

use super::*;
use crate::{
    quantized::Quantized,
    testing::{assert_close, random, zeros},
};

/// 600 tokens over 7 ids: some segments are longer than one task's piece.
fn ids(n: usize) -> Vec<u32> {
    (0..n as u32).map(|i| if i % 2 == 0 { 3 } else { i * i % 7 }).collect()
}

#[test]
fn forward_sums_the_rows() -> Result<()> {
    let (words, types) = (random(&[7, 5], 1)?, random(&[2, 5], 2)?);
    let (ids, kinds) = (Mirror::from(ids(40)), Mirror::from(vec![1; 40]));
    let lookups = [Lookup::new(&words, &ids), Lookup::new(&types, &kinds)];
    let index = Tensor::new(&*ids, &Device::Cpu)?;
    let want = words.index_select(&index, 0)?.broadcast_add(&types.narrow(0, 1, 1)?)?;
    assert_close("y", &forward(&lookups)?, &want, 1e-15)
}

#[test]
fn gradients_are_index_add() -> Result<()> {
    let (dy, table) = (random(&[600, 5], 1)?, random(&[7, 5], 2)?);
    let ids = ids(600);
    let index = Tensor::new(ids.as_slice(), &Device::Cpu)?;
    let want = zeros(&table)?.index_add(&index, &dy, 0)?;
    let dense = zeros(&table)?;
    backward_dense(&dy, &ids, None, &dense)?;
    assert_close("dense", &dense, &want, 1e-12)?;
    let rows = backward_sparse(&dy.to_dtype(DType::F32)?, &ids, None)?;
    assert_eq!(rows.ids, [0, 1, 2, 3, 4]);
    let all = rows.spread(&[0, 1, 2, 3, 4, 5, 6])?.values.reshape((7, 5))?;
    assert_close("sparse", &all, &want, 1e-5)
}

#[test]
fn padding_gets_no_gradient() -> Result<()> {
    let dy = random(&[600, 5], 1)?;
    let dense = Tensor::zeros((7, 5), DType::F64, &Device::Cpu)?;
    backward_dense(&dy, &ids(600), Some(3), &dense)?;
    assert_eq!(dense.get(3)?.to_vec1::<f64>()?, [0.0; 5]);
    let rows = backward_sparse(&dy.to_dtype(DType::F32)?, &ids(600), Some(3))?;
    assert_eq!(rows.ids, [0, 1, 2, 4]);
    Ok(())
}

#[test]
fn nothing_takes_no_row() -> Result<()> {
    // Three rows of a prompt before four words; the last row of the batch is neither's.
    let (words, prompt) = (random(&[7, 5], 1)?, random(&[3, 5], 2)?);
    let of_words = Mirror::from(vec![NOTHING, NOTHING, NOTHING, 6, 0, 6, 3, NOTHING]);
    let of_prompt = Mirror::from([vec![0, 1, 2], vec![NOTHING; 5]].concat());
    let lookups = [Lookup::new(&words, &of_words), Lookup::new(&prompt, &of_prompt)];
    let index = Tensor::new(&[6u32, 0, 6, 3], &Device::Cpu)?;
    let last = zeros(&words.narrow(0, 0, 1)?)?;
    let want = Tensor::cat(&[&prompt, &words.index_select(&index, 0)?, &last], 0)?;
    assert_eq!(forward(&lookups)?.to_vec2::<f64>()?, want.to_vec2::<f64>()?);

    let dy = random(&[8, 5], 3)?;
    let (d_words, d_prompt) = (zeros(&words)?, zeros(&prompt)?);
    backward_dense(&dy, &of_words, Some(3), &d_words)?;
    backward_dense(&dy, &of_prompt, None, &d_prompt)?;
    assert_eq!(d_prompt.to_vec2::<f64>()?, dy.narrow(0, 0, 3)?.to_vec2::<f64>()?);
    let rows = backward_sparse(&dy, &of_words, Some(3))?;
    assert_eq!(rows.ids, [0, 6]);
    let own = d_words.index_select(&Tensor::new(&[0u32, 6], &Device::Cpu)?, 0)?.flatten_all()?;
    assert_eq!(rows.values.to_vec1::<f64>()?, own.to_vec1::<f64>()?);
    assert_eq!(d_words.sum_all()?.to_scalar::<f64>()?, own.sum_all()?.to_scalar::<f64>()?);
    Ok(())
}

#[test]
fn rows_in_8_bits_are_the_dequantized_ones() -> Result<()> {
    let small = random(&[7, 5], 1)?.to_dtype(DType::F32)?;
    let words = Int8::quantize(&small)?;
    let full = Quantized::from(words.clone()).dequantize()?;
    let (types, ids) = (random(&[2, 5], 2)?, Mirror::from(ids(40)));
    let kinds = Mirror::from([vec![1; 39], vec![NOTHING]].concat());
    // Alone they are f32; beside a table of f64, f64.
    let y = forward(&[Lookup::new(&words, &ids)])?;
    assert_eq!(y.to_vec2::<f32>()?, forward(&[Lookup::new(&full, &ids)])?.to_vec2::<f32>()?);
    let full = full.to_dtype(DType::F64)?;
    for quantized_first in [true, false] {
        let sum = |words: Table<'_>| {
            let mut lookups = vec![Lookup::new(words, &ids), Lookup::new(&types, &kinds)];
            if !quantized_first {
                lookups.reverse();
            }
            forward(&lookups)?.to_vec2::<f64>()
        };
        assert_eq!(sum((&words).into())?, sum((&full).into())?);
    }
    Ok(())
}

#[test]
fn sparse_rows_merge_like_addition() -> Result<()> {
    let rows = |ids: &[u32], start: f32| -> Result<SparseRows> {
        let values: Vec<f32> = (0..ids.len() * 2).map(|i| start + i as f32).collect();
        let values = Tensor::new(values, &Device::Cpu)?;
        Ok(SparseRows { ids: ids.to_vec(), values, width: 2 })
    };
    let mut sum = SparseRows::empty(2, &Device::Cpu)?;
    sum.merge(&rows(&[1, 4, 9], 0.0)?)?;
    sum.merge(&rows(&[0, 4, 9, 12], 100.0)?)?;
    let want = [100., 101., 0., 1., 104., 106., 108., 110., 106., 107.];
    assert_eq!(sum.ids, [0, 1, 4, 9, 12]);
    assert_eq!(sum.values.to_vec1::<f32>()?, want);
    let spread = sum.spread(&[0, 1, 3, 4, 9, 11, 12])?.values.to_vec1::<f32>()?;
    assert_eq!(spread, [100., 101., 0., 1., 0., 0., 104., 106., 108., 110., 0., 0., 106., 107.]);
    sum.merge(&SparseRows::empty(2, &Device::Cpu)?)?;
    assert_eq!(sum.values.to_vec1::<f32>()?, want);
    assert!(sum.spread(&[0, 1, 4, 9]).is_err(), "row 12 would be lost");
    assert!(sum.merge(&SparseRows::empty(3, &Device::Cpu)?).is_err(), "another width");
    Ok(())
}

#[test]
fn an_id_outside_the_table_is_an_error() -> Result<()> {
    let table = random(&[7, 5], 1)?;
    let error = forward(&[Lookup::new(&table, &vec![1, 7].into())]).unwrap_err();
    assert!(error.to_string().contains("id 7 is outside a table of 7 rows"), "{error}");
    Ok(())
}
