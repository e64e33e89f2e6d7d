//! The kernels of op.cu, run on the host, against the CPU implementation.

use candle_core::{DType, Result};
use half::bf16;

use super::*;
use crate::{
    common::host_run::{Address, Buffer, Storage, check, in_every_order, kernels, launch, rounded},
    testing::random,
};

#[repr(C)]
struct Forward {
    tables: [Address; 3],
    ids: [Address; 3],
    y: Address,
    used: i32,
    rows: i32,
    columns: i32,
}

#[repr(C)]
struct Pieces {
    dy: Address,
    tokens: Address,
    starts: Address,
    sums: Address,
    columns: i32,
}

#[repr(C)]
struct Rows {
    sums: Address,
    first_pieces: Address,
    ids: Address,
    out: Address,
    columns: i32,
}

kernels!(
    Forward: host_embedding_forward_f32, host_embedding_forward_bf16;
    Pieces: host_embedding_pieces_f32, host_embedding_pieces_bf16;
    Rows: host_embedding_rows_f32;
);

fn ids(n: usize, rows: u32) -> Vec<u32> {
    (0..n as u32).map(|i| if i % 2 == 0 { rows / 2 } else { i * i % rows }).collect()
}

fn compare_forward<S: Storage>(t: usize, h: usize, used: usize) -> Result<()> {
    let sizes = [11u32, 5, 2];
    let tables = sizes.map(|rows| random(&[rows as usize, h], u64::from(rows)));
    let tables = tables.into_iter().map(|t| rounded::<S>(&t?)).collect::<Result<Vec<_>>>()?;
    let ids = sizes.map(|rows| ids(t, rows));
    let lookups: Vec<Lookup<'_>> =
        tables.iter().zip(&ids).take(used).map(|(table, ids)| Lookup { table, ids }).collect();
    let exact = forward(&lookups)?;
    let table_buffers = tables.iter().map(Buffer::<S>::tensor).collect::<Result<Vec<_>>>()?;
    let id_buffers: Vec<Buffer<u32>> = ids.iter().map(|ids| Buffer::of(ids)).collect();
    let y = Buffer::<S>::poisoned(t * h);
    let nth = |all: &dyn Fn(usize) -> Address| {
        std::array::from_fn(|i| if i < used { all(i) } else { Address::NULL })
    };
    let parameters = Forward {
        tables: nth(&|i| table_buffers[i].address()),
        ids: nth(&|i| id_buffers[i].address()),
        y: y.address(),
        used: used as i32,
        rows: t as i32,
        columns: h as i32,
    };
    let kernel = if S::BF16 { host_embedding_forward_bf16 } else { host_embedding_forward_f32 };
    launch(kernel, [(t * h.div_ceil(8)).div_ceil(256), 1, 1], 0, &parameters);
    check("y", &y, &exact, 2e-7)
}

/// Tokens sorted by id, where each piece of at most `longest` starts, the ids that occur, and the
/// first piece of each.
struct Segments {
    tokens: Buffer<u32>,
    starts: Buffer<i32>,
    pieces: usize,
    ids: Vec<u32>,
    first_pieces: Buffer<i32>,
}

fn segments(ids: &[u32], padding: Option<u32>, longest: usize) -> Segments {
    let mut tokens: Vec<u32> =
        (0..ids.len() as u32).filter(|t| Some(ids[*t as usize]) != padding).collect();
    tokens.sort_by_key(|t| ids[*t as usize]);
    let (mut starts, mut unique, mut first_pieces) = (Vec::new(), Vec::new(), Vec::new());
    for run in tokens.chunk_by(|a, b| ids[*a as usize] == ids[*b as usize]) {
        unique.push(ids[run[0] as usize]);
        first_pieces.push(starts.len() as i32);
        let first = run.as_ptr_range().start as usize - tokens.as_ptr() as usize;
        starts.extend((0..run.len()).step_by(longest).map(|i| (first / 4 + i) as i32));
    }
    let pieces = starts.len();
    starts.push(tokens.len() as i32);
    first_pieces.push(pieces as i32);
    Segments {
        tokens: Buffer::of(&tokens),
        starts: Buffer::of(&starts),
        pieces,
        ids: unique,
        first_pieces: Buffer::of(&first_pieces),
    }
}

fn compare_backward<S: Storage>(t: usize, h: usize, padding: Option<u32>) -> Result<()> {
    let (ids, dy) = (ids(t, 11), rounded::<S>(&random(&[t, h], 1)?)?);
    let start = rounded::<f32>(&random(&[11, h], 2)?)?;
    let dense_exact = start.copy()?;
    backward_dense(&dy, &ids, padding, &dense_exact)?;
    let sparse_exact = backward_sparse(&dy.to_dtype(DType::F32)?, &ids, padding)?;

    let segments = segments(&ids, padding, 16);
    let (dy, sums) = (Buffer::<S>::tensor(&dy)?, Buffer::<f32>::poisoned(segments.pieces * h));
    let parameters = Pieces {
        dy: dy.address(),
        tokens: segments.tokens.address(),
        starts: segments.starts.address(),
        sums: sums.address(),
        columns: h as i32,
    };
    let kernel = if S::BF16 { host_embedding_pieces_bf16 } else { host_embedding_pieces_f32 };
    launch(kernel, [h.div_ceil(256), segments.pieces, 1], 0, &parameters);
    let (dense, row_ids) = (Buffer::<f32>::tensor(&start)?, Buffer::of(&segments.ids));
    let sparse = Buffer::<f32>::poisoned(segments.ids.len() * h);
    for (out, ids) in [(&dense, row_ids.address()), (&sparse, Address::NULL)] {
        let parameters = Rows {
            sums: sums.address(),
            first_pieces: segments.first_pieces.address(),
            ids,
            out: out.address(),
            columns: h as i32,
        };
        let grid = [h.div_ceil(128), segments.ids.len(), 1];
        launch(host_embedding_rows_f32, grid, 0, &parameters);
    }
    // Sums of up to 150 terms in f32.
    check("dense", &dense, &dense_exact, 2e-6)?;
    assert_eq!(segments.ids, sparse_exact.ids);
    let exact = Tensor::from_vec(sparse_exact.values, (segments.ids.len(), h), &Device::Cpu)?;
    check("sparse", &sparse, &exact, 2e-6)
}

#[test]
fn host_gather_and_segmented_gradient_match_the_cpu() -> Result<()> {
    in_every_order(|| {
        for (t, h) in [(1, 1), (97, 19), (37, 776)] {
            for used in 1..=3 {
                compare_forward::<f32>(t, h, used)?;
                compare_forward::<bf16>(t, h, used)?;
            }
            for padding in [None, Some(5)].into_iter().filter(|_| t > 1) {
                compare_backward::<f32>(t, h, padding)?;
                compare_backward::<bf16>(t, h, padding)?;
            }
        }
        Ok(())
    })
}
