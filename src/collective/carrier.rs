//! Ranks in host memory: a carrier moves the bytes, and one thread owns it.
//!
//! The thread makes every call, in the order in which they were asked for; a bucket travels while
//! backward computes on the others.

use std::{
    sync::mpsc::{Receiver, Sender, channel},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use candle_core::Tensor;

use super::{Collective, Pending, State, Transfer, gone};
use crate::{Error, Result};

/// How long the last word to the others may take before this process ends without it.
const LAST_WORD: Duration = Duration::from_millis(500);

/// Who a rank is.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// Own number, from 0.
    pub rank: usize,
    /// Number of ranks.
    pub world: usize,
    /// Own number among the ranks of this node.
    pub local_rank: usize,
    /// Number of ranks on this node.
    pub local_world: usize,
}

/// What moves bytes between ranks. Its methods are [`Collective`]'s, but wait.
pub trait Carrier {
    /// Who this rank is.
    fn place(&self) -> Place;

    /// Sums a flat f32 tensor over all ranks, in place; the same bits everywhere.
    ///
    /// # Errors
    /// `Peer` when the others cannot be reached.
    fn all_reduce(&mut self, bucket: &Tensor) -> Result<Transfer>;

    /// Sums numbers over all ranks, in place.
    ///
    /// # Errors
    /// As above.
    fn all_reduce_f64(&mut self, values: &mut [f64]) -> Result<()>;

    /// The bytes of every rank, in rank order.
    ///
    /// # Errors
    /// As above.
    fn all_gather(&mut self, bytes: &[u8]) -> Result<Vec<Vec<u8>>>;

    /// Tells the others that this rank ends with `code`.
    fn abort(&mut self, code: u8);
}

type Request<C> = Box<dyn FnOnce(&mut C) + Send>;

/// The ranks that a carrier reaches.
pub struct Carried<C> {
    place: Place,
    requests: Option<Sender<Request<C>>>,
    thread: Option<JoinHandle<()>>,
}

impl<C: Carrier + 'static> Carried<C> {
    /// Starts the thread, and on it the carrier.
    ///
    /// # Errors
    /// Those of `make`; `Device` if there can be no thread.
    pub(super) fn start(make: impl FnOnce() -> Result<C> + Send + 'static) -> Result<Self> {
        let (requests, inbox) = channel::<Request<C>>();
        let (ready, place) = channel();
        let serve = move || match make() {
            Err(error) => {
                // Who asked waits for this and nothing else.
                let _ = ready.send(Err(error));
            }
            Ok(mut carrier) => {
                let _ = ready.send(Ok(carrier.place()));
                inbox.iter().for_each(|request| request(&mut carrier));
            }
        };
        let thread = std::thread::Builder::new()
            .name("collective".into())
            .spawn(serve)
            .map_err(|e| Error::Device(format!("cannot start the communication thread: {e}")))?;
        let place = place.recv().map_err(|_| gone())??;
        Ok(Self { place, requests: Some(requests), thread: Some(thread) })
    }

    /// Has the thread do `job`; its answer comes through what is returned.
    pub(super) fn ask<R: Send + 'static>(
        &self,
        job: impl FnOnce(&mut C) -> R + Send + 'static,
    ) -> Result<Receiver<R>> {
        let (answer, pending) = channel();
        // A requester that is gone has failed already; what it asked for still has to be done, because
        // the other ranks wait for it.
        let request: Request<C> = Box::new(move |carrier| {
            let _ = answer.send(job(carrier));
        });
        let requests = self.requests.as_ref().ok_or_else(gone)?;
        requests.send(request).map_err(|_| gone())?;
        Ok(pending)
    }

    /// The same, waiting for the answer.
    pub(super) fn call<R: Send + 'static>(
        &self,
        job: impl FnOnce(&mut C) -> R + Send + 'static,
    ) -> Result<R> {
        self.ask(job)?.recv().map_err(|_| gone())
    }
}

impl<C> Drop for Carried<C> {
    /// Finishes what was asked for, then ends the carrier.
    fn drop(&mut self) {
        self.requests = None;
        if let Some(thread) = self.thread.take() {
            // A panic over there has been printed by the hook already.
            let _ = thread.join();
        }
    }
}

impl<C: Carrier + 'static> Collective for Carried<C> {
    fn rank(&self) -> usize {
        self.place.rank
    }

    fn world(&self) -> usize {
        self.place.world
    }

    fn local_rank(&self) -> usize {
        self.place.local_rank
    }

    fn local_world(&self) -> usize {
        self.place.local_world
    }

    fn all_reduce_sum(&mut self, bucket: &Tensor) -> Result<Pending> {
        if self.place.world == 1 {
            return Ok(Pending::done(0, Instant::now()));
        }
        let bucket = bucket.clone();
        let pending = self.ask(move |carrier| carrier.all_reduce(&bucket))?;
        Ok(Pending(State::Running(pending)))
    }

    fn all_reduce_f64(&mut self, values: &mut [f64]) -> Result<()> {
        let mut sum = values.to_vec();
        let sum = self.call(move |carrier| carrier.all_reduce_f64(&mut sum).map(|()| sum))??;
        values.copy_from_slice(&sum);
        Ok(())
    }

    fn all_gather(&mut self, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        let bytes = bytes.to_vec();
        self.call(move |carrier| carrier.all_gather(&bytes))?
    }

    fn abort(&mut self, code: u8) -> ! {
        // The thread may hang in a call; that this process ends then has to be word enough.
        if let Ok(said) = self.ask(move |carrier| carrier.abort(code)) {
            let _ = said.recv_timeout(LAST_WORD);
        }
        std::process::exit(i32::from(code))
    }
}
