//! What the kernel's page tables say about a range of this process's memory.

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

/// Written since it was last write-protected (asynchronously).
pub(crate) const WRITTEN: u64 = 1 << 1;
const PRESENT: u64 = 1 << 3;
const SWAPPED: u64 = 1 << 4;
/// Maps the page of zeros that all processes share.
const ZERO_PAGE: u64 = 1 << 5;

/// Write-protect what matches.
pub(crate) const WP_MATCHING: u64 = 1;
/// Fail with EPERM where the range is not registered for asynchronous write-protection, instead of skipping it.
pub(crate) const CHECK_WPASYNC: u64 = 2;

// `_IOWR('f', 16, struct pm_scan_arg)`; installed headers are older than the kernels that have it
const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;
/// Runs of pages taken over from the kernel at once: 12 KiB, and few enough calls for scattered pages.
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

/// What a scan looks for: pages whose categories, after flipping `inverted`, have all of `all` and any of `any`.
#[derive(Clone, Copy, Default)]
pub(crate) struct Query {
    pub(crate) flags: u64,
    pub(crate) inverted: u64,
    pub(crate) all: u64,
    pub(crate) any: u64,
    /// Runs differ where these categories differ.
    pub(crate) reported: u64,
}

impl Query {
    /// Pages written since the last such scan; they are write-protected again. For memory whose page table entries
    /// stay (private memory). Entries that are empty do not match: the kernel would count them as written
    /// and fill them with markers, which look swapped out to [`Pagemap::populated`] and take page tables for all of RAM.
    /// They need none: what is populated later comes unprotected, and so counts as written.
    pub(crate) fn written() -> Self {
        let flags = WP_MATCHING | CHECK_WPASYNC;
        Self { flags, all: WRITTEN, any: PRESENT | SWAPPED, reported: WRITTEN | PRESENT, ..Self::default() }
    }

    /// The same for shared memory. The kernel may take the page table entry of a written page of a file away (when it
    /// reclaims the page), and no trace stays of the write. So here empty entries count as written, and get markers;
    /// an entry that became empty since is reported. The price is that never populated pages may match too, which
    /// the caller sorts out by asking the file.
    pub(crate) fn written_conservative() -> Self {
        Self { any: 0, reported: WRITTEN, ..Self::written() }
    }
}

/// What [`Pagemap`] reads.
const PAGEMAP: &str = "/proc/self/pagemap";

/// This process's `/proc/self/pagemap`.
pub(crate) struct Pagemap {
    file: File,
    can_scan: bool,
}

impl Pagemap {
    /// # Errors
    /// `NotFound` where `/proc` is not mounted, as in a jail; what the file system says.
    pub(crate) fn open() -> io::Result<Self> {
        Self::open_at(PAGEMAP)
    }

    /// As [`open`](Self::open), for what can do without: `None` where `/proc` is not mounted, or
    /// may not be read.
    pub(crate) fn open_if_any() -> io::Result<Option<Self>> {
        Self::open_if_at(PAGEMAP)
    }

    /// As [`open_if_any`](Self::open_if_any), at another path.
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
        // an empty range is valid where the ioctl exists (Linux 6.7)
        pagemap.can_scan = pagemap.scan(PAGE_SIZE as u64, 0, present(), |_, _| ()).is_ok();
        Ok(pagemap)
    }

    /// Whether the kernel has PAGEMAP_SCAN.
    pub(crate) fn can_scan(&self) -> bool {
        self.can_scan
    }

    /// Calls `found(start, end)` for runs of addresses among the `len` bytes at `start` that match.
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
            // SAFETY: `arg` is a valid `pm_scan_arg` whose `vec` has room for `vec_len` runs; the kernel writes only
            // there, and a write-protected page stays writable for the program (the kernel lifts it on the write).
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
            // a call may stop early although there was room: go on from where it stopped
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

    /// Calls `found(start, end)` for runs of addresses that have memory of their own, in RAM or swapped out.
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

    /// The same by reading the entries, for kernels before Linux 6.7: a page matches when a bit from `bit` up is set.
    fn read_entries(&self, start: u64, len: u64, bit: u32, mut found: impl FnMut(u64, u64)) -> io::Result<()> {
        // eight bytes a page, bit 63 present, bit 62 swapped. They cannot tell the page of zeros, which then counts.
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
    // matches pages that are not the page of zeros, and present or swapped
    Query { inverted: ZERO_PAGE, all: ZERO_PAGE, any: PRESENT | SWAPPED, reported: PRESENT, ..Query::default() }
}

/// Calls `found(from, end)` for runs of bytes that hold data in the first `len` bytes of `file`, as multiples of
/// [`PAGE_SIZE`]. A file system that keeps no record reports everything.
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
        // a hole punched in between may make the hole come first
        let hole = lseek(file, signed(data)?, Whence::SeekHole)? as u64;
        let end = hole.max(data + 1).next_multiple_of(page).min(len);
        found(data / page * page, end);
        at = end;
    }
    Ok(())
}

/// Whether the mapping at `address` is shared with other mappings of a file. `true` when nobody can tell.
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
