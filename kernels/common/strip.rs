//! Micro-kernels: [`ROWS`] rows of a product at a time, accumulated in registers.
//!
//! A GEMM library packs both operands first, which costs too much where an operand is a slice of a
//! diagonal band that no other product reads, or has a few rows only. Here the left operand is read one element at a time, at
//! any two strides, so a band is read where it lies; the right operand has rows of whole vectors.

#[cfg(test)]
mod test;

use pulp::{Arch, Simd, WithSimd};

use super::{Real, real::LANES};

/// Rows that one strip computes. Every buffer has room for a last strip that is not full.
pub(crate) const ROWS: usize = 6;

/// Vector arithmetic on an element type, for whichever vector unit runs.
pub(crate) trait Vector: Real {
    /// One register of elements.
    type Lanes<S: Simd>: Copy;
    /// The same element everywhere.
    fn splat<S: Simd>(simd: S, value: Self) -> Self::Lanes<S>;
    /// `a * b + c`.
    fn fused<S: Simd>(
        simd: S,
        a: Self::Lanes<S>,
        b: Self::Lanes<S>,
        c: Self::Lanes<S>,
    ) -> Self::Lanes<S>;
}

impl Vector for f32 {
    type Lanes<S: Simd> = S::f32s;

    #[inline(always)]
    fn splat<S: Simd>(simd: S, value: Self) -> S::f32s {
        simd.splat_f32s(value)
    }

    #[inline(always)]
    fn fused<S: Simd>(simd: S, a: S::f32s, b: S::f32s, c: S::f32s) -> S::f32s {
        simd.mul_add_f32s(a, b, c)
    }
}

impl Vector for f64 {
    type Lanes<S: Simd> = S::f64s;

    #[inline(always)]
    fn splat<S: Simd>(simd: S, value: Self) -> S::f64s {
        simd.splat_f64s(value)
    }

    #[inline(always)]
    fn fused<S: Simd>(simd: S, a: S::f64s, b: S::f64s, c: S::f64s) -> S::f64s {
        simd.mul_add_f64s(a, b, c)
    }
}

/// Elements of a buffer at two strides: element (i, k) is at `at + i·stride + k·step`.
#[derive(Clone, Copy)]
pub(crate) struct Walk<'a, T> {
    pub(crate) values: &'a [T],
    pub(crate) at: isize,
    pub(crate) stride: isize,
    pub(crate) step: isize,
}

impl<T> Walk<'_, T> {
    /// Pointer to element (0, 0), once elements (0, 0) to (rows - 1, depth - 1), each with
    /// `columns - 1` elements after it, are known to lie in the buffer.
    #[inline(always)]
    fn start(&self, rows: usize, depth: usize, columns: usize) -> *const T {
        let (down, along) = ((rows as isize - 1) * self.stride, (depth as isize - 1) * self.step);
        let first = self.at + down.min(0) + along.min(0);
        let last = self.at + down.max(0) + along.max(0) + columns as isize;
        let inside = depth > 0 && first >= 0 && last <= self.values.len() as isize;
        assert!(inside, "a strip reads {first}..{last} of {}", self.values.len());
        self.values.as_ptr().wrapping_offset(self.at)
    }
}

/// Rows of a buffer to write: row i starts at `at + i·stride`.
pub(crate) struct Rows<'a, T> {
    pub(crate) values: &'a mut [T],
    pub(crate) at: isize,
    pub(crate) stride: usize,
    /// Whether to add to what is there.
    pub(crate) accumulate: bool,
}

impl<T> Rows<'_, T> {
    /// Pointer to the first element, once all of `rows` rows are known to lie in the buffer.
    #[inline(always)]
    fn start(&mut self, rows: usize, columns: usize) -> *mut T {
        assert!(columns.is_multiple_of(LANES), "{columns} columns are no whole vectors");
        let last = self.at + ((rows - 1) * self.stride + columns) as isize;
        let inside = self.at >= 0 && last <= self.values.len() as isize;
        assert!(inside, "a strip writes {}..{last} of {}", self.at, self.values.len());
        self.values.as_mut_ptr().wrapping_offset(self.at)
    }
}

/// `dst[i, c] (+)= Σ_k a(i, k)·b[k, c]` for [`ROWS`] rows, `k < depth` and `c < columns`, a multiple
/// of [`LANES`]. Only `step` of b is used.
#[inline(always)]
pub(crate) fn strip<T: Vector>(
    mut dst: Rows<'_, T>,
    a: Walk<'_, T>,
    b: Walk<'_, T>,
    depth: usize,
    columns: usize,
) {
    let product = Product {
        start: dst.start(ROWS, columns),
        stride: dst.stride,
        accumulate: dst.accumulate,
        a: a.start(ROWS, depth, 1),
        a_stride: a.stride,
        a_step: a.step,
        b: b.start(1, depth, columns),
        b_step: b.step,
        depth,
    };
    Arch::new().dispatch(Strip { product, columns });
}

