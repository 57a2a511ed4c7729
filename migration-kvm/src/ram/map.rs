//! The system calls for guest RAM.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd, OwnedFd},
    ptr::{self, NonNull},
};

use migration_core::{PAGE_SIZE, RamSlice};
use nix::{
    errno::Errno,
    fcntl::{FallocateFlags, FcntlArg, SealFlag, fallocate, fcntl},
    sys::{
        memfd::{MFdFlags, memfd_create},
        statfs::fstatfs,
    },
    unistd::ftruncate,
};

use super::HUGE_PAGE_SIZE;

/// A read-write memory mapping, which is unmapped when dropped.
pub(super) struct Mapping {
    address: NonNull<u8>,
    len: usize,
}

// SAFETY: only this object owns the mapping, and all access to it goes through raw addresses.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes. With `file` the mapping shares the file's memory from that offset on,
    /// otherwise it is private anonymous memory.
    ///
    /// The address is congruent to `gpa` modulo 2 MiB. Only then can KVM map a huge page of the
    /// host as a huge page of the guest.
    pub(super) fn new(len: u64, gpa: u64, file: Option<(BorrowedFd<'_>, u64)>) -> io::Result<Self> {
        let huge = HUGE_PAGE_SIZE as usize;
        let len = usize::try_from(len).map_err(|_| io::ErrorKind::OutOfMemory)?;
        let room = len.checked_add(huge).ok_or(io::ErrorKind::OutOfMemory)?;
        let reserve = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: the kernel chooses the address of the new mapping, so no existing mapping
        // changes.
        let base = unsafe { libc::mmap(ptr::null_mut(), room, libc::PROT_NONE, reserve, -1, 0) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let head = ((gpa % HUGE_PAGE_SIZE) as usize).wrapping_sub(base as usize) % huge;
        let (flags, fd, offset) = match file {
            Some((fd, offset)) => (libc::MAP_SHARED, fd.as_raw_fd(), offset),
            None => (reserve, -1, 0),
        };
        let offset = libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
        let address = base.wrapping_byte_add(head);
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: replaces `head..head + len` of the reservation just made (`head < huge`), which
        // nothing else uses.
        let mapped = unsafe { libc::mmap(address, len, prot, flags | libc::MAP_FIXED, fd, offset) };
        let failure = (mapped == libc::MAP_FAILED).then(io::Error::last_os_error);
        let unmap = |at: *mut libc::c_void, len: usize| {
            if len != 0 {
                // SAFETY: a part of the reservation made above, which nothing else uses.
                unsafe { libc::munmap(at, len) };
            }
        };
        match (failure, NonNull::new(address.cast::<u8>())) {
            (None, Some(address)) => {
                unmap(base, head);
                unmap(base.wrapping_byte_add(head + len), huge - head);
                Ok(Self { address, len })
            }
            (failure, _) => {
                unmap(base, room);
                Err(failure.unwrap_or_else(|| io::ErrorKind::OutOfMemory.into()))
            }
        }
    }

    pub(super) fn address(&self) -> NonNull<u8> {
        self.address
    }

    /// Calls `madvise` for a range of the mapping.
    ///
    /// # Errors
    /// Fails with `InvalidInput` if the range is not inside the mapping or not aligned to pages,
    /// and with the error of the system call.
    pub(super) fn advise(&self, offset: u64, len: u64, advice: Advice) -> io::Result<()> {
        let inside = offset.checked_add(len).is_some_and(|end| end <= self.len as u64);
        if !inside || !offset.is_multiple_of(PAGE_SIZE as u64) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // SAFETY: the range is inside this mapping, which stays for as long as `self` does, and to
        // which no Rust reference exists.
        advise(unsafe { RamSlice::new(self.address.add(offset as usize), len as usize) }, advice)
    }
}

/// Calls `madvise` for a piece of guest memory. Every kind of advice leaves the mapping in place.
pub(super) fn advise(memory: RamSlice<'_>, advice: Advice) -> io::Result<()> {
    loop {
        // SAFETY: the memory is mapped, as `RamSlice` promises. No kind of `Advice` unmaps memory.
        // What they do to its contents (`Drop` makes zeros) is a write to memory to which no Rust
        // reference exists.
        if unsafe { libc::madvise(memory.as_ptr().cast(), memory.len(), advice as libc::c_int) } == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if !matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN)) {
            return Err(error);
        }
    }
}

impl Mapping {
    /// Finds out which pages of a memory file are in memory, whether or not they are mapped here.
    /// `pages` has one byte for each page from `offset` on; its lowest bit is set if the page is in
    /// memory.
    ///
    /// # Errors
    /// Fails like [`advise`](Self::advise).
    pub(super) fn resident(&self, offset: u64, pages: &mut [u8]) -> io::Result<()> {
        let len = pages.len() as u64 * PAGE_SIZE as u64;
        let inside = offset.checked_add(len).is_some_and(|end| end <= self.len as u64);
        if !inside || !offset.is_multiple_of(PAGE_SIZE as u64) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let address = self.address.as_ptr().wrapping_add(offset as usize);
        // SAFETY: the range is inside this mapping, and `pages` has a byte for each of its pages.
        let done = unsafe { libc::mincore(address.cast(), len as usize, pages.as_mut_ptr()) };
        if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: `new` mapped this range, and it is unmapped only here.
        unsafe { libc::munmap(self.address.as_ptr().cast(), self.len) };
    }
}

