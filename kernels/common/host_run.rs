//! Kernels run on the host, for tests: memory that they may touch, launches in several orders, and
//! comparisons by what rounding allows. How they are run is `common/host_run/`'s.

mod test;

use std::ffi::{CStr, c_char, c_void};

use candle_core::{DType, Device, Result, Tensor};
use half::bf16;

use super::{Dropout, Ragged, RowIds};

unsafe extern "C" {
    fn host_run_allocate(bytes: usize) -> *mut c_void;
    fn host_run_free(start: *mut c_void);
    fn host_run_order(order: u64);
}

/// Declares the host entries of kernels: `kernels!(Parameters: entry, entry);`. An entry is `host_`
/// and the kernel's name in its `op.cu`; `Parameters` mirrors the struct there, field by field.
macro_rules! kernels {
    ($($parameters:ty: $($entry:ident),+;)+) => {
        // SAFETY: common/device.cuh defines each with this signature.
        unsafe extern "C" {
            $($(fn $entry(
                grid: &[u32; 3],
                shared_bytes: usize,
                parameters: &$parameters,
                parameter_bytes: usize,
            ) -> *const std::ffi::c_char;)+)+
        }
    };
}
pub(crate) use kernels;

/// A host entry.
pub(crate) type Kernel<P> = unsafe extern "C" fn(&[u32; 3], usize, &P, usize) -> *const c_char;

/// What a launch failed with: a race, a bound, a divergent barrier.
pub(crate) fn outcome<P>(
    kernel: Kernel<P>,
    grid: [u32; 3],
    shared_bytes: usize,
    parameters: &P,
) -> std::result::Result<(), String> {
    // SAFETY: the entry checks the size of the parameters, and every access of the kernel.
    let failure = unsafe { kernel(&grid, shared_bytes, parameters, size_of::<P>()) };
    if failure.is_null() {
        return Ok(());
    }
    // SAFETY: a failure is a C string that lives until the next launch.
    Err(unsafe { CStr::from_ptr(failure) }.to_string_lossy().into_owned())
}

/// Runs a kernel over a grid.
///
/// # Panics
/// If a check of the runtime fails.
pub(crate) fn launch<P>(kernel: Kernel<P>, grid: [usize; 3], shared_bytes: usize, parameters: &P) {
    let grid = grid.map(|n| u32::try_from(n).expect("a grid of u32"));
    if let Err(failure) = outcome(kernel, grid, shared_bytes, parameters) {
        panic!("{failure}");
    }
}

/// Runs `test` with threads and blocks in ascending, descending and random order.
pub(crate) fn in_every_order(test: impl Fn() -> Result<()>) -> Result<()> {
    for order in [0, 1, 7] {
        // SAFETY: a call without arguments to check.
        unsafe { host_run_order(order) };
        test()?;
    }
    Ok(())
}

/// What tensors are stored as.
pub(crate) trait Storage: Copy {
    /// Whether it is bf16.
    const BF16: bool;
    /// Rounded to nearest.
    fn of(value: f64) -> Self;
    /// Exactly.
    fn wide(self) -> f64;
}

impl Storage for f32 {
    const BF16: bool = false;

    fn of(value: f64) -> Self {
        value as f32
    }

    fn wide(self) -> f64 {
        f64::from(self)
    }
}

impl Storage for bf16 {
    const BF16: bool = true;

    fn of(value: f64) -> Self {
        bf16::from_f64(value)
    }

    fn wide(self) -> f64 {
        self.to_f64()
    }
}

/// Memory of kernels, which ends where the runtime sees it.
pub(crate) struct Buffer<T> {
    start: *mut T,
    len: usize,
}

impl<T: Copy> Buffer<T> {
    /// `len` elements of NaN.
    pub(crate) fn poisoned(len: usize) -> Self {
        // SAFETY: the allocator has no contract beyond its size; null is full.
        let start = unsafe { host_run_allocate(len * size_of::<T>()) }.cast::<T>();
        assert!(!start.is_null(), "the host run's gigabyte of memory is used up");
        Self { start, len }
    }

    pub(crate) fn of(values: &[T]) -> Self {
        let buffer = Self::poisoned(values.len());
        // SAFETY: the buffer is as long as `values` and new.
        unsafe { std::ptr::copy_nonoverlapping(values.as_ptr(), buffer.start, values.len()) };
        buffer
    }

    /// What a kernel takes as a pointer.
    pub(crate) fn address(&self) -> Address {
        Address(self.start as u64)
    }

    /// The same of element `at`.
    pub(crate) fn address_of(&self, at: usize) -> Address {
        assert!(at <= self.len, "element {at} of {}", self.len);
        Address((self.start as usize + at * size_of::<T>()) as u64)
    }

    pub(crate) fn values(&self) -> &[T] {
        // SAFETY: allocated with this length, every bit pattern is a value of the numbers stored, and
        // kernels only write while a launch runs.
        unsafe { std::slice::from_raw_parts(self.start, self.len) }
    }
}

impl<T> Drop for Buffer<T> {
    fn drop(&mut self) {
        // SAFETY: the allocator gave it, and what borrows from it is gone.
        unsafe { host_run_free(self.start.cast()) };
    }
}

impl<S: Storage> Buffer<S> {
    /// The elements of a tensor, rounded.
    pub(crate) fn tensor(tensor: &Tensor) -> Result<Self> {
        let values = tensor.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
        Ok(Self::of(&values.into_iter().map(S::of).collect::<Vec<_>>()))
    }

    /// The elements as f64.
    pub(crate) fn wide(&self) -> Vec<f64> {
        self.values().iter().map(|x| x.wide()).collect()
    }
}

