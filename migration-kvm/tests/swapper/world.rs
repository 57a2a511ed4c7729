//! A VM's RAM with a swapper, a store that can be told to fail or to wait, and what trials do with them.

use std::{
    fs, io,
    os::fd::{FromRawFd, OwnedFd},
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use libtest_mimic::Failed;
use migration_core::{
    GuestRam, PAGE_SIZE, RamLayout, RamRegion,
    spawner::{GuestImpact, StdSpawner},
    store::{
        Incarnation, MemoryPageStore, Namespace, NamespaceId, Owner, PageData, PageStore, PageToGet, PageToPut, Record,
        StoreError, Stored, Urgency, VmNamespace,
    },
    vm::VmId,
    working_set::ResidentLimit,
};
use migration_kvm::{
    ram::{BackedRam, Backing, MappedRam},
    swapper::{ReferenceKind, Stepped, Swapper, SwapperOptions, SwapperParts, SwapperThreads},
    tracker::UserFault,
};

pub type Outcome = Result<(), Failed>;

/// Far longer than anything takes.
pub const LONG: Duration = Duration::from_secs(600);
pub const VM: VmId = VmId([7; 16]);
/// A limit below the smallest RAM: all pages are to be evicted.
pub const NOTHING: ResidentLimit = ResidentLimit::Bytes(1);

/// Stops whoever comes to it, until it is opened.
#[derive(Default)]
pub struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
}

#[derive(Default)]
struct GateState {
    closed: bool,
    waiting: u32,
}

impl Gate {
    pub fn close(&self) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).closed = true;
    }

    pub fn open(&self) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).closed = false;
        self.changed.notify_all();
    }

    fn pass(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.waiting += 1;
        self.changed.notify_all();
        state = self.changed.wait_while(state, |state| state.closed).unwrap_or_else(PoisonError::into_inner);
        state.waiting -= 1;
    }

    /// Waits until somebody waits there.
    pub fn await_waiter(&self) {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        drop(self.changed.wait_while(state, |state| state.waiting == 0).unwrap_or_else(PoisonError::into_inner));
    }
}

/// A store in memory that does as it is told.
pub struct Store {
    inner: Mutex<Arc<MemoryPageStore>>,
    pub fail_puts: AtomicBool,
    pub fail_gets: AtomicBool,
    pub puts: Gate,
    pub gets: AtomicU64,
    pub names: Mutex<Vec<NamespaceId>>,
}

impl Store {
    fn new() -> Self {
        Self {
            inner: Mutex::new(Arc::new(MemoryPageStore::new("rack-7", 256 << 20))),
            fail_puts: AtomicBool::new(false),
            fail_gets: AtomicBool::new(false),
            puts: Gate::default(),
            gets: AtomicU64::new(0),
            names: Mutex::default(),
        }
    }

    fn inner(&self) -> Arc<MemoryPageStore> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The store starts again, empty.
    pub fn lose_everything(&self) {
        *self.inner.lock().unwrap_or_else(PoisonError::into_inner) = Self::new().inner();
    }
}

fn broken() -> StoreError {
    StoreError::io("the trial")(io::ErrorKind::ConnectionReset.into())
}

impl PageStore for Store {
    fn name(&self) -> &str {
        "rack-7"
    }

    fn room(&self) -> u64 {
        self.inner().room()
    }

    fn create(&self, id: NamespaceId, record: &Record, lease: Duration) -> Result<Incarnation, StoreError> {
        self.names.lock().unwrap_or_else(PoisonError::into_inner).push(id);
        self.inner().create(id, record, lease)
    }

    fn renew(&self, of: VmNamespace, owner: Owner, lease: Duration) -> Result<Incarnation, StoreError> {
        self.inner().renew(of, owner, lease)
    }

