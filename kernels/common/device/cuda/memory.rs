//! Memory of a CUDA device: how much there is, tensors that kernels write, and copies through pinned memory,
//! for which the host waits only where it asks for what they bring.

use std::sync::Arc;

use candle_core::{
    CudaDevice, CudaStorage, DType, Result, Shape, Storage, Tensor, bail,
    cuda_backend::{
        CudaStorageSlice, DeviceId, WrapErr,
        cudarc::driver::{CudaEvent, CudaSlice, CudaStream, DevicePtr, result, sys},
    },
    op::BackpropOp,
};
use half::bf16;
use parking_lot::RwLockReadGuard;

use super::{Address, Kept, kept};
use crate::common::is_out_of_memory;

/// Bytes free and in all.
fn memory(device: &CudaDevice) -> Result<(usize, usize)> {
    device.cuda_stream().context().mem_get_info().w()
}

/// Bytes of the device's pool that are in use, and the most that were since [`forget_peak`] (or the start).
///
/// # Errors
/// If the driver fails.
pub fn used(device: &CudaDevice) -> Result<(u64, u64)> {
    use sys::CUmemPool_attribute_enum as Attribute;
    let pool = pool(device)?;
    let read = |attribute| {
        let mut bytes = 0u64;
        // SAFETY: the pool is the device's own, and both attributes are a u64.
        unsafe { result::mem_pool::get_attribute(pool, attribute, (&raw mut bytes).cast()) }.w()?;
        Ok::<u64, candle_core::Error>(bytes)
    };
    let high = read(Attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH)?;
    Ok((read(Attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT)?, high))
}

/// Bytes that the pool holds but that are not in use.
fn idle(device: &CudaDevice) -> Result<u64> {
    let mut held = 0u64;
    let attribute = sys::CUmemPool_attribute_enum::CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT;
    // SAFETY: the pool is the device's own; the attribute is a u64.
    unsafe { result::mem_pool::get_attribute(pool(device)?, attribute, (&raw mut held).cast()) }
        .w()?;
    Ok(held.saturating_sub(used(device)?.0))
}

/// From here on, the most that is in use counts anew.
///
/// # Errors
/// If the driver fails.
pub fn forget_peak(device: &CudaDevice) -> Result<()> {
    let attribute = sys::CUmemPool_attribute_enum::CU_MEMPOOL_ATTR_USED_MEM_HIGH;
    let mut zero = 0u64;
    // SAFETY: the pool is the device's own; the attribute is a u64 that may only be set to 0.
    unsafe { result::mem_pool::set_attribute(pool(device)?, attribute, (&raw mut zero).cast()) }.w()
}

pub(super) fn pool(device: &CudaDevice) -> Result<sys::CUmemoryPool> {
    // SAFETY: the device is open.
    unsafe { result::device::get_default_mem_pool(device.cuda_stream().context().cu_device()) }.w()
}

/// Pinned memory that a copy to the device reads from, and when that is over.
pub(super) struct Staging {
    start: *mut u8,
    bytes: usize,
    copied: CudaEvent,
}
// SAFETY: the memory is the process's; who writes it holds the lock of `kept`.
unsafe impl Send for Staging {}

impl Kept {
    /// Queues a copy of `bytes` to the device. It reads pinned memory, so the host does not wait.
    fn copy(&mut self, stream: &Arc<CudaStream>, bytes: &[u8], to: &CudaSlice<u8>) -> Result<()> {
        let size = Staging::size(bytes.len());
        // The first of its size was used the longest ago: if that copy is not over, no later one is. Each
        // look is a call of the driver.
        let first = self.staging.iter().position(|staging| staging.bytes == size);
        let first = first.filter(|at| self.staging[*at].copied.is_complete());
        let staging = match first.and_then(|at| self.staging.remove(at)) {
            Some(staging) => staging,
            None => Staging::new(stream, size)?,
        };
        // SAFETY: `staging` is at least as long, nothing reads it any more, and the copy to the device
        // is over when the event recorded behind it is.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), staging.start, bytes.len());
            let pinned = std::slice::from_raw_parts(staging.start, bytes.len());
            result::memcpy_htod_async(to.device_ptr(stream).0, pinned, stream.cu_stream()).w()?;
        }
        staging.copied.record(stream).w()?;
        self.staging.push_back(staging);
        Ok(())
    }
}

impl Staging {
    /// Bytes to take for a copy of `bytes`: few sizes, so that they are used again.
    fn size(bytes: usize) -> usize {
        bytes.next_power_of_two().max(4 << 10)
    }

    fn new(stream: &Arc<CudaStream>, bytes: usize) -> Result<Self> {
        let copied = stream.context().new_event(None).w()?;
        // SAFETY: never freed: the process keeps its staging until it ends.
        let start = unsafe { result::malloc_host(bytes, 0) }.w()?.cast();
        Ok(Self { start, bytes, copied })
    }
}

/// A few f64 on their way to pinned memory, which goes back to its device's store afterwards: taking it
/// from the driver and giving it back may wait for the device.
#[derive(Debug)]
pub(crate) struct Coming {
    slot: Option<Slot>,
    len: usize,
    device: DeviceId,
}

/// Pinned memory for `Slot::ROOM` numbers, and when the last copy into it is over.
#[derive(Debug)]
pub(super) struct Slot {
    start: *mut f64,
    arrived: CudaEvent,
}
// SAFETY: the memory is the process's, never freed, and a slot has one owner.
unsafe impl Send for Slot {}

impl Slot {
    const ROOM: usize = 64;

    fn new(stream: &CudaStream) -> Result<Self> {
        let arrived = stream.context().new_event(None).w()?;
        // SAFETY: never freed.
        let start = unsafe { result::malloc_host(Self::ROOM * size_of::<f64>(), 0) }.w()?.cast();
        Ok(Self { start, arrived })
    }
}

