//! Guest RAM that this crate maps itself.

use std::{
    fs, io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    ptr::NonNull,
    thread,
    time::{Duration, Instant},
};

use migration_core::{GuestRam, PAGE_SHIFT, PAGE_SIZE, PageRange, PageSet, RamLayout, RamRegion};
use nix::sys::stat::fstat;

use super::{
    Backing, HUGE_PAGE_SIZE, MemoryFile, RamError,
    map::{self, Advice, Mapping},
    pagemap::{Pagemap, data_extents},
    range::{self, RegionFile},
};

#[cfg(test)]
mod tests;

/// The number of pages whose page table entries are filled at once: 1 MiB, which takes about a
/// tenth of a millisecond, less than the scheduler's tick.
const PREFAULT_PIECE: u64 = 256;
/// The number of pages that are unmapped at once: 4 MiB, a multiple of a huge page.
const UNMAP_PIECE: u64 = 1024;
/// The longest rest after a piece of work, as a multiple of the time that the work took.
const LONGEST_REST: u32 = 16;
/// The wake-up latency above which a thread is assumed to share its core with another one.
const LATE_WAKE_UP: Duration = Duration::from_micros(300);

/// Adds rests between pieces of work that run while a guest runs. A rest takes as long as the work
/// before it, and longer if other threads want the cores.
struct Pacer(u32);

impl Default for Pacer {
    fn default() -> Self {
        Self(1)
    }
}

impl Pacer {
    fn run<T>(&mut self, work: impl FnOnce() -> T) -> T {
        let began = Instant::now();
        let result = work();
        let took = began.elapsed();
        let rest = took * self.0;
        thread::sleep(rest);
        self.adapt(began.elapsed().saturating_sub(took + rest));
        result
    }

    /// Makes the rests longer if the last one ended this late, which means that the core is shared.
    /// Otherwise makes them shorter.
    fn adapt(&mut self, late: Duration) {
        self.0 = if late > LATE_WAKE_UP { (self.0 * 2).min(LONGEST_REST) } else { self.0.saturating_sub(1).max(1) };
    }
}

/// Guest RAM that this crate maps. Each region of the layout has one mapping and, with shared
/// backings, one memory file.
///
/// Without `/proc` (in a jail), all pages of private memory count as
/// [populated](GuestRam::populated), and all pages of hugetlb memory as soon as one of them is.
/// Holes are then read and sent as zero pages. Memory files do not need `/proc`.
///
/// The RAM is excluded from core dumps. It takes memory only for pages that are touched. With
/// hugetlb all of it is reserved at once, so that no later access can fail.
///
/// ```
/// use migration_core::{GuestRam, PageSet, RamLayout, RamRegion};
/// use migration_kvm::ram::{Backing, MappedRam};
/// let layout = RamLayout::new(vec![RamRegion { gpa: 0, len: 1 << 20 }])?;
/// let ram = MappedRam::new(layout, Backing::Memfd)?;
/// ram.write(0x3000, b"hello")?;
/// let mut populated = PageSet::empty(256);
/// ram.populated(&mut populated)?;
/// assert!(populated.iter().eq([3]));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct MappedRam {
    layout: RamLayout,
    backing: Backing,
    regions: Vec<Region>,
    /// `None` without `/proc`. It is then unknown which pages of private memory were touched.
    pagemap: Option<Pagemap>,
}

struct Region {
    mapping: Mapping,
    file: Option<OwnedFd>,
}

impl Region {
    /// Returns whether the region's memory file has no hole. (hugetlbfs does not report where its
    /// data is.)
    fn is_full(&self, pages: PageRange) -> bool {
        let blocks =
            self.file.as_ref().and_then(|file| fstat(file).ok()).map(|stat| stat.st_blocks.max(0) as u64 * 512);
        blocks.is_some_and(|bytes| bytes >= pages.bytes())
    }
}

impl MappedRam {
    /// Maps zeroed RAM of this layout.
    ///
    /// # Errors
    /// Fails with [`RamError::HugeLength`] or [`RamError::NoHugePages`] for hugetlb, and with
    /// [`RamError::System`].
    pub fn new(layout: RamLayout, backing: Backing) -> Result<Self, RamError> {
        let files = layout
            .regions()
            .iter()
            .enumerate()
            .map(|(index, region)| {
                if backing == Backing::Hugetlb && !region.len.is_multiple_of(HUGE_PAGE_SIZE) {
                    return Err(RamError::HugeLength { index, len: region.len });
                }
                let file = || map::memory_file(region.len, backing == Backing::Hugetlb);
                backing.is_shared().then(file).transpose().map_err(RamError::system("create a memory file"))
            })
            .collect::<Result<_, _>>()?;
        Self::map(layout, backing, files).map(Self::request_shared_huge_pages)
    }

