//! Tensors in the host's pinned memory. Copies there and back are queued on the device's one stream, so neither
//! they nor the next use of the same memory need an event.

use candle_core::{
    CudaDevice, DType, Result, Shape, Tensor,
    cuda_backend::{WrapErr, cudarc::driver::result},
};

use super::{
    kept,
    memory::{address, unwritten},
};

/// Pinned memory of a tensor, which goes back to its device's store afterwards: taking it from the driver and
/// giving it back may wait for the device.
#[derive(Debug)]
pub(crate) struct Away {
    room: Option<Room>,
    shape: Shape,
    dtype: DType,
    device: CudaDevice,
}

/// Pinned memory of so many bytes.
#[derive(Debug)]
pub(super) struct Room {
    start: *mut u8,
    bytes: usize,
}
// SAFETY: the memory is the process's, never freed, and a room has one owner.
unsafe impl Send for Room {}
// SAFETY: as above; nothing of it is reached through a shared reference.
unsafe impl Sync for Room {}

impl Away {
    /// Queues the copy of a contiguous tensor.
    pub(crate) fn of(device: &CudaDevice, tensor: &Tensor) -> Result<Self> {
        let bytes = tensor.elem_count() * tensor.dtype().size_in_bytes();
        let room = Room::take(device, bytes)?;
        let (from, _guard) = address(tensor)?;
        // SAFETY: both are at least so long; the room is read by the stream alone, behind this copy, and the
        // device frees the tensor in the order of the stream.
        unsafe {
            let to = std::slice::from_raw_parts_mut(room.start, bytes);
            result::memcpy_dtoh_async(to, from.0, device.cuda_stream().cu_stream()).w()?;
        }
        Ok(Self {
            room: Some(room),
            shape: tensor.shape().clone(),
            dtype: tensor.dtype(),
            device: device.clone(),
        })
    }

    /// Queues the copy into new memory of the device.
    pub(crate) fn back(self) -> Result<Tensor> {
        let tensor = unwritten(&self.device, self.shape.clone(), self.dtype)?;
        let bytes = tensor.elem_count() * self.dtype.size_in_bytes();
        let (to, guard) = address(&tensor)?;
        if let Some(room) = &self.room {
            // SAFETY: the room holds so many bytes, which the stream has written before it reads them here, and
            // writes again only behind this copy; the tensor is new and has no other handle.
            unsafe {
                let from = std::slice::from_raw_parts(room.start, bytes);
                result::memcpy_htod_async(to.0, from, self.device.cuda_stream().cu_stream()).w()?;
            }
        }
        drop(guard);
        Ok(tensor)
    }
}

impl Drop for Away {
    fn drop(&mut self) {
        if let Some(room) = self.room.take() {
            kept().get_or_insert_default().entry(self.device.id()).or_default().rooms.push(room);
        }
    }
}

impl Room {
    /// The smallest that is free and large enough, or a new one.
    fn take(device: &CudaDevice, bytes: usize) -> Result<Self> {
        let mut all = kept();
        let rooms = &mut all.get_or_insert_default().entry(device.id()).or_default().rooms;
        // One that is much too large is left to tensors of its size.
        let fits = |room: &Self| (bytes..=2 * bytes).contains(&room.bytes);
        let best = (0..rooms.len()).filter(|i| fits(&rooms[*i])).min_by_key(|i| rooms[*i].bytes);
        if let Some(best) = best {
            return Ok(rooms.swap_remove(best));
        }
        drop(all);
        device.cuda_stream().context().bind_to_thread().w()?;
        // SAFETY: never freed: the process keeps its rooms until it ends.
        let start = unsafe { result::malloc_host(bytes.max(1), 0) }.w()?.cast();
        Ok(Self { start, bytes })
    }
}
