//! CUDA: opening a device, loading kernels, and the launch itself.
//!
//! Everything runs on one explicit stream a device, from one thread. cudarc's tracking of events is off:
//! memory is freed in the order of that stream, and whoever adds a stream orders it by events of its own.
//! Memory, and copies to and from it, is `memory`'s.

mod away;
mod memory;

use std::{
    collections::{HashMap, VecDeque},
    ffi::c_void,
    sync::{Mutex, MutexGuard, PoisonError},
};

use candle_core::{
    CudaDevice, DType, Device, Result, Storage, Tensor, bail,
    cuda_backend::{
        DeviceId, WrapErr,
        cudarc::{
            cublas::{result as cublas, sys as blas},
            driver::{CudaFunction, CudaSlice, CudaStream, result, sys},
            nvrtc::Ptx,
        },
    },
};
use parking_lot::RwLockReadGuard;

use super::{
    super::{
        fatbin::{FATBINS, RELEASE},
        mirror::{Mirror, Plain, bytes},
    },
    Address,
    product::{Matrix, Sizes},
};
pub(crate) use away::Away;
use away::Room;
pub(super) use memory::unwritten;
pub(crate) use memory::{Coming, Memory, address};
use memory::{Slot, Staging, first, pool, upload};
pub use memory::{forget_peak, used};

/// Opens the CUDA device `ordinal`: with a stream of its own, without cudarc's events, and with a pool
/// that keeps its memory, so that a step allocates nothing from the driver.
///
/// # Errors
/// If there is no driver, one older than the kernels, no such device, or one that cannot run them (older
/// than 8.0).
pub fn open(ordinal: usize) -> Result<Device> {
    check_driver()?;
    let device = Device::new_cuda_with_stream(ordinal)?;
    let cuda = device.as_cuda_device()?;
    let stream = cuda.cuda_stream();
    let (major, minor) = stream.context().compute_capability().w()?;
    if major < 8 {
        bail!("device {ordinal} has compute capability {major}.{minor}; the kernels need 8.0");
    }
    // SAFETY: nothing but this stream uses the device's tensors, except where `nccl` orders its own by
    // events and keeps what it reads alive.
    unsafe { cuda.disable_event_tracking() };
    // Where cuBLAS splits k it would else add the parts in what it stores, which may be bf16.
    let mode = blas::cublasMath_t::CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION;
    // SAFETY: the handle is the device's, which is open.
    unsafe { blas::cublasSetMathMode(*cuda.cublas_handle().handle(), mode) }.result().w()?;
    let threshold = sys::CUmemPool_attribute_enum::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
    let mut keep = u64::MAX;
    // SAFETY: the pool is the device's own, and the attribute is a u64.
    unsafe { result::mem_pool::set_attribute(pool(cuda)?, threshold, (&raw mut keep).cast()) }
        .w()?;
    Ok(device)
}

/// Fails where the driver is older than the nvcc that made the kernels, ours and candle's: it takes none of
/// their PTX.
fn check_driver() -> Result<()> {
    result::init().w()?;
    let (mut version, (major, minor)) = (0, RELEASE);
    // SAFETY: the driver writes a number to the local.
    unsafe { sys::cuDriverGetVersion(&mut version) }.result().w()?;
    if version < (1000 * major + 10 * minor) as i32 {
        bail!(
            "the driver is one of CUDA {}.{}, older than the {major}.{minor} that this binary was built with; \
             update the driver, or build with a CUDA toolkit that is no newer than it",
            version / 1000,
            version % 1000 / 10
        );
    }
    Ok(())
}

/// Number of CUDA devices; 0 where there is no driver.
///
/// # Errors
/// If the driver is there and fails.
pub fn count() -> Result<usize> {
    match result::init().and_then(|()| result::device::get_count()) {
        Ok(count) => Ok(count.max(0) as usize),
        // The driver's word for it, and that of launch/cuda-stubs where there is no driver.
        Err(error) if error.0 == sys::CUresult::CUDA_ERROR_NO_DEVICE => Ok(0),
        Err(error) => Err(error).w(),
    }
}