#[derive(Clone, Copy, Debug)]
#[repr(i32)]
pub(super) enum Advice {
    HugePages = libc::MADV_HUGEPAGE,
    NoHugePages = libc::MADV_NOHUGEPAGE,
    DontDump = libc::MADV_DONTDUMP,
    Drop = libc::MADV_DONTNEED,
    PopulateRead = libc::MADV_POPULATE_READ,
    PopulateWrite = libc::MADV_POPULATE_WRITE,
    Collapse = libc::MADV_COLLAPSE,
}

/// Makes a memory file of `len` bytes whose length can never change. So a peer that holds the
/// descriptor cannot make this process die of SIGBUS.
pub(super) fn memory_file(len: u64, huge: bool) -> io::Result<OwnedFd> {
    let mut flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    if huge {
        flags |= MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB;
    }
    let file = memfd_create(c"guest-ram", flags)?;
    let len = i64::try_from(len).map_err(|_| io::ErrorKind::OutOfMemory)?;
    ftruncate(&file, len)?;
    let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
    Ok(file)
}

/// Returns whether a memory file is sealed against shrinking and growing, or `None` if it is no
/// memory file.
pub(super) fn is_sealed(file: BorrowedFd<'_>) -> io::Result<Option<bool>> {
    match fcntl(file, FcntlArg::F_GET_SEALS) {
        Ok(seals) => {
            let length = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW;
            Ok(Some(SealFlag::from_bits_retain(seals).contains(length)))
        }
        Err(Errno::EINVAL) => Ok(None),
        Err(other) => Err(other.into()),
    }
}

/// Returns the page size of a memory file in bytes.
pub(super) fn page_size(file: BorrowedFd<'_>) -> io::Result<u64> {
    let system = fstatfs(file)?;
    Ok(u64::try_from(system.block_size()).unwrap_or(0))
}

/// Frees `len` bytes of a memory file from `offset` on. They then read as zeros in every process
/// that maps the file.
pub(super) fn punch_hole(file: BorrowedFd<'_>, offset: u64, len: u64) -> io::Result<()> {
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    let bound = |n: u64| i64::try_from(n).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput));
    Ok(fallocate(file, flags, bound(offset)?, bound(len)?)?)
}

#[cfg(test)]
mod tests {
    use std::{
        fs::File,
        os::{fd::AsFd as _, unix::fs::FileExt as _},
    };

    use super::*;

    const PAGE: u64 = PAGE_SIZE as u64;

    /// The kernel would act on whatever is mapped behind a mapping.
    #[test]
    fn only_pages_of_the_mapping_are_touched() {
        let file = File::from(memory_file(4 * PAGE, false).unwrap());
        let mapping = Mapping::new(4 * PAGE, 0, Some((file.as_fd(), 0))).unwrap();
        mapping.advise(0, 4 * PAGE, Advice::DontDump).unwrap();
        mapping.advise(PAGE, 3 * PAGE, Advice::DontDump).unwrap();
        for (offset, len) in [(PAGE, 4 * PAGE), (4 * PAGE, PAGE), (u64::MAX, 2), (1, PAGE)] {
            let error = mapping.advise(offset, len, Advice::DontDump).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{offset} {len}");
        }
        file.write_all_at(&[1], 2 * PAGE).unwrap();
        let resident = |offset, pages: usize| {
            let mut found = vec![0; pages];
            mapping.resident(offset, &mut found).map(|()| found.iter().map(|byte| byte & 1).collect::<Vec<_>>())
        };
        assert_eq!(resident(0, 4).unwrap(), [0, 0, 1, 0]);
        assert_eq!(resident(2 * PAGE, 2).unwrap(), [1, 0]);
        for (offset, pages) in [(PAGE, 4), (4 * PAGE, 1), (u64::MAX, 1), (1, 1)] {
            assert_eq!(resident(offset, pages).unwrap_err().kind(), io::ErrorKind::InvalidInput, "{offset} {pages}");
        }
    }

    #[test]
    fn the_length_of_a_memory_file_is_final() {
        for (huge, page) in [(false, PAGE), (true, HUGE_PAGE_SIZE)] {
            let file = memory_file(2 * HUGE_PAGE_SIZE, huge).unwrap();
            assert_eq!(page_size(file.as_fd()).unwrap(), page);
            assert_eq!(is_sealed(file.as_fd()).unwrap(), Some(true));
            for len in [HUGE_PAGE_SIZE, 3 * HUGE_PAGE_SIZE] {
                assert_eq!(ftruncate(&file, len as i64), Err(Errno::EPERM));
            }
            assert_eq!(fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_WRITE)), Err(Errno::EPERM));
            let flags = fcntl(&file, FcntlArg::F_GETFD).unwrap();
            assert_eq!(flags, libc::FD_CLOEXEC);
        }
        // the file of a program, and a pipe, have no seals
        let program = File::open("/proc/self/exe").unwrap();
        assert_eq!(is_sealed(program.as_fd()).unwrap(), None);
        assert_eq!(is_sealed(io::pipe().unwrap().0.as_fd()).unwrap(), None);
    }

    #[test]
    fn a_hole_is_as_long_as_asked() {
        let file = File::from(memory_file(4 * PAGE, false).unwrap());
        file.write_all_at(&[1; 4 * PAGE_SIZE], 0).unwrap();
        punch_hole(file.as_fd(), PAGE, 2 * PAGE).unwrap();
        let mut bytes = [9; 4 * PAGE_SIZE];
        file.read_exact_at(&mut bytes, 0).unwrap();
        let pages: Vec<_> = bytes.chunks(PAGE_SIZE).map(|page| page[0]).collect();
        assert_eq!(pages, [1, 0, 0, 1]);
        assert!(punch_hole(file.as_fd(), u64::MAX, PAGE).is_err());
    }
}
