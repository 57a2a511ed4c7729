//! The interface to the host's means of loading missing pages on demand, which post-copy needs.
//! migration-kvm implements it with userfaultfd.
//!
//! A pager is *armed* with the map of the VM's pages before any state is loaded. From then on, a
//! thread that touches a missing page (a vCPU, KVM itself, a thread of the VMM) sleeps until the
//! page is installed. A page is installed as a whole, so no thread reads half a page or zeros that
//! the page did not hold.

use std::{io, sync::Arc, time::Duration};

use super::{page::PageRange, page_map::PageCopy, ram::RamSlice, shared_map::SharedPageMap};
use crate::vm_error::VmError;

/// The report that a thread has touched a missing page and sleeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Fault {
    /// The number of the page.
    pub page: u64,
    /// The operating system's number of the thread, if it is known. A VMM finds the waiting vCPU
    /// with it.
    pub thread: Option<u32>,
}

/// The result of installing pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Installed {
    /// The number of pages that this call has installed.
    pub pages: u64,
    /// The number of pages that were installed before. Their contents are unchanged.
    pub duplicates: u64,
}

/// A function that reads the contents of pages into the memory that the pager passes. A pager calls
/// it at most once.
pub type Fill<'a> = &'a mut dyn FnMut(&[RamSlice<'_>]) -> io::Result<()>;

/// Installs the missing pages of one VM's RAM. Several threads use it at once.
pub trait Pager: Send + Sync {
    /// Returns the number of pages that must be installed together, in aligned blocks: 1, or 512 if
    /// RAM consists of huge pages that the host cannot split (hugetlb).
    fn block_pages(&self) -> u64;

    /// Drops the present contents of the pages that are missing in `map`, and begins to report
    /// faults on them. The missing pages form whole blocks of [`block_pages`](Self::block_pages)
    /// pages. Other pages are not touched. The pager keeps the map, and takes a
    /// [claim](SharedPageMap::claim) in it whenever it installs a page.
    ///
    /// # Errors
    /// Returns an error if the host does not permit it. The error names the missing right.
    fn arm(&self, map: &Arc<SharedPageMap>) -> Result<(), VmError>;

    /// Waits for faults and appends them to `faults`. Appends none if `timeout` passes or
    /// [`wake_waiters`](Self::wake_waiters) is called. A page can be reported again, for other
    /// threads, until it is installed.
    ///
    /// # Errors
    /// Returns an error only if the pager does not work any more.
    fn wait(&self, timeout: Duration, faults: &mut Vec<Fault>) -> Result<(), VmError>;

    /// Makes all calls of [`wait`](Self::wait) return, now and in future, so that the threads that
    /// call it can end.
    fn wake_waiters(&self);

    /// Installs `range` and wakes the threads that wait for it. `range` is whole blocks within one
    /// aligned stretch of 512 pages. `fill` reads the contents. `copy` says where the contents come
    /// from, and the [claim](SharedPageMap::claim) is for that copy. Pages that were installed
    /// before, or whose newest content is elsewhere, are not touched. `fill` is called for them
    /// too, because their contents may have to be read from a lane.
    ///
    /// # Errors
    /// Returns an error of `fill`, or of the host, for example if memory is short. Nothing is
    /// installed then. The pages are still missing, and the caller can try again.
    fn install(&self, range: PageRange, copy: PageCopy, fill: Fill<'_>) -> io::Result<Installed>;

    /// Installs `range`, any number of whole blocks, as zeros. Otherwise like
    /// [`install`](Self::install).
    ///
    /// # Errors
    /// Returns the host's error.
    fn install_zeros(&self, range: PageRange) -> io::Result<Installed>;

    /// Wakes the threads that wait for `page`. Used if the page was installed before their fault
    /// was read.
    ///
    /// # Errors
    /// Returns the host's error.
    fn wake(&self, page: u64) -> io::Result<()>;

    /// Joins small pages into huge pages, where the host can. Called once, after
    /// [`disarm`](Self::disarm), on a thread that nothing waits for, because the call may take
    /// long. Does nothing by default.
    fn collapse_huge_pages(&self) {}

    /// Ends the reports. Called when no page is missing.
    ///
    /// # Errors
    /// Returns the host's error.
    fn disarm(&self) -> Result<(), VmError>;

    /// Wakes all threads that wait for missing pages. Called when the VM is given up before it ran,
    /// so that its pages will not arrive. A thread that loads the state may be one of them; the
    /// content that it then reads does not matter. Never called once the VM may have started.
    fn give_up(&self);
}
