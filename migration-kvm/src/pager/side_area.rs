//! Where pages are that were taken out of the guest's reach.

use std::{io, os::fd::AsFd, sync::Arc, thread};

use migration_core::{GuestRam, PAGE_SHIFT, PAGE_SIZE, PageRange};
use nix::errno::Errno;

use super::{faults::Kind, pages::Pages};
use crate::{
    ram::{Backing, MappedRam, RamError},
    tracker::{
        Modes, UserFault, UserFaultError,
        uffd_api::{self, Progress},
    },
};

/// How often a move is repeated that the kernel could not do at the moment. The reasons, such as a
/// page that another thread has locked, pass within microseconds.
const ATTEMPTS: u32 = 200;

/// Pages that are out of the guest's reach, and whose content is still in memory.
///
/// Private pages are moved to the same place in a second mapping of the same size, which takes address
/// space only. Pages of a memory file are unmapped and stay in the file, where the pager's second
/// mapping reaches them. In both cases whoever touches the page raises a fault, and sleeps.
pub(super) struct SideArea {
    /// The second mapping, for private memory.
    private: Option<MappedRam>,
    fault: Arc<UserFault>,
}

/// Pages that were to be taken out of the guest's reach.
#[derive(Debug, Default)]
pub(super) struct Taken {
    /// Those that are out of reach.
    pub(super) runs: Vec<PageRange>,
    /// Why others have stayed where they are.
    pub(super) refused: Option<io::Error>,
}

impl SideArea {
    /// Returns an area for all of guest RAM.
    ///
    /// The area of private memory is registered with the same userfaultfd, because the kernel moves
    /// pages only into memory that is. It is registered for write-protection, of which no use is made:
    /// a registration for missing pages would make whoever reads an empty page of the area wait for
    /// ever.
    pub(super) fn new(pages: &Pages, fault: Arc<UserFault>) -> Result<Self, SideAreaError> {
        if pages.ram().backing().is_shared() {
            return Ok(Self { private: None, fault });
        }
        let area = MappedRam::new(pages.ram().layout().clone(), pages.ram().backing())?;
        let mut this = Self { private: None, fault };
        for index in 0..area.layout().regions().len() {
            let (address, len) = region(&area, index);
            this.fault.register(address, len, Modes::WRITE_PROTECT).inspect_err(|_| {
                // of those before, which are registered
                this.unregister(&area, index);
            })?;
        }
        this.private = Some(area);
        Ok(this)
    }

    fn unregister(&self, area: &MappedRam, regions: usize) {
        for index in 0..regions {
            let (address, len) = region(area, index);
            // the area is unmapped next, which ends the registration in the kernel as well
            let _ = self.fault.unregister(address, len, Modes::WRITE_PROTECT);
        }
    }

    /// Takes `range` out of the guest's reach. Pages that are not populated, or that the kernel or a
    /// device has in use, stay where they are.
    pub(super) fn take(&self, pages: &Pages, range: PageRange) -> Taken {
        let Some(area) = &self.private else {
            return match pages.ram().unmap(range) {
                Ok(()) => Taken { runs: vec![range], refused: None },
                Err(error) => Taken { runs: Vec::new(), refused: Some(io::Error::other(error)) },
            };
        };
        let mut taken = Taken::default();
        for (region, offset, piece) in pages.ram().layout().split(range) {
            let from = pages.ram().host_address(region).as_ptr() as u64 + offset;
            let to = area.host_address(region).as_ptr() as u64 + offset;
            self.move_all(piece, from, to, |outcome| match outcome {
                Moved::Pages(run) => {
                    taken.runs.push(run);
                    Ok(())
                }
                Moved::Stays(_, error) => {
                    taken.refused = Some(error.into());
                    Ok(())
                }
            })
            // the function above never fails
            .unwrap_or(());
        }
        taken
    }

    /// Maps `range` again, all of which is out of reach, and wakes whoever waits for it.
    ///
    /// # Errors
    /// What the kernel says, for example that memory is short. Pages that are not mapped again are
    /// still out of reach.
    pub(super) fn give_back(&self, pages: &Pages, range: PageRange) -> io::Result<()> {
        for (region, offset, piece) in pages.ram().layout().split(range) {
            let to = pages.ram().host_address(region).as_ptr() as u64 + offset;
            match &self.private {
                None => self.map_all(pages, piece, to)?,
                Some(area) => {
                    let from = area.host_address(region).as_ptr() as u64 + offset;
                    self.move_all(piece, from, to, |outcome| match outcome {
                        Moved::Pages(_) => Ok(()),
                        Moved::Stays(page, error) => {
                            let offset = (page - piece.first) << PAGE_SHIFT;
                            self.copy_back(area, page, from + offset, to + offset, error)
                        }
                    })?;
                }
            }
        }
        pages.wake(range)
    }