/// A pointer as kernels take it; [`NULL`](Self::NULL) where something is missing.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(crate) struct Address(u64);

impl Address {
    pub(crate) const NULL: Self = Self(0);

    /// That of a buffer, if there is one.
    pub(crate) fn of<T: Copy>(buffer: Option<&Buffer<T>>) -> Self {
        buffer.map_or(Self::NULL, Buffer::address)
    }
}

/// `Dropout` of `common/device.cuh`.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct DropoutParameters {
    key: [u32; 2],
    step: u32,
    threshold: u32,
    scale: f32,
}

impl DropoutParameters {
    pub(crate) fn new(dropout: Option<&Dropout>) -> Self {
        dropout.map_or(Self { key: [0; 2], step: 0, threshold: 0, scale: 1.0 }, |dropout| Self {
            key: dropout.key,
            step: dropout.step,
            threshold: u32::from(dropout.threshold),
            scale: dropout.scale() as f32,
        })
    }
}

/// Row ids in memory of kernels.
pub(crate) struct RowIdBuffers {
    sample: Buffer<u32>,
    position: Buffer<u32>,
}

/// `RowIds` of `common/device.cuh`.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct RowIdParameters {
    sample: Address,
    position: Address,
}

impl RowIdBuffers {
    pub(crate) fn new(rows: &RowIds) -> Self {
        Self { sample: Buffer::of(&rows.sample), position: Buffer::of(&rows.position) }
    }

    pub(crate) fn parameters(&self) -> RowIdParameters {
        RowIdParameters { sample: self.sample.address(), position: self.position.address() }
    }
}

/// `cu_seqlens` as kernels take it: B + 1 numbers.
pub(crate) fn seqlens(ragged: &Ragged) -> Buffer<i32> {
    Buffer::of(&ragged.cu_seqlens().iter().map(|at| *at as i32).collect::<Vec<_>>())
}

/// (sequence, first row) of every tile of `rows` rows: what blocks of attention take.
pub(crate) fn work(ragged: &Ragged, rows: usize) -> Buffer<[i32; 2]> {
    let tiles =
        |s: usize| (0..ragged.range(s).len()).step_by(rows).map(move |row| [s as i32, row as i32]);
    Buffer::of(&(0..ragged.sequences()).flat_map(tiles).collect::<Vec<_>>())
}

/// `AddPartials` of `common/op.cu`.
#[repr(C)]
struct AddPartials {
    partials: Address,
    gradient: Address,
    parts: i32,
    columns: i32,
}
kernels!(AddPartials: host_add_partials_f32;);

/// Rows of one partial sum, and how many partials that makes.
pub(crate) fn parts(rows: usize) -> (usize, usize) {
    const ROWS_PER_PART: usize = 24;
    (ROWS_PER_PART, rows.div_ceil(ROWS_PER_PART))
}

/// Adds `[parts, gradient]` partial sums to a gradient, in order.
pub(crate) fn add_partials(partials: &Buffer<f32>, gradient: &Buffer<f32>) {
    let columns = gradient.len;
    let parameters = AddPartials {
        partials: partials.address(),
        gradient: gradient.address(),
        parts: (partials.len / columns) as i32,
        columns: columns as i32,
    };
    launch(host_add_partials_f32, [columns.div_ceil(128), 1, 1], 0, &parameters);
}

/// `tensor` with its elements rounded to `S`: what the kernel reads, as f64.
pub(crate) fn rounded<S: Storage>(tensor: &Tensor) -> Result<Tensor> {
    Tensor::from_vec(Buffer::<S>::tensor(tensor)?.wide(), tensor.dims(), &Device::Cpu)
}

/// Holds what a kernel wrote to the `exact` f64 results. A stored element may be twice as wrong as the
/// exact result rounded to `S`, and besides by `arithmetic`, relative to the largest magnitude (at
/// least 1): what f32 arithmetic loses before it is stored.
pub(crate) fn check<S: Storage>(
    what: &str,
    got: &Buffer<S>,
    exact: &Tensor,
    arithmetic: f64,
) -> Result<()> {
    let want = exact.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
    let naive = want.iter().map(|x| (S::of(*x).wide() - x).abs()).fold(0.0, f64::max);
    check_within(what, &got.wide(), &want, 2.0 * naive, arithmetic)
}

/// Holds `got` to `want` within `allowed`, and besides `arithmetic` as in [`check`].
pub(crate) fn check_within(
    what: &str,
    got: &[f64],
    want: &[f64],
    allowed: f64,
    arithmetic: f64,
) -> Result<()> {
    assert_eq!(got.len(), want.len(), "{what}");
    let scale = want.iter().fold(1.0f64, |m, x| m.max(x.abs()));
    let (allowed, mut worst) = (allowed + arithmetic * scale, 0.0f64);
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        let error = (got - want).abs();
        // Written so that NaN fails.
        assert!(error <= allowed, "{what}[{i}]: {got}, expected {want} within {allowed:e}");
        worst = worst.max(error);
    }
    println!("{what}: off by {worst:.1e}, allowed {allowed:.1e}");
    Ok(())
}

/// Holds what a kernel wrote to be at most twice as far from `exact` as a naive implementation of the
/// same precision is.
pub(crate) fn check_against<S: Storage>(
    what: &str,
    got: &Buffer<S>,
    exact: &[f64],
    naive: &[f64],
) -> Result<()> {
    // Not `f64::max`, which would overlook a NaN.
    let errors = exact.iter().zip(naive).map(|(exact, naive)| (exact - naive).abs());
    let worst = errors.fold(0.0, |m, e| if e <= m { m } else { e });
    check_within(what, &got.wide(), exact, 2.0 * worst, 1e-6)
}
