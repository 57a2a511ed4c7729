//! Guest RAM of huge pages from the kernel's reserve. A test of its own process, because it raises
//! the reserve and counts on it.

use std::{fs, os::fd::OwnedFd, time::Duration};

use migration_core::{GuestRam, PageRange, PageSet, RamLayout, RamRegion};
use migration_kvm::ram::{Backing, HUGE_PAGE_SIZE, MappedRam};

const NR_HUGEPAGES: &str = "/proc/sys/vm/nr_hugepages";
/// The number of huge pages of the RAM, and one more for a second mapping.
const NEEDED: u64 = 5;
/// The number of small pages in a huge page.
const HUGE: u64 = HUGE_PAGE_SIZE / 4096;
const LONG: Duration = Duration::from_secs(60);

/// The raised reserve of huge pages, which is restored when this is dropped.
struct Reserve(u64);

impl Reserve {
    fn raise() -> Option<Self> {
        let read = || fs::read_to_string(NR_HUGEPAGES).ok()?.trim().parse::<u64>().ok();
        let before = read()?;
        fs::write(NR_HUGEPAGES, (before + NEEDED).to_string()).ok()?;
        let raised = Self(before);
        (read() == Some(before + NEEDED)).then_some(raised)
    }
}

impl Drop for Reserve {
    fn drop(&mut self) {
        let _ = fs::write(NR_HUGEPAGES, self.0.to_string());
    }
}

/// Makes RAM of two regions: two huge pages and one.
fn layout() -> RamLayout {
    let regions = [(0, 2), (1 << 30, 1)].map(|(gpa, pages)| RamRegion { gpa, len: pages * HUGE_PAGE_SIZE });
    RamLayout::new(regions.into()).unwrap()
}

fn populated(ram: &MappedRam) -> Vec<(u64, u64)> {
    let mut set = PageSet::empty(ram.layout().pages());
    ram.populated(&mut set).unwrap();
    set.ranges().map(|range| (range.first, range.count)).collect()
}

/// Returns the pieces that are filled in advance, put together.
fn filled(ram: &MappedRam) -> Vec<(u64, u64)> {
    let mut set = PageSet::empty(ram.layout().pages());
    let mut fill = |piece: PageRange| {
        set.insert_range(piece);
        Ok(())
    };
    assert!(ram.prefault_shared_by(LONG, &mut fill).unwrap());
    set.ranges().map(|range| (range.first, range.count)).collect()
}

#[test]
fn the_kernel_says_where_pages_are_mapped_and_how_many_there_are() {
    let Some(_reserve) = Reserve::raise() else { return eprintln!("skipped: no huge pages can be reserved") };
    let ram = MappedRam::new(layout(), Backing::Hugetlb).unwrap();
    assert_eq!((populated(&ram), filled(&ram)), (vec![], vec![]));
    ram.write(HUGE_PAGE_SIZE + 5, &[1]).unwrap();
    assert_eq!((populated(&ram), filled(&ram)), (vec![(HUGE, HUGE)], vec![]));
    // another process populates a page: it may be any
    let files: Vec<OwnedFd> =
        ram.memory_files().unwrap().into_iter().map(|file| file.try_clone_to_owned().unwrap()).collect();
    let other = MappedRam::from_memory_files(layout(), files, Backing::Hugetlb).unwrap();
    other.write(0, &[2]).unwrap();
    assert_eq!(populated(&ram), [(0, 2 * HUGE)]);
    // the region is full, and can be mapped whole
    assert_eq!(filled(&ram), [(0, 2 * HUGE)]);
    other.write(1 << 30, &[3]).unwrap();
    assert_eq!(populated(&ram), [(0, 3 * HUGE)]);
    assert!(ram.prefault_shared(LONG).unwrap());
    let mut bytes = [0; 3];
    for (byte, gpa) in bytes.iter_mut().zip([0, HUGE_PAGE_SIZE + 5, 1 << 30]) {
        ram.read(gpa, std::slice::from_mut(byte)).unwrap();
    }
    assert_eq!(bytes, [2, 1, 3]);
    ram.discard(PageRange::new(0, HUGE)).unwrap();
    assert_eq!(populated(&ram), [(HUGE, 2 * HUGE)]);
}