    /// Maps existing memory files, in the order of the layout's regions. The files are those of
    /// [`memory_file`](Self::memory_file), duplicated or received from another process.
    ///
    /// # Errors
    /// - [`RamError::NotShared`] if the backing is private,
    /// - [`RamError::FileSize`] unless there is one file of the right length for each region,
    /// - [`RamError::NotMemory`] if a file is no memory file with the page size of the backing,
    /// - [`RamError::Unsealed`] if a file can still shrink or grow,
    /// - [`RamError::System`].
    pub fn from_memory_files(layout: RamLayout, files: Vec<OwnedFd>, backing: Backing) -> Result<Self, RamError> {
        let page_size = match backing {
            Backing::Memfd => PAGE_SIZE as u64,
            Backing::Hugetlb => HUGE_PAGE_SIZE,
            private => return Err(RamError::NotShared(private)),
        };
        if files.len() > layout.regions().len() {
            return Err(RamError::FileSize { index: layout.regions().len(), len: 0, size: 0 });
        }
        for (index, region) in layout.regions().iter().enumerate() {
            let len = region.len;
            let Some(file) = files.get(index) else {
                return Err(RamError::FileSize { index, len, size: 0 });
            };
            let size = file_size(file.as_fd())?;
            if size != len {
                return Err(RamError::FileSize { index, len, size });
            }
            let sealed = map::is_sealed(file.as_fd()).map_err(RamError::system("read a file's seals"))?;
            let found = map::page_size(file.as_fd()).map_err(RamError::system("read a file's page size"))?;
            match sealed {
                Some(_) if found != page_size => return Err(RamError::NotMemory { index, backing }),
                None => return Err(RamError::NotMemory { index, backing }),
                Some(false) => return Err(RamError::Unsealed(index)),
                Some(true) => {}
            }
        }
        let ram = Self::map(layout, backing, files.into_iter().map(Some).collect())?;
        Ok(ram.request_shared_huge_pages())
    }

    /// Asks for transparent huge pages in a memory file.
    fn request_shared_huge_pages(self) -> Self {
        if self.backing == Backing::Memfd {
            // ignored: without transparent huge pages in the kernel, or if the administrator
            // forbids them, 4 KiB pages are used
            for (mapped, region) in self.regions.iter().zip(self.layout.regions()) {
                drop(mapped.mapping.advise(0, region.len, Advice::HugePages));
            }
        }
        self
    }

    fn map(layout: RamLayout, backing: Backing, files: Vec<Option<OwnedFd>>) -> Result<Self, RamError> {
        let mut regions = Vec::with_capacity(files.len());
        for (file, region) in files.into_iter().zip(layout.regions()) {
            let mapped = file.as_ref().map(|file| (file.as_fd(), 0));
            let mapping = Mapping::new(region.len, region.gpa, mapped).map_err(|error| {
                // hugetlb pages are reserved by the mapping itself, so another process cannot take
                // them in between
                match (backing, error.raw_os_error()) {
                    (Backing::Hugetlb, Some(libc::ENOMEM)) => {
                        regions.clear();
                        RamError::NoHugePages { needed: layout.bytes() / HUGE_PAGE_SIZE, free: free_huge_pages() }
                    }
                    _ => RamError::System { what: "map memory", source: error },
                }
            })?;
            let advise = |advice| mapping.advise(0, region.len, advice);
            match backing {
                // ignored: fails if the kernel has no transparent huge pages, and then none need to
                // be turned off
                Backing::Anonymous => drop(advise(Advice::NoHugePages)),
                Backing::TransparentHuge => {
                    advise(Advice::HugePages).map_err(RamError::system("ask for transparent huge pages"))?;
                }
                Backing::Memfd | Backing::Hugetlb => {}
            }
            advise(Advice::DontDump).map_err(RamError::system("exclude memory from core dumps"))?;
            regions.push(Region { mapping, file });
        }
        let pagemap = Pagemap::open_if_any().map_err(RamError::system("open /proc/self/pagemap"))?;
        Ok(Self { layout, backing, regions, pagemap })
    }

