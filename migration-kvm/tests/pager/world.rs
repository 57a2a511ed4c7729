//! A VM's RAM with a pager, and what trials do with it.

use std::{fs, io, sync::Arc, thread, time::Duration};

use libtest_mimic::Failed;
use migration_core::{
    GuestRam, PAGE_SIZE, PageRange, PageSet, RamLayout, RamRegion, RamSlice,
    page_map::{PageCopy, PageMap},
    pager::{Fault, Installed, Pager},
    shared_map::SharedPageMap,
    vm::VmError,
};
use migration_kvm::{
    pager::UserFaultPager,
    ram::{Backing, MappedRam},
    tracker::UserFault,
};

pub type Outcome = Result<(), Failed>;

/// Far longer than anything takes: an end for waits that must not need one.
pub const LONG: Duration = Duration::from_secs(600);

pub struct World<R = MappedRam> {
    pub ram: Arc<R>,
    pub fault: Arc<UserFault>,
    pub pager: UserFaultPager,
}

impl World {
    /// Two regions of 4 MiB.
    pub fn new(backing: Backing) -> Result<Self, Failed> {
        Self::with_regions(backing, [0x40_0000, 0x40_0000])
    }

    pub fn with_regions(backing: Backing, len: [u64; 2]) -> Result<Self, Failed> {
        let second = 0x100_0000 + len[0] % 0x20_0000;
        let regions = vec![RamRegion { gpa: 0, len: len[0] }, RamRegion { gpa: second, len: len[1] }];
        let ram = Arc::new(MappedRam::new(RamLayout::new(regions)?, backing)?);
        let fault = Arc::new(UserFault::new()?);
        let pager = UserFaultPager::new(ram.clone(), fault.clone())?;
        Ok(Self { ram, fault, pager })
    }
}

impl<R: GuestRam + 'static> World<R> {
    pub fn pages(&self) -> u64 {
        self.ram.layout().pages()
    }

    pub fn all(&self) -> PageSet {
        PageSet::full(self.pages())
    }

    /// Arms the pager for a VM of which these pages were left behind.
    pub fn arm(&self, missing: &PageSet) -> Result<(), VmError> {
        let mut map = PageMap::new(missing.capacity());
        map.leave_behind(missing).map_err(|e| VmError::because("leave pages behind", e))?;
        self.pager.arm(&Arc::new(SharedPageMap::new(map)))
    }

    pub fn memory(&self) -> &dyn GuestRam {
        &*self.ram
    }

    /// What `page` holds; sleeps while it is missing.
    pub fn read(&self, page: u64) -> Result<Vec<u8>, Failed> {
        let mut bytes = vec![0; PAGE_SIZE];
        let gpa = self.ram.layout().gpa_of(page).ok_or("no such page")?;
        self.memory().read(gpa, &mut bytes)?;
        Ok(bytes)
    }

    pub fn write(&self, page: u64, bytes: &[u8]) -> Outcome {
        let gpa = self.ram.layout().gpa_of(page).ok_or("no such page")?;
        Ok(self.memory().write(gpa, bytes)?)
    }

    pub fn install(&self, range: PageRange, salt: u64) -> io::Result<Installed> {
        self.pager.install(range, PageCopy::Source, &mut |slices| {
            fill(slices, range, salt);
            Ok(())
        })
    }

    pub fn holds(&self, range: PageRange, salt: u64) -> Outcome {
        range.pages().try_for_each(|page| {
            let same = self.read(page)? == contents(page, salt);
            ensure(same, || format!("page {page} does not hold what {salt} wrote"))
        })
    }

    pub fn zeros(&self, range: PageRange) -> Outcome {
        range.pages().try_for_each(|page| {
            let zero = self.read(page)?.iter().all(|&b| b == 0);
            ensure(zero, || format!("page {page} is not zero"))
        })
    }

    /// The block of pages that is installed together with `page`.
    pub fn block(&self, page: u64) -> PageRange {
        let block_pages = self.pager.block_pages();
        PageRange::new(page / block_pages * block_pages, block_pages)
    }

    pub fn pages_of(&self, each: impl FnMut(u64) -> Outcome) -> Outcome {
        self.ram.layout().all().pages().try_for_each(each)
    }

    /// Runs `body` while a thread answers faults by `answer`.
    pub fn serve<T>(
        &self,
        answer: impl Fn(Fault) -> io::Result<()> + Sync,
        body: impl FnOnce() -> T,
    ) -> Result<T, Failed> {
        thread::scope(|scope| {
            let server = scope.spawn(|| -> Result<(), String> {
                loop {
                    let mut faults = Vec::new();
                    self.pager.wait(LONG, &mut faults).map_err(|e| e.to_string())?;
                    if faults.is_empty() {
                        return Ok(());
                    }
                    faults.into_iter().try_for_each(&answer).map_err(|e| e.to_string())?;
                }
            });
            let stop = Stop(&self.pager);
            let result = body();
            drop(stop);
            server.join().map_err(|_| "the server panicked")??;
            Ok(result)
        })
    }
}

/// Ends the waiting for faults when dropped.
pub struct Stop<'a>(pub &'a UserFaultPager);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.wake_waiters();
    }
}

pub fn contents(page: u64, salt: u64) -> Vec<u8> {
    let words = (0..PAGE_SIZE as u64 / 8).map(|i| (page << 32 | salt << 16 | i).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    words.flat_map(u64::to_ne_bytes).collect()
}

pub fn fill(slices: &[RamSlice<'_>], range: PageRange, salt: u64) {
    let mut pages = range.pages();
    for &slice in slices {
        let mut rest = slice;
        while !rest.is_empty() {
            rest.copy_from(&contents(pages.next().unwrap_or(u64::MAX), salt));
            rest = rest.skip(PAGE_SIZE);
        }
    }
    assert_eq!(pages.next(), None, "less room than pages");
}

pub fn ensure(condition: bool, what: impl FnOnce() -> String) -> Outcome {
    if condition { Ok(()) } else { Err(what().into()) }
}

pub fn expect(got: Installed, pages: u64, duplicates: u64) -> Outcome {
    let want = Installed { pages, duplicates };
    ensure(got == want, || format!("{got:?} instead of {want:?}"))
}

pub fn range(first: u64, count: u64) -> PageRange {
    PageRange::new(first, count)
}

/// Huge pages that the trials need: they may run in parallel.
const HUGE_PAGES: u64 = 80;
const NR_HUGEPAGES: &str = "/proc/sys/vm/nr_hugepages";

/// Raises the reserve of huge pages, and puts it back when dropped.
pub struct HugePages(u64);

impl HugePages {
    pub fn reserve() -> Result<Self, String> {
        let read = || fs::read_to_string(NR_HUGEPAGES).ok()?.trim().parse::<u64>().ok();
        let before = read().ok_or("cannot read the number of huge pages")?;
        let this = Self(before);
        fs::write(NR_HUGEPAGES, (before + HUGE_PAGES).to_string()).map_err(|e| format!("{NR_HUGEPAGES}: {e}"))?;
        if read() == Some(before + HUGE_PAGES) { Ok(this) } else { Err("not enough memory in 2 MiB pieces".into()) }
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _ = fs::write(NR_HUGEPAGES, self.0.to_string());
    }
}
