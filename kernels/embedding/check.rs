//! The kernels against the CPU implementation in f64.

use candle_core::{DType, Result};

use super::*;
use crate::{
    common::check::{Checker, HIDDEN, Sizes, random, wide},
    quantized::Quantized,
};

/// Rows of the word table of DeBERTa-v3.
const WORDS: u32 = 128_100;
/// As many of them as are gathered from: in f64, twice, the whole table would take two gigabytes.
const GATHERED: u32 = 32_000;

/// What tokens name, and the gradients of a small table and of words.
pub(crate) fn check(c: &mut Checker, sizes: Sizes) -> Result<()> {
    let (sizes, rows, words) = match sizes {
        Sizes::Odd => (&[(1, 1), (97, 19), (37, 776)][..], [11, 5, 2, 5], 11),
        Sizes::Real => (&[(4096, HIDDEN)][..], [GATHERED, 512, 2, 20], WORDS),
    };
    for (t, h) in sizes {
        for dtype in c.stored() {
            for used in 1..=4 {
                compare_forward(c, *t, *h, &rows[..used], dtype)?;
            }
            compare_int8(c, *t, *h, rows[0], dtype)?;
            for padding in [None, Some(5)].into_iter().filter(|_| *t > 1) {
                compare_backward(c, *t, *h, words, padding, dtype)?;
            }
        }
    }
    Ok(())
}

/// Half of them one row, some no row at all.
fn ids(n: usize, rows: u32) -> Vec<u32> {
    let of = |i: u32| match i % 2 {
        0 => rows / 2,
        _ if i % 7 == 3 => NOTHING,
        _ => i * i % rows,
    };
    (0..n as u32).map(of).collect()
}

fn lookups<'a>(tables: &'a [Tensor], ids: &'a [Mirror<u32>]) -> Vec<Lookup<'a>> {
    tables.iter().zip(ids).map(|(table, ids)| Lookup::new(table, ids)).collect()
}

fn compare_forward(c: &mut Checker, t: usize, h: usize, rows: &[u32], dtype: DType) -> Result<()> {
    c.case(format!("{t} x {h} of {} tables, {dtype:?}", rows.len()));
    let table = |rows: &u32| c.random(&[*rows as usize, h], u64::from(*rows), dtype);
    let tables = rows.iter().map(table).collect::<Result<Vec<_>>>()?;
    let exact = tables.iter().map(wide).collect::<Result<Vec<_>>>()?;
    let ids: Vec<_> = rows.iter().map(|rows| Mirror::from(ids(t, *rows))).collect();
    let y = forward(&lookups(&tables, &ids))?;
    c.check("y", &y, &forward(&lookups(&exact, &ids))?, 2e-7)
}

/// A table in 8 bits beside one that is not, whose ids differ.
fn compare_int8(c: &mut Checker, t: usize, h: usize, rows: u32, dtype: DType) -> Result<()> {
    c.case(format!("{t} x {h} of int8, {dtype:?}"));
    // Not from its first row on: a part of a larger table.
    let whole = random(&[rows as usize + 3, h], 7)?.to_dtype(DType::F32)?;
    let words = Int8::quantize(&whole)?.rows(3, rows as usize)?;
    let exact_words = wide(&Quantized::from(words.clone()).dequantize()?)?;
    let words = words.to_device(c.device())?;
    let types = c.random(&[2, h], 2, dtype)?;
    let exact_types = wide(&types)?;
    let (ids, kinds) = (Mirror::from(ids(t, rows)), Mirror::from(ids(t, 2)));
    let (y, exact) =
        (forward(&[Lookup::new(&words, &ids)])?, forward(&[Lookup::new(&exact_words, &ids)])?);
    c.check("y alone", &y, &exact, 2e-7)?;
    let y = forward(&[Lookup::new(&words, &ids), Lookup::new(&types, &kinds)])?;
    let exact = forward(&[Lookup::new(&exact_words, &ids), Lookup::new(&exact_types, &kinds)])?;
    c.check("y", &y, &exact, 2e-7)
}

fn compare_backward(
    c: &mut Checker,
    t: usize,
    h: usize,
    words: u32,
    padding: Option<u32>,
    dtype: DType,
) -> Result<()> {
    c.case(format!("{t} x {h}, padding {padding:?}, {dtype:?}"));
    let dy = c.random(&[t, h], 1, dtype)?;
    let exact_dy = wide(&dy)?;
    // Half of the tokens are one word: its sum has t/2 terms in f32, 64 at a time.
    let arithmetic = 2e-6;
    let dense = c.random(&[11, h], 2, DType::F32)?;
    let exact_dense = wide(&dense)?;
    backward_dense(&dy, &ids(t, 11), padding, &dense)?;
    backward_dense(&exact_dy, &ids(t, 11), padding, &exact_dense)?;
    c.check("dense", &dense, &exact_dense, arithmetic)?;
    let sparse = backward_sparse(&dy, &ids(t, words), padding)?;
    let exact = backward_sparse(&exact_dy, &ids(t, words), padding)?;
    c.same("rows", &sparse.ids, &exact.ids);
    c.check("sparse", &sparse.values, &exact.values, arithmetic)
}

#[cfg(all(test, feature = "host-kernels"))]
mod host {
    use candle_core::Device;

    use super::*;
    use crate::{
        common::{check::random, host_run::in_every_order},
        testing::on_host,
    };

    #[test]
    fn host_gather_and_segmented_gradient_match_the_cpu() -> Result<()> {
        on_host(|c| check(c, Sizes::Odd))
    }

    #[test]
    fn host_rows_join_as_on_the_cpu() -> Result<()> {
        let values = |rows: usize, seed| random(&[rows * 150], seed)?.to_dtype(DType::F32);
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
        let dy = random(&[2, 4], 1)?.to_dtype(DType::BF16)?;
        let dense = Tensor::zeros((3, 4), DType::F32, &Device::Cpu)?;
        backward_dense(&dy, &[1, 1], Some(1), &dense)?;
        assert_eq!(dense.flatten_all()?.to_vec1::<f32>()?, [0.0; 12]);
        assert!(backward_sparse(&dy, &[1, 1], Some(1))?.ids.is_empty());
        Ok(())
    }

    #[test]
    fn host_five_tables_are_refused() -> Result<()> {
        let (table, ids) = (random(&[2, 4], 1)?.to_dtype(DType::BF16)?, Mirror::from(vec![0, 1]));
        let error = forward(&[Lookup::new(&table, &ids); 5]).unwrap_err().to_string();
        assert!(error.contains("a sum of 5 tables; the CUDA kernels take 4"), "{error}");
        Ok(())
    }
}
