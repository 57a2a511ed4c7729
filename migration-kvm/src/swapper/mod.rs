//! Keeps cold pages of a VM that runs here in a page store: the swapper of agile migration.
//!
//! A [`Swapper`] looks which pages the guest has not referenced for a while, writes them to the VM's
//! stores in batches, and drops them. A touch brings them back with their neighbours. How much stays
//! resident is a limit, set by hand or by an estimate of the working set.
//!
//! It starts no thread by itself. Either [`Swapper::start`] has a spawner start them, or the VMM calls
//! [`serve_faults`](Swapper::serve_faults), [`fetch_waiting`](Swapper::fetch_waiting) and
//! [`step`](Swapper::step), each on a thread of its own: a guest whose faults nobody answers hangs.
//!
//! # A page's way
//! The order is that of rule 21. No step before the third loses a write.
//!
//! 1. [`step`](Swapper::step) takes the page out of the guest's reach. It is still in memory, and a
//!    touch maps it again within microseconds. So it is on *probation*.
//! 2. The next step puts it into the stores, unless it was touched. A page of zeros is dropped without
//!    that.
//! 3. When the stores have acknowledged the put, and the page was not touched meanwhile, it is dropped.
//! 4. A touch is a missing page: [`serve_faults`](Swapper::serve_faults) reads the fault, and
//!    [`fetch_waiting`](Swapper::fetch_waiting) fetches the page and its neighbours, if a store has
//!    them. The page loses its copy in the store then, because the guest may write it.
//!
//! # Migrations
//! While a VM is migrated, saved or handed over, no page is evicted (rule 22): the VMM calls
//! [`hold`](Swapper::hold) before it starts to track pages, and
//! [`no_page_comes_back`](Held::no_page_comes_back) when the vCPUs are paused.
//!
//! **A page in a store is not populated**: whoever takes pages that are not populated for zeros, as the
//! engine does without [`memory`](Swapper::memory), loses it. So before a migration or a snapshot that
//! does not know of stores all pages are [brought back](Swapper::bring_back).

mod coldness;
mod evict;
mod fetch;
mod gate;
mod status;
mod threads;

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

pub use coldness::{NoSource, ReferenceKind, ReferenceSource};
pub use evict::Stepped;
use evict::Work;
use fetch::Waiter;
use gate::Gate;
use migration_core::{
    PAGE_SIZE, PageRange, PageSet,
    page_map::PageMap,
    paged_memory::{FetchError, PagedMemory, PagedMemoryParts, PutError},
    pager::Pager,
    shared_map::SharedPageMap,
    store::{Namespace, Owner, PageStore, StoreError, Urgency},
    vm::{VmError, VmId},
    working_set::{EstimatorOptions, ResidentLimit},
};
use status::Counters;
pub use status::PagingStatus;
use thiserror::Error;
pub use threads::SwapperThreads;

use crate::{
    pager::{EvictionError, PagerError, UserFaultPager},
    ram::BackedRam,
    tracker::UserFault,
};

/// What a [`Swapper`] is made of.
pub struct SwapperParts {
    /// The VM.
    pub vm: VmId,
    /// Its RAM, which no other process uses.
    pub ram: BackedRam,
    /// Its userfaultfd. A write-protecting tracker may use it as well, and no pager.
    pub fault: Arc<UserFault>,
    /// The stores of the VM's cold pages, at least one. Each of them gets every page (rule 12).
    pub stores: Vec<Arc<dyn PageStore>>,
    /// Makes the secret name of a namespace: see `migration_crypto::random_namespace`.
    pub new_namespace: Arc<dyn Fn() -> Namespace + Send + Sync>,
    /// Who answers for the namespaces, as the stores record it.
    pub owner: Owner,
    /// Which pages were referenced.
    pub references: Box<dyn ReferenceSource>,
}

/// How a [`Swapper`] works.
#[derive(Clone, Debug)]
pub struct SwapperOptions {
    /// The limit of resident memory at the start: [`set_limit`](Swapper::set_limit) changes it.
    pub limit: ResidentLimit,
    /// How long a page is on probation, and the time between two steps of
    /// [`SwapperThreads`]: 1 s.
    pub interval: Duration,
    /// The number of intervals for which it is remembered that a page was referenced: 4.
    pub remembered: usize,
    /// Bytes that stay resident whatever the limit is: 16 MiB.
    pub floor: u64,
    /// The most bytes that are evicted in one step: 64 MiB.
    pub most: u64,
    /// The pages of the aligned block that is fetched for a fault, as far as they are in a store: 16.
    /// At most [`MAX_FETCHED_PAGES`](migration_core::paged_memory::MAX_FETCHED_PAGES) are fetched.
    pub neighbours: u64,
    /// The number of threads that fetch pages for faults: 2. One that waits for a slow store does not
    /// delay the other.
    pub fetch_threads: usize,
    /// For how long a store may be silent before a fetch is repeated: 5 s.
    pub fetch_timeout: Duration,
    /// For how long the stores keep the pages if nobody renews them: 24 hours. The swapper renews them
    /// long before.
    pub lease: Duration,
    /// How the working set is estimated, if the limit is automatic. `None` stands for
    /// [`EstimatorOptions::of_ram`].
    pub estimator: Option<EstimatorOptions>,
}

