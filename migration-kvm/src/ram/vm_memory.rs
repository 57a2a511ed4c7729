//! Guest RAM of a VMM that uses the vm-memory crate.

use std::{io, os::fd::AsFd, ptr::NonNull, sync::Arc};

use migration_core::{
    GuestRam, LayoutError, PAGE_SHIFT, PAGE_SIZE, PageRange, PageSet, RamLayout, RamRegion,
    tracker::{DirtyTracker, TrackerError},
};
use thiserror::Error;
use vm_memory::{
    Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    bitmap::{AtomicBitmap, Bitmap},
};

use super::pagemap::{Pagemap, data_extents, is_shared};

/// The reason why a vm-memory object cannot be used as guest RAM.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum VmMemoryError {
    /// The regions are empty, unaligned or overlapping.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// A region is not completely mapped into this process, or not page-aligned.
    #[error("the region at {0:#x} is not mapped into this process whole and page-aligned")]
    NotMapped(u64),
    /// The file /proc/self/pagemap exists but cannot be opened.
    #[error("open /proc/self/pagemap")]
    Pagemap(#[source] io::Error),
}

/// A [`GuestRam`] over memory of the vm-memory crate, which it keeps alive.
///
/// Each vm-memory region becomes one region of the layout, in ascending order. Without `/proc` (in
/// a jail), all pages count as [populated](GuestRam::populated).
pub struct VmMemoryRam<M> {
    memory: Arc<M>,
    layout: RamLayout,
    addresses: Vec<NonNull<u8>>,
    /// For each region, whether it is mapped shared. Then only its file knows which pages are
    /// populated.
    shared: Vec<bool>,
    /// `None` without `/proc`. All pages of private memory then count as populated.
    pagemap: Option<Pagemap>,
}

// SAFETY: the addresses point into `memory`, which is `Send` and `Sync` itself and is accessed only
// through raw addresses.
unsafe impl<M: Send + Sync> Send for VmMemoryRam<M> {}
// SAFETY: as above.
unsafe impl<M: Send + Sync> Sync for VmMemoryRam<M> {}

impl<B: Bitmap + Send + Sync> VmMemoryRam<GuestMemoryMmap<B>> {
    /// Makes guest RAM over the regions that vm-memory has mapped.
    ///
    /// # Errors
    /// See [`VmMemoryError`].
    pub fn from_mmap(memory: Arc<GuestMemoryMmap<B>>) -> Result<Self, VmMemoryError> {
        // SAFETY: a `GuestMemoryMmap` cannot change while it is shared. Its regions stay mapped
        // until it is dropped, which the `Arc` in the result prevents.
        unsafe { Self::new(memory) }
    }
}

impl<M: GuestMemoryBackend + Send + Sync> VmMemoryRam<M> {
    /// Makes guest RAM over any vm-memory back-end.
    ///
    /// # Safety
    /// For as long as `memory` lives, its regions must stay the same, and must stay mapped,
    /// readable and writable at their present addresses.
    ///
    /// # Errors
    /// See [`VmMemoryError`].
    pub unsafe fn new(memory: Arc<M>) -> Result<Self, VmMemoryError> {
        let mut found = Vec::new();
        for region in memory.iter() {
            let (gpa, len) = (region.start_addr().raw_value(), region.len());
            let slice = region.as_volatile_slice().map_err(|_| VmMemoryError::NotMapped(gpa))?;
            let address = slice.ptr_guard_mut().as_ptr();
            let whole = slice.len() as u64 == len && (address as usize).is_multiple_of(PAGE_SIZE);
            let address = NonNull::new(address).filter(|_| whole).ok_or(VmMemoryError::NotMapped(gpa))?;
            // not an error: if it is unknown, everything counts as populated
            let shared = is_shared(address.as_ptr() as u64).unwrap_or(true);
            found.push((RamRegion { gpa, len }, address, shared));
        }
        found.sort_by_key(|(region, ..)| region.gpa);
        let layout = RamLayout::new(found.iter().map(|f| f.0).collect())?;
        let (addresses, shared) = found.into_iter().map(|f| (f.1, f.2)).unzip();
        let pagemap = Pagemap::open_if_any().map_err(VmMemoryError::Pagemap)?;
        Ok(Self { memory, layout, addresses, shared, pagemap })
    }