    /// Moves pages from one address to another, and reports what has become of them.
    fn move_all(
        &self,
        piece: PageRange,
        from: u64,
        to: u64,
        mut report: impl FnMut(Moved) -> io::Result<()>,
    ) -> io::Result<()> {
        let (mut done, mut attempts) = (0, 0);
        while done < piece.count {
            let offset = done << PAGE_SHIFT;
            let left = (piece.count - done) << PAGE_SHIFT;
            // SAFETY: both ranges are inside memory that is mapped for as long as it is borrowed here,
            // and to which nobody has a Rust reference. Guest RAM whose page is moved away raises a
            // fault, which the pager answers; the side area is read only where a page was moved to.
            let Progress { done: bytes, error } =
                unsafe { uffd_api::move_pages(self.fault.as_fd(), to + offset, from + offset, left) };
            let moved = PageRange::new(piece.first + done, bytes >> PAGE_SHIFT);
            if moved.count != 0 {
                attempts = 0;
                report(Moved::Pages(moved))?;
                done += moved.count;
                continue;
            }
            match error {
                Some(Errno::EAGAIN | Errno::EINTR) if attempts < ATTEMPTS => {
                    attempts += 1;
                    thread::yield_now();
                }
                error => {
                    attempts = 0;
                    report(Moved::Stays(moved.first, error.unwrap_or(Errno::EAGAIN)))?;
                    done += 1;
                }
            }
        }
        Ok(())
    }

    /// Copies one page back that cannot be moved.
    fn copy_back(&self, area: &MappedRam, page: u64, from: u64, to: u64, error: Errno) -> io::Result<()> {
        if error == Errno::ENOENT {
            return Err(io::Error::other(format!("page {page} is not where it was moved to")));
        }
        for _ in 0..ATTEMPTS {
            // SAFETY: `from` is a page of the side area, which is mapped for as long as it is borrowed,
            // and `to` is the same page of guest RAM, to which nobody has a Rust reference.
            let copied = unsafe { uffd_api::copy(self.fault.as_fd(), to, from, PAGE_SIZE as u64) };
            match copied.error {
                None | Some(Errno::EEXIST) => {
                    return area.discard(PageRange::new(page, 1)).map_err(io::Error::other);
                }
                Some(Errno::EAGAIN | Errno::EINTR) => thread::yield_now(),
                Some(error) => return Err(error.into()),
            }
        }
        Err(error.into())
    }

    /// Maps pages of a memory file that are in the file.
    fn map_all(&self, pages: &Pages, piece: PageRange, at: u64) -> io::Result<()> {
        let (mut done, mut attempts) = (0, 0);
        while done < piece.count {
            let offset = done << PAGE_SHIFT;
            // SAFETY: inside guest RAM, which is never borrowed.
            let progress =
                unsafe { uffd_api::map(self.fault.as_fd(), at + offset, (piece.count - done) << PAGE_SHIFT) };
            let mapped = progress.done >> PAGE_SHIFT;
            done += mapped;
            match progress.error {
                None => {}
                Some(_) if mapped != 0 => attempts = 0,
                Some(Errno::EEXIST) => done += 1,
                // a hole by now: somebody has discarded the page
                Some(Errno::EFAULT | Errno::ENOENT) => {
                    pages.answer(piece.first + done, Kind::Missing)?;
                    done += 1;
                }
                Some(Errno::EAGAIN | Errno::EINTR) if attempts < ATTEMPTS => {
                    attempts += 1;
                    thread::yield_now();
                }
                Some(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Copies what `page` holds, which is out of reach.
    pub(super) fn copy(&self, pages: &Pages, page: u64, into: &mut [u8]) -> io::Result<()> {
        let memory = self.private.as_ref().or(pages.alias()).ok_or(io::ErrorKind::NotFound)?;
        memory.slice(PageRange::new(page, 1)).map_err(io::Error::other)?.copy_to(into);
        Ok(())
    }

    /// Frees the memory of `range`, all of which is out of reach.
    pub(super) fn discard(&self, pages: &Pages, range: PageRange) -> Result<(), RamError> {
        match &self.private {
            Some(area) => area.discard(range),
            None => pages.ram().discard(range),
        }
    }
}

/// What has become of pages that were to be moved.
enum Moved {
    Pages(PageRange),
    Stays(u64, Errno),
}

/// Why there is no side area.
#[derive(Debug, thiserror::Error)]
pub(super) enum SideAreaError {
    #[error(transparent)]
    Ram(#[from] RamError),
    #[error(transparent)]
    Fault(#[from] UserFaultError),
}

/// Host address and length in bytes of region `index`.
fn region(area: &MappedRam, index: usize) -> (u64, u64) {
    (area.host_address(index).as_ptr() as u64, area.layout().regions()[index].len)
}

impl Drop for SideArea {
    fn drop(&mut self) {
        if let Some(area) = self.private.take() {
            self.unregister(&area, area.layout().regions().len());
        }
    }
}

/// Returns whether pages of this backing can be taken out of the guest's reach.
pub(super) fn can_evict(backing: Backing) -> bool {
    backing != Backing::Hugetlb
}