/// `dst[i, c] (+)= Σ_k a[k, c]·b[k, c - i]` for `rows` rows: a product along diagonals. `stride` of
/// neither operand is used.
#[inline(always)]
pub(crate) fn slide<T: Vector>(
    mut dst: Rows<'_, T>,
    a: Walk<'_, T>,
    b: Walk<'_, T>,
    depth: usize,
    (rows, columns): (usize, usize),
) {
    let product = Product {
        start: dst.start(rows, columns),
        stride: dst.stride,
        accumulate: dst.accumulate,
        a: a.start(1, depth, columns),
        a_stride: 0,
        a_step: a.step,
        b: Walk { stride: -1, ..b }.start(rows, depth, columns),
        b_step: b.step,
        depth,
    };
    Arch::new().dispatch(Slide { product, rows, columns });
}

/// Operands whose extent [`strip`] or [`slide`] checked.
#[derive(Clone, Copy)]
struct Product<T> {
    start: *mut T,
    stride: usize,
    accumulate: bool,
    a: *const T,
    a_stride: isize,
    a_step: isize,
    b: *const T,
    b_step: isize,
    depth: usize,
}

/// Elements in one register.
#[inline(always)]
fn lanes<T: Vector, S: Simd>() -> usize {
    size_of::<T::Lanes<S>>() / size_of::<T>()
}

/// Vectors of a row that one pass takes: with six rows, 24 sums of 32 registers or 12 of 16.
#[inline(always)]
fn most_vectors<S: Simd>() -> usize {
    if S::REGISTER_COUNT < 32 { 2 } else { 4 }
}

struct Strip<T> {
    product: Product<T>,
    columns: usize,
}

impl<T: Vector> WithSimd for Strip<T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let lanes = lanes::<T, S>();
        let mut column = 0;
        while column < self.columns {
            let vectors = ((self.columns - column) / lanes).min(most_vectors::<S>());
            // SAFETY: `strip` checked all rows and columns; columns are a multiple of LANES, and that
            // one of lanes, so the vectors end at `columns` at the latest.
            unsafe {
                match vectors {
                    4 => self.product.broadcast::<S, 4>(simd, column),
                    3 => self.product.broadcast::<S, 3>(simd, column),
                    2 => self.product.broadcast::<S, 2>(simd, column),
                    _ => self.product.broadcast::<S, 1>(simd, column),
                }
            }
            column += vectors * lanes;
        }
    }
}

struct Slide<T> {
    product: Product<T>,
    rows: usize,
    columns: usize,
}

impl<T: Vector> WithSimd for Slide<T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let lanes = lanes::<T, S>();
        let mut column = 0;
        while column < self.columns {
            let vectors = ((self.columns - column) / lanes).min(most_vectors::<S>());
            // SAFETY: as in `Strip`, with the rows that `slide` checked.
            unsafe {
                match vectors {
                    4 => self.rows::<S, 4>(simd, column),
                    3 => self.rows::<S, 3>(simd, column),
                    2 => self.rows::<S, 2>(simd, column),
                    _ => self.rows::<S, 1>(simd, column),
                }
            }
            column += vectors * lanes;
        }
    }
}

impl<T: Vector> Slide<T> {
    /// All rows, up to six at a time that are a register's length apart.
    #[inline(always)]
    unsafe fn rows<S: Simd, const V: usize>(&self, simd: S, column: usize) {
        let lanes = lanes::<T, S>();
        for first in 0..lanes.min(self.rows) {
            let mut row = first;
            while row < self.rows {
                let rows = (self.rows - row).div_ceil(lanes).min(6);
                // SAFETY: the last of these rows is below `self.rows`; columns are the caller's.
                unsafe {
                    match rows {
                        6 => self.product.diagonal::<S, 6, V>(simd, row, column),
                        5 => self.product.diagonal::<S, 5, V>(simd, row, column),
                        4 => self.product.diagonal::<S, 4, V>(simd, row, column),
                        3 => self.product.diagonal::<S, 3, V>(simd, row, column),
                        2 => self.product.diagonal::<S, 2, V>(simd, row, column),
                        _ => self.product.diagonal::<S, 1, V>(simd, row, column),
                    }
                }
                row += rows * lanes;
            }
        }
    }
}

