//! Queries of the kernel's page tables for a range of this process's memory.

use std::{
    fs::{self, File},
    io,
    os::{
        fd::{AsRawFd, BorrowedFd},
        unix::fs::FileExt,
    },
    ptr,
};

use migration_core::{PAGE_SHIFT, PAGE_SIZE};
use nix::{
    errno::Errno,
    unistd::{Whence, lseek},
};

/// Category: the page was written since it was last write-protected (asynchronously).
pub(crate) const WRITTEN: u64 = 1 << 1;
const PRESENT: u64 = 1 << 3;
const SWAPPED: u64 = 1 << 4;
/// Category: the page is the zero page that all processes share.
const ZERO_PAGE: u64 = 1 << 5;

/// Scan flag: write-protect the matching pages.
pub(crate) const WP_MATCHING: u64 = 1;
/// Scan flag: fail with EPERM, instead of skipping, where the range is not registered for
/// asynchronous write-protection.
pub(crate) const CHECK_WPASYNC: u64 = 2;

// `_IOWR('f', 16, struct pm_scan_arg)`, which installed kernel headers may lack
const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;
/// The number of runs that one call returns: 12 KiB, which keeps the number of calls small for
/// scattered pages.
const RUNS: usize = 512;

/// `struct pm_scan_arg`.
#[derive(Default)]
#[repr(C)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `struct page_region`.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Run {
    start: u64,
    end: u64,
    categories: u64,
}

/// The criteria of a scan. A page matches if its categories, after inverting those in `inverted`,
/// have all of `all` and any of `any`.
#[derive(Clone, Copy, Default)]
pub(crate) struct Query {
    pub(crate) flags: u64,
    pub(crate) inverted: u64,
    pub(crate) all: u64,
    pub(crate) any: u64,
    /// The categories in which the pages of a run agree.
    pub(crate) reported: u64,
}

impl Query {
    /// Matches pages written since the last such scan, and write-protects them again. For memory
    /// whose page table entries stay (private memory).
    ///
    /// Empty entries do not match. The kernel would count them as written and fill them with
    /// markers. These look swapped out to [`Pagemap::populated`], and need page tables for all of
    /// RAM. Empty entries need no markers: a page that is populated later is unprotected, and so
    /// counts as written.
    pub(crate) fn written() -> Self {
        let flags = WP_MATCHING | CHECK_WPASYNC;
        Self { flags, all: WRITTEN, any: PRESENT | SWAPPED, reported: WRITTEN | PRESENT, ..Self::default() }
    }

    /// Matches pages written since the last such scan, for shared memory.
    ///
    /// When the kernel reclaims a written page of a file, it may remove the page's entry, and no
    /// trace of the write is left. So here empty entries count as written and get markers, and an
    /// entry that became empty since the last scan is reported. Pages that were never populated may
    /// match, too; the caller removes them by asking the file.
    pub(crate) fn written_conservative() -> Self {
        Self { any: 0, reported: WRITTEN, ..Self::written() }
    }
}

/// The file that [`Pagemap`] reads.
const PAGEMAP: &str = "/proc/self/pagemap";

/// The `/proc/self/pagemap` of this process.
pub(crate) struct Pagemap {
    file: File,
    can_scan: bool,
}

impl Pagemap {
    /// Opens the file.
    ///
    /// # Errors
    /// Fails with `NotFound` if `/proc` is not mounted, as in a jail, and with other errors of the
    /// file system.
    pub(crate) fn open() -> io::Result<Self> {
        Self::open_at(PAGEMAP)
    }

    /// Opens the file, for callers that can work without it. Returns `None` if `/proc` is not
    /// mounted or must not be read.
    pub(crate) fn open_if_any() -> io::Result<Option<Self>> {
        Self::open_if_at(PAGEMAP)
    }

