//! Serving the pages that a VM misses where it runs: what post-copy needs of the host.
//! migration-kvm implements it over userfaultfd.
//!
//! A pager is *armed* with the map of the VM's pages before any state is loaded. From then on
//! whoever touches a page that is missing there (a vCPU, KVM itself, a thread of the VMM) sleeps
//! until it is installed: whole, at once, so that nobody ever reads half a page, and never as zeros
//! that it did not hold.

use std::{io, sync::Arc, time::Duration};

use super::{page::PageRange, page_map::PageCopy, ram::RamSlice, shared_map::SharedPageMap};
use crate::vm_error::VmError;

/// Somebody touched a missing page, and sleeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Fault {
    /// The page.
    pub page: u64,
    /// The operating system's number of the thread that touched it, where that is known. A VMM
    /// tells by it which vCPU waits.
    pub thread: Option<u32>,
}

/// What became of pages that were to be installed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Installed {
    /// Pages that are there now because of this call.
    pub pages: u64,
    /// Pages that were there already; their contents are untouched.
    pub duplicates: u64,
}

/// Reads the contents of pages into memory that the pager names; called at most once.
pub type Fill<'a> = &'a mut dyn FnMut(&[RamSlice<'_>]) -> io::Result<()>;

/// Makes missing pages of one VM's RAM appear. Used by several threads at once.
pub trait Pager: Send + Sync {
    /// Pages are installed in blocks of so many, aligned in RAM's numbering of pages: 1, or 512
    /// where RAM consists of huge pages that the host cannot split (hugetlb).
    fn block_pages(&self) -> u64;

    /// Drops what the pages that are missing in `map` hold now, and begins to watch them. They are
    /// whole blocks of [`block_pages`](Self::block_pages) pages. Pages that are not missing are not
    /// touched. The pager keeps the map, and has a [claim](SharedPageMap::claim) in it whenever it
    /// installs a page.
    ///
    /// # Errors
    /// When the host does not permit it, saying which right is missing.
    fn arm(&self, map: &Arc<SharedPageMap>) -> Result<(), VmError>;

    /// Waits for faults, and appends those that have come to `faults`: one or more, or none when
    /// `timeout` passed or [`wake_waiters`](Self::wake_waiters) was called. The same page may be
    /// reported again, by other threads, until it is installed.
    ///
    /// # Errors
    /// Only when the pager is broken.
    fn wait(&self, timeout: Duration, faults: &mut Vec<Fault>) -> Result<(), VmError>;

    /// Makes calls of [`wait`](Self::wait) return, now and in future, to end the threads that call
    /// it.
    fn wake_waiters(&self);

    /// Installs `range`, whole blocks within one aligned stretch of 512 pages, whose contents
    /// `fill` reads, and wakes who sleeps for them. `copy` says where the contents come from, and
    /// the [claim](SharedPageMap::claim) is for it. Pages that were installed before, or whose
    /// newest content is elsewhere, are not touched (`fill` is called all the same: the contents
    /// may be on a lane, and have to be taken from it).
    ///
    /// # Errors
    /// An error of `fill` is passed on, and nothing is installed then. Else what the host says, for
    /// example that memory is short: the pages are still missing and can be tried again.
    fn install(&self, range: PageRange, copy: PageCopy, fill: Fill<'_>) -> io::Result<Installed>;

    /// Installs `range`, whole blocks of any number, as zeros: the source has sent nothing else. As
    /// [`install`](Self::install) else.
    ///
    /// # Errors
    /// What the host says.
    fn install_zeros(&self, range: PageRange) -> io::Result<Installed>;

    /// Wakes who sleeps for `page` although it is installed (its fault was read after that).
    ///
    /// # Errors
    /// What the host says.
    fn wake(&self, page: u64) -> io::Result<()>;

    /// Brings memory into its best shape when the watch has ended, for example makes huge pages of
    /// small ones. May take a while; does nothing by default. Called once, on a thread that nobody
    /// waits for.
    fn collapse_huge_pages(&self) {}

    /// Ends the watch, once no page is missing.
    ///
    /// # Errors
    /// What the host says.
    fn disarm(&self) -> Result<(), VmError>;

    /// The VM is given up before it ran, and its missing pages will not come: wakes whoever sleeps
    /// for one, for example a thread that loads the state. What it reads then does not matter.
    /// Never called once the VM may have started.
    fn give_up(&self);
}
