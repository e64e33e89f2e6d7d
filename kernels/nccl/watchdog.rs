//! A thread that watches what is under way between ranks: a rank that has died, or is stuck, shows as
//! work that fails or never ends, and nobody who waits on the device would return.
//!
//! Knows nothing of NCCL: what it watches is a [`Transport`] and some [`Work`], so it is tested without one.

use std::{
    collections::VecDeque,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::JoinHandle,
    time::{Duration, Instant},
};

/// Pause between two looks.
const PERIOD: Duration = Duration::from_millis(100);

/// What carries the work.
pub(super) trait Transport: Send + 'static {
    /// What has gone wrong with it, if anything.
    fn error(&self) -> Option<String>;
    /// Ends all work under way, so that what waits for it returns.
    fn abort(&self);
}

/// Something under way. It is kept, with all it holds, until it is done.
pub(super) trait Work: Send + 'static {
    /// Whether it is done.
    fn is_done(&self) -> Result<bool, String>;
}

struct Entry<W> {
    what: String,
    since: Instant,
    work: W,
}

struct State<W> {
    entries: VecDeque<Entry<W>>,
    failure: Option<String>,
    stop: bool,
}

struct Shared<W> {
    state: Mutex<State<W>>,
    changed: Condvar,
    timeout: Duration,
}

impl<W> Shared<W> {
    fn state(&self) -> MutexGuard<'_, State<W>> {
        // Nothing in here is half changed where it could panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The thread, which ends with this.
pub(super) struct Watchdog<W: Work> {
    shared: Arc<Shared<W>>,
    thread: Option<JoinHandle<()>>,
}

impl<W: Work> Watchdog<W> {
    /// Watches `transport`; work that takes longer than `timeout` is a failure.
    pub(super) fn start(transport: impl Transport, timeout: Duration) -> std::io::Result<Self> {
        let state = State { entries: VecDeque::new(), failure: None, stop: false };
        let shared =
            Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new(), timeout });
        let thread = std::thread::Builder::new().name("nccl watchdog".into()).spawn({
            let shared = shared.clone();
            move || watch(&shared, &transport)
        })?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Watches over one more piece of work; pieces end in the order in which they are added.
    pub(super) fn add(&self, what: String, work: W) {
        self.shared.state().entries.push_back(Entry { what, since: Instant::now(), work });
    }

    /// What went wrong, once something has.
    pub(super) fn failure(&self) -> Option<String> {
        self.shared.state().failure.clone()
    }

    /// Makes `failure` known, as if the thread had found it.
    pub(super) fn fail(&self, failure: &str) {
        self.shared.state().failure.get_or_insert_with(|| failure.into());
    }
}

impl<W: Work> Drop for Watchdog<W> {
    fn drop(&mut self) {
        self.shared.state().stop = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            // A panic over there has been printed by the hook already.
            let _ = thread.join();
        }
    }
}

fn watch<W: Work>(shared: &Shared<W>, transport: &impl Transport) {
    loop {
        // Outside our lock: who has the transport's may be about to take ours.
        let error = transport.error();
        let (done, failure) = {
            let mut state = shared.state();
            if state.stop || state.failure.is_some() {
                return;
            }
            let (done, failure) = look(&mut state.entries, shared.timeout);
            let failure = error.or(failure);
            state.failure.clone_from(&failure);
            (done, failure)
        };
        // Freeing what it held may call the driver: not while others wait for the lock.
        drop(done);
        if failure.is_some() {
            transport.abort();
            return;
        }
        let state = shared.state();
        if !state.stop {
            // Woken early or not, the next look tells.
            drop(shared.changed.wait_timeout(state, PERIOD));
        }
    }
}