impl<T: Vector> Product<T> {
    /// `V` vectors of [`ROWS`] rows.
    ///
    /// # Safety
    /// Columns `column..column + V·lanes` must be among those that [`strip`] checked.
    #[inline(always)]
    unsafe fn broadcast<S: Simd, const V: usize>(self, simd: S, column: usize) {
        // SAFETY: every address is one that was checked: `i < ROWS`, `k < depth`, and the columns by
        // this function's contract.
        unsafe {
            let mut sums: [[T::Lanes<S>; V]; ROWS] = self.before(simd, (0, 1), column);
            let (mut a, mut b) = (self.a, self.b.add(column));
            for _ in 0..self.depth {
                let mut row = [T::splat(simd, T::ZERO); V];
                for v in 0..V {
                    row[v] = read(b, v);
                }
                for i in 0..ROWS {
                    let x = T::splat(simd, *a.offset(i as isize * self.a_stride));
                    for v in 0..V {
                        sums[i][v] = T::fused(simd, x, row[v], sums[i][v]);
                    }
                }
                a = a.wrapping_offset(self.a_step);
                b = b.wrapping_offset(self.b_step);
            }
            self.store::<S, ROWS, V>(sums, (0, 1), column);
        }
    }

    /// `V` vectors of `R` rows that are a register's length apart: row after row reads the registers
    /// of b that the one before it read, one further on. Neighbouring rows would each read their own,
    /// and across cache lines: that took half again as long.
    ///
    /// # Safety
    /// These rows, and columns `column..column + V·lanes`, must be among those that [`slide`] checked.
    #[inline(always)]
    unsafe fn diagonal<S: Simd, const R: usize, const V: usize>(
        self,
        simd: S,
        row: usize,
        column: usize,
    ) {
        let apart = lanes::<T, S>();
        // SAFETY: every address is one that was checked: `k < depth`, and the rows and columns by this
        // function's contract.
        unsafe {
            let mut sums: [[T::Lanes<S>; V]; R] = self.before(simd, (row, apart), column);
            let mut a = self.a.add(column);
            // Of the last row, whose registers come first.
            let mut b = self.b.offset(column as isize - (row + (R - 1) * apart) as isize);
            for _ in 0..self.depth {
                let mut x = [T::splat(simd, T::ZERO); V];
                for v in 0..V {
                    x[v] = read(a, v);
                }
                for register in 0..V + R - 1 {
                    let y = read(b, register);
                    for i in 0..R {
                        let v = (register + i).wrapping_sub(R - 1);
                        if v < V {
                            sums[i][v] = T::fused(simd, x[v], y, sums[i][v]);
                        }
                    }
                }
                a = a.wrapping_offset(self.a_step);
                b = b.wrapping_offset(self.b_step);
            }
            self.store::<S, R, V>(sums, (row, apart), column);
        }
    }

    /// What the sums of rows `first`, `first + apart`, ... start from.
    ///
    /// # Safety
    /// The rows and columns must be among those that were checked.
    #[inline(always)]
    unsafe fn before<S: Simd, const R: usize, const V: usize>(
        &self,
        simd: S,
        (first, apart): (usize, usize),
        column: usize,
    ) -> [[T::Lanes<S>; V]; R] {
        let mut sums = [[T::splat(simd, T::ZERO); V]; R];
        if self.accumulate {
            for i in 0..R {
                for v in 0..V {
                    let at = (first + i * apart) * self.stride + column;
                    // SAFETY: by this function's contract.
                    sums[i][v] = unsafe { read(self.start.add(at), v) };
                }
            }
        }
        sums
    }

    /// # Safety
    /// As [`before`](Self::before).
    #[inline(always)]
    unsafe fn store<S: Simd, const R: usize, const V: usize>(
        &self,
        sums: [[T::Lanes<S>; V]; R],
        (first, apart): (usize, usize),
        column: usize,
    ) {
        for i in 0..R {
            for v in 0..V {
                let at = (first + i * apart) * self.stride + column;
                // SAFETY: by this function's contract; the buffer was borrowed exclusively.
                unsafe {
                    self.start.add(at).cast::<T::Lanes<S>>().add(v).write_unaligned(sums[i][v]);
                }
            }
        }
    }
}

/// Register `v` from `from` on.
///
/// # Safety
/// Its elements must lie in one buffer, which nobody writes.
#[inline(always)]
unsafe fn read<L: Copy, T>(from: *const T, v: usize) -> L {
    // SAFETY: by this function's contract.
    unsafe { from.cast::<L>().add(v).read_unaligned() }
}
