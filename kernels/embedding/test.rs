use candle_core::{DType, Device, Result};

use super::*;
use crate::testing::{assert_close, random, zeros};

/// 600 tokens over 7 ids: some segments are longer than one task's piece.
fn ids(n: usize) -> Vec<u32> {
    (0..n as u32).map(|i| if i % 2 == 0 { 3 } else { i * i % 7 }).collect()
}

#[test]
fn forward_sums_the_rows() -> Result<()> {
    let (words, types) = (random(&[7, 5], 1)?, random(&[2, 5], 2)?);
    let (ids, kinds) = (Mirror::from(ids(40)), Mirror::from(vec![1; 40]));
    let lookups = [Lookup { table: &words, ids: &ids }, Lookup { table: &types, ids: &kinds }];
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
    let error = forward(&[Lookup { table: &table, ids: &vec![1, 7].into() }]).unwrap_err();
    assert!(error.to_string().contains("id 7 is outside a table of 7 rows"), "{error}");
    Ok(())
}
