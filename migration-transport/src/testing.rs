//! Helpers of this crate's unit tests.

use migration_core::{HeapRam, RamLayout, RamRegion};

/// Zeroed RAM of `pages` pages at guest physical address 0.
pub(crate) fn ram(pages: u64) -> HeapRam {
    HeapRam::new(RamLayout::new(vec![RamRegion { gpa: 0, len: pages * 4096 }]).unwrap()).unwrap()
}

/// Bytes with a long period, so that misplaced ones show.
pub(crate) fn pattern(len: usize) -> Vec<u8> {
    (0..len as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect()
}
