//! Kernels run on the host, for tests: memory that they may touch, launches, and in which order threads
//! run. How they are run is `common/host_run/`'s.

#[cfg(test)]
mod test;

use std::{
    cell::Cell,
    ffi::{CStr, c_char, c_void},
};

use candle_core::{
    CpuStorage, DType, InplaceOp1, Layout, Result, Storage, Tensor, backend::BackendStorage, bail,
};

use super::{
    device::{Address, Kernel},
    mirror::{Plain, bytes},
};

unsafe extern "C" {
    fn host_run_allocate(bytes: usize) -> *mut c_void;
    fn host_run_free(start: *mut c_void);
    #[cfg(test)]
    fn host_run_order(order: u64);
}

/// A kernel's entry on the host: grid, threads of a block, dynamic shared memory, parameters and their
/// size. What went wrong, or null.
pub(crate) type Entry<P> = unsafe extern "C" fn(&[u32; 3], u32, usize, &P, usize) -> *const c_char;

/// What a launch failed with: a race, a bound, a divergent barrier.
pub(crate) fn outcome<P>(
    kernel: Kernel<P>,
    grid: [u32; 3],
    shared_bytes: usize,
    parameters: &P,
) -> std::result::Result<(), String> {
    // SAFETY: the entry checks the size of the parameters, and every access of the kernel.
    let failure =
        unsafe { (kernel.host)(&grid, kernel.threads, shared_bytes, parameters, size_of::<P>()) };
    if failure.is_null() {
        return Ok(());
    }
    // SAFETY: a failure is a C string that lives until the next launch.
    Err(unsafe { CStr::from_ptr(failure) }.to_string_lossy().into_owned())
}

thread_local! {
    /// Whether f32 tensors go to the kernels too.
    static KERNELS_FOR_F32: Cell<bool> = const { Cell::new(false) };
}

/// Whether ops on the CPU take the kernels for tensors of `dtype`.
pub(crate) fn takes(dtype: DType) -> bool {
    dtype == DType::BF16 || dtype == DType::F32 && KERNELS_FOR_F32.get()
}

/// Runs `body`, in which ops of this thread take the kernels for f32 tensors as well.
#[cfg(test)]
pub(crate) fn kernels_for_f32<R>(body: impl FnOnce() -> R) -> R {
    let before = KERNELS_FOR_F32.replace(true);
    let result = body();
    KERNELS_FOR_F32.set(before);
    result
}

/// A launch in the making: copies of what it may touch, in memory whose ends the runtime sees.
#[derive(Default)]
pub(crate) struct Target<'a> {
    buffers: Vec<(Buffer<u8>, Option<&'a Tensor>)>,
}

impl<'a> Target<'a> {
    pub(crate) fn read(&mut self, tensor: &Tensor) -> Result<Address> {
        self.hold(Buffer::of(&bytes_of(tensor)?), None)
    }

    pub(crate) fn write(&mut self, tensor: &'a Tensor) -> Result<Address> {
        self.hold(Buffer::of(&bytes_of(tensor)?), Some(tensor))
    }

    pub(crate) fn numbers<T: Plain>(&mut self, numbers: &[T]) -> Address {
        let buffer = Buffer::of(bytes(numbers));
        let address = buffer.address();
        self.buffers.push((buffer, None));
        address
    }

    fn hold(&mut self, buffer: Buffer<u8>, back: Option<&'a Tensor>) -> Result<Address> {
        let address = buffer.address();
        self.buffers.push((buffer, back));
        Ok(address)
    }

    /// Runs the kernel, then writes what it wrote to the tensors.
    pub(crate) fn run<P>(
        self,
        kernel: Kernel<P>,
        grid: [u32; 3],
        shared_bytes: usize,
        parameters: &P,
    ) -> Result<()> {
        if let Err(failure) = outcome(kernel, grid, shared_bytes, parameters) {
            bail!("{failure}");
        }
        for (buffer, tensor) in &self.buffers {
            if let Some(tensor) = tensor {
                write_bytes(tensor, buffer.values())?;
            }
        }
        Ok(())
    }
}

/// Runs `$body` with the elements of a CPU storage.
macro_rules! elements {
    ($storage:expr, $values:ident => $body:expr) => {
        match $storage {
            CpuStorage::F32($values) => $body,
            CpuStorage::F64($values) => $body,
            CpuStorage::BF16($values) => $body,
            CpuStorage::U32($values) => $body,
            CpuStorage::U8($values) => $body,
            other => bail!("no kernel takes {:?}", other.dtype()),
        }
    };
}

fn bytes_of(tensor: &Tensor) -> Result<Vec<u8>> {
    let size = tensor.dtype().size_in_bytes();
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cpu(storage) = &*storage else {
        bail!("a host run was given another device's tensor")
    };
    let Some((start, end)) = layout.contiguous_offsets() else { bail!("not contiguous") };
    elements!(storage, values => {
        // SAFETY: plain numbers, every byte of which is initialised.
        let bytes = unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), values.len() * size) };
        Ok(<[u8]>::to_vec(&bytes[start * size..end * size]))
    })
}

struct WriteBytes<'b>(&'b [u8]);

impl InplaceOp1 for WriteBytes<'_> {
    fn name(&self) -> &'static str {
        "write_bytes"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let size = storage.dtype().size_in_bytes();
        let start = layout.start_offset();
        elements!(storage, values => {
            let values = &mut values[start..start + self.0.len() / size];
            // SAFETY: as long as the bytes, and any bytes are a value of these numbers.
            unsafe {
                let to = values.as_mut_ptr().cast::<u8>();
                std::ptr::copy_nonoverlapping(self.0.as_ptr(), to, size_of_val(values));
            }
        });
        Ok(())
    }
}

/// Copies the elements of `from` to `to`, which has the same shape and dtype.
pub(crate) fn overwrite(to: &Tensor, from: &Tensor) -> Result<()> {
    write_bytes(to, &bytes_of(from)?)
}

fn write_bytes(tensor: &Tensor, bytes: &[u8]) -> Result<()> {
    tensor.inplace_op1(&WriteBytes(bytes))
}

/// Runs `test` with threads and blocks in ascending, descending and random order.
#[cfg(test)]
pub(crate) fn in_every_order(test: impl Fn() -> Result<()>) -> Result<()> {
    for order in [0, 1, 7] {
        // SAFETY: a call without arguments to check.
        unsafe { host_run_order(order) };
        test()?;
    }
    Ok(())
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
