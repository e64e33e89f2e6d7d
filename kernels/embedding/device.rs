//! Launches of the embedding. Tokens are sorted on the host, where their ids are.

use candle_core::{DType, Result, Tensor, bail};

use super::{Lookup, SparseRows, Table, segments::Segments, sparse::Sources};
use crate::common::device::{Address, Launch, int, kernels, of_dtype, unwritten};

const OP: &str = "embedding";
/// Tables of one sum: words, positions, token types.
const TABLES: usize = 4;
const THREADS: usize = 256;
/// Columns that a block of `pieces` takes.
const STRIP: usize = 256;
const ROWS_THREADS: usize = 128;
/// Tokens that one block sums.
const SEGMENT: usize = match cfg!(test) {
    true => 16, // so that tests of few tokens have ids of several pieces
    false => 256,
};

#[repr(C)]
struct Forward {
    tables: [Address; TABLES],
    scales: [Address; TABLES],
    ids: [Address; TABLES],
    first_rows: [i32; TABLES],
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

#[repr(C)]
struct Join {
    a: Address,
    b: Address,
    from: Address,
    out: Address,
    columns: i32,
}

kernels!(
    Forward, THREADS as u32 => embedding_forward_f32, embedding_forward_bf16;
    Pieces, STRIP as u32 => embedding_pieces_f32, embedding_pieces_bf16;
    Rows, ROWS_THREADS as u32 => embedding_rows_f32;
    Join, ROWS_THREADS as u32 => embedding_join_f32;
);

pub(super) fn forward(lookups: &[Lookup<'_>], dtype: DType) -> Result<Tensor> {
    if lookups.len() > TABLES {
        bail!("{OP}: a sum of {} tables; the CUDA kernels take {TABLES}", lookups.len());
    }
    let (rows, columns) = (lookups[0].ids.len(), lookups[0].table.dims()?.1);
    let y = unwritten(lookups[0].table.device(), (rows, columns), dtype)?;
    let kernel = of_dtype(OP, &y, embedding_forward_f32, embedding_forward_bf16)?;
    let mut launch = Launch::on(OP, &y)?;
    let mut parameters = Forward {
        tables: [Address::NULL; TABLES],
        scales: [Address::NULL; TABLES],
        ids: [Address::NULL; TABLES],
        first_rows: [0; TABLES],
        y: launch.write(&y, dtype)?,
        used: lookups.len() as i32,
        rows: int(OP, rows)?,
        columns: int(OP, columns)?,
    };
    for (i, lookup) in lookups.iter().enumerate() {
        parameters.ids[i] = launch.mirror(lookup.ids)?;
        match lookup.table {
            Table::Dense(table) => parameters.tables[i] = launch.read(table, dtype)?,
            Table::Int8(table) => {
                parameters.tables[i] = launch.read(&table.codes, DType::U8)?;
                parameters.scales[i] = launch.read(&table.absmax, DType::F32)?;
                parameters.first_rows[i] = int(OP, table.rows.start)?;
            }
        }
    }
    let grid = (rows * columns.div_ceil(8)).div_ceil(THREADS);
    launch.run(kernel, [grid, 1, 1], 0, &parameters)?;
    Ok(y)
}

pub(super) fn backward_dense(
    dy: &Tensor,
    ids: &[u32],
    padding: Option<u32>,
    gradient: &Tensor,
) -> Result<()> {
    let segments = Segments::new(ids, padding, SEGMENT);
    let sums = piece_sums(dy, &segments)?;
    sum_rows(&segments, &sums, Some(&segments.ids()), gradient)
}

pub(super) fn backward_sparse(
    dy: &Tensor,
    ids: &[u32],
    padding: Option<u32>,
) -> Result<SparseRows> {
    let width = dy.dim(1)?;
    let segments = Segments::new(ids, padding, SEGMENT);
    let sums = piece_sums(dy, &segments)?;
    let ids = segments.ids();
    let values = unwritten(dy.device(), ids.len() * width, DType::F32)?;
    sum_rows(&segments, &sums, None, &values)?;
    Ok(SparseRows { ids, values, width })
}

/// Sum of each piece's rows of `dy`, `[pieces, H]` in f32.
fn piece_sums(dy: &Tensor, segments: &Segments) -> Result<Tensor> {
    let kernel = of_dtype(OP, dy, embedding_pieces_f32, embedding_pieces_bf16)?;
    let (columns, pieces) = (dy.dim(1)?, segments.pieces.len());
    let ends = segments.pieces.iter().map(|(_, tokens)| tokens.end as i32);
    let starts: Vec<i32> = [0].into_iter().chain(ends).collect();
    let sums = unwritten(dy.device(), (pieces, columns), DType::F32)?;
    let mut launch = Launch::on(OP, dy)?;
    let parameters = Pieces {
        dy: launch.read(dy, dy.dtype())?,
        tokens: launch.numbers(&segments.tokens)?,
        starts: launch.numbers(&starts)?,
        sums: launch.write(&sums, DType::F32)?,
        columns: int(OP, columns)?,
    };
    launch.run(kernel, [pieces, columns.div_ceil(STRIP), 1], 0, &parameters)?;
    Ok(sums)
}

/// The pieces of each id: added to the rows of `out` that `ids` names, or, without, its rows in order.
fn sum_rows(segments: &Segments, sums: &Tensor, ids: Option<&[u32]>, out: &Tensor) -> Result<()> {
    let (pieces, columns) = sums.dims2()?;
    let runs = segments.pieces.chunk_by(|(a, _), (b, _)| a == b);
    let mut first_pieces = vec![0i32];
    first_pieces.extend(runs.scan(0, |first, run| {
        *first += run.len() as i32;
        Some(*first)
    }));
    debug_assert_eq!(first_pieces.last(), Some(&(pieces as i32)));
    let mut launch = Launch::on(OP, sums)?;
    let parameters = Rows {
        sums: launch.read(sums, DType::F32)?,
        first_pieces: launch.numbers(&first_pieces)?,
        ids: ids.map_or(Ok(Address::NULL), |ids| launch.numbers(ids))?,
        out: launch.write(out, DType::F32)?,
        columns: int(OP, columns)?,
    };
    let grid = [first_pieces.len() - 1, columns.div_ceil(ROWS_THREADS), 1];
    launch.run(embedding_rows_f32, grid, 0, &parameters)
}

pub(super) fn join([a, b]: [&Tensor; 2], from: &[Sources], width: usize) -> Result<Tensor> {
    let out = unwritten(a.device(), from.len() * width, DType::F32)?;
    let mut launch = Launch::on(OP, a)?;
    let parameters = Join {
        a: launch.read(a, DType::F32)?,
        b: launch.read(b, DType::F32)?,
        from: launch.numbers(from)?,
        out: launch.write(&out, DType::F32)?,
        columns: int(OP, width)?,
    };
    let grid = [from.len(), width.div_ceil(ROWS_THREADS), 1];
    launch.run(embedding_join_f32, grid, 0, &parameters)?;
    Ok(out)
}