impl Default for SwapperOptions {
    fn default() -> Self {
        Self {
            limit: ResidentLimit::Off,
            interval: Duration::from_secs(1),
            remembered: 4,
            floor: 16 << 20,
            most: 64 << 20,
            neighbours: 16,
            fetch_threads: 2,
            fetch_timeout: Duration::from_secs(5),
            lease: Duration::from_secs(24 * 3600),
            estimator: None,
        }
    }
}

/// There can be no swapper. What it displays does not repeat its cause.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SwapperError {
    /// There is no store.
    #[error("cold pages need at least one page store")]
    NoStore,
    /// Missing pages cannot be served.
    #[error(transparent)]
    Pager(#[from] PagerError),
    /// Pages of this VM cannot be evicted.
    #[error(transparent)]
    Eviction(#[from] EvictionError),
    /// The pages that RAM holds are not known.
    #[error("the pages that RAM holds")]
    Populated(#[source] std::io::Error),
    /// The stores did not take a namespace.
    #[error("a namespace for cold pages")]
    Store(#[from] PutError),
    /// RAM cannot be watched.
    #[error("watch RAM for missing pages")]
    Watch(#[source] VmError),
}

/// Evicts cold pages of a VM that runs here, and brings them back: see the [module](self).
pub struct Swapper {
    map: Arc<SharedPageMap>,
    pager: Arc<UserFaultPager>,
    gate: Arc<Gate>,
    memory: Arc<PagedMemory>,
    store_names: Vec<String>,
    new_namespace: Arc<dyn Fn() -> Namespace + Send + Sync>,
    owner: Owner,
    options: SwapperOptions,
    limit: Mutex<ResidentLimit>,
    pinned: Mutex<PageSet>,
    references: Mutex<Box<dyn ReferenceSource>>,
    /// How many [`Held`] there are.
    held: AtomicU32,
    /// Held during a step, also while a store is asked.
    work: Mutex<Work>,
    /// Missing pages that somebody waits for.
    waiting: Mutex<BTreeMap<u64, Waiter>>,
    /// There is another one, or the swapper stops.
    waits: Condvar,
    /// Pages that were fetched since the last step.
    recent: Mutex<PageSet>,
    counters: Mutex<Counters>,
    signal: Mutex<Signal>,
    signalled: Condvar,
    began: Instant,
}

/// What the threads are told.
#[derive(Default)]
struct Signal {
    stop: bool,
    /// A step is to be made at once.
    step: bool,
}

impl Swapper {
    /// Makes a swapper for a VM all of whose pages are in RAM, and watches the RAM from now on. Its
    /// faults have to be [served](Self::serve_faults) before the guest runs: the first touch of each
    /// page that was never populated is a fault, too.
    ///
    /// # Errors
    /// [`SwapperError`], with the reason why pages of this VM cannot be evicted.
    pub fn new(parts: SwapperParts, options: SwapperOptions) -> Result<Self, SwapperError> {
        let SwapperParts { vm, ram, fault, stores, new_namespace, owner, references } = parts;
        if stores.is_empty() {
            return Err(SwapperError::NoStore);
        }
        let pages = ram.layout().pages();
        let map = Arc::new(SharedPageMap::new(PageMap::new(pages)));
        let pager = Arc::new(UserFaultPager::over(ram, fault)?);
        pager.prepare_eviction()?;
        let store_names: Vec<_> = stores.iter().map(|store| store.name().to_owned()).collect();
        let gate = Arc::new(Gate::new(pager.clone()));
        let memory = PagedMemory::new(PagedMemoryParts { vm, map: map.clone(), pager: gate.clone(), stores });
        let this = Self {
            memory: Arc::new(memory),
            gate,
            store_names,
            new_namespace,
            owner,
            limit: Mutex::new(options.limit),
            pinned: Mutex::new(PageSet::empty(pages)),
            references: Mutex::new(references),
            held: AtomicU32::new(0),
            work: Mutex::new(Work::new(pages, options.remembered)),
            waiting: Mutex::default(),
            waits: Condvar::new(),
            recent: Mutex::new(PageSet::empty(pages)),
            counters: Mutex::default(),
            signal: Mutex::default(),
            signalled: Condvar::new(),
            began: Instant::now(),
            map,
            pager,
            options,
        };
        this.look().map_err(SwapperError::Populated)?;
        this.make_home(&mut lock(&this.work))?;
        if let Err(error) = this.pager.arm(&this.map) {
            // nothing was put yet
            this.forget_all();
            return Err(SwapperError::Watch(error));
        }
        Ok(this)
    }

    /// Returns where each page of the VM is.
    pub fn map(&self) -> &Arc<SharedPageMap> {
        &self.map
    }

    /// Returns the pager of the VM's RAM.
    pub fn pager(&self) -> &Arc<UserFaultPager> {
        &self.pager
    }

    /// Returns the stores and namespaces in which pages are, for the next migration of the VM.
    pub fn memory(&self) -> &Arc<PagedMemory> {
        &self.memory
    }

    /// Returns the limit of resident memory.
    pub fn limit(&self) -> ResidentLimit {
        *lock(&self.limit)
    }

    /// Changes the limit of resident memory. The next step goes by it, which the
    /// [threads](Self::start) make at once. Without a limit no page is evicted; those that are in a
    /// store stay there until they are touched, or [brought back](Self::bring_back).
    pub fn set_limit(&self, limit: ResidentLimit) {
        *lock(&self.limit) = limit;
        lock(&self.signal).step = true;
        self.signalled.notify_all();
    }

    /// Names the pages that are never evicted: those that VMM and KVM touch in the pause of a migration
    /// (rule 20), and those that a device accesses without the CPU. Replaces the earlier ones. Pages
    /// of these that are in a store stay there until they are touched.
    pub fn set_pinned(&self, pages: PageSet) {
        *lock(&self.pinned) = pages;
    }

    /// Evicts nothing until the returned value is dropped, and maps all pages again that are about to
    /// be evicted (rule 22). A put that is under way does not count any more, and this does not wait for
    /// it. Faults are served as before.
    ///
    /// Called before pages are tracked, paused, saved or handed over.
    ///
    /// # Errors
    /// A page could not be mapped again. Nothing is held then.
    pub fn hold(self: &Arc<Self>) -> Result<Held, VmError> {
        self.held.fetch_add(1, Ordering::SeqCst);
        let held = Held { swapper: self.clone() };
        lock(&self.references).suspend();
        self.give_back_all().map_err(|e| VmError::because("map pages again that were to be evicted", e))?;
        Ok(held)
    }

    fn is_held(&self) -> bool {
        self.held.load(Ordering::SeqCst) != 0
    }

    /// Reads all pages back that are only in a store, for example to end the use of the store. Evicts
    /// nothing meanwhile.
    ///
    /// # Errors
    /// [`FetchError`], if a store lacks pages or does not answer before `deadline`. Those that were read
    /// are in RAM.
    pub fn bring_back(&self, deadline: Instant) -> Result<u64, FetchError> {
        self.held.fetch_add(1, Ordering::SeqCst);
        let all = PageRange::new(0, self.map.read(PageMap::pages));
        let mut fetched = 0;
        let result = loop {
            match self.memory.fetch(all, Urgency::Prefetch, deadline) {
                Ok(installed) if installed.pages == 0 => {
                    // others have claimed what is left, and fetch it for faults
                    if self.map.read(|map| map.in_store().is_empty()) || Instant::now() >= deadline {
                        break Ok(fetched);
                    }
                    std::thread::yield_now();
                }
                Ok(installed) => fetched += installed.pages,
                Err(error) => break Err(error),
            }
        };
        self.held.fetch_sub(1, Ordering::SeqCst);
        result
    }

    /// Forgets all namespaces, in all stores: the VM has ended, or all pages were
    /// [brought back](Self::bring_back). Never called when the VM was migrated, whose new owner needs
    /// them (rule 14). Returns what went wrong.
    pub fn forget_all(&self) -> Vec<StoreError> {
        self.memory.forget_all()
    }

    /// Ends the watch of the RAM, once no page is in a store. Its threads are stopped afterwards.
    ///
    /// # Errors
    /// Pages are in a store, or what the kernel says.
    pub fn disarm(&self) -> Result<(), VmError> {
        self.pager.disarm()
    }

    fn give_back_all(&self) -> std::io::Result<()> {
        let mut first = 0;
        // in pieces, so that faults are answered in between
        while let Some(mut moves) = self.pager.out_of_reach() {
            let Some(page) = moves.pages().first_from(first) else { break };
            moves.give_back(PageRange::new(page, GIVE_BACK_PAGES))?;
            first = page + GIVE_BACK_PAGES;
        }
        Ok(())
    }
}

/// The pages that are mapped again while no fault is answered.
const GIVE_BACK_PAGES: u64 = 1024;

/// As long as it lives, a [`Swapper`] evicts nothing: see [`Swapper::hold`].
pub struct Held {
    swapper: Arc<Swapper>,
}

impl Held {
    /// Lets no page come back until [`pages_come_back`](Self::pages_come_back) is called, or this is
    /// dropped. Called when the vCPUs are paused, and does not wait for a store. Whoever touches a page
    /// that is in a store waits for as long: pages that are touched in the pause are
    /// [pinned](Swapper::set_pinned).
    pub fn no_page_comes_back(&self) {
        self.swapper.gate.set_shut(true);
    }

    /// Lets pages come back. Called before the vCPUs run again.
    pub fn pages_come_back(&self) {
        self.swapper.gate.set_shut(false);
        // a thread that looks for a page holds this lock until it waits
        drop(lock(&self.swapper.waiting));
        self.swapper.waits.notify_all();
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.pages_come_back();
        self.swapper.held.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Locks, whether or not another thread panicked: what these locks guard is replaced whole, never
/// half-written.
fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Returns a number of pages in bytes.
const fn bytes(pages: u64) -> u64 {
    pages * PAGE_SIZE as u64
}
