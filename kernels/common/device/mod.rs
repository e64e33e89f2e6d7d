//! Launching the kernels of `op.cu` on what tensors hold.
//!
//! A room's `device.rs` says what a kernel takes and over which grid. Where it runs is decided here, by
//! the device of its tensors: a CUDA device, or, for tests (feature `host-kernels`), this machine's CPU by
//! `common/host_run`, so that all but the driver's calls runs without a GPU.
//!
//! | file | owns |
//! |---|---|
//! | this | `Launch`, kernels by name, new tensors |
//! | `cuda` | CUDA: opening a device, loading kernels, memory, the launch itself |
//! | `parameters` | what kernels of several rooms take |
//! | `product` | matrix products |

#[cfg(feature = "cuda")]
pub mod cuda;
pub(crate) mod parameters;
pub(crate) mod product;

use std::marker::PhantomData;

use candle_core::{DType, Device, Result, Shape, Tensor, bail};

use super::mirror::{Mirror, Plain};

#[cfg(feature = "host-kernels")]
use super::host_run;

/// A kernel by its name in `op.cu`, and the struct that it takes, a mirror of the one there.
pub(crate) struct Kernel<P> {
    name: &'static str,
    pub(crate) threads: u32,
    #[cfg(feature = "host-kernels")]
    pub(crate) host: host_run::Entry<P>,
    parameters: PhantomData<fn(&P)>,
}

impl<P> Clone for Kernel<P> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<P> Copy for Kernel<P> {}

impl<P> Kernel<P> {
    pub(crate) const fn new(
        name: &'static str,
        threads: u32,
        #[cfg(feature = "host-kernels")] host: host_run::Entry<P>,
    ) -> Self {
        Self {
            name,
            threads,
            #[cfg(feature = "host-kernels")]
            host,
            parameters: PhantomData,
        }
    }
}

/// Declares kernels: `kernels!(Parameters, threads: name, name; …)`. `Parameters` mirrors the struct of
/// `op.cu` field by field, `threads` is what `KERNEL` says there; the host run compares both.
macro_rules! kernels {
    ($($parameters:ty, $threads:expr => $($name:ident),+;)+) => {$($(
        #[allow(non_upper_case_globals)]
        const $name: $crate::common::device::Kernel<$parameters> = {
            #[cfg(feature = "host-kernels")]
            // SAFETY: common/device.cuh defines each with this signature.
            unsafe extern "C" {
                #[link_name = concat!("host_", stringify!($name))]
                fn entry(
                    grid: &[u32; 3],
                    threads: u32,
                    shared_bytes: usize,
                    parameters: &$parameters,
                    parameter_bytes: usize,
                ) -> *const std::ffi::c_char;
            }
            $crate::common::device::Kernel::new(
                stringify!($name),
                $threads,
                #[cfg(feature = "host-kernels")]
                entry,
            )
        };
    )+)+};
}
pub(crate) use kernels;

/// A pointer as kernels take it; [`NULL`](Self::NULL) where something is missing.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(crate) struct Address(pub(crate) u64);

impl Address {
    pub(crate) const NULL: Self = Self(0);
}

/// Whether kernels run on `device`, storing `dtype`: on every CUDA device, and for tests on the CPU
/// in bf16, for which there is no other implementation, or in f32 within `host_run::kernels_for_f32`.
#[cfg_attr(not(feature = "host-kernels"), expect(unused_variables))]
pub(crate) fn takes(device: &Device, dtype: DType) -> bool {
    match device {
        #[cfg(feature = "host-kernels")]
        Device::Cpu => host_run::takes(dtype),
        #[cfg(not(feature = "host-kernels"))]
        Device::Cpu => false,
        Device::Cuda(_) => cfg!(feature = "cuda"),
        Device::Metal(_) => false,
    }
}

/// The kernel for `tensor`'s elements.
pub(crate) fn of_dtype<P>(
    op: &str,
    tensor: &Tensor,
    f32: Kernel<P>,
    bf16: Kernel<P>,
) -> Result<Kernel<P>> {
    match tensor.dtype() {
        DType::F32 => Ok(f32),
        DType::BF16 => Ok(bf16),
        other => bail!("{op}: no kernel for {other:?}"),
    }
}

/// A tensor that a kernel is about to write whole. On the host it starts as NaN.
pub(crate) fn unwritten(device: &Device, shape: impl Into<Shape>, dtype: DType) -> Result<Tensor> {
    let shape = shape.into();
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(cuda) => cuda::unwritten(cuda, shape, dtype),
        Device::Cpu => Tensor::full(f32::NAN, shape, device)?.to_dtype(dtype),
        other => bail!("no kernels for {other:?}"),
    }
}

/// One launch: what the kernel may touch, then the kernel itself. What it holds stays in memory until
/// then, and a CUDA stream frees memory in its own order.
pub(crate) struct Launch<'a> {
    op: &'static str,
    target: Target<'a>,
}

