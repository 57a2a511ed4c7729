//! Policies that say when a VMM is due to be replaced.

use std::{
    fs, io,
    time::{Duration, Instant},
};

/// Decides when a VMM hands its VMs over to a successor. Asked again and again, a few times a
/// second.
pub trait RefreshPolicy: Send {
    /// Returns whether it is time.
    ///
    /// # Errors
    /// Returns an error if that cannot be found out. The VMM stays as it is, and asks again.
    fn due(&mut self) -> io::Result<bool>;
}

/// After a time, counted from its making.
#[derive(Clone, Copy, Debug)]
pub struct Interval {
    since: Instant,
    time: Duration,
}

impl Interval {
    /// In `time` from now.
    pub fn new(time: Duration) -> Self {
        Self { since: Instant::now(), time }
    }
}

impl RefreshPolicy for Interval {
    fn due(&mut self) -> io::Result<bool> {
        Ok(self.since.elapsed() >= self.time)
    }
}

/// When the calling process has more memory of its own than it should, as after a leak. Guest RAM
/// that is shared, which a VMM can only hand over, does not count.
#[derive(Clone, Copy, Debug)]
pub struct MemoryGrowth {
    limit: u64,
}

impl MemoryGrowth {
    /// Above `limit` bytes of resident anonymous memory (`RssAnon`).
    pub fn above(limit: u64) -> Self {
        Self { limit }
    }
}

impl RefreshPolicy for MemoryGrowth {
    fn due(&mut self) -> io::Result<bool> {
        Ok(own_memory()? > self.limit)
    }
}

/// Active anonymous memory of the calling process, in bytes.
fn own_memory() -> io::Result<u64> {
    let status = fs::read_to_string("/proc/self/status");
    let status = status.map_err(|e| io::Error::new(e.kind(), format!("/proc/self/status: {e} (is /proc mounted?)")))?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    let kilobytes = line.and_then(|text| text.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok());
    let bytes = kilobytes.and_then(|kb| kb.checked_mul(1024));
    bytes.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "/proc/self/status has no RssAnon"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_of_ones_own_counts() {
        // so much that it counts whatever other tests free meanwhile
        let more = std::hint::black_box(vec![1u8; 256 << 20]);
        assert!(MemoryGrowth::above(255 << 20).due().unwrap());
        assert!(!MemoryGrowth::above(1 << 40).due().unwrap());
        drop(more);
    }

    #[test]
    fn an_interval_passes() {
        assert!(Interval::new(Duration::ZERO).due().unwrap());
        assert!(!Interval::new(Duration::from_secs(3600)).due().unwrap());
    }
}
