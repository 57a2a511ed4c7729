//! The address space that mappings of guest RAM take. A test of its own process, because threads of
//! other tests map memory, too.

use std::fs;

use migration_core::{RamLayout, RamRegion};
use migration_kvm::ram::{Backing, HUGE_PAGE_SIZE, MappedRam};

/// Returns the size of this process's address space in pages.
fn pages() -> u64 {
    let text = fs::read_to_string("/proc/self/statm").unwrap();
    text.split(' ').next().unwrap().parse().unwrap()
}

/// A mapping is placed inside a larger one, whose rest is given back.
#[test]
fn a_mapping_takes_its_own_size_and_gives_it_back() {
    const COUNT: u64 = 100;
    const PAGES: u64 = 7;
    for backing in [Backing::Anonymous, Backing::Memfd] {
        // the address follows the guest's, so the rest before and after it has several sizes
        let layout = |n: u64| vec![RamRegion { gpa: n % 512 * 4096, len: PAGES * 4096 }];
        let map = |n| MappedRam::new(RamLayout::new(layout(n)).unwrap(), backing).unwrap();
        drop(map(0));
        let before = pages();
        let all: Vec<_> = (0..COUNT).map(map).collect();
        let with = pages();
        drop(all);
        let huge = HUGE_PAGE_SIZE / 4096;
        // the allocator of this process may need some pages for itself
        assert!(with >= before + COUNT * PAGES, "{before} {with}");
        assert!(with < before + COUNT * PAGES + huge, "{before} {with}");
        assert!(pages() < before + huge / 2, "{before} {}", pages());
    }
}