enum Target<'a> {
    #[cfg(feature = "cuda")]
    Cuda(cuda::Target<'a>),
    #[cfg(feature = "host-kernels")]
    Host(host_run::Target<'a>),
}

impl<'a> Launch<'a> {
    /// A launch of `op` on the device of `tensor`.
    pub(crate) fn on(op: &'static str, tensor: &Tensor) -> Result<Self> {
        let target = match tensor.device() {
            #[cfg(feature = "cuda")]
            Device::Cuda(device) => Target::Cuda(cuda::Target::new(device)),
            #[cfg(feature = "host-kernels")]
            Device::Cpu => Target::Host(host_run::Target::default()),
            other => bail!("{op}: no kernels for {other:?}"),
        };
        Ok(Self { op, target })
    }

    /// The elements of a contiguous tensor, to read.
    pub(crate) fn read(&mut self, tensor: &'a Tensor, dtype: DType) -> Result<Address> {
        self.check(tensor, dtype)?;
        match &mut self.target {
            #[cfg(feature = "cuda")]
            Target::Cuda(target) => target.tensor(tensor),
            #[cfg(feature = "host-kernels")]
            Target::Host(target) => target.read(tensor),
        }
    }

    /// [`read`](Self::read) of what may be missing.
    pub(crate) fn read_some(
        &mut self,
        tensor: Option<&'a Tensor>,
        dtype: DType,
    ) -> Result<Address> {
        tensor.map_or(Ok(Address::NULL), |tensor| self.read(tensor, dtype))
    }

    /// The elements of a contiguous tensor, to write or to add to.
    pub(crate) fn write(&mut self, tensor: &'a Tensor, dtype: DType) -> Result<Address> {
        self.check(tensor, dtype)?;
        match &mut self.target {
            #[cfg(feature = "cuda")]
            Target::Cuda(target) => target.tensor(tensor),
            #[cfg(feature = "host-kernels")]
            Target::Host(target) => target.write(tensor),
        }
    }

    /// [`write`](Self::write) of what may be missing.
    pub(crate) fn write_some(
        &mut self,
        tensor: Option<&'a Tensor>,
        dtype: DType,
    ) -> Result<Address> {
        tensor.map_or(Ok(Address::NULL), |tensor| self.write(tensor, dtype))
    }

    /// Numbers that the host made.
    pub(crate) fn mirror<T: Plain>(&mut self, mirror: &'a Mirror<T>) -> Result<Address> {
        match &mut self.target {
            #[cfg(feature = "cuda")]
            Target::Cuda(target) => target.mirror(mirror),
            #[cfg(feature = "host-kernels")]
            Target::Host(target) => Ok(target.numbers(mirror)),
        }
    }

    /// Numbers for this launch alone.
    pub(crate) fn numbers<T: Plain>(&mut self, numbers: &[T]) -> Result<Address> {
        match &mut self.target {
            #[cfg(feature = "cuda")]
            Target::Cuda(target) => target.numbers(numbers),
            #[cfg(feature = "host-kernels")]
            Target::Host(target) => Ok(target.numbers(numbers)),
        }
    }

    /// Runs the kernel over a grid. On a CUDA device it is only queued.
    pub(crate) fn run<P>(
        self,
        kernel: Kernel<P>,
        grid: [usize; 3],
        shared_bytes: usize,
        parameters: &P,
    ) -> Result<()> {
        // A launch over nothing is an error of CUDA's; there is nothing to do.
        if grid.contains(&0) {
            return Ok(());
        }
        let Ok([x, y, z]) = <[u32; 3]>::try_from(grid.map(|n| n as u32).as_slice()) else {
            unreachable!("three in, three out")
        };
        if grid[0] > i32::MAX as usize || grid[1] > 65_535 || grid[2] > 65_535 {
            bail!(
                "{}: a grid of {grid:?} blocks for {} is beyond CUDA's limits",
                self.op,
                kernel.name
            );
        }
        match self.target {
            #[cfg(feature = "cuda")]
            Target::Cuda(target) => {
                target.run(kernel.name, kernel.threads, [x, y, z], shared_bytes, parameters)
            }
            #[cfg(feature = "host-kernels")]
            Target::Host(target) => target.run(kernel, [x, y, z], shared_bytes, parameters),
        }
    }

    fn check(&self, tensor: &Tensor, dtype: DType) -> Result<()> {
        let op = self.op;
        if tensor.dtype() != dtype {
            bail!(
                "{op}: a tensor {:?} of {:?} where the kernel takes {dtype:?}",
                tensor.dims(),
                tensor.dtype()
            );
        }
        if !tensor.is_contiguous() {
            bail!("{op}: a tensor {:?} that is not contiguous", tensor.dims());
        }
        // Kernels read vectors of 16 bytes, and sums in f64 one at a time; host runs copy a tensor, so they
        // would not see it.
        let alignment = if dtype == DType::F64 { 8 } else { 16 };
        if !(tensor.layout().start_offset() * dtype.size_in_bytes()).is_multiple_of(alignment) {
            let dims = tensor.dims();
            bail!("{op}: a view {dims:?} that does not start at a multiple of {alignment} bytes");
        }
        match (&self.target, tensor.device()) {
            #[cfg(feature = "cuda")]
            (Target::Cuda(target), Device::Cuda(device)) if target.is(device) => Ok(()),
            #[cfg(feature = "host-kernels")]
            (Target::Host(_), Device::Cpu) => Ok(()),
            (_, other) => bail!("{op}: a tensor {:?} on {other:?}, another device", tensor.dims()),
        }
    }
}

/// As a kernel counts: most kernels' sizes are `int`.
pub(crate) fn int(op: &str, n: usize) -> Result<i32> {
    match i32::try_from(n) {
        Ok(n) => Ok(n),
        Err(_) => bail!("{op}: {n} rows or columns are more than its kernel counts to"),
    }
}