/// The device's name and number.
pub fn name(device: &CudaDevice) -> String {
    let stream = device.cuda_stream();
    let context = stream.context();
    let name = context.name().unwrap_or_else(|_| "CUDA device".into());
    format!("{name} (CUDA {})", context.ordinal())
}

/// What this crate keeps for each device.
#[derive(Default)]
struct Kept {
    functions: HashMap<&'static str, Loaded>,
    /// In the order of their last copies.
    staging: VecDeque<Staging>,
    slots: Vec<Slot>,
    /// For tensors that are parked.
    rooms: Vec<Room>,
    launches: u64,
}

struct Loaded {
    function: CudaFunction,
    /// Dynamic shared memory that it may use.
    shared_bytes: usize,
}

static KEPT: Mutex<Option<HashMap<DeviceId, Kept>>> = Mutex::new(None);

fn kept() -> MutexGuard<'static, Option<HashMap<DeviceId, Kept>>> {
    KEPT.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Number of kernels and products that this crate has queued on `device`.
pub fn launches(device: &CudaDevice) -> u64 {
    kept().as_ref().and_then(|all| all.get(&device.id())).map_or(0, |kept| kept.launches)
}

impl Kept {
    /// The kernel called `name`, allowed `shared_bytes` of dynamic shared memory.
    fn function(
        &mut self,
        stream: &CudaStream,
        name: &'static str,
        shared_bytes: usize,
    ) -> Result<&CudaFunction> {
        if !self.functions.contains_key(name) {
            self.load(stream, name)?;
        }
        let Some(loaded) = self.functions.get_mut(name) else { bail!("no kernel {name}") };
        if shared_bytes > loaded.shared_bytes {
            let most =
                sys::CUdevice_attribute_enum::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
            let most = stream.context().attribute(most).w()?;
            if shared_bytes > most.max(0) as usize {
                bail!(
                    "{name} needs {shared_bytes} bytes of shared memory a block, and this device has {most}; \
                     those of 8.0, 9.0 and 10.0 have enough"
                );
            }
            let attribute =
                sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            loaded.function.set_attribute(attribute, shared_bytes as i32).w()?;
            loaded.shared_bytes = shared_bytes;
        }
        Ok(&loaded.function)
    }

    /// Loads the whole room that has the kernel.
    fn load(&mut self, stream: &CudaStream, name: &str) -> Result<()> {
        /// What every kernel may use without asking.
        const GRANTED: usize = 48 << 10;
        let Some(room) = FATBINS.iter().find(|room| room.kernels.contains(&name)) else {
            bail!("no kernel {name} was built");
        };
        let module = stream.context().load_module(Ptx::from_binary(room.image.to_vec())).w()?;
        for name in room.kernels {
            let function = module.load_function(name).w()?;
            self.functions.insert(name, Loaded { function, shared_bytes: GRANTED });
        }
        Ok(())
    }
}

/// A launch in the making.
pub(super) struct Target<'a> {
    device: CudaDevice,
    tensors: Vec<RwLockReadGuard<'a, Storage>>,
    numbers: Vec<CudaSlice<u8>>,
}

impl<'a> Target<'a> {
    pub(super) fn new(device: &CudaDevice) -> Self {
        Self { device: device.clone(), tensors: Vec::new(), numbers: Vec::new() }
    }

    pub(super) fn is(&self, device: &CudaDevice) -> bool {
        self.device.id() == device.id()
    }

    pub(super) fn tensor(&mut self, tensor: &'a Tensor) -> Result<Address> {
        let (address, guard) = address(tensor)?;
        self.tensors.push(guard);
        Ok(address)
    }

    pub(super) fn mirror<T: Plain>(&mut self, mirror: &Mirror<T>) -> Result<Address> {
        let memory = match mirror.device.get() {
            Some(memory) => memory,
            None => {
                let slice = upload(&self.device, bytes(mirror))?;
                mirror.device.get_or_init(|| Memory { slice, device: self.device.id() })
            }
        };
        if memory.device != self.device.id() {
            bail!("numbers that were made for another device");
        }
        Ok(Address(first(&memory.slice, &self.device.cuda_stream())))
    }