/// What is done, and what went wrong with what is not.
fn look<W: Work>(
    entries: &mut VecDeque<Entry<W>>,
    timeout: Duration,
) -> (Vec<Entry<W>>, Option<String>) {
    let mut done = Vec::new();
    while let Some(first) = entries.front() {
        match first.work.is_done() {
            Ok(true) => done.extend(entries.pop_front()),
            Ok(false) if first.since.elapsed() > timeout => {
                let failure = format!(
                    "{} has not ended within {} s; another rank has died or is stuck",
                    first.what,
                    timeout.as_secs_f64()
                );
                return (done, Some(failure));
            }
            Ok(false) => break,
            Err(error) => return (done, Some(format!("{} failed: {error}", first.what))),
        }
    }
    (done, None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

    #[derive(Clone, Default)]
    struct Fake {
        busy: Arc<Mutex<()>>,
        broken: Arc<AtomicBool>,
        aborts: Arc<AtomicUsize>,
    }

    impl Transport for Fake {
        fn error(&self) -> Option<String> {
            let _busy = self.busy.lock().unwrap();
            self.broken.load(Ordering::SeqCst).then(|| "remote process exited".into())
        }

        fn abort(&self) {
            self.aborts.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// Done once set; counts itself while it is kept.
    struct Piece(Arc<AtomicBool>, #[allow(dead_code)] Arc<()>);

    impl Work for Piece {
        fn is_done(&self) -> Result<bool, String> {
            Ok(self.0.load(Ordering::SeqCst))
        }
    }

    fn until(what: &str, happened: impl Fn() -> bool) {
        let started = Instant::now();
        while !happened() {
            assert!(started.elapsed() < Duration::from_secs(30), "{what} never came");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn work_is_kept_until_it_is_done_and_no_longer() {
        let (fake, kept) = (Fake::default(), Arc::new(()));
        let dog = Watchdog::start(fake.clone(), Duration::from_secs(600)).unwrap();
        let flags: Vec<_> = (0..3).map(|_| Arc::<AtomicBool>::default()).collect();
        for (i, flag) in flags.iter().enumerate() {
            dog.add(format!("piece {i}"), Piece(flag.clone(), kept.clone()));
        }
        flags[1].store(true, Ordering::SeqCst);
        std::thread::sleep(3 * PERIOD);
        assert_eq!(Arc::strong_count(&kept), 4, "piece 0 comes before piece 1");
        flags[0].store(true, Ordering::SeqCst);
        until("the end of two pieces", || Arc::strong_count(&kept) == 2);
        assert_eq!(dog.failure(), None);
        drop(dog);
        assert_eq!((Arc::strong_count(&kept), fake.aborts.load(Ordering::SeqCst)), (1, 0));
    }

    #[test]
    fn work_that_does_not_end_in_time_is_named_and_ended_once() {
        let fake = Fake::default();
        let dog = Watchdog::start(fake.clone(), Duration::from_millis(300)).unwrap();
        dog.add("all-reduce 7".into(), Piece(Arc::default(), Arc::default()));
        until("an abort", || fake.aborts.load(Ordering::SeqCst) > 0);
        let failure = dog.failure().expect("a failure");
        assert!(failure.starts_with("all-reduce 7 has not ended within 0.3 s"), "{failure}");
        std::thread::sleep(3 * PERIOD);
        assert_eq!(fake.aborts.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn an_error_of_the_transport_is_found_without_any_work() {
        let fake = Fake::default();
        let dog: Watchdog<Piece> = Watchdog::start(fake.clone(), Duration::from_secs(600)).unwrap();
        fake.broken.store(true, Ordering::SeqCst);
        until("an abort", || fake.aborts.load(Ordering::SeqCst) == 1);
        dog.fail("a later one");
        assert_eq!(dog.failure().as_deref(), Some("remote process exited"));
    }

    #[test]
    fn whoever_has_the_transport_may_make_a_failure_known() {
        let fake = Fake::default();
        let dog: Watchdog<Piece> = Watchdog::start(fake.clone(), Duration::from_secs(600)).unwrap();
        let busy = fake.busy.lock().unwrap();
        // By now the thread waits for the transport.
        std::thread::sleep(2 * PERIOD);
        dog.fail("the call failed");
        drop(busy);
        assert_eq!(dog.failure().as_deref(), Some("the call failed"));
    }
}
