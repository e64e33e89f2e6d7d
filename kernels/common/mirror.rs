//! Numbers that the host makes and kernels read: lengths, ids, labels, tables of angles.

use std::ops::Deref;

/// What may be copied to a device byte by byte: no padding, no pointer.
///
/// # Safety
/// Every byte of a value must be initialised, and it must mean the same on the device.
pub unsafe trait Plain: Copy + Send + Sync + 'static {}
// SAFETY: plain numbers, and arrays of them.
unsafe impl Plain for u32 {}
// SAFETY: as above.
unsafe impl Plain for i32 {}
// SAFETY: as above.
unsafe impl Plain for i16 {}
// SAFETY: as above.
unsafe impl Plain for f32 {}
// SAFETY: as above.
unsafe impl Plain for [i32; 2] {}

/// Numbers on the host that a device gets a copy of when the first kernel reads them, once.
#[derive(Debug, Default)]
pub struct Mirror<T> {
    host: Vec<T>,
    #[cfg(feature = "cuda")]
    pub(crate) device: std::sync::OnceLock<super::device::cuda::Memory>,
}

impl<T: Copy> Clone for Mirror<T> {
    /// Of the host's numbers; the clone's device copy is its own.
    fn clone(&self) -> Self {
        self.host.clone().into()
    }
}

impl<T> From<Vec<T>> for Mirror<T> {
    fn from(host: Vec<T>) -> Self {
        Self {
            host,
            #[cfg(feature = "cuda")]
            device: std::sync::OnceLock::new(),
        }
    }
}

impl<T> Deref for Mirror<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.host
    }
}

/// The bytes of plain numbers.
#[cfg(any(feature = "cuda", feature = "host-kernels"))]
pub(crate) fn bytes<T: Plain>(numbers: &[T]) -> &[u8] {
    // SAFETY: `Plain` promises that every byte is initialised.
    unsafe { std::slice::from_raw_parts(numbers.as_ptr().cast(), size_of_val(numbers)) }
}
