//! A pager for memory on the heap: nobody traps on it, so a script says who touches what.

use std::{
    collections::VecDeque,
    io,
    sync::{Arc, Condvar, Mutex, MutexGuard},
    time::Duration,
};

use migration_core::{
    GuestRam, HeapRam, PAGE_SIZE, PageRange, PageSet, RamLayout, RamRegion, RamSlice,
    page_map::PageCopy,
    pager::{Fault, Fill, Installed, Pager},
    shared_map::SharedPageMap,
    vm::VmError,
};

use crate::HANG;

/// What a page holds while it is missing. A page that were taken for zero, or read too early, would
/// show it.
const POISON: u8 = 0xee;

/// How a destination serves missing pages.
#[derive(Clone)]
pub(crate) struct Paging {
    pub(crate) block_pages: u64,
    /// Faults, as one call of `wait` after another returns them once the pager is armed.
    pub(crate) faults: Vec<Vec<u64>>,
    /// Pages that loading the state touches: it waits until they are there.
    pub(crate) touched: Vec<u64>,
}

pub(crate) struct HeapPager {
    ram: Arc<HeapRam>,
    block_pages: u64,
    touched: Vec<u64>,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    /// Where the pages are, once the pager is armed.
    map: Option<Arc<SharedPageMap>>,
    armed: bool,
    faults: VecDeque<Vec<u64>>,
    woken: bool,
    given_up: bool,
    /// How often each page was installed.
    installed: Vec<u32>,
    duplicates: u64,
    /// What the engine must not have asked for.
    broken: Vec<String>,
}

impl State {
    fn missing(&self) -> PageSet {
        self.map.as_ref().map(|map| map.missing()).unwrap_or_default()
    }

    fn is_missing(&self, page: u64) -> bool {
        self.map.as_ref().is_some_and(|map| map.is_missing(page))
    }
}

