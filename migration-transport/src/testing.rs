//! Helpers for the unit tests of this crate.

use std::io;

use bytes::Bytes;
use migration_core::{HeapRam, RamLayout, RamRegion, store::VersionStore};

/// Makes zeroed RAM of `pages` pages at guest physical address 0.
pub(crate) fn ram(pages: u64) -> HeapRam {
    HeapRam::new(RamLayout::new(vec![RamRegion { gpa: 0, len: pages * 4096 }]).unwrap()).unwrap()
}

/// Returns bytes with a long period, so that misplaced ones are noticed.
pub(crate) fn pattern(len: usize) -> Vec<u8> {
    (0..len as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect()
}

/// The number and state of a checkpoint, and the byte that fills each page.
pub(crate) type Contents = (Option<(u32, Bytes)>, Vec<(u64, Option<u8>)>);

/// Returns what a store restores.
pub(crate) fn contents(store: &mut dyn VersionStore) -> io::Result<Contents> {
    let mut pages = Vec::new();
    store.restore(&mut |page, data| {
        let fill = data.map(|data| data[0]);
        assert!(data.is_none_or(|data| data.iter().all(|&byte| Some(byte) == fill)));
        pages.push((page, fill));
        Ok(())
    })?;
    Ok((store.latest(), pages))
}