    /// Opens the file at another path, like [`open_if_any`](Self::open_if_any).
    pub(crate) fn open_if_at(path: &str) -> io::Result<Option<Self>> {
        use io::ErrorKind::{NotADirectory, NotFound, PermissionDenied};
        match Self::open_at(path) {
            Ok(pagemap) => Ok(Some(pagemap)),
            Err(error) if matches!(error.kind(), NotFound | NotADirectory | PermissionDenied) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn open_at(path: &str) -> io::Result<Self> {
        let mut pagemap = Self { file: File::open(path)?, can_scan: true };
        // where the ioctl exists (Linux 6.7), an empty range is valid
        pagemap.can_scan = pagemap.scan(PAGE_SIZE as u64, 0, present(), |_, _| ()).is_ok();
        Ok(pagemap)
    }

    /// Returns whether the kernel has PAGEMAP_SCAN.
    pub(crate) fn can_scan(&self) -> bool {
        self.can_scan
    }

    /// Calls `found(start, end)` for runs of matching addresses in the `len` bytes at `start`.
    pub(crate) fn scan(&self, start: u64, len: u64, q: Query, mut found: impl FnMut(u64, u64)) -> io::Result<()> {
        let end = start.checked_add(len).ok_or(io::ErrorKind::InvalidInput)?;
        let mut runs = [Run::default(); RUNS];
        let mut at = start;
        loop {
            let mut arg = ScanArg {
                size: size_of::<ScanArg>() as u64,
                flags: q.flags,
                start: at,
                end,
                vec: runs.as_mut_ptr() as u64,
                vec_len: RUNS as u64,
                category_inverted: q.inverted,
                category_mask: q.all,
                category_anyof_mask: q.any,
                return_mask: q.reported,
                ..ScanArg::default()
            };
            // SAFETY: `arg` is a valid `pm_scan_arg` whose `vec` has room for `vec_len` runs. The
            // kernel writes only there. A write-protected page stays writable for the program,
            // because the kernel lifts the protection at the write.
            let n = unsafe { libc::ioctl(self.file.as_raw_fd(), PAGEMAP_SCAN, ptr::from_mut(&mut arg)) };
            let Ok(n) = usize::try_from(n) else {
                let error = io::Error::last_os_error();
                if matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN)) {
                    continue;
                }
                return Err(error);
            };
            let runs = &runs[..n.min(RUNS)];
            runs.iter().filter(|r| r.start < r.end).for_each(|r| found(r.start, r.end));
            // a call may stop early although there was room, so continue from where it stopped
            let reached = arg.walk_end.max(runs.last().map_or(0, |r| r.end));
            if reached >= end || at >= end {
                return Ok(());
            }
            if reached <= at {
                return Err(io::Error::other("PAGEMAP_SCAN makes no progress"));
            }
            at = reached;
        }
    }

    /// Calls `found(start, end)` for runs of addresses that have memory of their own, in RAM or
    /// swapped out.
    pub(crate) fn populated(&self, start: u64, len: u64, found: impl FnMut(u64, u64)) -> io::Result<()> {
        if self.can_scan {
            return self.scan(start, len, present(), found);
        }
        self.read_entries(start, len, 62, found)
    }

    /// Calls `found(start, end)` for runs of addresses that are mapped to memory in RAM.
    pub(crate) fn resident(&self, start: u64, len: u64, found: impl FnMut(u64, u64)) -> io::Result<()> {
        if self.can_scan {
            return self.scan(start, len, Query { any: PRESENT, ..present() }, found);
        }
        self.read_entries(start, len, 63, found)
    }

    /// Reads single entries, for kernels before Linux 6.7. A page matches if `bit` or a higher bit
    /// of its entry is set.
    fn read_entries(&self, start: u64, len: u64, bit: u32, mut found: impl FnMut(u64, u64)) -> io::Result<()> {
        // An entry has eight bytes: bit 63 means present, bit 62 swapped. The zero page cannot be
        // recognized and counts as memory.
        const WORDS: usize = 4096;
        let mut bytes = vec![0; WORDS * 8];
        let (mut page, end) = (start >> PAGE_SHIFT, (start + len) >> PAGE_SHIFT);
        while page < end {
            let words = WORDS.min((end - page) as usize);
            self.file.read_exact_at(&mut bytes[..words * 8], page * 8)?;
            for word in bytes[..words * 8].as_chunks::<8>().0 {
                if u64::from_ne_bytes(*word) >> bit != 0 {
                    found(page << PAGE_SHIFT, (page + 1) << PAGE_SHIFT);
                }
                page += 1;
            }
        }
        Ok(())
    }
}

