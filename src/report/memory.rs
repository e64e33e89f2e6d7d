//! How much memory this process has held at most.

/// The highest resident size of this process so far, as Linux counts it; `None` elsewhere.
pub fn peak_host_bytes() -> Option<u64> {
    peak(&std::fs::read_to_string("/proc/self/status").ok()?)
}

fn peak(status: &str) -> Option<u64> {
    let value = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kibibytes: u64 = value.trim().strip_suffix("kB")?.trim_end().parse().ok()?;
    Some(kibibytes * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_is_found_and_read() {
        let status = "Name:\tallreel\nVmPeak:\t  999 kB\nVmHWM:\t   12345 kB\nVmRSS:\t 1 kB\n";
        assert_eq!(peak(status), Some(12_345 * 1024));
        assert_eq!(peak("Name:\tallreel\n"), None);
        assert_eq!(peak("VmHWM:\t many kB\n"), None);
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn memory_that_was_touched_is_counted() {
        let size = 256 << 20;
        let block = std::hint::black_box(vec![1u8; size]);
        let held = peak_host_bytes().unwrap();
        assert!(held >= size as u64, "{held}");
        assert!(held < 1 << 40, "{held}");
        drop(block);
        // Not `held` itself: the kernel's counters are a few pages off either way.
        assert!(peak_host_bytes().unwrap() >= size as u64, "a peak does not go down");
    }
}
