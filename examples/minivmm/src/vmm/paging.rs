//! Cold pages of a machine that is at home here. They are in page stores until the guest touches
//! them.

use std::{
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use migration_core::{
    GuestRam, PageRange, PageSet,
    spawner::GuestImpact,
    store::{Owner, PageStore},
    text::{Chain, describe},
    working_set::ResidentLimit,
};
use migration_crypto::random_namespace;
use migration_kvm::{
    ram::BackedRam,
    spawner::LinuxSpawner,
    swapper::{Held, PagingStatus, ReferenceKind, Swapper, SwapperOptions, SwapperParts, SwapperThreads},
    tracker::UserFault,
};

use super::{
    Machine, MachineError,
    machine::{BOARD, machine_error},
};
use crate::vm::GuestError;

/// The longest time for which pages are read back after the limit was removed. A page that is not
/// back by then is read when the guest touches it.
const BRING_BACK: Duration = Duration::from_secs(600);

/// The destination of a machine's cold pages.
pub(crate) struct ColdPages {
    /// The stores. Every page goes into each of them.
    pub(crate) stores: Vec<Arc<dyn PageStore>>,
    /// The owner that the stores record for the pages.
    pub(crate) owner: Owner,
    /// The limit of resident memory at the start.
    pub(crate) limit: ResidentLimit,
}

/// The swapper of a machine.
pub(super) struct Paging {
    pub(super) swapper: Arc<Swapper>,
    /// The threads of the swapper. They end when this is dropped, or earlier if the guest has left.
    threads: Mutex<Option<SwapperThreads>>,
}

impl Paging {
    fn stop(&self) {
        let threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner).take();
        drop(threads);
    }
}

impl Machine {
    /// Puts cold pages of the guest into page stores from now on.
    pub(crate) fn page_out(&self, cold: ColdPages) -> Result<(), MachineError> {
        let ColdPages { stores, owner, limit } = cold;
        let fault = match &self.fault {
            Some(fault) => fault.clone(),
            None => Arc::new(UserFault::new().map_err(machine_error)?),
        };
        let parts = SwapperParts {
            vm: self.config.id,
            ram: BackedRam::of(self.ram.clone()).map_err(machine_error)?,
            references: ReferenceKind::Auto.open(self.ram.clone(), fault.clone()).map_err(machine_error)?,
            fault,
            stores,
            new_namespace: Arc::new(|| random_namespace().expect("the operating system has random bytes")),
            owner,
        };
        let swapper = Swapper::new(parts, SwapperOptions { limit, ..SwapperOptions::default() });
        let swapper = Arc::new(swapper.map_err(machine_error)?);
        // `status` reads this page, also in the pause of a migration, so it is never evicted
        let mut pinned = PageSet::empty(self.pages());
        self.ram.layout().page_of(BOARD).into_iter().for_each(|page| pinned.insert_range(PageRange::new(page, 1)));
        swapper.set_pinned(pinned);
        let threads = swapper.start(&LinuxSpawner::default(), GuestImpact::Balanced).map_err(machine_error)?;
        // this is called once, so the cell is empty
        let _ = self.paging.set(Paging { swapper, threads: Mutex::new(Some(threads)) });
        Ok(())
    }

    /// Returns the state of paging, or `None` if cold pages go to no page store.
    pub(crate) fn paging(&self) -> Option<PagingStatus> {
        self.paging.get().map(|paging| paging.swapper.status())
    }

    /// Changes the limit of resident memory. Without a limit, all pages are read back in the
    /// background.
    pub(crate) fn set_resident_limit(&self, limit: ResidentLimit) -> Result<(), GuestError> {
        let swapper = self.paging.get().ok_or(GuestError::NotPaged)?.swapper.clone();
        swapper.set_limit(limit);
        if limit != ResidentLimit::Off {
            return Ok(());
        }
        let back = move || {
            if let Err(error) = swapper.bring_back(Instant::now() + BRING_BACK) {
                log!("not all pages are back from the page store: {}", Chain(&error));
            }
        };
        let started = thread::Builder::new().name("bring-back".into()).spawn(back);
        started.map(drop).map_err(GuestError::NotBack)
    }

    /// Returns a guard that prevents evictions while it lives. Returns `None` if the machine never
    /// evicts pages.
    pub(super) fn hold_pages(&self) -> Option<Result<Held, String>> {
        self.paging.get().map(|paging| paging.swapper.hold().map_err(describe))
    }

    /// Returns the number of pages that are only in page stores.
    pub(super) fn cold_pages(&self) -> u64 {
        self.paging.get().map_or(0, |paging| paging.swapper.map().read(|map| map.in_store().len()))
    }

    /// Ends paging after the guest has left for another host, which uses the pages in the stores.
    pub(super) fn end_paging(&self) {
        if let Some(paging) = self.paging.get() {
            paging.stop();
        }
    }

    /// Removes all pages from the stores after the guest has ended, because nobody needs them.
    pub(crate) fn forget_cold_pages(&self) {
        let Some(paging) = self.paging.get() else { return };
        for error in paging.swapper.forget_all() {
            log!("cold pages stay in their page store until their lease ends: {}", Chain(&error));
        }
    }
}