    /// Maps memory of a VM a second time, for a pager: these parts of its memory files.
    pub(super) fn second(layout: RamLayout, backing: Backing, files: &[MemoryFile]) -> Result<Self, RamError> {
        let map = |(file, region): (&MemoryFile, &RamRegion)| {
            let mapping = Mapping::new(region.len, region.gpa, Some((file.file.as_fd(), file.offset)))?;
            mapping.advise(0, region.len, Advice::DontDump)?;
            Ok(Region { mapping, file: None })
        };
        let regions: io::Result<_> = files.iter().zip(layout.regions()).map(map).collect();
        let regions = regions.map_err(RamError::system("map memory a second time"))?;
        Ok(Self { layout, backing, regions, pagemap: None })
    }

    /// Returns the backing of the RAM.
    pub fn backing(&self) -> Backing {
        self.backing
    }

    /// Returns the memory file of region `index`, or `None` if the memory is private or there is no
    /// such region. A process that holds the file can read and write the guest's memory, but cannot
    /// change the file's length.
    pub fn memory_file(&self, index: usize) -> Option<BorrowedFd<'_>> {
        self.regions.get(index)?.file.as_ref().map(AsFd::as_fd)
    }

    /// Returns the memory files of all regions, in the order of the layout. A process that takes
    /// over the VM maps them with [`from_memory_files`](Self::from_memory_files).
    ///
    /// # Errors
    /// Fails with [`RamError::NotShared`] if the backing is private.
    pub fn memory_files(&self) -> Result<Vec<BorrowedFd<'_>>, RamError> {
        let files: Option<Vec<_>> = self.regions.iter().map(|r| r.file.as_ref().map(AsFd::as_fd)).collect();
        files.ok_or(RamError::NotShared(self.backing))
    }

    /// Returns whether `files` are the memory files of this RAM, region by region. Files are
    /// compared by identity, not by descriptor.
    ///
    /// # Errors
    /// Fails with [`RamError::NotShared`] if the backing is private, and with [`RamError::System`].
    pub fn is_in(&self, files: &[impl AsFd]) -> Result<bool, RamError> {
        let own = self.memory_files()?;
        if own.len() != files.len() {
            return Ok(false);
        }
        let identity = |file: BorrowedFd<'_>| {
            let stat =
                fstat(file).map_err(io::Error::from).map_err(RamError::system("read a memory file's identity"))?;
            Ok((stat.st_dev, stat.st_ino))
        };
        for (own, other) in own.into_iter().zip(files) {
            if identity(own)? != identity(other.as_fd())? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Fills the page tables of this process for all pages that the memory files hold, so that the
    /// guest does not fault on each page after it was handed over to this process. Returns whether
    /// all was done within `patience`.
    ///
    /// This takes 120 to 220 ms per GiB, half of which are rests. The guest runs meanwhile, in
    /// another process and perhaps on this core, and without the rests it would have to wait for
    /// the scheduler's next tick. Pages without contents are skipped, because to map them would
    /// allocate memory for them.
    ///
    /// # Errors
    /// Fails with [`RamError::System`].
    pub fn prefault_shared(&self, patience: Duration) -> Result<bool, RamError> {
        self.prefault_shared_by(patience, &mut |range| self.prefault_for_reading(range))
    }

    /// Fills page tables like [`prefault_shared`](Self::prefault_shared), with `fill` instead of
    /// this process's own page tables. `fill` can be [`pre_fault`](crate::state::pre_fault) or a
    /// function for a device. It gets pieces of up to 1 MiB, each in one region.
    ///
    /// # Errors
    /// Fails with the errors of `fill`, and with [`RamError::System`].
    pub fn prefault_shared_by(
        &self,
        patience: Duration,
        fill: &mut dyn FnMut(PageRange) -> Result<(), RamError>,
    ) -> Result<bool, RamError> {
        let (start, mut pacer) = (Instant::now(), Pacer::default());
        for (index, region) in self.regions.iter().enumerate() {
            let Some(pages) = self.layout.region_pages(index) else { continue };
            if self.backing == Backing::Hugetlb && !region.is_full(pages) {
                continue;
            }
            for first in pages.pages().step_by(PREFAULT_PIECE as usize) {
                if start.elapsed() >= patience {
                    return Ok(false);
                }
                let piece = PageRange::new(first, PREFAULT_PIECE.min(pages.end() - first));
                let held = self.in_memory(index, PageRange::new(first - pages.first, piece.count))?;
                if !held.is_empty() {
                    let held = held.iter().map(|range| PageRange::new(pages.first + range.first, range.count));
                    pacer.run(|| held.into_iter().try_for_each(&mut *fill))?;
                }
            }
        }
        Ok(true)
    }

    /// Returns the pages in `range` of a memory file that are in memory. Pages are counted from the
    /// start of the region. The caller asks piece by piece: to find a file's next hole, the kernel
    /// may search all of the file without giving up the core.
    fn in_memory(&self, region: usize, range: PageRange) -> Result<Vec<PageRange>, RamError> {
        if self.backing == Backing::Hugetlb {
            // the kernel reports only mapped pages of hugetlb files, so count all of them
            return Ok(vec![range]);
        }
        let mut resident = [0; PREFAULT_PIECE as usize];
        let resident = &mut resident[..range.count as usize];
        let queried = self.regions[region].mapping.resident(range.first << PAGE_SHIFT, resident);
        queried.map_err(RamError::system("find the pages of a memory file"))?;
        let mut held = PageSet::empty(range.count);
        for (page, _) in (0..).zip(&*resident).filter(|(_, byte)| **byte & 1 == 1) {
            held.insert(page);
        }
        Ok(held.ranges().map(|r| PageRange::new(range.first + r.first, r.count)).collect())
    }

    /// Removes the guest's memory from the page tables of this process, and from those of KVM for
    /// VMs in it. Returns whether all was done within `patience`. Does nothing for private memory.
    ///
    /// Use it when the VM runs in another process on the same cores and its RAM stays in memory
    /// files. The work is done in pieces with rests, because to unmap all at once would take tens
    /// of milliseconds per GiB. Later accesses map the memory again.
    ///
    /// # Errors
    /// Fails with [`RamError::System`].
    pub fn unmap_shared_in_pieces(&self, patience: Duration) -> Result<bool, RamError> {
        if !self.backing.is_shared() {
            return Ok(true);
        }
        let (start, mut pacer) = (Instant::now(), Pacer::default());
        for region in 0..self.regions.len() {
            let Some(pages) = self.layout.region_pages(region) else { continue };
            for first in pages.pages().step_by(UNMAP_PIECE as usize) {
                let piece = PageRange::new(first, UNMAP_PIECE.min(pages.end() - first));
                if start.elapsed() >= patience {
                    return Ok(false);
                }
                pacer.run(|| range::advise(self, piece, Advice::Drop, "unmap memory"))?;
            }
        }
        Ok(true)
    }

    /// Makes a second mapping of the same memory, or returns `None` for private memory. A pager
    /// fills pages through it without the guest seeing them before they are complete. It has page
    /// tables of its own, so userfaultfd and write-protection of the first mapping do not see its
    /// accesses.
    ///
    /// # Errors
    /// Fails with [`RamError::System`].
    pub fn alias(&self) -> Result<Option<Self>, RamError> {
        if !self.backing.is_shared() {
            return Ok(None);
        }
        let files: io::Result<Vec<_>> =
            self.regions.iter().map(|r| r.file.as_ref().map(OwnedFd::try_clone).transpose()).collect();
        let files = files.map_err(RamError::system("duplicate a memory file's descriptor"))?;
        Self::map(self.layout.clone(), self.backing, files).map(Some)
    }

    /// Gives every page of `range` memory and a writable page table entry, so that later accesses
    /// of this process do not fault. The contents do not change. Pages without contents become zero
    /// pages that count as populated.
    ///
    /// # Errors
    /// Fails with [`RamError::Outside`], and with [`RamError::System`] if memory is short or before
    /// Linux 5.14.
    pub fn prefault(&self, range: PageRange) -> Result<(), RamError> {
        range::advise(self, range, Advice::PopulateWrite, "populate memory")
    }

    /// Fills the page table entries of `range` for reading. If another process has populated the
    /// memory file, this saves the guest a fault for each page.
    ///
    /// # Errors
    /// Fails like [`prefault`](Self::prefault).
    pub fn prefault_for_reading(&self, range: PageRange) -> Result<(), RamError> {
        range::advise(self, range, Advice::PopulateRead, "map populated memory")
    }

    /// Collapses small pages to huge pages in those blocks of 2 MiB that are completely in `range`,
    /// if the backing can have both. A thread that touches such a block meanwhile waits for about
    /// 100 µs.
    ///
    /// # Errors
    /// Fails with [`RamError::Outside`], and with [`RamError::System`] if no huge page is available
    /// or before Linux 6.1. The remaining blocks are then unchanged.
    pub fn assemble_huge_pages(&self, range: PageRange) -> Result<(), RamError> {
        range::advise(self, range, Advice::Collapse, "assemble huge pages")
    }

    /// Frees the memory of `range`, which then reads as zeros in every process that maps it. No
    /// dirty tracker reports this.
    ///
    /// A part of a transparent huge page that cannot be split becomes zeros without being freed. On
    /// hugetlb the range must cover whole huge pages. Touching it again takes a free huge page from
    /// the reserve, and raises SIGBUS if there is none.
    ///
    /// # Errors
    /// Fails with [`RamError::Outside`] or [`RamError::System`].
    pub fn discard(&self, range: PageRange) -> Result<(), RamError> {
        let file = |region: usize| {
            let file = self.regions.get(region)?.file.as_ref()?;
            Some(RegionFile { file: file.as_fd(), offset: 0 })
        };
        range::discard(self, self.backing, range, file)
    }
}

