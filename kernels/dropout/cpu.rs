//! Dropout on the CPU: masks are drawn row by row, never stored.

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use crate::common::{
    Dropout, ROWS_PER_TASK, Real, RowIds,
    host::{read, tensor, unwritten},
    simd,
};

pub(super) fn apply<T: Real>(x: &Tensor, dropout: &Dropout, rows: &RowIds) -> Result<Tensor> {
    let (t, n) = x.dims2()?;
    let x = read::<T>(x)?;
    let mut y = unwritten::<T>(t * n);
    y.par_chunks_mut(ROWS_PER_TASK * n).zip(x.par_chunks(ROWS_PER_TASK * n)).enumerate().for_each(
        |(task, (y, x))| {
            let mut factors = vec![T::ZERO; n];
            simd(
                #[inline(always)]
                || {
                    for (i, (y, x)) in y.chunks_exact_mut(n).zip(x.chunks_exact(n)).enumerate() {
                        let row = task * ROWS_PER_TASK + i;
                        dropout.factors(rows.sample[row], rows.position[row], &mut factors);
                        for ((y, x), factor) in y.iter_mut().zip(x).zip(&factors) {
                            *y = *x * *factor;
                        }
                    }
                },
            );
        },
    );
    tensor(y, (t, n))
}