    /// Returns the vm-memory object.
    pub fn memory(&self) -> &Arc<M> {
        &self.memory
    }
}

// SAFETY: `VmMemoryRam::new` checked that each region is completely mapped at its address. Its
// caller guaranteed that this stays so for as long as `memory` lives, which is as long as this
// object.
unsafe impl<M: GuestMemoryBackend + Send + Sync> GuestRam for VmMemoryRam<M> {
    fn layout(&self) -> &RamLayout {
        &self.layout
    }

    fn host_address(&self, index: usize) -> NonNull<u8> {
        self.addresses[index]
    }

    fn populated(&self, into: &mut PageSet) -> io::Result<()> {
        for region in self.memory.iter() {
            let Some(first) = self.layout.page_of(region.start_addr().raw_value()) else { continue };
            let Some((index, _)) = self.layout.locate(first) else { continue };
            let len = region.len();
            if self.shared[index] && region.file_offset().is_none() {
                into.insert_range(PageRange::new(first, len >> PAGE_SHIFT));
                continue;
            }
            let mut add = |from: u64, end: u64| {
                let (from, end) = (from >> PAGE_SHIFT, end.div_ceil(PAGE_SIZE as u64));
                into.insert_range(PageRange::new(first + from, end.saturating_sub(from)));
            };
            if let Some(file) = region.file_offset() {
                // a mapping of a file, shared or private, shows the file's data whether or not it
                // is mapped yet
                let start = file.start();
                data_extents(file.file().as_fd(), start.saturating_add(len), |from, end| {
                    if end > start {
                        add(from.saturating_sub(start), end - start);
                    }
                })?;
                if self.shared[index] {
                    continue;
                }
            }
            let address = self.addresses[index].as_ptr() as u64;
            match &self.pagemap {
                Some(pagemap) => pagemap.populated(address, len, |from, end| add(from - address, end - address))?,
                None => add(0, len),
            }
        }
        Ok(())
    }
}

/// A [`DirtyTracker`] that uses vm-memory's own dirty bitmap. It sees writes of devices and VMM
/// threads through vm-memory, but no writes of vCPUs. Combine it with one of KVM's trackers in a
/// [`UnionTracker`](migration_core::tracker::UnionTracker).
///
/// The bitmap's page size must be 4 KiB; otherwise [`start`](DirtyTracker::start) fails. vm-memory
/// sets bits whether or not this tracker is active. Starting clears earlier bits.
pub struct VmMemoryBitmap {
    memory: Arc<GuestMemoryMmap<AtomicBitmap>>,
    layout: RamLayout,
    pending: PageSet,
    active: bool,
}

impl VmMemoryBitmap {
    /// Makes a tracker over the bitmaps of `ram`'s regions.
    pub fn new(ram: &VmMemoryRam<GuestMemoryMmap<AtomicBitmap>>) -> Self {
        let layout = ram.layout().clone();
        Self { memory: ram.memory.clone(), pending: PageSet::empty(layout.pages()), layout, active: false }
    }

    fn take(&self, into: &mut PageSet) {
        for region in self.memory.iter() {
            if let Some(first) = self.layout.page_of(region.start_addr().raw_value()) {
                into.insert_bitmap(first, region.len() >> PAGE_SHIFT, &(**region).bitmap().get_and_reset());
            }
        }
    }
}