    fn put(&self, of: VmNamespace, generation: u32, pages: &[PageToPut<'_>]) -> Result<Stored, StoreError> {
        self.puts.pass();
        if self.fail_puts.load(Ordering::SeqCst) {
            // the outcome is unknown: half of it is there
            self.inner().put(of, generation, &pages[..pages.len().div_ceil(2)])?;
            return Err(broken());
        }
        self.inner().put(of, generation, pages)
    }

    fn get(
        &self,
        of: VmNamespace,
        pages: &[PageToGet],
        urgency: Urgency,
        deadline: Instant,
        take: &mut dyn FnMut(u64, PageData<'_>),
    ) -> Result<(), StoreError> {
        self.gets.fetch_add(1, Ordering::SeqCst);
        if self.fail_gets.load(Ordering::SeqCst) {
            return Err(broken());
        }
        self.inner().get(of, pages, urgency, deadline, take)
    }

    fn record(&self, id: NamespaceId) -> Result<Option<Record>, StoreError> {
        self.inner().record(id)
    }

    fn forget(&self, of: VmNamespace) -> Result<(), StoreError> {
        self.inner().forget(of)
    }

    fn expired(&self) -> Result<Vec<(NamespaceId, Record)>, StoreError> {
        self.inner().expired()
    }
}

pub struct World {
    pub ram: Arc<MappedRam>,
    pub store: Arc<Store>,
    pub swapper: Arc<Swapper>,
    /// The time of the next step.
    now: Mutex<Instant>,
    _threads: Mutex<SwapperThreads>,
}

/// Options under which a step evicts all that it can, and no thread makes one by itself.
pub fn options() -> SwapperOptions {
    SwapperOptions { interval: LONG, floor: 0, most: u64::MAX, limit: NOTHING, ..SwapperOptions::default() }
}

impl World {
    /// Two regions, of 4 MiB and of 4 MiB and 12 KiB. Page `n` holds [`contents`]`(n, 0)`, but for some
    /// zeros and some pages that were never touched.
    pub fn new(backing: Backing, options: SwapperOptions) -> Result<Self, Failed> {
        Self::with_source(backing, options, ReferenceKind::Faults)
    }

    pub fn with_source(backing: Backing, options: SwapperOptions, source: ReferenceKind) -> Result<Self, Failed> {
        let regions = vec![RamRegion { gpa: 0, len: 0x40_0000 }, RamRegion { gpa: 0x100_0000, len: 0x40_3000 }];
        let ram = Arc::new(MappedRam::new(RamLayout::new(regions)?, backing)?);
        for page in ram.layout().all().pages().filter(|&page| !is_hole(page)) {
            let gpa = ram.layout().gpa_of(page).ok_or("no such page")?;
            ram.write(gpa, &expected(page, 0))?;
        }
        let store = Arc::new(Store::new());
        let fault = Arc::new(UserFault::new()?);
        let names = AtomicU64::new(1);
        let new_namespace = move || {
            let mut name = [7; 16];
            name[..8].copy_from_slice(&names.fetch_add(1, Ordering::SeqCst).to_le_bytes());
            Namespace::new(name)
        };
        let parts = SwapperParts {
            vm: VM,
            ram: BackedRam::of(ram.clone())?,
            references: source.open(ram.clone(), fault.clone())?,
            fault,
            stores: vec![store.clone()],
            new_namespace: Arc::new(new_namespace),
            owner: Owner::new("a trial")?,
        };
        let swapper = Arc::new(Swapper::new(parts, options)?);
        let threads = swapper.start(&StdSpawner, GuestImpact::Balanced)?;
        Ok(Self { ram, store, swapper, now: Mutex::new(Instant::now()), _threads: Mutex::new(threads) })
    }

    pub fn pages(&self) -> u64 {
        self.ram.layout().pages()
    }

    /// Makes a step, an hour after the last one.
    pub fn step(&self) -> Result<Stepped, Failed> {
        self.step_after(Duration::from_secs(3600))
    }

    pub fn step_after(&self, time: Duration) -> Result<Stepped, Failed> {
        let mut now = self.now.lock().unwrap_or_else(PoisonError::into_inner);
        *now += time;
        Ok(self.swapper.step(*now)?)
    }

    /// Makes steps until nothing is left to evict.
    pub fn evict_all(&self) -> Outcome {
        for _ in 0..20 {
            let stepped = self.step()?;
            ensure(stepped.failed == 0, || format!("{stepped:?}: {:?}", self.swapper.status().problem))?;
            if stepped == Stepped::default() {
                return Ok(());
            }
        }
        Err(format!("no end: {:?}", self.swapper.status()).into())
    }

    /// Waits until all faults are concluded. Whoever has touched a page goes on a moment before.
    pub fn nobody_waits(&self) {
        while self.swapper.status().waiting_pages != 0 {
            thread::yield_now();
        }
    }

    pub fn read(&self, page: u64) -> Result<Vec<u8>, Failed> {
        let mut bytes = vec![0; PAGE_SIZE];
        self.ram.read(self.ram.layout().gpa_of(page).ok_or("no such page")?, &mut bytes)?;
        Ok(bytes)
    }

    pub fn write(&self, page: u64, bytes: &[u8]) -> Outcome {
        Ok(self.ram.write(self.ram.layout().gpa_of(page).ok_or("no such page")?, bytes)?)
    }

    /// Checks a page that holds what it held at the beginning.
    pub fn unchanged(&self, page: u64) -> Outcome {
        let same = self.read(page)? == expected(page, 0);
        ensure(same, || format!("page {page} does not hold what it did"))
    }

    pub fn all_unchanged(&self) -> Outcome {
        (0..self.pages()).try_for_each(|page| self.unchanged(page))
    }

    /// Returns how many pages of RAM take memory, whoever asks.
    pub fn populated(&self) -> Result<u64, Failed> {
        let mut pages = migration_core::PageSet::empty(self.pages());
        self.ram.populated(&mut pages)?;
        Ok(pages.len())
    }
}

/// Pages that were never touched.
pub fn is_hole(page: u64) -> bool {
    (100..110).contains(&page)
}

/// Pages of zeros that take memory.
pub fn is_zero(page: u64) -> bool {
    (200..230).contains(&page)
}

/// What a page holds at the beginning, or `salt` writes of all of it later.
pub fn expected(page: u64, salt: u64) -> Vec<u8> {
    if salt == 0 && (is_hole(page) || is_zero(page)) { vec![0; PAGE_SIZE] } else { contents(page, salt) }
}

pub fn contents(page: u64, salt: u64) -> Vec<u8> {
    let words = (0..PAGE_SIZE as u64 / 8).map(|i| (page << 40 | salt << 16 | i).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    words.flat_map(u64::to_ne_bytes).collect()
}

pub fn ensure(condition: bool, what: impl FnOnce() -> String) -> Outcome {
    if condition { Ok(()) } else { Err(what().into()) }
}

/// Keeps memory pinned, as a device does that accesses it without the CPU.
pub struct Pin(#[expect(dead_code, reason = "the descriptor keeps the pin")] OwnedFd);

impl Pin {
    /// Pins a page, by registering it with an io_uring.
    pub fn new(ram: &MappedRam, page: u64) -> Result<Self, String> {
        const REGISTER_BUFFERS: u32 = 0;
        let disabled = fs::read_to_string("/proc/sys/kernel/io_uring_disabled").unwrap_or_default();
        if disabled.trim() == "2" {
            return Err("io_uring is disabled".into());
        }
        // `struct io_uring_params` has 120 bytes
        let mut params = [0u64; 15];
        // SAFETY: the kernel reads and writes `params`, and returns a new descriptor.
        let fd = unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, params.as_mut_ptr()) };
        if fd < 0 {
            return Err(format!("io_uring_setup: {}", io::Error::last_os_error()));
        }
        // SAFETY: nothing else owns the new descriptor.
        let ring = unsafe { OwnedFd::from_raw_fd(fd as i32) };
        let slice = ram.slice(migration_core::PageRange::new(page, 1)).map_err(|e| e.to_string())?;
        let buffer = libc::iovec { iov_base: slice.as_ptr().cast(), iov_len: slice.len() };
        // SAFETY: the kernel reads `buffer`, and pins the memory in it, which outlives the descriptor or
        // is unmapped with no use of the pin.
        let done = unsafe { libc::syscall(libc::SYS_io_uring_register, fd, REGISTER_BUFFERS, &raw const buffer, 1) };
        if done < 0 {
            return Err(format!("io_uring_register: {}", io::Error::last_os_error()));
        }
        Ok(Self(ring))
    }
}
