//! What the kernel is asked to do with ranges of guest RAM.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd},
    sync::Arc,
    thread,
};

use migration_core::{GuestRam, PAGE_SHIFT, PAGE_SIZE, PageRange, RamSlice, shared_map::Claim};
use nix::errno::Errno;

use super::{GRANULE, HUGE_BLOCK, faults::Kind, staging::Staging};
use crate::{
    ram::{BackedRam, Backing, HUGE_PAGE_SIZE, MappedRam, RamError},
    tracker::{
        UserFault,
        uffd_api::{self, Progress},
    },
};

/// A page of zeros to copy from.
#[repr(align(4096))]
struct Zeros([u8; PAGE_SIZE]);

static ZEROS: Zeros = Zeros([0; PAGE_SIZE]);

/// Guest RAM, with what it takes to install pages of it.
pub(super) struct Pages {
    ram: BackedRam,
    /// The same memory once more, for shared backings: what is written there shows up only when it
    /// is mapped.
    alias: Option<MappedRam>,
    fault: Arc<UserFault>,
}

impl Pages {
    pub(super) fn new(ram: BackedRam, fault: Arc<UserFault>) -> Result<Self, RamError> {
        let alias = ram.alias()?;
        Ok(Self { ram, alias, fault })
    }

    pub(super) fn ram(&self) -> &BackedRam {
        &self.ram
    }

    pub(super) fn fault(&self) -> &UserFault {
        &self.fault
    }

    pub(super) fn shared_fault(&self) -> Arc<UserFault> {
        self.fault.clone()
    }

    /// Returns the second mapping of shared memory.
    pub(super) fn alias(&self) -> Option<&MappedRam> {
        self.alias.as_ref()
    }

    pub(super) fn block_pages(&self) -> u64 {
        if self.ram.backing() == Backing::Hugetlb { HUGE_BLOCK } else { GRANULE }
    }

    /// Frees what `range` holds. (Also hidden contents of shared memory that were never mapped.)
    pub(super) fn drop_contents(&self, range: PageRange) -> Result<(), RamError> {
        // A hole in hugetlb memory would give its page back to everybody's reserve. To unmap it is
        // enough: it is mapped again only when it was overwritten. Kernels before 5.18 cannot.
        if self.ram.backing() == Backing::Hugetlb && self.ram.unmap(range).is_ok() {
            return Ok(());
        }
        self.ram.discard(range)
    }

