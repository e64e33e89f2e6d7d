//! How the process is set up once: worker threads, denormals, and an allocator that keeps its pages.

/// Flushes denormals to zero on the calling thread (FTZ and DAZ). A denormal costs an assist of
/// a hundred cycles or more, and the tails of softmax, of Adam's moments and of any recurrence run
/// into them.
pub fn flush_denormals() {
    #[cfg(target_arch = "x86_64")]
    {
        let mut mxcsr: u32 = 0;
        // SAFETY: SSE2 is part of x86-64; only the FTZ (15) and DAZ (6) bits of this thread's own
        // control register are changed. The compiler assumes that nobody does; what can differ for
        // it is whether a denormal constant it folded is zero, which no kernel depends on.
        unsafe {
            std::arch::asm!("stmxcsr [{}]", in(reg) &mut mxcsr, options(nostack));
            mxcsr |= 1 << 15 | 1 << 6;
            std::arch::asm!("ldmxcsr [{}]", in(reg) &mxcsr, options(nostack, readonly));
        }
    }
    #[cfg(target_arch = "aarch64")]
    {
        let mut fpcr: u64;
        // SAFETY: only the FZ bit (24) of this thread's own control register is changed.
        unsafe {
            std::arch::asm!("mrs {}, fpcr", out(reg) fpcr, options(nomem, nostack));
            fpcr |= 1 << 24;
            std::arch::asm!("msr fpcr, {}", in(reg) fpcr, options(nomem, nostack));
        }
    }
}

/// Builds the global rayon pool with `threads` workers, each flushing denormals, and sets the
/// calling thread up likewise. A pool that already exists is left as it is.
///
/// Returns the number of workers.
pub fn start(threads: usize) -> usize {
    flush_denormals();
    // An error means that the pool exists already (tests in one process); its size then stands.
    let _ = rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .thread_name(|i| format!("worker-{i}"))
        .start_handler(|_| flush_denormals())
        .build_global();
    rayon::current_num_threads()
}

/// Tells mimalloc never to give pages back: a training step frees and asks for the same buffers
/// every time, and a page fault for each 4 KiB of them costs more than the arithmetic on it.
/// Only has an effect in a binary whose global allocator is mimalloc.
pub fn keep_pages() {
    // `mi_option_purge_delay` of mimalloc 2 and 3, which the bindings do not name; -1 is "never".
    const PURGE_DELAY: libmimalloc_sys::mi_option_t = 15;
    // SAFETY: sets an integer option of the allocator; documented as callable at any time.
    unsafe {
        libmimalloc_sys::mi_option_set(PURGE_DELAY, -1);
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn denormals_are_flushed() {
        std::thread::spawn(|| {
            let tiny = std::hint::black_box(f32::MIN_POSITIVE);
            assert!(std::hint::black_box(tiny * 0.5) > 0.0);
            super::flush_denormals();
            assert_eq!(std::hint::black_box(tiny) * std::hint::black_box(0.5), 0.0);
        })
        .join()
        .expect("the thread panicked");
    }
}