impl Coming {
    /// Queues the copy of a contiguous f64 tensor.
    pub(crate) fn of(device: &CudaDevice, numbers: &Tensor) -> Result<Self> {
        let (stream, len) = (device.cuda_stream(), numbers.elem_count());
        if len > Slot::ROOM {
            bail!("{len} numbers to read later; a slot has room for {}", Slot::ROOM);
        }
        let (from, _guard) = address(numbers)?;
        let slot = match kept().get_or_insert_default().entry(device.id()).or_default().slots.pop()
        {
            Some(slot) => slot,
            None => Slot::new(&stream)?,
        };
        // SAFETY: both hold `len` numbers, nothing reads the slot before its event, and the device frees
        // `numbers` in the order of the stream.
        unsafe {
            let to = std::slice::from_raw_parts_mut(slot.start, len);
            result::memcpy_dtoh_async(to, from.0, stream.cu_stream()).w()?;
        }
        slot.arrived.record(&stream).w()?;
        Ok(Self { slot: Some(slot), len, device: device.id() })
    }

    /// Waits for the copy alone.
    pub(crate) fn wait(self) -> Result<Vec<f64>> {
        let Some(slot) = &self.slot else { bail!("numbers that have been read") };
        slot.arrived.synchronize().w()?;
        // SAFETY: the copy has written all of it, and is over.
        Ok(unsafe { std::slice::from_raw_parts(slot.start, self.len) }.to_vec())
    }
}

impl Drop for Coming {
    fn drop(&mut self) {
        let Some(slot) = self.slot.take() else { return };
        // A device that failed writes no more, and its slot is not used again.
        if slot.arrived.synchronize().is_ok() {
            kept().get_or_insert_default().entry(self.device).or_default().slots.push(slot);
        }
    }
}

/// Device memory of a [`Mirror`], and whose.
#[derive(Debug)]
pub(crate) struct Memory {
    pub(super) slice: CudaSlice<u8>,
    pub(super) device: DeviceId,
}

/// A tensor that a kernel is about to write whole.
pub(in super::super) fn unwritten(
    device: &CudaDevice,
    shape: Shape,
    dtype: DType,
) -> Result<Tensor> {
    // Memory of nothing is an error of the driver's.
    let n = shape.elem_count().max(1);
    // SAFETY: the caller writes every element before one is read; tests on the host hold it to that.
    let slice = unsafe {
        match dtype {
            DType::F32 => device.alloc(n).map(CudaStorageSlice::F32),
            DType::F64 => device.alloc(n).map(CudaStorageSlice::F64),
            DType::BF16 => device.alloc(n).map(CudaStorageSlice::BF16),
            DType::U32 => device.alloc(n).map(CudaStorageSlice::U32),
            other => bail!("no kernel writes {other:?}"),
        }
    };
    let slice = slice.map_err(|error| refused(device, n * dtype.size_in_bytes(), error))?;
    let storage = Storage::Cuda(CudaStorage { slice, device: device.clone() });
    Ok(Tensor::from_storage(storage, shape, BackpropOp::none(), false))
}

/// An allocation's error, with what was asked for and what there was.
fn refused(device: &CudaDevice, bytes: usize, error: candle_core::Error) -> candle_core::Error {
    if !is_out_of_memory(&error) {
        return error;
    }
    let mebi = |bytes: usize| bytes >> 20;
    let (free, all) = memory(device).unwrap_or_default();
    // What the pool holds and nobody uses is free too.
    let free = free + idle(device).unwrap_or_default() as usize;
    let (asked, free, all) = (mebi(bytes), mebi(free), mebi(all));
    candle_core::Error::Msg(format!(
        "OUT_OF_MEMORY: {asked} MiB more were asked for, and {free} of the device's {all} MiB are free"
    ))
}

/// Address of the first element of a contiguous tensor, which `guard` keeps where it is.
pub(crate) fn address(tensor: &Tensor) -> Result<(Address, RwLockReadGuard<'_, Storage>)> {
    let (guard, layout) = tensor.storage_and_layout();
    let Storage::Cuda(storage) = &*guard else {
        bail!("a CUDA kernel was given a tensor of the host")
    };
    let stream = storage.device.cuda_stream();
    let start = match &storage.slice {
        CudaStorageSlice::F32(slice) => first::<f32>(slice, &stream),
        CudaStorageSlice::F64(slice) => first::<f64>(slice, &stream),
        CudaStorageSlice::BF16(slice) => first::<bf16>(slice, &stream),
        CudaStorageSlice::U32(slice) => first::<u32>(slice, &stream),
        CudaStorageSlice::U8(slice) => first::<u8>(slice, &stream),
        _ => bail!("no kernel takes {:?}", tensor.dtype()),
    };
    let offset = layout.start_offset() * tensor.dtype().size_in_bytes();
    Ok((Address(start + offset as u64), guard))
}

pub(super) fn first<T>(slice: &CudaSlice<T>, stream: &CudaStream) -> u64 {
    slice.device_ptr(stream).0
}

/// New memory of the device with these bytes; at least one, for a null pointer means something else.
pub(super) fn upload(device: &CudaDevice, bytes: &[u8]) -> Result<CudaSlice<u8>> {
    let stream = device.cuda_stream();
    // SAFETY: the copy that is queued right behind writes it whole, and no more of it is read.
    let slice = unsafe { device.alloc::<u8>(bytes.len().max(1)) }?;
    if !bytes.is_empty() {
        let mut all = kept();
        all.get_or_insert_default().entry(device.id()).or_default().copy(&stream, bytes, &slice)?;
    }
    Ok(slice)
}
