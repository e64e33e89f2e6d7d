//! How long a body takes: by its device's clock, and by the caller's.

use std::time::Instant;

use candle_core::{Device, Result};

/// One repetition, in milliseconds.
#[derive(Clone, Copy, Debug)]
pub struct Lap {
    /// What the device took for it.
    pub kernel: f64,
    /// What the caller waited for it.
    pub wall: f64,
}

/// Something that runs on a device; it may return before the device is done.
pub type Step<'a> = &'a mut dyn FnMut() -> Result<()>;

/// The clock of a device.
pub trait Clock {
    /// Times `body` after `before`, which is not timed.
    ///
    /// # Errors
    /// Those of the two, and of the device.
    fn lap(&self, before: Step<'_>, body: Step<'_>) -> Result<Lap>;

    /// Runs `body` once: the most bytes of the device that it held beyond what it found in use, its
    /// results and scratch; `None` where nobody counts them.
    ///
    /// # Errors
    /// Those of `body`, and of the device.
    fn memory(&self, body: Step<'_>) -> Result<Option<u64>>;
}

/// The clock of `device`.
///
/// # Errors
/// If the device has none.
pub fn of(device: &Device) -> Result<Box<dyn Clock>> {
    match device {
        Device::Cpu => Ok(Box::new(Host)),
        #[cfg(feature = "cuda")]
        Device::Cuda(cuda) => Ok(Box::new(cuda::Stream::new(cuda))),
        other => candle_core::bail!("no clock for {other:?}"),
    }
}

/// On a CPU the caller does the work: both times are one.
struct Host;

impl Clock for Host {
    fn lap(&self, before: Step<'_>, body: Step<'_>) -> Result<Lap> {
        before()?;
        let begin = Instant::now();
        body()?;
        let wall = begin.elapsed().as_secs_f64() * 1e3;
        Ok(Lap { kernel: wall, wall })
    }

    fn memory(&self, _: Step<'_>) -> Result<Option<u64>> {
        Ok(None)
    }
}

#[cfg(feature = "cuda")]
mod cuda {
    use std::{sync::Arc, time::Instant};

    use candle_core::{
        CudaDevice, Error, Result,
        cuda_backend::cudarc::driver::{CudaEvent, CudaStream, sys::CUevent_flags},
    };

    use super::{Clock, Lap, Step};

    /// Events on the stream that candle launches on.
    pub struct Stream(Arc<CudaStream>, CudaDevice);

    impl Stream {
        pub fn new(device: &CudaDevice) -> Self {
            Self(device.cuda_stream(), device.clone())
        }

        fn event(&self) -> Result<CudaEvent> {
            let timed = Some(CUevent_flags::CU_EVENT_DEFAULT);
            self.0.record_event(timed).map_err(Error::wrap)
        }
    }

    impl Clock for Stream {
        /// Runs `body` twice. Between events it is launched while the device is still busy with
        /// `before`, so that the kernel time is not one of launching; for the wall time the device is
        /// idle at both ends.
        fn lap(&self, before: Step<'_>, body: Step<'_>) -> Result<Lap> {
            before()?;
            let begin = self.event()?;
            body()?;
            let end = self.event()?;
            let kernel = f64::from(begin.elapsed_ms(&end).map_err(Error::wrap)?);
            before()?;
            self.0.synchronize().map_err(Error::wrap)?;
            let begin = Instant::now();
            body()?;
            self.0.synchronize().map_err(Error::wrap)?;
            Ok(Lap { kernel, wall: begin.elapsed().as_secs_f64() * 1e3 })
        }

        fn memory(&self, body: Step<'_>) -> Result<Option<u64>> {
            use allreel_kernels::common::device::cuda::{forget_peak, used};
            self.0.synchronize().map_err(Error::wrap)?;
            forget_peak(&self.1)?;
            let (before, _) = used(&self.1)?;
            body()?;
            self.0.synchronize().map_err(Error::wrap)?;
            Ok(Some(used(&self.1)?.1.saturating_sub(before)))
        }
    }
}