impl HeapPager {
    pub(crate) fn new(ram: Arc<HeapRam>, paging: &Paging) -> Self {
        let pages = ram.layout().pages();
        let state = State {
            map: None,
            armed: false,
            faults: paging.faults.clone().into(),
            woken: false,
            given_up: false,
            installed: vec![0; pages as usize],
            duplicates: 0,
            broken: Vec::new(),
        };
        let (block_pages, touched) = (paging.block_pages, paging.touched.clone());
        Self { ram, block_pages, touched, state: Mutex::new(state), changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Touches the pages that loading the state needs.
    pub(crate) fn touch(&self) -> Result<(), VmError> {
        let waits = |s: &mut State| !s.given_up && self.touched.iter().any(|&page| s.is_missing(page));
        let (state, waited) = self.changed.wait_timeout_while(self.lock(), HANG, waits).unwrap();
        assert!(!waited.timed_out(), "hangs: a page that loading the state needs");
        if state.given_up { Err(VmError::new("given up while the state was loaded")) } else { Ok(()) }
    }

    /// How many pages came again although they were there, once every missing page has come exactly
    /// once.
    pub(crate) fn check(&self) -> u64 {
        let state = self.lock();
        assert_eq!(state.broken, Vec::<String>::new());
        assert!(!state.given_up, "given up although the VM runs");
        assert!(state.missing().is_empty(), "{:?} are missing", state.missing());
        assert!(!state.armed, "not disarmed");
        assert!(state.installed.iter().all(|&times| times <= 1), "installed twice");
        state.duplicates
    }

    /// Waits until all of `pages` are there.
    pub(crate) fn wait_for(&self, what: &str, mut pages: impl Iterator<Item = u64> + Clone) {
        let waits = |s: &mut State| pages.clone().any(|page| s.is_missing(page));
        let (state, waited) = self.changed.wait_timeout_while(self.lock(), HANG, waits).unwrap();
        let first = pages.find(|&page| state.is_missing(page));
        assert!(!waited.timed_out(), "hangs: page {first:?}, {what}");
    }

    /// How many pages were installed.
    pub(crate) fn installed(&self) -> u64 {
        self.lock().installed.iter().map(|&times| u64::from(times)).sum()
    }

    fn check_range(&self, range: PageRange) -> io::Result<()> {
        let whole = range.first.is_multiple_of(self.block_pages) && range.count.is_multiple_of(self.block_pages);
        if whole && range.count > 0 && range.end() <= self.ram.layout().pages() {
            return Ok(());
        }
        self.lock().broken.push(format!("installs {range:?}"));
        Err(io::ErrorKind::InvalidInput.into())
    }

    /// Takes over what is missing of `range`, whose contents are those of `from`.
    fn take(&self, range: PageRange, copy: PageCopy, from: Option<RamSlice<'_>>) -> Installed {
        let ram = &self.ram;
        let mut installed = Installed { pages: 0, duplicates: range.count };
        let map = self.lock().map.clone().expect("it is armed");
        let Some(mut claim) = map.claim(range, copy).unwrap() else {
            self.lock().duplicates += range.count;
            return installed;
        };
        let mut state = self.lock();
        for page in claim.runs().into_iter().flat_map(PageRange::pages) {
            let mut bytes = [0; PAGE_SIZE];
            if let Some(from) = from {
                from.skip((page - range.first) as usize * PAGE_SIZE).take(PAGE_SIZE).copy_to(&mut bytes);
            }
            ram.slice(PageRange::new(page, 1)).unwrap().copy_from(&bytes);
            state.installed[page as usize] += 1;
            claim.installed(PageRange::new(page, 1));
            installed.pages += 1;
            installed.duplicates -= 1;
        }
        claim.finish();
        state.duplicates += installed.duplicates;
        drop(state);
        self.changed.notify_all();
        installed
    }
}

impl Pager for HeapPager {
    fn block_pages(&self) -> u64 {
        self.block_pages
    }

    fn arm(&self, map: &Arc<SharedPageMap>) -> Result<(), VmError> {
        let missing = map.missing();
        let ram = &self.ram;
        for page in missing.iter() {
            ram.slice(PageRange::new(page, 1)).unwrap().copy_from(&[POISON; PAGE_SIZE]);
        }
        let mut state = self.lock();
        if std::mem::replace(&mut state.armed, true) {
            state.broken.push("armed twice".into());
        }
        state.map = Some(map.clone());
        Ok(())
    }

    fn wait(&self, timeout: Duration, faults: &mut Vec<Fault>) -> Result<(), VmError> {
        let idle = |s: &mut State| !s.woken && (s.faults.is_empty() || !s.armed);
        let mut state = self.changed.wait_timeout_while(self.lock(), timeout, idle).unwrap().0;
        if !state.woken && state.armed {
            let pages = state.faults.pop_front().unwrap_or_default();
            faults.extend(pages.iter().map(|&page| Fault { page, thread: Some(1) }));
        }
        Ok(())
    }

    fn wake_waiters(&self) {
        self.lock().woken = true;
        self.changed.notify_all();
    }

    fn install(&self, range: PageRange, copy: PageCopy, fill: Fill<'_>) -> io::Result<Installed> {
        self.check_range(range)?;
        if range.first / 512 != (range.end() - 1) / 512 {
            self.lock().broken.push(format!("installs {range:?}"));
        }
        let region = RamRegion { gpa: 0, len: range.count * PAGE_SIZE as u64 };
        let aside = HeapRam::new(RamLayout::new(vec![region]).unwrap())?;
        let slice = aside.slice(PageRange::new(0, range.count)).unwrap();
        fill(&[slice])?;
        Ok(self.take(range, copy, Some(slice)))
    }

    fn install_zeros(&self, range: PageRange) -> io::Result<Installed> {
        self.check_range(range)?;
        Ok(self.take(range, PageCopy::Source, None))
    }

    fn wake(&self, page: u64) -> io::Result<()> {
        let mut state = self.lock();
        if state.is_missing(page) {
            state.broken.push(format!("wakes who waits for page {page}, which is missing"));
        }
        Ok(())
    }

    fn disarm(&self) -> Result<(), VmError> {
        let mut state = self.lock();
        if !state.missing().is_empty() {
            state.broken.push("disarmed while pages are missing".into());
        }
        if !std::mem::replace(&mut state.armed, false) {
            state.broken.push("disarmed twice".into());
        }
        Ok(())
    }

    fn give_up(&self) {
        self.lock().given_up = true;
        self.changed.notify_all();
    }
}