impl DirtyTracker for VmMemoryBitmap {
    fn name(&self) -> &'static str {
        "vm-memory"
    }

    fn is_active(&self) -> bool {
        self.active
    }

    fn start(&mut self) -> Result<(), TrackerError> {
        if self.active {
            return Ok(());
        }
        if self.memory.iter().any(|r| (**r).bitmap().len() as u64 != r.len() >> PAGE_SHIFT) {
            return Err(TrackerError::new(self.name(), "a bitmap's page size is not 4 KiB"));
        }
        self.take(&mut PageSet::empty(self.layout.pages()));
        self.pending.clear();
        self.active = true;
        Ok(())
    }

    fn stop(&mut self) -> Result<(), TrackerError> {
        self.active = false;
        self.pending.clear();
        Ok(())
    }

    fn harvest(&mut self, into: &mut PageSet) -> Result<(), TrackerError> {
        self.take(into);
        into.union_with(&self.pending);
        self.pending.clear();
        Ok(())
    }

    fn mark_dirty(&mut self, pages: &PageSet) {
        self.pending.union_with(pages);
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::File, num::NonZeroUsize, os::unix::fs::FileExt as _};

    use vm_memory::{Bytes, FileOffset, GuestAddress, GuestRegionMmap, MmapRegion, mmap::MmapRegionBuilder};

    use super::*;
    use crate::ram::map;

    const PAGE: u64 = PAGE_SIZE as u64;
    const PROT: i32 = libc::PROT_READ | libc::PROT_WRITE;

    /// Makes RAM of one region of six pages at guest physical address 0x8000.
    fn region(file: Option<FileOffset>, flags: i32) -> VmMemoryRam<GuestMemoryMmap<()>> {
        let mapping = MmapRegion::build(file, 6 * PAGE_SIZE, PROT, flags | libc::MAP_NORESERVE).unwrap();
        let region = GuestRegionMmap::new(mapping, GuestAddress(0x8000)).unwrap();
        VmMemoryRam::from_mmap(Arc::new(GuestMemoryMmap::from_regions(vec![region]).unwrap())).unwrap()
    }

    fn populated<M: GuestMemoryBackend + Send + Sync>(ram: &VmMemoryRam<M>) -> Vec<u64> {
        let mut set = PageSet::empty(ram.layout().pages());
        ram.populated(&mut set).unwrap();
        set.iter().collect()
    }

    /// Makes a file of 12 pages with data in some of them.
    fn file(pages: &[u64]) -> Arc<File> {
        let file = File::from(map::memory_file(12 * PAGE, false).unwrap());
        pages.iter().for_each(|page| file.write_all_at(&[1], page * PAGE).unwrap());
        Arc::new(file)
    }

    /// The region is pages 2 to 7 of the file. Data before, across its beginning, in it, and after.
    #[test]
    fn pages_of_a_file_are_populated_where_the_file_has_data() {
        for (data, expected) in [(&[0, 3, 6, 7, 9][..], &[1, 4, 5][..]), (&[0, 1, 2, 8, 9], &[0]), (&[1, 8], &[])] {
            let ram = region(Some(FileOffset::from_arc(file(data), 2 * PAGE)), libc::MAP_SHARED);
            assert_eq!(populated(&ram), expected, "{data:?}");
        }
        let ram = region(Some(FileOffset::from_arc(file(&[3]), 2 * PAGE)), libc::MAP_SHARED);
        ram.write(0x8000, &[1]).unwrap();
        assert_eq!(populated(&ram), [0, 1]);
    }

    #[test]
    fn a_private_mapping_of_a_file_has_pages_of_its_own_as_well() {
        let mut ram = region(Some(FileOffset::from_arc(file(&[3]), 2 * PAGE)), libc::MAP_PRIVATE);
        ram.write(0xc000, &[1]).unwrap();
        assert_eq!(populated(&ram), [1, 4]);
        assert_eq!(ram.memory().iter().count(), 1);
        // without `/proc` every page may be one
        ram.pagemap = None;
        assert_eq!(populated(&ram), [0, 1, 2, 3, 4, 5]);
    }

    #[test]
    fn shared_memory_without_a_file_may_be_populated_anywhere() {
        let ram = region(None, libc::MAP_SHARED | libc::MAP_ANONYMOUS);
        assert_eq!(populated(&ram), [0, 1, 2, 3, 4, 5]);
        let ram = region(None, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        assert!(populated(&ram).is_empty());
        // of two regions, each for itself
        let regions = [(libc::MAP_SHARED, 0), (libc::MAP_PRIVATE, 0x10_0000)].map(|(flags, gpa)| {
            let flags = flags | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
            let mapping = MmapRegion::<()>::build(None, 2 * PAGE_SIZE, PROT, flags).unwrap();
            GuestRegionMmap::new(mapping, GuestAddress(gpa)).unwrap()
        });
        let memory = GuestMemoryMmap::from_regions(regions.into()).unwrap();
        assert_eq!(populated(&VmMemoryRam::from_mmap(Arc::new(memory)).unwrap()), [0, 1]);
    }

    #[test]
    fn a_bitmap_of_other_pages_is_no_tracker() {
        let bitmap = AtomicBitmap::new(0x8000, NonZeroUsize::new(2 * PAGE_SIZE).unwrap());
        let mapping = MmapRegionBuilder::new_with_bitmap(0x8000, bitmap)
            .with_mmap_prot(PROT)
            .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE)
            .build()
            .unwrap();
        let regions = vec![GuestRegionMmap::new(mapping, GuestAddress(0)).unwrap()];
        let ram = VmMemoryRam::from_mmap(Arc::new(GuestMemoryMmap::from_regions(regions).unwrap())).unwrap();
        let mut tracker = VmMemoryBitmap::new(&ram);
        assert!(tracker.start().unwrap_err().to_string().contains("vm-memory: a bitmap's page size is not 4 KiB"));
        assert!(!tracker.is_active());
    }

    #[test]
    fn vm_memory_is_guest_ram_and_its_bitmap_a_tracker() {
        let ranges = [(GuestAddress(0), 0x4000), (GuestAddress(0x10_0000), 0x8000)];
        let memory = Arc::new(GuestMemoryMmap::<AtomicBitmap>::from_ranges(&ranges).unwrap());
        let ram = VmMemoryRam::from_mmap(memory.clone()).unwrap();
        let mut tracker = VmMemoryBitmap::new(&ram);
        memory.write_slice(b"early", GuestAddress(0)).unwrap();
        assert!(!tracker.is_active());
        tracker.start().unwrap();
        assert!(tracker.is_active());
        memory.write_slice(b"late", GuestAddress(0x10_2ffe)).unwrap();
        // starting again changes nothing
        tracker.start().unwrap();
        let mut dirty = PageSet::empty(12);
        tracker.harvest(&mut dirty).unwrap();
        assert!(dirty.iter().eq([6, 7]), "{dirty:?}");
        let mut populated = PageSet::empty(12);
        ram.populated(&mut populated).unwrap();
        assert!(populated.contains(0) && populated.contains(6) && populated.contains(7), "{populated:?}");
        let mut bytes = [0; 4];
        ram.read(0x10_2ffe, &mut bytes).unwrap();
        assert_eq!(&bytes, b"late");
        tracker.mark_dirty(&dirty);
        let mut again = PageSet::empty(12);
        tracker.harvest(&mut again).unwrap();
        assert_eq!(again, dirty);
        // pages that were harvested are not reported again, and a stop forgets those that were marked
        let mut none = PageSet::empty(12);
        tracker.harvest(&mut none).unwrap();
        assert!(none.is_empty());
        tracker.mark_dirty(&dirty);
        tracker.stop().unwrap();
        assert!(!tracker.is_active());
        tracker.start().unwrap();
        tracker.harvest(&mut none).unwrap();
        assert!(none.is_empty());
    }
}
