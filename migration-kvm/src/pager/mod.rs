//! Serving missing pages to a VM that runs already: post-copy's half in the kernel.
//!
//! Guest RAM is registered with the VM's userfaultfd, which is shared with a write-protecting
//! tracker. What is done about a page depends on what backs it:
//!
//! | backing | registered for | contents | zeros |
//! |---|---|---|---|
//! | anonymous | missing | staging buffer, COPY | ZEROPAGE |
//! | transparent huge | missing | the same; 2 MiB at once by MOVE, which stays a huge page | ZEROPAGE |
//! | memfd | missing and minor | into a second mapping, CONTINUE | ZEROPAGE |
//! | hugetlb | missing and minor | into a second mapping, CONTINUE | the same |
//!
//! A page of a file is in the file while it is being filled, but nobody reads it there: a touch is
//! a *minor* fault then, and sleeps like any other until CONTINUE.

use std::{
    io,
    sync::{Arc, Mutex, OnceLock, PoisonError, RwLock},
    time::{Duration, Instant},
};

use migration_core::{
    PageRange, PageSet,
    page_map::{PageCopy, PageMap},
    pager::{Fault, Fill, Installed, Pager},
    shared_map::{Claim, SharedPageMap},
    vm::VmError,
};
use thiserror::Error;

use crate::{
    ram::{BackedRam, Backing, HUGE_PAGE_SIZE, MappedRam, RamError},
    tracker::{Modes, UserFault, UserFaultError, features},
};

mod faults;
mod out_of_reach;
#[allow(unsafe_code)]
mod pages;
#[allow(unsafe_code)]
mod side_area;
mod staging;

use faults::{Faults, Kind, RawFault};
use out_of_reach::Eviction;
pub use out_of_reach::{EvictionError, OutOfReach};
use pages::Pages;
use staging::Pool;

/// Pages that are installed together where memory can be split.
const GRANULE: u64 = 1;
/// Pages in a huge page: those of hugetlb memory are installed together.
const HUGE_BLOCK: u64 = HUGE_PAGE_SIZE / migration_core::PAGE_SIZE as u64;
/// Zeros are installed by so many pages at a time (1 GiB), so that the map's lock is held for
/// moments only.
const ZERO_STEP: u64 = 1 << 18;