// SAFETY: every region is completely mapped, readable and writable, from construction until drop.
// Nothing remaps it, the files cannot shrink, and no method returns a Rust reference into it.
unsafe impl GuestRam for MappedRam {
    fn layout(&self) -> &RamLayout {
        &self.layout
    }

    fn host_address(&self, index: usize) -> NonNull<u8> {
        self.regions[index].mapping.address()
    }

    fn populated(&self, into: &mut PageSet) -> io::Result<()> {
        for (index, region) in self.regions.iter().enumerate() {
            let Some(pages) = self.layout.region_pages(index) else { continue };
            let (address, len) = (region.mapping.address().as_ptr() as u64, pages.bytes());
            let add = |from: u64, end: u64, into: &mut PageSet| {
                into.insert_range(PageRange::new(pages.first + (from >> PAGE_SHIFT), (end - from) >> PAGE_SHIFT));
            };
            let mut mapped = 0;
            match (&region.file, self.backing) {
                // pages of a file may be populated without being mapped here, so ask the file
                (Some(file), Backing::Memfd) => data_extents(file.as_fd(), len, |from, end| add(from, end, into))?,
                (Some(file), _) => {
                    if let Some(pagemap) = &self.pagemap {
                        pagemap.resident(address, len, |from, end| {
                            mapped += end - from;
                            add(from - address, end - address, into);
                        })?;
                    }
                    // hugetlbfs reports only how much data there is, not where. If there are more
                    // pages than are mapped here (another process populated them, or a page is just
                    // being migrated), any page may be populated.
                    let blocks = fstat(file)?.st_blocks.max(0) as u64;
                    if blocks.saturating_mul(512) > mapped {
                        into.insert_range(pages);
                    }
                }
                (None, _) => match &self.pagemap {
                    Some(pagemap) => {
                        pagemap.populated(address, len, |from, end| add(from - address, end - address, into))?
                    }
                    // mincore(2) reports swapped pages as absent, so no page may be left out; zero
                    // pages are found when they are read
                    None => into.insert_range(pages),
                },
            }
        }
        Ok(())
    }
}

pub(super) fn file_size(file: BorrowedFd<'_>) -> Result<u64, RamError> {
    let stat = fstat(file).map_err(io::Error::from).map_err(RamError::system("read a memory file's length"))?;
    Ok(u64::try_from(stat.st_size).unwrap_or(0))
}

/// Returns the number of huge pages that are neither used nor reserved. It is for an error message,
/// so an unreadable file counts as 0.
fn free_huge_pages() -> u64 {
    let read = |name: &str| -> u64 {
        let text = fs::read_to_string(format!("/sys/kernel/mm/hugepages/hugepages-2048kB/{name}"));
        text.ok().and_then(|t| t.trim().parse().ok()).unwrap_or(0)
    };
    read("free_hugepages").saturating_sub(read("resv_hugepages"))
}