    /// The pages of `range` as they will be, to be filled before [`map`](Self::map); `None` for
    /// private memory, or when there is no memory for them.
    pub(super) fn hidden(&self, range: PageRange) -> Option<Vec<RamSlice<'_>>> {
        let alias = self.alias.as_ref()?;
        // taking the memory now makes lack of it an error, not a signal; and it is one call for all
        // pages
        alias.prefault(range).ok()?;
        self.ram.layout().split(range).map(|(_, _, piece)| alias.slice(piece).ok()).collect()
    }

    /// Maps `run`, whose pages the file has. Returns how many were mapped already.
    pub(super) fn map(&self, run: PageRange, claim: &mut Claim<'_>) -> io::Result<u64> {
        // SAFETY: inside guest RAM, which is never borrowed.
        self.each(run, claim, |at, left| unsafe { uffd_api::map(self.fd(), at, left.bytes()) }, |_| Ok(true))
    }

    /// Installs `run` with the contents of `from`, whose first byte belongs to page `first`.
    /// Returns how many were there already.
    pub(super) fn install(
        &self,
        run: PageRange,
        from: &Staging<'_>,
        first: u64,
        claim: &mut Claim<'_>,
    ) -> io::Result<u64> {
        let source = |part: PageRange| from.slice(PageRange::new(part.first - first, part.count));
        if self.alias.is_some() {
            let hidden = self.hidden(run).ok_or(io::ErrorKind::OutOfMemory)?;
            let mut from = source(run)?;
            let mut page = [0; PAGE_SIZE];
            for to in hidden {
                let mut to = to;
                while !to.is_empty() {
                    from.take(PAGE_SIZE).copy_to(&mut page);
                    to.take(PAGE_SIZE).copy_from(&page);
                    (from, to) = (from.skip(PAGE_SIZE), to.skip(PAGE_SIZE));
                }
            }
            return self.map(run, claim);
        }
        source(run)?; // `run` lies inside the buffer
        let copy = |at, left: PageRange| match source(left) {
            // SAFETY: `source` lies inside the buffer, which stays mapped for as long as `from` is
            // borrowed; `at` names `left` in guest RAM, which is never borrowed.
            Ok(source) => unsafe { uffd_api::copy(self.fd(), at, source.as_ptr() as u64, left.bytes()) },
            Err(_) => Progress { done: 0, error: Some(Errno::EINVAL) },
        };
        self.each(run, claim, copy, |_| Ok(true))
    }

    /// Whether `range` could be one huge page of the host.
    pub(super) fn is_huge_block(&self, range: PageRange) -> bool {
        let piece = self.ram.layout().split(range).next();
        piece.is_some_and(|(region, offset, piece)| {
            let address = self.ram.host_address(region).as_ptr() as u64 + offset;
            piece.bytes() == HUGE_PAGE_SIZE && address.is_multiple_of(HUGE_PAGE_SIZE)
        })
    }

    /// Installs `block`, which [is a huge block](Self::is_huge_block), with the memory of `from`
    /// itself. Returns how many pages went so; for the others it was not possible, and `from` has
    /// their contents still.
    pub(super) fn take_huge(&self, block: PageRange, from: &Staging<'_>, claim: &mut Claim<'_>) -> io::Result<u64> {
        let source = from.slice(PageRange::new(0, block.count))?;
        let Some((region, offset, piece)) = self.ram.layout().split(block).next() else { return Ok(0) };
        let to = self.ram.host_address(region).as_ptr() as u64 + offset;
        // SAFETY: both lie inside memory that is mapped for as long as it is borrowed here, and
        // which nobody has a reference to. The buffer is this thread's, and reads as zeros where it
        // is taken away.
        let progress = unsafe { uffd_api::move_pages(self.fd(), to, source.as_ptr() as u64, piece.bytes()) };
        let moved = progress.done >> PAGE_SHIFT;
        claim.installed(PageRange::new(block.first, moved));
        Ok(moved)
    }

    /// Installs `run` as zeros. Returns how many were there already.
    pub(super) fn zero(&self, run: PageRange, claim: &mut Claim<'_>) -> io::Result<u64> {
        if self.ram.backing() != Backing::Hugetlb {
            return self.each(
                run,
                claim,
                // SAFETY: inside guest RAM, which is never borrowed.
                |at, left| unsafe { uffd_api::zero(self.fd(), at, left.bytes()) },
                |page| self.zero_by_hand(page),
            );
        }
        let (mut already, step) = (0, self.block_pages());
        for first in run.pages().step_by(step as usize) {
            let block = PageRange::new(first, step);
            if self.zero_by_hand(block)? {
                already += step;
            }
            claim.installed(block);
        }
        Ok(already)
    }

    /// Zeros for a block that the kernel has no zeros for: hugetlb; what an installation that
    /// failed left behind in the file; or a write-protecting tracker's marker in the page table,
    /// which counts as a page there. Whether it was there already.
    fn zero_by_hand(&self, block: PageRange) -> io::Result<bool> {
        let address = self.address(block.first)?;
        loop {
            let progress = if self.alias.is_some() {
                self.hidden(block).ok_or(io::ErrorKind::OutOfMemory)?.into_iter().for_each(RamSlice::zero);
                // SAFETY: inside guest RAM, which is never borrowed.
                unsafe { uffd_api::map(self.fd(), address, block.bytes()) }
            } else {
                // SAFETY: as above; the source is a static, of the length of a page, which is the
                // block_pages here.
                unsafe { uffd_api::copy(self.fd(), address, ZEROS.0.as_ptr() as u64, block.bytes()) }
            };
            match progress.error {
                None => return Ok(false),
                Some(Errno::EEXIST) => return Ok(true),
                Some(Errno::EAGAIN | Errno::EINTR) => thread::yield_now(),
                Some(error) => return Err(error.into()),
            }
        }
    }

    /// Lets somebody go on who touched `page`, which is not missing: it was never populated, was
    /// discarded, or is in the file but not mapped here. What it holds stays; and if it is there by
    /// now, the toucher is woken.
    pub(super) fn answer(&self, page: u64, kind: Kind) -> io::Result<()> {
        let block = PageRange::new(page - page % self.block_pages(), self.block_pages());
        let (fd, at, len) = (self.fd(), self.address(block.first)?, block.bytes());
        // SAFETY: inside guest RAM, which is never borrowed; a page that has contents is not
        // changed.
        let map = || unsafe { uffd_api::map(fd, at, len) };
        // SAFETY: as above.
        let zero = || unsafe { uffd_api::zero(fd, at, len) };
        // SAFETY: as above; used where a block is one page, the length of the static.
        let copy_zeros = || unsafe { uffd_api::copy(fd, at, ZEROS.0.as_ptr() as u64, len) };
        let attempts: [&dyn Fn() -> Progress; 2] = match (self.ram.backing(), kind) {
            (Backing::Anonymous | Backing::TransparentHuge, _) => [&zero, &copy_zeros],
            (Backing::Memfd, Kind::Minor) => [&map, &zero],
            (Backing::Memfd, _) => [&zero, &map],
            (Backing::Hugetlb, _) => {
                if let Some(alias) = &self.alias {
                    alias.prefault(block).map_err(io::Error::other)?;
                }
                [&map, &map]
            }
        };
        let mut result = Ok(());
        for attempt in attempts {
            match attempt().error {
                None => return Ok(()),
                // somebody was faster, or it changed meanwhile: who touched it sees
                Some(Errno::EEXIST | Errno::EFAULT | Errno::EAGAIN | Errno::EINTR | Errno::ENOENT) => {}
                Some(error) => result = Err(error.into()),
            }
        }
        self.wake(block)?;
        result
    }

    /// Wakes who sleeps for a page of `range`.
    pub(super) fn wake(&self, range: PageRange) -> io::Result<()> {
        for (region, offset, piece) in self.ram.layout().split(range) {
            let address = self.ram.host_address(region).as_ptr() as u64 + offset;
            uffd_api::wake(self.fd(), address, piece.bytes())?;
        }
        Ok(())
    }

    /// The page at host address `address`; `None` outside guest RAM.
    pub(super) fn page_at(&self, address: u64) -> Option<u64> {
        let layout = self.ram.layout();
        (0..layout.regions().len()).find_map(|index| {
            let (start, pages) = (self.ram.host_address(index).as_ptr() as u64, layout.region_pages(index)?);
            let offset = address.checked_sub(start).filter(|&offset| offset < pages.bytes())?;
            Some(pages.first + (offset >> PAGE_SHIFT))
        })
    }

    fn address(&self, page: u64) -> io::Result<u64> {
        let (region, offset) = self.ram.layout().locate(page).ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.ram.host_address(region).as_ptr() as u64 + offset)
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.fault.as_fd()
    }

    /// Carries a request through `run`: the kernel may do it in parts, and stops at a page that is
    /// there already. `exists` says of such a page (or huge page) whether that is so. What is there
    /// is noted in `claim`, also when the request fails on the way. Returns how many pages were
    /// there already.
    fn each(
        &self,
        run: PageRange,
        claim: &mut Claim<'_>,
        request: impl Fn(u64, PageRange) -> Progress,
        exists: impl Fn(PageRange) -> io::Result<bool>,
    ) -> io::Result<u64> {
        let mut already = 0;
        for (_, _, piece) in self.ram.layout().split(run) {
            let address = self.address(piece.first)?;
            let mut done = 0;
            while done < piece.count {
                let left = PageRange::new(piece.first + done, piece.count - done);
                let progress = request(address + (done << PAGE_SHIFT), left);
                let mut part = PageRange::new(left.first, progress.done >> PAGE_SHIFT);
                claim.installed(part);
                match progress.error {
                    None | Some(Errno::EINTR) => {}
                    Some(Errno::EAGAIN) if part.count == 0 => thread::yield_now(),
                    // it came so far, and says why not farther when it is asked again
                    Some(_) if part.count != 0 => {}
                    Some(Errno::EEXIST) => {
                        part.count = self.block_pages();
                        if exists(part)? {
                            already += part.count;
                        }
                        claim.installed(part);
                    }
                    Some(error) => return Err(error.into()),
                }
                done += part.count;
            }
        }
        Ok(already)
    }
}
