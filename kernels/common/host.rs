//! Reading and writing the memory of CPU tensors, and buffers that are written before they are read.

use std::{
    cell::RefCell,
    marker::PhantomData,
    ops::{Deref, Range},
};

use candle_core::{
    CpuStorage, Device, InplaceOp1, Layout, Result, Shape, Storage, Tensor, WithDType, bail,
};

use parking_lot::RwLockReadGuard;

use super::Real;

/// A contiguous CPU tensor, borrowed as a slice.
pub struct Host<'a, T> {
    guard: RwLockReadGuard<'a, Storage>,
    range: Range<usize>,
    element: PhantomData<T>,
}

/// Borrows the elements of a contiguous CPU tensor.
///
/// # Errors
/// On another device or dtype, or when the tensor is not contiguous.
pub fn read<T: WithDType>(tensor: &Tensor) -> Result<Host<'_, T>> {
    let (guard, layout) = tensor.storage_and_layout();
    let Some((start, end)) = layout.contiguous_offsets() else {
        bail!("a kernel was given a tensor of shape {:?} that is not contiguous", layout.shape());
    };
    match &*guard {
        Storage::Cpu(storage) => storage.as_slice::<T>()?,
        _ => bail!("a CPU kernel was given a tensor on another device"),
    };
    Ok(Host { guard, range: start..end, element: PhantomData })
}

impl<T: WithDType> Deref for Host<'_, T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        match &*self.guard {
            Storage::Cpu(storage) => match storage.as_slice::<T>() {
                Ok(values) => &values[self.range.clone()],
                Err(_) => unreachable!("read() checked the dtype"),
            },
            _ => unreachable!("read() checked the device"),
        }
    }
}

struct Write<F>(RefCell<Option<F>>);

impl<F: FnOnce(&mut CpuStorage, &Layout) -> Result<()>> InplaceOp1 for Write<F> {
    fn name(&self) -> &'static str {
        "write"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        match self.0.borrow_mut().take() {
            Some(write) => write(storage, layout),
            None => bail!("an in-place write ran twice"),
        }
    }
}

/// Hands the elements of a contiguous CPU tensor to `write`, in place. The tensor's storage stays
/// locked meanwhile: `write` must not read another view of it.
///
/// # Errors
/// As [`read`], and those of `write`.
pub fn write<T: Real, R>(tensor: &Tensor, write: impl FnOnce(&mut [T]) -> Result<R>) -> Result<R> {
    let mut result = None;
    let op = |storage: &mut CpuStorage, layout: &Layout| {
        let Some((start, end)) = layout.contiguous_offsets() else {
            bail!("cannot write a tensor of shape {:?}: not contiguous", layout.shape());
        };
        let dtype = storage.as_slice::<T>().err();
        let Some(values) = T::storage_mut(storage) else {
            bail!("cannot write: {}", dtype.map_or_else(String::new, |e| e.to_string()));
        };
        result = Some(write(&mut values[start..end])?);
        Ok(())
    };
    tensor.inplace_op1(&Write(RefCell::new(Some(op))))?;
    match result {
        Some(result) => Ok(result),
        None => bail!("an in-place write did not run"),
    }
}

/// A tensor that owns `values`.
pub(crate) fn tensor<T: Real>(values: Vec<T>, shape: impl Into<Shape>) -> Result<Tensor> {
    Tensor::from_vec(values, shape, &Device::Cpu)
}

/// A buffer of `n` elements that the caller promises to write entirely before reading any. Tests
/// fill it with NaN, so that an element that was not written is seen.
#[allow(clippy::uninit_vec)]
pub(crate) fn unwritten<T: Real>(n: usize) -> Vec<T> {
    let mut values = Vec::with_capacity(n);
    // SAFETY: the capacity is n, and every caller writes all n elements before one is read (tests
    // poison them to hold callers to it). What is relied on beyond the letter of the language is that
    // a `&mut [T]` over floats nobody has written yet is harmless while it is only written through.
    unsafe { values.set_len(n) };
    if cfg!(test) {
        values.fill(T::of(f64::NAN));
    }
    values
}

/// A slice that several tasks write at once, each its own elements.
#[derive(Clone, Copy)]
pub(crate) struct Scatter<'a, T> {
    start: *mut T,
    len: usize,
    borrow: PhantomData<&'a mut [T]>,
}

// SAFETY: a Scatter only hands out pointers; `row` is unsafe and its contract forbids overlap.
unsafe impl<T: Send> Send for Scatter<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Scatter<'_, T> {}

impl<'a, T> Scatter<'a, T> {
    pub(crate) fn new(values: &'a mut [T]) -> Self {
        Self { start: values.as_mut_ptr(), len: values.len(), borrow: PhantomData }
    }

    /// Pointer to element `at`, for a GEMM that writes a strided block from there.
    pub(crate) fn pointer(&self, at: usize) -> *mut T {
        assert!(at <= self.len, "offset {at} of {}", self.len);
        // SAFETY: at <= len, checked above.
        unsafe { self.start.add(at) }
    }

    /// Elements `at..at + n`.
    ///
    /// # Safety
    /// No other task may touch these elements while the slice lives.
    pub(crate) unsafe fn slice(&self, at: usize, n: usize) -> &'a mut [T] {
        assert!(at + n <= self.len, "slice {at}..{} of {}", at + n, self.len);
        // SAFETY: in bounds, checked above; exclusive by this function's contract.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(at), n) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_view_is_read_and_written_in_place() -> Result<()> {
        let flat = Tensor::arange(0f32, 10f32, &Device::Cpu)?;
        let view = flat.narrow(0, 2, 6)?.reshape((2, 3))?;
        write::<f32, _>(&view, |values| {
            values[0] = 20.0;
            Ok(())
        })?;
        assert_eq!(&*read::<f32>(&view)?, &[20., 3., 4., 5., 6., 7.]);
        assert_eq!(flat.to_vec1::<f32>()?[2], 20.0);
        Ok(())
    }

    #[test]
    fn wrong_layout_or_dtype_is_refused() -> Result<()> {
        let flat = Tensor::arange(0f32, 6f32, &Device::Cpu)?.reshape((2, 3))?;
        assert!(read::<f32>(&flat.t()?).is_err());
        assert!(read::<f64>(&flat).is_err());
        assert!(write::<f64, _>(&flat, |_| Ok(())).is_err());
        Ok(())
    }
}
