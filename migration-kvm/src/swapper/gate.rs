//! Keeps pages from coming back while a VM is paused.

use std::{
    io,
    sync::{Arc, PoisonError, RwLock, RwLockReadGuard},
    time::Duration,
};

use migration_core::{
    PageRange,
    page_map::PageCopy,
    pager::{Fault, Fill, Installed, Pager},
    shared_map::SharedPageMap,
    vm::VmError,
};

use crate::pager::UserFaultPager;

/// A pager that installs nothing while it is shut. So nobody has to wait in the pause until a store
/// has answered: what it answers is fetched again afterwards.
pub(super) struct Gate {
    pager: Arc<UserFaultPager>,
    shut: RwLock<bool>,
}

impl Gate {
    pub(super) fn new(pager: Arc<UserFaultPager>) -> Self {
        Self { pager, shut: RwLock::new(false) }
    }

    /// Shuts or opens the gate. Waits for installations that are under way, which no store delays.
    pub(super) fn set_shut(&self, shut: bool) {
        *self.shut.write().unwrap_or_else(PoisonError::into_inner) = shut;
    }

    pub(super) fn is_shut(&self) -> bool {
        *self.shut.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns what keeps the gate open, or an error if it is shut.
    fn pass(&self) -> io::Result<RwLockReadGuard<'_, bool>> {
        let shut = self.shut.read().unwrap_or_else(PoisonError::into_inner);
        if *shut {
            Err(io::Error::other("no page comes back while the VM is paused for a migration"))
        } else {
            Ok(shut)
        }
    }
}

impl Pager for Gate {
    fn block_pages(&self) -> u64 {
        self.pager.block_pages()
    }

    fn arm(&self, map: &Arc<SharedPageMap>) -> Result<(), VmError> {
        self.pager.arm(map)
    }

    fn wait(&self, timeout: Duration, faults: &mut Vec<Fault>) -> Result<(), VmError> {
        self.pager.wait(timeout, faults)
    }

    fn wake_waiters(&self) {
        self.pager.wake_waiters();
    }

    fn install(&self, range: PageRange, copy: PageCopy, fill: Fill<'_>) -> io::Result<Installed> {
        let _open = self.pass()?;
        self.pager.install(range, copy, fill)
    }

    fn install_zeros(&self, range: PageRange) -> io::Result<Installed> {
        let _open = self.pass()?;
        self.pager.install_zeros(range)
    }

    fn wake(&self, page: u64) -> io::Result<()> {
        self.pager.wake(page)
    }

    fn collapse_huge_pages(&self) {
        self.pager.collapse_huge_pages();
    }

    fn disarm(&self) -> Result<(), VmError> {
        self.pager.disarm()
    }

    fn give_up(&self) {
        self.pager.give_up();
    }
}
