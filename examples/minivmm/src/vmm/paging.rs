//! Cold pages of a machine that is at home here: they are in page stores until the guest touches
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

/// How long it is tried to read all pages back when there is no limit any more. Those that have not
/// come by then come when they are touched.
const BRING_BACK: Duration = Duration::from_secs(600);

/// Where a machine's cold pages go.
pub(crate) struct ColdPages {
    /// Each of these stores gets every page.
    pub(crate) stores: Vec<Arc<dyn PageStore>>,
    /// Who answers for them.
    pub(crate) owner: Owner,
    /// The limit of resident memory at the start.
    pub(crate) limit: ResidentLimit,
}

/// The swapper of a machine.
pub(super) struct Paging {
    pub(super) swapper: Arc<Swapper>,
    /// They end with this, and before if the guest has gone.
    threads: Mutex<Option<SwapperThreads>>,
}

impl Paging {
    fn stop(&self) {
        let threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner).take();
        drop(threads);
    }
}

impl Machine {
    /// Has cold pages of the guest, which does not run yet, put into page stores from now on.
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
        // `status` looks at it, also in the pause
        let mut pinned = PageSet::empty(self.pages());
        self.ram.layout().page_of(BOARD).into_iter().for_each(|page| pinned.insert_range(PageRange::new(page, 1)));
        swapper.set_pinned(pinned);
        let threads = swapper.start(&LinuxSpawner::default(), GuestImpact::Balanced).map_err(machine_error)?;
        // it is called once
        let _ = self.paging.set(Paging { swapper, threads: Mutex::new(Some(threads)) });
        Ok(())
    }

    /// Returns how the memory stands, if cold pages go to page stores.
    pub(crate) fn paging(&self) -> Option<PagingStatus> {
        self.paging.get().map(|paging| paging.swapper.status())
    }

    /// Changes the limit of resident memory. Without one, all pages are read back meanwhile.
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

    /// No page is evicted as long as the returned value lives; `None` if none ever is.
    pub(super) fn hold_pages(&self) -> Option<Result<Held, String>> {
        self.paging.get().map(|paging| paging.swapper.hold().map_err(describe))
    }

    /// Returns how many pages are only in page stores.
    pub(super) fn cold_pages(&self) -> u64 {
        self.paging.get().map_or(0, |paging| paging.swapper.map().read(|map| map.in_store().len()))
    }

    /// The guest has gone to another host, which has the pages that are in stores.
    pub(super) fn end_paging(&self) {
        if let Some(paging) = self.paging.get() {
            paging.stop();
        }
    }

    /// The guest has ended: nobody needs its pages.
    pub(crate) fn forget_cold_pages(&self) {
        let Some(paging) = self.paging.get() else { return };
        for error in paging.swapper.forget_all() {
            log!("cold pages stay in their page store until their lease ends: {}", Chain(&error));
        }
    }
}