    pub(super) fn numbers<T: Plain>(&mut self, numbers: &[T]) -> Result<Address> {
        let slice = upload(&self.device, bytes(numbers))?;
        let address = Address(first(&slice, &self.device.cuda_stream()));
        self.numbers.push(slice);
        Ok(address)
    }

    pub(super) fn run<P>(
        self,
        name: &'static str,
        threads: u32,
        [x, y, z]: [u32; 3],
        shared_bytes: usize,
        parameters: &P,
    ) -> Result<()> {
        let stream = self.device.cuda_stream();
        stream.context().bind_to_thread().w()?;
        let mut all = kept();
        let kept = all.get_or_insert_default().entry(self.device.id()).or_default();
        kept.launches += 1;
        let function = kept.function(&stream, name, shared_bytes)?.cu_function();
        let mut arguments = [std::ptr::from_ref(parameters).cast_mut().cast::<c_void>()];
        // SAFETY: the kernel takes one `P` by value, which the driver copies before this returns (host
        // runs compare its size); what it points to stays in memory until then, and later in the order
        // of the stream, on which all of it was made.
        unsafe {
            result::launch_kernel(
                function,
                (x, y, z),
                (threads, 1, 1),
                shared_bytes as u32,
                stream.cu_stream(),
                &mut arguments,
            )
        }
        .w()
    }
}

/// `to = a·b` or `to += a·b` (see `product`). cuBLAS counts by columns: what it is asked for is
/// `toᵀ = bᵀ·aᵀ`, of the same memory.
pub(super) fn product(
    device: &CudaDevice,
    [a, b, to]: [Matrix<'_>; 3],
    sizes: Sizes,
    accumulate: bool,
) -> Result<()> {
    kept().get_or_insert_default().entry(device.id()).or_default().launches += 1;
    let handles = device.cublas_handle();
    let first = |matrix: Matrix<'_>| (matrix.start * matrix.tensor.dtype().size_in_bytes()) as u64;
    let ((a_at, _a), (b_at, _b), (to_at, _to)) =
        (address(a.tensor)?, address(b.tensor)?, address(to.tensor)?);
    let operation = |matrix: Matrix<'_>| match matrix.transposed {
        false => blas::cublasOperation_t::CUBLAS_OP_N,
        true => blas::cublasOperation_t::CUBLAS_OP_T,
    };
    let dtype = |matrix: Matrix<'_>| match matrix.tensor.dtype() {
        DType::BF16 => blas::cudaDataType_t::CUDA_R_16BF,
        _ => blas::cudaDataType_t::CUDA_R_32F,
    };
    let (one, beta) = (1f32, if accumulate { 1f32 } else { 0.0 });
    device.cuda_stream().context().bind_to_thread().w()?;
    // SAFETY: `product` held the shapes to the tensors and each other; the handle is of the stream on
    // which the tensors were made, and scalars are read before this returns.
    unsafe {
        cublas::gemm_strided_batched_ex(
            *handles.handle(),
            operation(b),
            operation(a),
            sizes.n as i32,
            sizes.m as i32,
            sizes.k as i32,
            (&raw const one).cast(),
            (b_at.0 + first(b)) as *const c_void,
            dtype(b),
            b.row_stride as i32,
            b.group_stride as i64,
            (a_at.0 + first(a)) as *const c_void,
            dtype(a),
            a.row_stride as i32,
            a.group_stride as i64,
            (&raw const beta).cast(),
            (to_at.0 + first(to)) as *mut c_void,
            dtype(to),
            to.row_stride as i32,
            to.group_stride as i64,
            sizes.groups as i32,
            blas::cublasComputeType_t::CUBLAS_COMPUTE_32F,
            blas::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
        )
    }
    .w()
}
