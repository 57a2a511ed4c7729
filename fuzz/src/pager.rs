//! A pager over plain memory, which nobody traps on: it makes up a few faults, and checks what the engine asks of it.

use std::{
    io,
    sync::{Arc, Condvar, Mutex, MutexGuard},
    time::Duration,
};

use migration_core::{
    GuestRam, HeapRam, PAGE_SIZE, PageRange, PageSet, RamLayout, RamRegion, RamSlice,
    pager::{Fault, Fill, Installed, Pager},
    vm::VmError,
};

/// Faults at the beginning, each on the first and the last page that is missing then.
const FAULTS: u32 = 3;

/// See the module.
pub struct PlainPager {
    ram: Arc<HeapRam>,
    granule: u64,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    armed: bool,
    listed: PageSet,
    missing: PageSet,
    faults: u32,
    woken: bool,
    given_up: bool,
}

impl PlainPager {
    /// For this memory, in blocks of `granule` pages.
    pub fn new(ram: Arc<HeapRam>, granule: u64) -> Self {
        let none = PageSet::empty(ram.layout().pages());
        let state =
            State { armed: false, listed: none.clone(), missing: none, faults: FAULTS, woken: false, given_up: false };
        Self { ram, granule, state: Mutex::new(state), changed: Condvar::new() }
    }

    /// Waits for the first page that is missing, as one who loads the state does.
    pub fn touch(&self, patience: Duration) -> Result<(), VmError> {
        let state = self.lock();
        let Some(page) = state.missing.first_from(0) else { return Ok(()) };
        let waits = |s: &mut State| !s.given_up && s.missing.contains(page);
        let (state, waited) = self.changed.wait_timeout_while(state, patience, waits).expect("a panic aborts");
        let there = !waited.timed_out() && !state.given_up;
        if there { Ok(()) } else { Err(VmError::new("a page does not come")) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("a panic aborts")
    }

    fn take(&self, range: PageRange, from: Option<RamSlice<'_>>) -> Installed {
        let ram: &dyn GuestRam = &*self.ram;
        let (mut state, mut installed) = (self.lock(), Installed::default());
        assert!(state.armed || state.missing.is_empty(), "pages before the watch has begun");
        assert_eq!(state.listed.count_in(range), range.count, "pages that are not on the list");
        assert!(range.first % self.granule == 0 && range.count % self.granule == 0, "no whole blocks: {range:?}");
        for page in range.pages() {
            if !state.missing.remove(page) {
                installed.duplicates += 1;
                continue;
            }
            let mut bytes = [0; PAGE_SIZE];
            if let Some(from) = from {
                from.skip((page - range.first) as usize * PAGE_SIZE).take(PAGE_SIZE).copy_to(&mut bytes);
            }
            ram.slice(PageRange::new(page, 1)).expect("a page of the list is in RAM").copy_from(&bytes);
            installed.pages += 1;
        }
        drop(state);
        self.changed.notify_all();
        installed
    }
}

impl Pager for PlainPager {
    fn granule(&self) -> u64 {
        self.granule
    }

    fn arm(&self, missing: &PageSet) -> Result<(), VmError> {
        let mut state = self.lock();
        assert!(!std::mem::replace(&mut state.armed, true), "armed twice");
        assert!(missing.ranges().all(|r| r.end() <= self.ram.layout().pages()), "pages outside RAM are missing");
        (state.listed, state.missing) = (missing.clone(), missing.clone());
        Ok(())
    }

    fn wait(&self, timeout: Duration, faults: &mut Vec<Fault>) -> Result<(), VmError> {
        let idle = |s: &mut State| !s.woken && (s.faults == 0 || !s.armed || s.missing.is_empty());
        let waited = self.changed.wait_timeout_while(self.lock(), timeout, idle);
        let mut state = waited.expect("a panic aborts").0;
        if !state.woken && state.armed && state.faults > 0 {
            state.faults -= 1;
            let pages = [state.missing.first_from(0), state.missing.last_below(state.missing.capacity())];
            faults.extend(pages.into_iter().flatten().map(|page| Fault { page, thread: None }));
        }
        Ok(())
    }

    fn wake_waiters(&self) {
        self.lock().woken = true;
        self.changed.notify_all();
    }

    fn install(&self, range: PageRange, fill: Fill<'_>) -> io::Result<Installed> {
        assert!(range.count > 0 && range.first / 512 == (range.end() - 1) / 512, "across stretches: {range:?}");
        let region = RamRegion { gpa: 0, len: range.count * PAGE_SIZE as u64 };
        let aside = HeapRam::new(RamLayout::new(vec![region]).expect("a layout"))?;
        let slice = (&aside as &dyn GuestRam).slice(PageRange::new(0, range.count)).expect("all of it");
        fill(&[slice])?;
        Ok(self.take(range, Some(slice)))
    }

    fn install_zeros(&self, range: PageRange) -> io::Result<Installed> {
        Ok(self.take(range, None))
    }

    fn wake(&self, page: u64) -> io::Result<()> {
        assert!(!self.lock().missing.contains(page), "page {page} is still missing");
        Ok(())
    }

    fn disarm(&self) -> Result<(), VmError> {
        let mut state = self.lock();
        assert!(state.missing.is_empty(), "the watch ends while pages are missing");
        state.armed = false;
        Ok(())
    }

    fn give_up(&self) {
        self.lock().given_up = true;
        self.changed.notify_all();
    }
}
