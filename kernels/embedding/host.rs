//! The kernels of op.cu, run on the host, against the CPU implementation.

use candle_core::{DType, Device, Result};

use super::*;
use crate::{
    common::host_run::in_every_order,
    testing::{STORED, check, random, rounded, wide},
};

fn ids(n: usize, rows: u32) -> Vec<u32> {
    (0..n as u32).map(|i| if i % 2 == 0 { rows / 2 } else { i * i % rows }).collect()
}

fn lookups<'a>(tables: &'a [Tensor], ids: &'a [Mirror<u32>]) -> Vec<Lookup<'a>> {
    tables.iter().zip(ids).map(|(table, ids)| Lookup { table, ids }).collect()
}

fn compare_forward(t: usize, h: usize, used: usize, dtype: DType) -> Result<()> {
    let sizes = [11u32, 5, 2];
    let table = |rows: u32| rounded(&random(&[rows as usize, h], u64::from(rows))?, dtype);
    let tables = sizes.into_iter().map(table).collect::<Result<Vec<_>>>()?;
    let exact = tables.iter().map(wide).collect::<Result<Vec<_>>>()?;
    let ids = sizes.map(|rows| Mirror::from(ids(t, rows)));
    let y = device::forward(&lookups(&tables[..used], &ids))?;
    let exact = forward(&lookups(&exact[..used], &ids))?;
    check(&format!("y {t} x {h} of {used}"), &y, &exact, 2e-7)
}

fn compare_backward(t: usize, h: usize, padding: Option<u32>, dtype: DType) -> Result<()> {
    let (ids, dy) = (ids(t, 11), rounded(&random(&[t, h], 1)?, dtype)?);
    let dense = rounded(&random(&[11, h], 2)?, DType::F32)?;
    let exact_dense = wide(&dense)?;
    device::backward_dense(&dy, &ids, padding, &dense)?;
    backward_dense(&wide(&dy)?, &ids, padding, &exact_dense)?;
    // Sums of up to 150 terms in f32.
    check("dense", &dense, &exact_dense, 2e-6)?;
    let sparse = device::backward_sparse(&dy, &ids, padding)?;
    let exact = backward_sparse(&wide(&dy)?, &ids, padding)?;
    assert_eq!(sparse.ids, exact.ids);
    check("sparse", &sparse.values, &exact.values, 2e-6)
}

#[test]
fn host_gather_and_segmented_gradient_match_the_cpu() -> Result<()> {
    in_every_order(|| {
        for ((t, h), dtype) in
            [(1, 1), (97, 19), (37, 776)].into_iter().flat_map(|size| STORED.map(|d| (size, d)))
        {
            for used in 1..=3 {
                compare_forward(t, h, used, dtype)?;
            }
            for padding in [None, Some(5)].into_iter().filter(|_| t > 1) {
                compare_backward(t, h, padding, dtype)?;
            }
        }
        Ok(())
    })
}

#[test]
fn host_rows_join_as_on_the_cpu() -> Result<()> {
    let values = |rows: usize, seed| rounded(&random(&[rows * 150], seed)?, DType::F32);
    let (a, b) = (values(3, 1)?, values(2, 2)?);
    in_every_order(|| {
        for from in [vec![[0, -1], [-1, 0], [1, 1], [2, -1]], vec![[-1, -1], [2, -1]]] {
            let got = device::join([&a, &b], &from, 150)?.to_vec1::<f32>()?;
            assert_eq!(got, cpu::join::<f32>([&a, &b], &from, 150)?.to_vec1::<f32>()?);
        }
        Ok(())
    })
}

#[test]
fn host_nothing_but_padding_has_no_gradient() -> Result<()> {
    let dy = rounded(&random(&[2, 4], 1)?, DType::BF16)?;
    let dense = Tensor::zeros((3, 4), DType::F32, &Device::Cpu)?;
    backward_dense(&dy, &[1, 1], Some(1), &dense)?;
    assert_eq!(dense.flatten_all()?.to_vec1::<f32>()?, [0.0; 12]);
    assert!(backward_sparse(&dy, &[1, 1], Some(1))?.ids.is_empty());
    Ok(())
}

#[test]
fn host_four_tables_are_refused() -> Result<()> {
    let (table, ids) = (rounded(&random(&[2, 4], 1)?, DType::BF16)?, Mirror::from(vec![0, 1]));
    let error = forward(&[Lookup { table: &table, ids: &ids }; 4]).unwrap_err().to_string();
    assert!(error.contains("a sum of 4 tables; the CUDA kernels take 3"), "{error}");
    Ok(())
}