/// There can be no pager. What it displays does not repeat its cause.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum PagerError {
    /// The userfaultfd lacks something: the kernel does not have it, or the descriptor was created
    /// without it.
    #[error("userfaultfd lacks {lacks} (feature bits {bits:#x}), which missing pages on {backing} memory need")]
    Lacks {
        /// What backs the RAM.
        backing: Backing,
        /// The features' names.
        lacks: String,
        /// Their [`features`].
        bits: u64,
    },
    /// The RAM could not be mapped a second time.
    #[error(transparent)]
    Ram(#[from] RamError),
    /// A descriptor for waking waiters could not be had.
    #[error("wake-up descriptor")]
    System(#[from] io::Error),
}

/// A [`Pager`] over userfaultfd.
///
/// Somebody must be in [`wait`](Pager::wait) from [`arm`](Pager::arm) until
/// [`disarm`](Pager::disarm): it also answers touches of pages that were never populated, which the
/// kernel cannot tell from missing ones.
///
/// Two calls that install the same page: the first to have its contents wins, and the other finds a
/// duplicate. On shared memory a call may fill pages in place; another call that has one of them
/// waits after its own `fill` until the first one is done, since it may still fail. Where memory or
/// descriptors have run out, a call waits for a buffer of another one. Nothing else waits; after a
/// minute in vain the call fails, and names the threads that it has waited for.
///
/// When [`install`](Pager::install) fails for lack of memory, part of the range may be there; if it
/// is repeated, these pages count as duplicates. [`missing`](Self::missing) has the exact number.
///
/// Dropping it leaves missing pages missing: who touches them sleeps until the [`UserFault`] goes,
/// and then reads zeros.
pub struct UserFaultPager {
    pages: Pages,
    /// Which pages are missing: the map with which this was armed, or an empty one.
    map: RwLock<Arc<SharedPageMap>>,
    faults: Faults,
    staging: Pool,
    /// Held while arming and disarming: whether it is armed.
    armed: Mutex<bool>,
    can_move: bool,
    /// Blocks of [`HUGE_BLOCK`] that were not installed as huge pages.
    split: Mutex<PageSet>,
    /// Once somebody wants to evict pages.
    eviction: OnceLock<Eviction>,
}

impl UserFaultPager {
    /// A pager for all of `ram`, which watches nothing yet. `fault` may be in use by a tracker at
    /// the same time; no other pager may use it.
    ///
    /// # Errors
    /// When the userfaultfd lacks a feature that this backing needs, or descriptors or address
    /// space are short.
    pub fn new(ram: Arc<MappedRam>, fault: Arc<UserFault>) -> Result<Self, PagerError> {
        Self::over(BackedRam::of(ram)?, fault)
    }

    /// Creates a pager for RAM that a VMM has mapped itself.
    ///
    /// The VMM must not change the mapping of missing pages, for example by `madvise` or another
    /// registration with a userfaultfd. Pages that are locked, or that a device accesses without
    /// the CPU, cannot be missing.
    ///
    /// # Errors
    /// Those of [`new`](Self::new).
    pub fn over(ram: BackedRam, fault: Arc<UserFault>) -> Result<Self, PagerError> {
        let (backing, has) = (ram.backing(), fault.features());
        let needs: &[(u64, &str)] = match backing {
            Backing::Anonymous | Backing::TransparentHuge => &[],
            Backing::Memfd => &[(features::MISSING_SHMEM, "MISSING_SHMEM"), (features::MINOR_SHMEM, "MINOR_SHMEM")],
            Backing::Hugetlb => {
                &[(features::MISSING_HUGETLBFS, "MISSING_HUGETLBFS"), (features::MINOR_HUGETLBFS, "MINOR_HUGETLBFS")]
            }
        };
        let lacking: Vec<_> = needs.iter().filter(|(bit, _)| has & bit == 0).collect();
        if !lacking.is_empty() {
            let lacks = lacking.iter().map(|(_, name)| *name).collect::<Vec<_>>().join(" and ");
            let bits = lacking.iter().fold(0, |bits, (bit, _)| bits | bit);
            return Err(PagerError::Lacks { backing, lacks, bits });
        }
        let huge = backing == Backing::TransparentHuge;
        let pages = ram.layout().pages();
        Ok(Self {
            pages: Pages::new(ram, fault.clone())?,
            map: RwLock::new(nothing_missing(pages)),
            faults: Faults::new(fault)?,
            staging: Pool::new(huge),
            armed: Mutex::new(false),
            split: Mutex::default(),
            eviction: OnceLock::new(),
            can_move: huge && has & features::MOVE != 0,
        })
    }

    /// Returns the RAM whose missing pages it serves.
    pub fn ram(&self) -> &BackedRam {
        self.pages.ram()
    }

    /// Returns how many pages are missing.
    pub fn missing(&self) -> u64 {
        self.map().read(|map| map.missing().len())
    }

    /// Returns whether `page` is missing: looking at it would wait.
    pub fn is_missing(&self, page: u64) -> bool {
        self.map().is_missing(page)
    }

    fn map(&self) -> Arc<SharedPageMap> {
        self.map.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set_map(&self, map: Arc<SharedPageMap>) {
        *self.map.write().unwrap_or_else(PoisonError::into_inner) = map;
    }

    fn note_split(&self, run: PageRange) {
        if self.pages.ram().backing() == Backing::TransparentHuge {
            let mut split = self.split.lock().unwrap_or_else(PoisonError::into_inner);
            split.insert(run.first / HUGE_BLOCK);
        }
    }

    fn modes(&self) -> Modes {
        let shared = self.pages.ram().backing().is_shared();
        if shared { Modes::MISSING | Modes::MINOR } else { Modes::MISSING }
    }

    fn unregister(&self, regions: usize) -> Result<(), UserFaultError> {
        // go on after a failure
        let results = (0..regions).map(|index| {
            let (address, len) = region(self.pages.ram(), index);
            self.pages.fault().unregister(address, len, self.modes())
        });
        results.fold(Ok(()), Result::and)
    }

    /// `range` comes from a peer.
    fn check(&self, range: PageRange) -> io::Result<()> {
        let (block_pages, all) = (self.pages.block_pages(), self.pages.ram().layout().pages());
        let inside = range.count != 0 && range.first.checked_add(range.count).is_some_and(|end| end <= all);
        if inside && range.first.is_multiple_of(block_pages) && range.count.is_multiple_of(block_pages) {
            return Ok(());
        }
        let PageRange { first, count } = range;
        let why =
            format!("pages {first}+{count} are not whole blocks of {block_pages} pages inside guest RAM of {all}");
        Err(io::Error::new(io::ErrorKind::InvalidInput, why))
    }

    /// Lets `work` install the missing pages of `range`, claim by claim. It returns how many of the
    /// pages it was given were there all the same.
    fn each_claim(
        &self,
        range: PageRange,
        copy: PageCopy,
        mut work: impl FnMut(&mut Claim<'_>) -> io::Result<u64>,
    ) -> io::Result<Installed> {
        let (map, mut pages) = (self.map(), 0);
        while let Some(mut claim) = map.claim(range, copy)? {
            let claimed: u64 = claim.runs().iter().map(|run| run.count).sum();
            let worked = work(&mut claim);
            self.finish(claim)?;
            pages += claimed - worked?;
        }
        Ok(Installed { pages, duplicates: range.count - pages })
    }

    fn finish(&self, claim: Claim<'_>) -> io::Result<()> {
        claim.finish().into_iter().try_for_each(|run| self.pages.wake(run))
    }

    /// Fills the pages in place, if they are shared memory, and all missing and free.
    fn install_in_place(&self, range: PageRange, copy: PageCopy, fill: &mut Fill<'_>) -> Option<io::Result<Installed>> {
        if !self.pages.ram().backing().is_shared() {
            return None;
        }
        let map = self.map();
        let mut claim = map.claim_whole(range, copy)?;
        let hidden = self.pages.hidden(range)?;
        if let Err(error) = fill(&hidden) {
            // what is half filled goes before the claim does. If it cannot, it stays hidden, and is
            // overwritten.
            let _ = self.pages.drop_contents(range);
            return Some(self.finish(claim).and(Err(error)));
        }
        let mapped = self.pages.map(range, &mut claim);
        let finished = self.finish(claim);
        let already = match mapped.and_then(|already| finished.map(|()| already)) {
            Ok(already) => already,
            Err(error) => return Some(Err(error)),
        };
        Some(Ok(Installed { pages: range.count - already, duplicates: already }))
    }

    /// Sorts out one fault: a missing page is for the caller, any other is answered here.
    fn sort(&self, fault: RawFault) -> Result<Option<Fault>, VmError> {
        let page = self.pages.page_at(fault.address);
        let page = page.ok_or_else(|| VmError::new(format!("a fault at {:#x}, outside guest RAM", fault.address)))?;
        if fault.kind == Kind::WriteProtect {
            return Err(VmError::new(format!("a write-protection fault on page {page}, which nobody asked for")));
        }
        // until the fault is answered, so that the page does not move in between
        let mut moves = self.out_of_reach();
        if self.map().touched(page) {
            let known = self.pages.fault().features() & features::THREAD_ID != 0 && fault.thread != 0;
            return Ok(Some(Fault { page, thread: known.then_some(fault.thread) }));
        }
        if let Some(moves) = &mut moves {
            let touched = moves.touch(page);
            if touched.map_err(|e| VmError::because(format!("map page {page} again, which was touched"), e))? {
                return Ok(None);
            }
        }
        let answered = self.pages.answer(page, fault.kind);
        answered.map(|()| None).map_err(|e| VmError::because(format!("answer a touch of page {page}"), e))
    }
}

impl Pager for UserFaultPager {
    fn block_pages(&self) -> u64 {
        self.pages.block_pages()
    }

    /// Registers first, and drops afterwards: in the other order, a touch in between would make a
    /// page of zeros that stays. So who touches RAM during this call sleeps, or reads what it held
    /// before.
    fn arm(&self, map: &Arc<SharedPageMap>) -> Result<(), VmError> {
        let (ram, missing) = (self.pages.ram(), map.missing());
        let all = ram.layout().pages();
        if missing.capacity() != all {
            return Err(VmError::new(format!("a map of {} pages for {all} pages of RAM", missing.capacity())));
        }
        for run in missing.ranges() {
            self.check(run).map_err(|e| VmError::because("watch for missing pages", e))?;
        }
        let mut armed = self.armed.lock().unwrap_or_else(PoisonError::into_inner);
        if *armed {
            return Err(VmError::new("missing pages are watched for already"));
        }
        // before the first fault can come
        self.set_map(map.clone());
        let mut registered = 0;
        let mut watch = || -> Result<(), VmError> {
            for index in 0..ram.layout().regions().len() {
                let (address, len) = region(ram, index);
                let done = self.pages.fault().register(address, len, self.modes());
                done.map_err(|e| VmError::because(format!("watch RAM region {index} for missing pages"), e))?;
                registered = index + 1;
            }
            for run in missing.ranges() {
                self.pages.drop_contents(run).map_err(|e| VmError::because("drop what missing pages held", e))?;
            }
            Ok(())
        };
        let result = watch();
        *self.split.lock().unwrap_or_else(PoisonError::into_inner) = PageSet::empty(all.div_ceil(HUGE_BLOCK));
        match result {
            Ok(()) => {
                *armed = true;
                self.allow_eviction();
            }
            Err(_) => {
                self.set_map(nothing_missing(all));
                let _ = self.unregister(registered); // the first error is the one to tell
            }
        }
        result
    }

    fn wait(&self, timeout: Duration, faults: &mut Vec<Fault>) -> Result<(), VmError> {
        let deadline = Instant::now().checked_add(timeout);
        let (before, mut raw) = (faults.len(), Vec::new());
        loop {
            let came = self.faults.next(deadline, &mut raw).map_err(|e| VmError::because("read faults", e))?;
            let mut result = Ok(());
            for fault in raw.drain(..) {
                match self.sort(fault) {
                    Ok(fault) => faults.extend(fault),
                    Err(error) => result = result.and(Err(error)),
                }
            }
            let late = deadline.is_some_and(|at| Instant::now() >= at);
            if result.is_err() || !came || late || faults.len() > before {
                return result;
            }
        }
    }

    /// Makes huge pages of the blocks that arrived in pieces, as far as all their pages hold data.
    fn collapse_huge_pages(&self) {
        let blocks = std::mem::take(&mut *self.split.lock().unwrap_or_else(PoisonError::into_inner));
        let were_missing = self.map().read(|map| map.missing_at_hand_over().clone());
        for block in blocks.iter() {
            let range = PageRange::new(block * HUGE_BLOCK, HUGE_BLOCK);
            let whole = were_missing.count_in(range) == HUGE_BLOCK && self.pages.is_huge_block(range);
            // without it the guest is a little slower, until the kernel does it by itself
            if whole && self.pages.ram().assemble_huge_pages(range).is_err() {
                return;
            }
        }
    }

    fn wake_waiters(&self) {
        self.faults.ring();
    }

    fn install(&self, range: PageRange, copy: PageCopy, mut fill: Fill<'_>) -> io::Result<Installed> {
        self.check(range)?;
        if range.first / HUGE_BLOCK != (range.end() - 1) / HUGE_BLOCK {
            let why = format!("pages {}+{} cross a multiple of {HUGE_BLOCK}", range.first, range.count);
            return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        }
        if let Some(installed) = self.install_in_place(range, copy, &mut fill) {
            return installed;
        }
        let staging = self.staging.take(range)?;
        fill(&[staging.slice(PageRange::new(0, range.count))?])?;
        self.each_claim(range, copy, |claim| {
            let (runs, mut already) = (claim.runs(), 0);
            for mut run in runs {
                if run == range && self.can_move && self.pages.is_huge_block(range) {
                    let moved = self.pages.take_huge(range, &staging, claim)?;
                    run = PageRange::new(range.first + moved, range.count - moved);
                }
                if run.count != 0 {
                    self.note_split(run);
                    already += self.pages.install(run, &staging, range.first, claim)?;
                }
            }
            Ok(already)
        })
    }

    fn install_zeros(&self, range: PageRange) -> io::Result<Installed> {
        self.check(range)?;
        let mut sum = Installed::default();
        for first in range.pages().step_by(ZERO_STEP as usize) {
            let part = PageRange::new(first, ZERO_STEP.min(range.end() - first));
            let installed = self.each_claim(part, PageCopy::Source, |claim| {
                claim.runs().into_iter().try_fold(0, |already, run| Ok(already + self.pages.zero(run, claim)?))
            })?;
            sum.pages += installed.pages;
            sum.duplicates += installed.duplicates;
        }
        Ok(sum)
    }

    fn wake(&self, page: u64) -> io::Result<()> {
        let block_pages = self.pages.block_pages();
        let block = PageRange::new(page - page % block_pages, block_pages);
        self.check(block)?;
        self.pages.wake(block)
    }

    /// Ends the watch all the same: missing pages read as zeros from now on.
    fn give_up(&self) {
        let mut armed = self.armed.lock().unwrap_or_else(PoisonError::into_inner);
        if std::mem::take(&mut *armed) {
            // best effort, as below
            let _ = self.end_eviction();
            self.set_map(nothing_missing(self.pages.ram().layout().pages()));
            // best effort: the memory goes with the VM, and the descriptor with it
            let _ = self.unregister(self.pages.ram().layout().regions().len());
        }
    }

    fn disarm(&self) -> Result<(), VmError> {
        let mut armed = self.armed.lock().unwrap_or_else(PoisonError::into_inner);
        if !*armed {
            return Ok(());
        }
        let missing = self.missing();
        if missing != 0 {
            return Err(VmError::new(format!("{missing} pages are missing still")));
        }
        self.end_eviction().map_err(|e| VmError::because("map pages again that were to be evicted", e))?;
        *armed = false;
        let regions = self.pages.ram().layout().regions().len();
        self.unregister(regions).map_err(|e| VmError::because("end the watch for missing pages", e))
    }
}

impl Drop for UserFaultPager {
    fn drop(&mut self) {
        // before the side area goes, where they are
        let _ = self.end_eviction();
        let _ = self.disarm(); // refuses while pages are missing
    }
}

fn nothing_missing(pages: u64) -> Arc<SharedPageMap> {
    Arc::new(SharedPageMap::new(PageMap::new(pages)))
}

/// Host address and length in bytes of RAM region `index`.
fn region(ram: &BackedRam, index: usize) -> (u64, u64) {
    (ram.host_address(index).as_ptr() as u64, ram.layout().regions()[index].len)
}
