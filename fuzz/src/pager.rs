//! A pager over plain memory, which nobody traps on: it makes up a few faults, and checks what the
//! engine asks of it.

use std::{
    io,
    sync::{Arc, Condvar, Mutex, MutexGuard},
    time::Duration,
};

use migration_core::{
    GuestRam, HeapRam, PAGE_SIZE, PageRange, RamLayout, RamRegion, RamSlice,
    page_map::{PageCopy, PageMap},
    pager::{Fault, Fill, Installed, Pager},
    shared_map::SharedPageMap,
    vm::VmError,
};

/// Faults at the beginning, each on the first and the last page that is missing then.
const FAULTS: u32 = 3;

/// See the module.
pub struct PlainPager {
    ram: Arc<HeapRam>,
    block_pages: u64,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    armed: bool,
    map: Arc<SharedPageMap>,
    faults: u32,
    woken: bool,
    given_up: bool,
}

impl PlainPager {
    /// For this memory, in blocks of `block_pages` pages.
    pub fn new(ram: Arc<HeapRam>, block_pages: u64) -> Self {
        let map = Arc::new(SharedPageMap::new(PageMap::new(ram.layout().pages())));
        let state = State { armed: false, map, faults: FAULTS, woken: false, given_up: false };
        Self { ram, block_pages, state: Mutex::new(state), changed: Condvar::new() }
    }

    /// Waits for the first page that is missing, as one who loads the state does.
    pub fn touch(&self, patience: Duration) -> Result<(), VmError> {
        let state = self.lock();
        let Some(page) = state.map.missing().first_from(0) else { return Ok(()) };
        let waits = |s: &mut State| !s.given_up && s.map.is_missing(page);
        let (state, waited) = self.changed.wait_timeout_while(state, patience, waits).expect("a panic aborts");
        let there = !waited.timed_out() && !state.given_up;
        if there { Ok(()) } else { Err(VmError::new("a page does not come")) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("a panic aborts")
    }

    fn take(&self, range: PageRange, copy: PageCopy, from: Option<RamSlice<'_>>) -> Installed {
        let ram = &self.ram;
        let map = self.lock().map.clone();
        let left_behind = map.read(|map| map.missing_at_hand_over().count_in(range));
        assert_eq!(left_behind, range.count, "pages that are not on the list");
        assert!(range.first % self.block_pages == 0 && range.count % self.block_pages == 0, "no whole blocks: {range:?}");
        let mut installed = Installed { pages: 0, duplicates: range.count };
        let Some(mut claim) = map.claim(range, copy).expect("nobody waits for so long") else { return installed };
        for page in claim.runs().into_iter().flat_map(PageRange::pages) {
            let mut bytes = [0; PAGE_SIZE];
            if let Some(from) = from {
                from.skip((page - range.first) as usize * PAGE_SIZE).take(PAGE_SIZE).copy_to(&mut bytes);
            }
            ram.slice(PageRange::new(page, 1)).expect("a page of the list is in RAM").copy_from(&bytes);
            claim.installed(PageRange::new(page, 1));
            installed.pages += 1;
            installed.duplicates -= 1;
        }
        claim.finish();
        // so that nobody misses it between a look and its wait
        drop(self.lock());
        self.changed.notify_all();
        installed
    }
}

impl Pager for PlainPager {
    fn block_pages(&self) -> u64 {
        self.block_pages
    }

    fn arm(&self, map: &Arc<SharedPageMap>) -> Result<(), VmError> {
        let mut state = self.lock();
        assert!(!std::mem::replace(&mut state.armed, true), "armed twice");
        assert_eq!(map.read(PageMap::pages), self.ram.layout().pages(), "the map is of another VM");
        state.map = map.clone();
        Ok(())
    }

    fn wait(&self, timeout: Duration, faults: &mut Vec<Fault>) -> Result<(), VmError> {
        let idle = |s: &mut State| !s.woken && (s.faults == 0 || !s.armed || s.map.missing().is_empty());
        let waited = self.changed.wait_timeout_while(self.lock(), timeout, idle);
        let mut state = waited.expect("a panic aborts").0;
        if !state.woken && state.armed && state.faults > 0 {
            state.faults -= 1;
            let missing = state.map.missing();
            let pages = [missing.first_from(0), missing.last_below(missing.capacity())];
            faults.extend(pages.into_iter().flatten().map(|page| Fault { page, thread: None }));
        }
        Ok(())
    }

    fn wake_waiters(&self) {
        self.lock().woken = true;
        self.changed.notify_all();
    }

    fn install(&self, range: PageRange, copy: PageCopy, fill: Fill<'_>) -> io::Result<Installed> {
        assert!(range.count > 0 && range.first / 512 == (range.end() - 1) / 512, "across stretches: {range:?}");
        let region = RamRegion { gpa: 0, len: range.count * PAGE_SIZE as u64 };
        let aside = HeapRam::new(RamLayout::new(vec![region]).expect("a layout"))?;
        let slice = aside.slice(PageRange::new(0, range.count)).expect("all of it");
        fill(&[slice])?;
        Ok(self.take(range, copy, Some(slice)))
    }

    fn install_zeros(&self, range: PageRange) -> io::Result<Installed> {
        Ok(self.take(range, PageCopy::Source, None))
    }

    fn wake(&self, page: u64) -> io::Result<()> {
        assert!(!self.lock().map.is_missing(page), "page {page} is still missing");
        Ok(())
    }

    fn disarm(&self) -> Result<(), VmError> {
        let mut state = self.lock();
        assert!(state.map.missing().is_empty(), "the watch ends while pages are missing");
        state.armed = false;
        Ok(())
    }

    fn give_up(&self) {
        self.lock().given_up = true;
        self.changed.notify_all();
    }
}
