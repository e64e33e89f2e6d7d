//! Micro-kernels: [`ROWS`] rows of a product at a time, accumulated in registers.
//!
//! A GEMM library packs both operands first, which costs too much where an operand is a slice of a
//! diagonal band that no other product reads. Here the left operand is read one element at a time, at
//! any two strides, so a band is read where it lies; the right operand has rows of whole vectors.

use pulp::{Arch, Simd, WithSimd};

use crate::common::{Real, real::LANES};

/// Rows that one strip computes. Every buffer has room for a last strip that is not full.
pub(super) const ROWS: usize = 6;

/// Vector arithmetic on an element type, for whichever vector unit runs.
pub(in crate::disentangled) trait Vector: Real {
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
pub(super) struct Walk<'a, T> {
    pub(super) values: &'a [T],
    pub(super) at: isize,
    pub(super) stride: isize,
    pub(super) step: isize,
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
pub(super) struct Rows<'a, T> {
    pub(super) values: &'a mut [T],
    pub(super) at: isize,
    pub(super) stride: usize,
    /// Whether to add to what is there.
    pub(super) accumulate: bool,
}

impl<T> Rows<'_, T> {
    #[inline(always)]
    fn start(&mut self, columns: usize) -> *mut T {
        assert!(columns.is_multiple_of(LANES), "{columns} columns are no whole vectors");
        let last = self.at + ((ROWS - 1) * self.stride + columns) as isize;
        let inside = self.at >= 0 && last <= self.values.len() as isize;
        assert!(inside, "a strip writes {}..{last} of {}", self.at, self.values.len());
        self.values.as_mut_ptr().wrapping_offset(self.at)
    }
}

/// `dst[i, c] (+)= Σ_k a(i, k)·b[k, c]` for [`ROWS`] rows, `k < depth` and `c < columns`, a multiple
/// of [`LANES`]. Only `step` of b is used.
#[inline(always)]
pub(super) fn strip<T: Vector>(
    mut dst: Rows<'_, T>,
    a: Walk<'_, T>,
    b: Walk<'_, T>,
    depth: usize,
    columns: usize,
) {
    let product = Product {
        start: dst.start(columns),
        stride: dst.stride,
        accumulate: dst.accumulate,
        a: a.start(ROWS, depth, 1),
        a_stride: a.stride,
        a_step: a.step,
        b: b.start(1, depth, columns),
        b_step: b.step,
        depth,
    };
    Arch::new().dispatch(Sweep { pass: Broadcast(product), columns });
}

/// `dst[i, c] (+)= Σ_k a[k, c]·b[k, c - i]`: a product along diagonals. `stride` of neither is used.
#[inline(always)]
pub(super) fn slide<T: Vector>(
    mut dst: Rows<'_, T>,
    a: Walk<'_, T>,
    b: Walk<'_, T>,
    depth: usize,
    columns: usize,
) {
    let product = Product {
        start: dst.start(columns),
        stride: dst.stride,
        accumulate: dst.accumulate,
        a: a.start(1, depth, columns),
        a_stride: 0,
        a_step: a.step,
        b: Walk { stride: -1, ..b }.start(ROWS, depth, columns),
        b_step: b.step,
        depth,
    };
    Arch::new().dispatch(Sweep { pass: Diagonal(product), columns });
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

/// One pass over the depth, for `V` vectors of each row from `column` on.
trait Pass: Copy {
    type Element: Vector;

    /// # Safety
    /// `column` and `V` vectors after it must be inside the columns that were checked.
    unsafe fn run<S: Simd, const V: usize>(self, simd: S, column: usize);
}

/// All columns, as many vectors at a time as leave the accumulators in registers.
struct Sweep<P> {
    pass: P,
    columns: usize,
}

impl<P: Pass> WithSimd for Sweep<P> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let lanes = lanes::<P::Element, S>();
        let most = if S::REGISTER_COUNT < 32 { 2 } else { 4 };
        let mut column = 0;
        while column < self.columns {
            let vectors = ((self.columns - column) / lanes).min(most);
            // SAFETY: `vectors` of them end at `columns` at the latest: columns are a multiple of
            // LANES, which is one of lanes.
            unsafe {
                match vectors {
                    4 => self.pass.run::<S, 4>(simd, column),
                    3 => self.pass.run::<S, 3>(simd, column),
                    2 => self.pass.run::<S, 2>(simd, column),
                    _ => self.pass.run::<S, 1>(simd, column),
                }
            }
            column += vectors * lanes;
        }
    }
}