fn present() -> Query {
    // pages that are present or swapped, except the zero page
    Query { inverted: ZERO_PAGE, all: ZERO_PAGE, any: PRESENT | SWAPPED, reported: PRESENT, ..Query::default() }
}

/// Calls `found(from, end)` for runs of bytes with data in the first `len` bytes of `file`. The
/// bounds are multiples of [`PAGE_SIZE`]. A file system without records of holes reports
/// everything.
pub(crate) fn data_extents(file: BorrowedFd<'_>, len: u64, mut found: impl FnMut(u64, u64)) -> io::Result<()> {
    let page = PAGE_SIZE as u64;
    let signed = |at: u64| i64::try_from(at).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput));
    let mut at = 0;
    while at < len {
        let data = match lseek(file, signed(at)?, Whence::SeekData) {
            Ok(data) => data as u64,
            Err(Errno::ENXIO) => break,
            Err(error) => return Err(error.into()),
        };
        if data >= len {
            break;
        }
        // if a hole is punched in between, SEEK_HOLE may return `data` itself
        let hole = lseek(file, signed(data)?, Whence::SeekHole)? as u64;
        let end = hole.max(data + 1).next_multiple_of(page).min(len);
        found(data / page * page, end);
        at = end;
    }
    Ok(())
}

/// Returns whether the mapping at `address` is shared with other mappings of a file. Returns `true`
/// if that is unknown.
pub(crate) fn is_shared(address: u64) -> io::Result<bool> {
    let maps = fs::read_to_string("/proc/self/maps")?;
    let found = maps.lines().find_map(|line| {
        let (range, rest) = line.split_once(' ')?;
        let (start, end) = range.split_once('-')?;
        let parse = |hex| u64::from_str_radix(hex, 16).ok();
        (parse(start)?..parse(end)?).contains(&address).then(|| rest.as_bytes().get(3) != Some(&b'p'))
    });
    Ok(found.unwrap_or(true))
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd as _;

    use migration_core::{GuestRam as _, PageRange, PageSet, RamLayout, RamRegion};

    use super::*;
    use crate::ram::{Backing, MappedRam, map};

    const PAGE: u64 = PAGE_SIZE as u64;

    fn ram(pages: u64, backing: Backing) -> MappedRam {
        MappedRam::new(RamLayout::new(vec![RamRegion { gpa: 0, len: pages * PAGE }]).unwrap(), backing).unwrap()
    }

    type Ask = fn(&Pagemap, u64, u64, &mut dyn FnMut(u64, u64)) -> io::Result<()>;
    const POPULATED: Ask = |pagemap, start, len, found| pagemap.populated(start, len, found);
    const RESIDENT: Ask = |pagemap, start, len, found| pagemap.resident(start, len, found);

    /// Returns the runs of page numbers that `ask` finds in `range` of the RAM.
    fn runs(pagemap: &Pagemap, ram: &MappedRam, range: PageRange, ask: Ask) -> Vec<PageRange> {
        let address = ram.host_address(0).as_ptr() as u64;
        let mut found = Vec::new();
        ask(pagemap, address + range.first * PAGE, range.bytes(), &mut |from, end| {
            assert!((from - address).is_multiple_of(PAGE) && end > from);
            found.push(PageRange::new((from - address) / PAGE, (end - from) / PAGE));
        })
        .unwrap();
        found
    }

    fn set(runs: &[PageRange], pages: u64) -> PageSet {
        let mut set = PageSet::empty(pages);
        runs.iter().for_each(|run| set.insert_range(*run));
        set
    }

    /// The entries are read in blocks of 4096 pages, so the RAM has more.
    #[test]
    fn a_scan_and_the_entries_find_the_same_pages() {
        const PAGES: u64 = 4096 + 9;
        let ram = ram(PAGES, Backing::Anonymous);
        let touched = [0, 3, 4, 5, 4095, 4096, 4098, PAGES - 1];
        touched.iter().for_each(|page| ram.write(page * PAGE + 7, &[1]).unwrap());
        let scanning = Pagemap::open().unwrap();
        assert!(scanning.can_scan());
        let reading = Pagemap { can_scan: false, ..Pagemap::open().unwrap() };
        let all = ram.layout().all();
        for ask in [POPULATED, RESIDENT] {
            for pagemap in [&scanning, &reading] {
                assert!(set(&runs(pagemap, &ram, all, ask), PAGES).iter().eq(touched));
                // a part of it
                let part = PageRange::new(4, 4094);
                assert!(set(&runs(pagemap, &ram, part, ask), PAGES).iter().eq([4, 5, 4095, 4096]));
                assert_eq!(runs(pagemap, &ram, PageRange::new(5, 0), ask), []);
            }
        }
        // the zero page of a page that was only read is no memory of its own; single entries do not
        // tell
        ram.read(9 * PAGE, &mut [0]).unwrap();
        let nine = PageRange::new(9, 1);
        assert_eq!(runs(&scanning, &ram, nine, POPULATED), []);
        assert_eq!(runs(&reading, &ram, nine, POPULATED), [nine]);
    }

    /// One call of the kernel returns 512 runs at most.
    #[test]
    fn a_scan_goes_on_until_all_runs_are_found() {
        const PAGES: u64 = 4 * RUNS as u64 + 1;
        let ram = ram(PAGES, Backing::Anonymous);
        let pagemap = Pagemap::open().unwrap();
        for touched in [2 * RUNS as u64 - 1, 2 * RUNS as u64, PAGES] {
            let expected: Vec<_> = (0..touched).step_by(2).map(|page| PageRange::new(page, 1)).collect();
            expected.iter().for_each(|run| ram.write(run.first * PAGE, &[1]).unwrap());
            assert_eq!(runs(&pagemap, &ram, ram.layout().all(), POPULATED), expected, "{touched}");
        }
        let error = pagemap.scan(u64::MAX - PAGE, 2 * PAGE, present(), |_, _| ()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn only_a_file_that_is_not_there_is_no_error() {
        assert!(Pagemap::open_if_at("/no/such/pagemap").unwrap().is_none());
        assert!(Pagemap::open_if_at("/dev/null/pagemap").unwrap().is_none());
        assert!(Pagemap::open_if_at(&format!("/{}", "x".repeat(300))).is_err());
        // a file without the ioctl
        assert!(!Pagemap::open_if_at("/dev/null").unwrap().unwrap().can_scan());
        assert!(Pagemap::open_if_any().unwrap().unwrap().can_scan());
    }

    #[test]
    fn extents_of_a_file_are_whole_pages_within_the_length() {
        let file = File::from(map::memory_file(10 * PAGE, false).unwrap());
        let extents = |len: u64| {
            let mut found = Vec::new();
            data_extents(file.as_fd(), len, |from, end| found.push((from, end))).unwrap();
            found
        };
        assert_eq!(extents(10 * PAGE), []);
        for page in [2, 5, 6, 9] {
            file.write_all_at(&[1], page * PAGE + 5).unwrap();
        }
        let [two, five, six, nine] = [2, 5, 6, 9].map(|page| page * PAGE);
        assert_eq!(extents(10 * PAGE), [(two, two + PAGE), (five, six + PAGE), (nine, nine + PAGE)]);
        // the length ends in a run, and where one begins
        assert_eq!(extents(six), [(two, two + PAGE), (five, six)]);
        assert_eq!(extents(five), [(two, two + PAGE)]);
        assert_eq!(extents(two), []);
        assert_eq!(extents(0), []);
        let pipe = io::pipe().unwrap().0;
        assert!(data_extents(pipe.as_fd(), PAGE, |_, _| ()).is_err());
    }

    #[test]
    fn mappings_of_files_are_shared() {
        let address = |ram: &MappedRam| ram.host_address(0).as_ptr() as u64;
        let (private, shared) = (ram(3, Backing::Anonymous), ram(3, Backing::Memfd));
        for page in 0..3 {
            assert!(!is_shared(address(&private) + page * PAGE).unwrap());
            assert!(is_shared(address(&shared) + page * PAGE).unwrap());
        }
        // nothing is mapped there
        assert!(is_shared(1).unwrap());
    }
}