/// Elements in one register.
#[inline(always)]
fn lanes<T: Vector, S: Simd>() -> usize {
    size_of::<T::Lanes<S>>() / size_of::<T>()
}

impl<T: Vector> Product<T> {
    /// What row sums start from.
    #[inline(always)]
    unsafe fn before<S: Simd, const V: usize>(
        &self,
        simd: S,
        column: usize,
    ) -> [[T::Lanes<S>; V]; ROWS] {
        let mut sums = [[T::splat(simd, T::ZERO); V]; ROWS];
        if self.accumulate {
            for i in 0..ROWS {
                for v in 0..V {
                    // SAFETY: inside the rows that were checked.
                    sums[i][v] = unsafe { read(self.start.add(i * self.stride + column), v) };
                }
            }
        }
        sums
    }

    #[inline(always)]
    unsafe fn store<S: Simd, const V: usize>(&self, sums: [[T::Lanes<S>; V]; ROWS], column: usize) {
        for i in 0..ROWS {
            for v in 0..V {
                // SAFETY: inside the rows that were checked, and exclusively borrowed.
                unsafe {
                    let to = self.start.add(i * self.stride + column).cast::<T::Lanes<S>>();
                    to.add(v).write_unaligned(sums[i][v]);
                }
            }
        }
    }
}

/// Register `v` from `from` on.
#[inline(always)]
unsafe fn read<L: Copy, T>(from: *const T, v: usize) -> L {
    // SAFETY: the caller checked that these elements lie in its buffer.
    unsafe { from.cast::<L>().add(v).read_unaligned() }
}

#[derive(Clone, Copy)]
struct Broadcast<T>(Product<T>);

impl<T: Vector> Pass for Broadcast<T> {
    type Element = T;

    #[inline(always)]
    unsafe fn run<S: Simd, const V: usize>(self, simd: S, column: usize) {
        let p = self.0;
        // SAFETY: every address is one of those that `strip` checked: `i < ROWS`, `k < depth`, and
        // by this function's contract the columns.
        unsafe {
            let mut sums = p.before::<S, V>(simd, column);
            let (mut a, mut b) = (p.a, p.b.add(column));
            for _ in 0..p.depth {
                let mut row = [T::splat(simd, T::ZERO); V];
                for v in 0..V {
                    row[v] = read(b, v);
                }
                for i in 0..ROWS {
                    let x = T::splat(simd, *a.offset(i as isize * p.a_stride));
                    for v in 0..V {
                        sums[i][v] = T::fused(simd, x, row[v], sums[i][v]);
                    }
                }
                a = a.wrapping_offset(p.a_step);
                b = b.wrapping_offset(p.b_step);
            }
            p.store::<S, V>(sums, column);
        }
    }
}

#[derive(Clone, Copy)]
struct Diagonal<T>(Product<T>);

impl<T: Vector> Pass for Diagonal<T> {
    type Element = T;

    #[inline(always)]
    unsafe fn run<S: Simd, const V: usize>(self, simd: S, column: usize) {
        let p = self.0;
        // SAFETY: every address is one of those that `slide` checked: `i < ROWS`, `k < depth`, and
        // by this function's contract the columns.
        unsafe {
            let mut sums = p.before::<S, V>(simd, column);
            let (mut a, mut b) = (p.a.add(column), p.b.add(column));
            for _ in 0..p.depth {
                for v in 0..V {
                    let x = read(a, v);
                    for i in 0..ROWS {
                        let y = read(b.offset(-(i as isize)), v);
                        sums[i][v] = T::fused(simd, x, y, sums[i][v]);
                    }
                }
                a = a.wrapping_offset(p.a_step);
                b = b.wrapping_offset(p.b_step);
            }
            p.store::<S, V>(sums, column);
        }
    }
}
