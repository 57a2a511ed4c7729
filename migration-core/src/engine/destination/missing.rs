//! Post-copy at the destination: the missing pages, the threads that wait for them, and the pages
//! that were requested from the source.

use std::{
    collections::HashMap,
    io,
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use super::{fetchers::Gatherer, handle::Gathering};
use crate::{
    PAGE_SIZE, PageRange, PageSet, RamLayout,
    channel::WriteHalf,
    codec::DecodeError,
    histogram::Latencies,
    lock::lock,
    page::STRIPE_PAGES,
    page_map::PageCopy,
    paged_memory::FetchError,
    pager::{Fault, Installed, Pager},
    ram::RamSlice,
    shared_map::SharedPageMap,
    store::{Urgency, VersionStore},
    wire::{Bulk, FaultSummary, MAX_REQUESTS},
};

/// The next step in the handling of missing pages.
pub(in crate::engine) enum Turn {
    /// No page is missing any more.
    Complete,
    /// The source has vacated, and waits for an answer.
    Vacated,
    /// The missing pages are not needed any more.
    Over,
}

/// The interval at which a thread that waits for faults checks whether it must end.
const TICK: Duration = Duration::from_millis(200);

/// The missing pages of a VM that is handed over before they are transferred.
pub(in crate::engine) struct Missing {
    pub(in crate::engine) pager: Arc<dyn Pager>,
    /// The generation number under which missing pages are sent and requested.
    pub(in crate::engine) generation: u32,
    /// The location of each page. Only pages that were missing at the hand-over may arrive.
    map: Arc<SharedPageMap>,
    /// Fetches the missing pages that are in stores.
    gatherer: Option<Arc<Gatherer>>,
    state: Mutex<State>,
    /// Notified when no page is missing any more, or when the missing pages are not needed any
    /// more.
    changed: Condvar,
    lanes: Vec<Mutex<Option<Requests>>>,
    ended: AtomicBool,
    bytes: Arc<AtomicU64>,
}

struct State {
    /// The waiting threads, by the number of the block of pages.
    waiting: HashMap<u64, Vec<Waiter>>,
    vcpus: Vec<u32>,
    latencies: Latencies,
    faults: u64,
    vcpu_faults: u64,
    duplicates: u64,
    /// The number of calls of the pager whose results are not recorded yet.
    installing: u32,
    /// Whether the source has vacated, and waits for an answer.
    vacated: bool,
    /// Whether the session is over.
    over: bool,
}

/// A fault whose page is not installed yet.
struct Waiter {
    thread: Option<u32>,
    since: Instant,
}

/// The sending side of a demand lane.
struct Requests {
    writer: Box<dyn WriteHalf>,
    sequence: u32,
}

/// Returns whether a set of pages consists of whole blocks of `block_pages` pages.
pub(in crate::engine) fn is_whole(pages: &PageSet, block_pages: u64) -> bool {
    let whole = |r: PageRange| r.first.is_multiple_of(block_pages) && r.count.is_multiple_of(block_pages);
    block_pages == 1 || pages.ranges().all(whole)
}

impl Missing {
    pub(in crate::engine) fn new(
        pager: Arc<dyn Pager>,
        map: Arc<SharedPageMap>,
        generation: u32,
        lanes: u16,
        bytes: Arc<AtomicU64>,
    ) -> Self {
        let state = State {
            waiting: HashMap::new(),
            vcpus: Vec::new(),
            latencies: Latencies::default(),
            faults: 0,
            vcpu_faults: 0,
            duplicates: 0,
            installing: 0,
            vacated: false,
            over: false,
        };
        Self {
            pager,
            generation,
            map,
            gatherer: None,
            state: Mutex::new(state),
            changed: Condvar::new(),
            lanes: (0..lanes).map(|_| Mutex::default()).collect(),
            ended: AtomicBool::new(false),
            bytes,
        }
    }

    /// Adds the fetcher of pages in stores.
    pub(in crate::engine) fn with_gatherer(self, gatherer: Option<Arc<Gatherer>>) -> Self {
        Self { gatherer, ..self }
    }

    /// Checks the pages of an extent that the source sends. A page that has arrived before is
    /// accepted: the source may send it again after the link was lost.
    ///
    /// # Errors
    /// Returns an error if a page was not missing at the hand-over, or if the pages are not whole
    /// blocks.
    pub(in crate::engine) fn check(&self, range: PageRange) -> Result<(), DecodeError> {
        let block_pages = self.pager.block_pages();
        if self.map.read(|map| map.missing_at_hand_over().count_in(range)) != range.count {
            let why = format!("pages {}+{} were not left behind", range.first, range.count);
            return Err(DecodeError::invalid("extent", why));
        }
        if !range.first.is_multiple_of(block_pages) || !range.count.is_multiple_of(block_pages) {
            let why = format!("pages {}+{} are no whole blocks of {block_pages}", range.first, range.count);
            return Err(DecodeError::invalid("extent", why));
        }
        Ok(())
    }

    /// Returns whether no page is missing, and the result of every installation is recorded.
    pub(in crate::engine) fn is_complete(&self) -> bool {
        self.is_complete_in(&lock(&self.state))
    }

    fn is_complete_in(&self, state: &State) -> bool {
        state.installing == 0 && self.map.read(|map| map.missing().is_empty())
    }

    /// Returns the missing pages.
    pub(in crate::engine) fn pages(&self) -> PageSet {
        self.map.missing()
    }

    pub(in crate::engine) fn set_vcpus(&self, threads: Vec<u32>) {
        lock(&self.state).vcpus = threads;
    }

    /// Returns the number of missing pages, and their locations.
    pub(in crate::engine) fn gathering(&self) -> Gathering {
        // the number of blocks, and not the number of threads that wait for one
        let faults = lock(&self.state).waiting.len() as u64;
        self.map.read(|map| Gathering {
            missing_pages: map.missing().len(),
            source: map.at_source(),
            stores: self.gatherer.as_ref().map(|gatherer| gatherer.stored(map)).unwrap_or_default(),
            faults,
        })
    }

    /// Returns whether a missing page is only at the source.
    pub(in crate::engine) fn needs_source(&self) -> bool {
        self.map.read(|map| map.at_source() > 0)
    }

    /// Attaches a demand lane. Requests on it the pages for which threads wait already.
    ///
    /// # Errors
    /// Returns an error if there is no lane with this index, or if the requests cannot be sent.
    pub(in crate::engine) fn attach(&self, index: u16, writer: Box<dyn WriteHalf>) -> io::Result<()> {
        let Some(lane) = self.lanes.get(usize::from(index)) else { return Err(io::ErrorKind::InvalidInput.into()) };
        *lock(lane) = Some(Requests { writer, sequence: 0 });
        let block_pages = self.pager.block_pages();
        let waiting: Vec<u64> = lock(&self.state).waiting.keys().map(|block| block * block_pages).collect();
        for pages in self.ask(waiting).chunks(MAX_REQUESTS) {
            self.request(usize::from(index), pages.to_vec())?;
        }
        Ok(())
    }

    /// Requests from stores the pages of `pages` that are there. Returns the pages that are to be
    /// requested from the source: the pages that are in no store, and those that the source holds
    /// and whose stores do not answer. Until the VM runs, the pages that the source holds are
    /// requested only from the source (rule 7).
    fn ask(&self, mut pages: Vec<u64>) -> Vec<u64> {
        let Some(gatherer) = &self.gatherer else { return pages };
        pages.retain(|&page| {
            let (copy, held) = self.map.read(|map| (map.copy(page), map.is_held(page)));
            match copy.filter(|_| !held || gatherer.is_running()) {
                None => true,
                Some(copy) => {
                    gatherer.fault(page, copy.entry);
                    held && gatherer.is_silent(copy.entry)
                }
            }
        });
        pages
    }

    /// Requests from stores the pages for which threads wait and that are in stores. Called when
    /// the source will not answer its requests, or not soon (rule 17).
    pub(in crate::engine) fn ask_stores_again(&self) {
        let block_pages = self.pager.block_pages();
        let waiting: Vec<u64> = lock(&self.state).waiting.keys().map(|block| block * block_pages).collect();
        // the pages of the source are requested when there is a demand lane
        self.ask(waiting);
    }

    /// Requests from stores those of the pages `runs` for which threads wait. Called when these
    /// pages have been put into stores.
    pub(in crate::engine) fn ask_stores(&self, runs: &[PageRange]) {
        let (state, block_pages) = (lock(&self.state), self.pager.block_pages());
        let waits = |page: &u64| runs.iter().any(|run| run.pages().contains(page));
        let pages: Vec<u64> = state.waiting.keys().map(|block| block * block_pages).filter(waits).collect();
        drop(state);
        // the source has received requests for these pages before
        self.ask(pages);
    }

    /// Requests from the source those of `pages` for which threads wait. Called when these pages
    /// must come from the source again.
    pub(in crate::engine) fn ask_source(&self, pages: &PageSet) {
        let (state, block_pages) = (lock(&self.state), self.pager.block_pages());
        let waiting = state.waiting.keys().map(|block| block * block_pages);
        let waiting: Vec<u64> = waiting.filter(|&page| pages.contains(page)).collect();
        drop(state);
        for pages in waiting.chunks(MAX_REQUESTS) {
            // without a demand lane, the pages are requested when one is attached
            let _ = self.request(0, pages.to_vec());
        }
    }

    /// Fetches pages of `within` from the stores of `entry`, and installs them.
    pub(in crate::engine) fn fetch(
        &self,
        entry: u8,
        within: PageRange,
        urgency: Urgency,
        deadline: Instant,
    ) -> Result<Installed, FetchError> {
        let Some(gatherer) = &self.gatherer else { return Ok(Installed::default()) };
        self.install(within, |_| gatherer.memory.fetch_entry(entry, within, urgency, deadline))
    }

    /// Records that the source has vacated, and that all data that it has sent before on bulk lanes
    /// was read.
    pub(in crate::engine) fn vacated(&self) {
        lock(&self.state).vacated = true;
        self.changed.notify_all();
    }

    /// Waits for the next step. A *vacated* is returned when every page that was requested from the
    /// source has arrived. `was_complete` is whether [`Turn::Complete`] was returned before.
    pub(in crate::engine) fn wait_turn(&self, was_complete: bool) -> Turn {
        let mut state = lock(&self.state);
        loop {
            let ended = self.ended.load(Ordering::Acquire) && !was_complete;
            if ended && self.is_complete_in(&state) {
                return Turn::Complete;
            }
            // when the last page has arrived, a lane may still be dropping a page that was sent
            // twice
            let is_being_dropped = ended && self.map.read(|map| map.missing().is_empty());
            if ended && !is_being_dropped || state.over {
                return Turn::Over;
            }
            if state.vacated && !self.is_asked(&state) {
                state.vacated = false;
                return Turn::Vacated;
            }
            state = self.changed.wait_timeout(state, TICK).unwrap_or_else(|e| e.into_inner()).0;
        }
    }

    /// Returns whether a thread waits for a page that is not in a store.
    fn is_asked(&self, state: &State) -> bool {
        let block_pages = self.pager.block_pages();
        let mut pages = state.waiting.keys().map(|block| block * block_pages);
        self.map.read(|map| pages.any(|page| map.missing().contains(page) && !map.in_store().contains(page)))
    }

    /// Waits for faults and requests their pages, until no page is missing or the missing pages are
    /// not needed any more. `number` is the number of the calling thread, and selects its demand
    /// lane.
    pub(in crate::engine) fn watch(&self, number: usize) -> Result<(), crate::vm::VmError> {
        let mut faults = Vec::new();
        while !self.ended.load(Ordering::Acquire) {
            faults.clear();
            self.pager.wait(TICK, &mut faults)?;
            if faults.is_empty() {
                continue;
            }
            let wanted = self.note(&faults);
            for pages in wanted.chunks(MAX_REQUESTS) {
                // without a demand lane, the guest waits until one is attached: then all pages for
                // which threads wait are requested
                let _ = self.request(number % self.lanes.len().max(1), pages.to_vec());
            }
        }
        Ok(())
    }

    /// Records faults. Returns the pages that are to be requested from the source.
    fn note(&self, faults: &[Fault]) -> Vec<u64> {
        let (now, block_pages) = (Instant::now(), self.pager.block_pages());
        let mut wanted = Vec::new();
        let mut state = lock(&self.state);
        for fault in faults {
            if fault.thread.is_some()
                && let Some(waits) = state.waiting.get(&(fault.page / block_pages))
                && waits.iter().any(|waiter| waiter.thread == fault.thread)
            {
                // a signal has interrupted the wait of this thread, for a pause or a checkpoint,
                // and the thread has returned to it: it is the same fault
                continue;
            }
            state.faults += 1;
            let by_vcpu = fault.thread.is_some_and(|thread| state.vcpus.contains(&thread));
            state.vcpu_faults += u64::from(by_vcpu);
            if !self.map.is_missing(fault.page) {
                state.latencies.record(Duration::ZERO);
                // the page was installed after the fault was read; if this fails, the page is not
                // there, and the next fault reports that
                let _ = self.pager.wake(fault.page);
                continue;
            }
            let waits = state.waiting.entry(fault.page / block_pages).or_default();
            if waits.is_empty() {
                wanted.push(fault.page);
            }
            waits.push(Waiter { thread: fault.thread, since: now });
        }
        drop(state);
        self.ask(wanted)
    }

    fn request(&self, lane: usize, pages: Vec<u64>) -> io::Result<()> {
        let lost = || io::Error::from(io::ErrorKind::NotConnected);
        let mut guard = lock(self.lanes.get(lane).ok_or_else(lost)?);
        let lane = guard.as_mut().ok_or_else(lost)?;
        let bytes = Bulk::Request { pages }.encode(0, lane.sequence, self.generation);
        lane.sequence = lane.sequence.wrapping_add(1);
        let sent = lane.writer.write_all(&bytes, &[]);
        if sent.is_err() {
            *guard = None;
        } else {
            self.bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        }
        sent
    }

    /// Lets the pager install pages of `range` by `work`, and records the result.
    ///
    /// # Errors
    /// Returns the error of `work`. Some of the pages may be installed nevertheless.
    pub(in crate::engine) fn install<E>(
        &self,
        range: PageRange,
        work: impl FnOnce(&dyn Pager) -> Result<Installed, E>,
    ) -> Result<Installed, E> {
        lock(&self.state).installing += 1;
        let result = work(&*self.pager);
        let mut state = lock(&self.state);
        state.installing -= 1;
        state.duplicates += result.as_ref().map_or(0, |installed| installed.duplicates);
        self.serve_waiters(&mut state, range);
        let (complete, vacated) = (self.is_complete_in(&state), state.vacated);
        drop(state);
        if vacated {
            self.changed.notify_all();
        }
        if complete {
            self.end();
        }
        result
    }

    /// Removes the waiting threads whose pages of `range` are installed now, and records their
    /// latencies.
    fn serve_waiters(&self, state: &mut State, range: PageRange) {
        if state.waiting.is_empty() {
            return;
        }
        let (now, block_pages) = (Instant::now(), self.pager.block_pages());
        let blocks = range.first / block_pages..range.end().div_ceil(block_pages);
        let is_here = |block: &u64| {
            let pages = PageRange::new(block * block_pages, block_pages);
            self.map.read(|map| map.missing().first_in(pages).is_none())
        };
        let State { waiting, latencies, .. } = state;
        let mut served = |waits: Vec<Waiter>| waits.iter().for_each(|w| latencies.record(now - w.since));
        // searches the shorter one: the range, or the list of blocks for which threads wait
        let found: Vec<u64> = if (waiting.len() as u64) < range.count {
            waiting.keys().copied().filter(|block| blocks.contains(block)).filter(is_here).collect()
        } else {
            blocks.filter(|block| waiting.contains_key(block)).filter(is_here).collect()
        };
        found.iter().filter_map(|block| waiting.remove(block)).for_each(&mut served);
    }

    /// Installs every missing page from the store into which its source has put it. Pages that the
    /// store does not have are installed as zeros.
    pub(in crate::engine) fn fill(&self, layout: &RamLayout, store: &mut dyn VersionStore) -> io::Result<()> {
        let mut block = vec![0; STRIPE_PAGES as usize * PAGE_SIZE];
        let mut at = None;
        store.restore(&mut |page, data| {
            let stripe = page / STRIPE_PAGES;
            if at.is_some_and(|at| at != stripe) {
                self.fill_stripe(layout, at, &block)?;
                block.fill(0);
            }
            at = Some(stripe);
            if let Some(data) = data {
                let offset = (page % STRIPE_PAGES) as usize * PAGE_SIZE;
                block[offset..offset + PAGE_SIZE].copy_from_slice(data);
            }
            Ok(())
        })?;
        self.fill_stripe(layout, at, &block)?;
        for range in self.pages().ranges() {
            self.install(range, |pager| pager.install_zeros(range))?;
        }
        Ok(())
    }

    fn fill_stripe(&self, layout: &RamLayout, stripe: Option<u64>, block: &[u8]) -> io::Result<()> {
        let Some(stripe) = stripe else { return Ok(()) };
        let within = PageRange::new(stripe.saturating_mul(STRIPE_PAGES), STRIPE_PAGES);
        for run in self.pages().ranges_in(within) {
            for (_, _, range) in layout.split(run) {
                let mut from = (range.first % STRIPE_PAGES) as usize * PAGE_SIZE;
                let mut fill = |slices: &[RamSlice<'_>]| {
                    for slice in slices {
                        slice.copy_from(&block[from..from + slice.len()]);
                        from += slice.len();
                    }
                    Ok(())
                };
                self.install(range, |pager| pager.install(range, PageCopy::Source, &mut fill))?;
            }
        }
        Ok(())
    }

    /// Ends the handling of faults, because no page is missing, or because the missing pages are
    /// not needed any more.
    pub(in crate::engine) fn end(&self) {
        self.ended.store(true, Ordering::Release);
        // locks the state once, so that no thread misses the change between its check and its wait
        drop(lock(&self.state));
        self.changed.notify_all();
        self.pager.wake_waiters();
        if let Some(gatherer) = &self.gatherer {
            gatherer.end();
        }
    }

    /// Ends the handling of missing pages, because the session is over.
    pub(in crate::engine) fn close(&self) {
        lock(&self.state).over = true;
        self.end();
    }

    /// Waits for at most `time` until the handling of faults has ended. Returns whether it has.
    pub(in crate::engine) fn wait_ended_for(&self, time: Duration) -> bool {
        let running = |_: &mut State| !self.ended.load(Ordering::Acquire);
        let waited = self.changed.wait_timeout_while(lock(&self.state), time, running);
        drop(waited.unwrap_or_else(|e| e.into_inner()));
        self.ended.load(Ordering::Acquire)
    }

    pub(in crate::engine) fn summary(&self) -> FaultSummary {
        let state = lock(&self.state);
        let us = |q: f64| state.latencies.quantile(q).map_or(0, |d| d.as_micros() as u64);
        FaultSummary {
            count: state.faults,
            vcpu: state.vcpu_faults,
            p50_us: us(0.5),
            p90_us: us(0.9),
            p99_us: us(0.99),
            p999_us: us(0.999),
            max_us: state.latencies.max().map_or(0, |d| d.as_micros() as u64),
            duplicates: state.duplicates,
        }
    }
}

#[cfg(test)]
pub(in crate::engine) mod tests {
    use super::*;
    use crate::{
        GuestRam, HeapRam, RamRegion, RamSlice,
        page_map::{PageCopy, PageMap},
        pager::Fill,
        store::MemoryVersions,
        vm::VmError,
        wire::Header,
    };

    /// A pager of RAM on the heap. No guest waits for its missing pages.
    pub(in crate::engine) struct HeapPager {
        ram: HeapRam,
        map: Arc<SharedPageMap>,
        block_pages: u64,
        /// The results of the calls of `wait`. The last element is returned first.
        faults: Mutex<Vec<Vec<Fault>>>,
        woken: Mutex<Vec<u64>>,
    }

    impl Pager for HeapPager {
        fn block_pages(&self) -> u64 {
            self.block_pages
        }

        fn arm(&self, _: &Arc<SharedPageMap>) -> Result<(), VmError> {
            unreachable!()
        }

        fn wait(&self, _timeout: Duration, faults: &mut Vec<Fault>) -> Result<(), VmError> {
            let next = lock(&self.faults).pop();
            faults.extend(next.ok_or_else(|| VmError::new("no more faults"))?);
            Ok(())
        }

        fn wake_waiters(&self) {}

        fn install(&self, range: PageRange, _: PageCopy, fill: Fill<'_>) -> io::Result<Installed> {
            // in two slices if the range has more than one page
            let slice = self.ram.slice(range).unwrap();
            fill(&[slice.take(PAGE_SIZE), slice.skip(PAGE_SIZE)])?;
            arrived(&self.map, range);
            Ok(Installed { pages: range.count, duplicates: 0 })
        }

        fn install_zeros(&self, range: PageRange) -> io::Result<Installed> {
            self.ram.slice(range).unwrap().zero();
            arrived(&self.map, range);
            Ok(Installed { pages: range.count, duplicates: 0 })
        }

        fn wake(&self, page: u64) -> io::Result<()> {
            lock(&self.woken).push(page);
            Ok(())
        }

        fn disarm(&self) -> Result<(), VmError> {
            unreachable!()
        }

        fn give_up(&self) {
            unreachable!()
        }
    }

    /// The pages that were requested on a lane, with the sequence number of each frame.
    #[derive(Clone, Default)]
    struct Asked(Arc<Mutex<Frames>>);

    type Frames = Vec<(u32, Vec<u64>)>;

    impl WriteHalf for Asked {
        fn write_all(&mut self, head: &[u8], _: &[RamSlice<'_>]) -> io::Result<()> {
            let (header, body) = head.split_first_chunk().unwrap();
            let header = Header::decode(header).unwrap();
            let Bulk::Request { pages } = Bulk::decode(&header, body, PAGES).unwrap() else { panic!("no request") };
            assert_eq!(header.number, GENERATION);
            lock(&self.0).push((header.sequence, pages));
            Ok(())
        }

        fn set_idle_timeout(&mut self, _: Option<Duration>) -> io::Result<()> {
            Ok(())
        }
    }

    const PAGES: u64 = 2 * STRIPE_PAGES;
    const GENERATION: u32 = 7;

    pub(in crate::engine) fn missing(block_pages: u64, pages: &[(u64, u64)]) -> (Missing, Arc<HeapPager>) {
        let border = STRIPE_PAGES + 8;
        let regions =
            vec![RamRegion { gpa: 0, len: border << 12 }, RamRegion { gpa: 1 << 40, len: (PAGES - border) << 12 }];
        let ram = HeapRam::new(RamLayout::new(regions).unwrap()).unwrap();
        let mut set = PageSet::empty(PAGES);
        pages.iter().for_each(|&(first, count)| set.insert_range(PageRange::new(first, count)));
        let mut map = PageMap::new(PAGES);
        map.leave_behind(&set).unwrap();
        let map = Arc::new(SharedPageMap::new(map));
        let (faults, woken) = (Mutex::default(), Mutex::default());
        let pager = Arc::new(HeapPager { ram, map: map.clone(), block_pages, faults, woken });
        (Missing::new(pager.clone(), map, GENERATION, 2, Arc::default()), pager)
    }

    /// Records pages as installed, together with the result of the installation.
    pub(in crate::engine) fn arrive(missing: &Missing, range: PageRange, installed: Installed) {
        let recorded: io::Result<_> = missing.install(range, |_| {
            arrived(&missing.map, range);
            Ok(installed)
        });
        recorded.unwrap();
    }

    /// Records pages as installed.
    pub(in crate::engine) fn arrived(map: &SharedPageMap, range: PageRange) {
        if let Some(mut claim) = map.claim(range, PageCopy::Source).unwrap() {
            claim.runs().into_iter().for_each(|run| claim.installed(run));
        }
    }

    fn fault(page: u64, thread: u32) -> Fault {
        Fault { page, thread: (thread != 0).then_some(thread) }
    }

    #[test]
    fn a_fault_is_asked_for_once_and_counted_for_each_who_waits() {
        let (missing, pager) = missing(4, &[(0, 12)]);
        missing.set_vcpus(vec![1, 2]);
        assert_eq!(missing.note(&[fault(5, 1), fault(9, 3)]), [5, 9]);
        // a second thread, in the same block; the same thread, which a signal has woken; and
        // unidentified threads
        assert_eq!(missing.note(&[fault(6, 2), fault(5, 1), fault(6, 0), fault(6, 0)]), [0u64; 0]);
        let summary = missing.summary();
        assert_eq!((summary.count, summary.vcpu), (5, 2));
        assert_eq!(lock(&missing.state).waiting.values().map(Vec::len).sum::<usize>(), 5);

        // the range is first longer and then shorter than the list of blocks
        arrive(&missing, PageRange::new(4, 4), Installed { pages: 4, duplicates: 0 });
        assert_eq!(lock(&missing.state).waiting.keys().copied().collect::<Vec<_>>(), [2]);
        assert_eq!(lock(&missing.state).latencies.count(), 4);
        assert_eq!(missing.note(&[fault(0, 1), fault(1, 2)]), [0]);
        arrive(&missing, PageRange::new(8, 4), Installed { pages: 2, duplicates: 2 });
        assert_eq!(lock(&missing.state).waiting.keys().copied().collect::<Vec<_>>(), [0]);

        // the page of this fault has arrived before the fault was read
        assert_eq!(missing.note(&[fault(5, 1)]), [0u64; 0]);
        assert_eq!(*lock(&pager.woken), [5]);
        let summary = missing.summary();
        assert_eq!((summary.count, summary.vcpu, summary.duplicates), (8, 5, 2));
        arrive(&missing, PageRange::new(8, 4), Installed { pages: 0, duplicates: 2 });
        assert_eq!(missing.summary().duplicates, 4);
        assert!(missing.pages().iter().eq(0..4) && !missing.wait_ended_for(Duration::ZERO));
        arrive(&missing, PageRange::new(0, 4), Installed::default());
        assert!(lock(&missing.state).waiting.is_empty());
        assert!(
            missing.wait_ended_for(Duration::from_secs(3600)) && matches!(missing.wait_turn(false), Turn::Complete)
        );
    }

    #[test]
    fn each_thread_asks_on_its_lane_and_a_lane_that_comes_late_catches_up() {
        let (missing, pager) = missing(4, &[(0, 40)]);
        missing.note(&[fault(5, 1)]);
        let lanes = [Asked::default(), Asked::default()];
        for (index, lane) in lanes.iter().enumerate() {
            missing.attach(index as u16, Box::new(lane.clone())).unwrap();
            assert_eq!(*lock(&lane.0), [(0, vec![4])]);
        }
        assert!(missing.attach(2, Box::new(lanes[0].clone())).is_err());
        for (number, page) in [(0, 1), (1, 13), (3, 17)] {
            *lock(&pager.faults) = vec![vec![fault(8, number as u32)], vec![], vec![fault(page, number as u32)]];
            assert!(missing.watch(number).is_err(), "the pager has no more");
            arrive(&missing, PageRange::new(page / 4 * 4, 4), Installed::default());
            arrive(&missing, PageRange::new(8, 4), Installed::default());
        }
        assert_eq!(*lock(&lanes[0].0), [(0, vec![4]), (1, vec![1]), (2, vec![8])]);
        assert_eq!(*lock(&lanes[1].0), [(0, vec![4]), (1, vec![13]), (2, vec![17])]);
        // six requests for one page each
        assert_eq!(missing.bytes.load(Ordering::Relaxed), 6 * (Header::LEN as u64 + 4 + 8));
        missing.end();
        missing.watch(0).unwrap();
    }

    #[test]
    fn what_a_failed_install_has_brought_is_recorded() {
        let (missing, _) = missing(1, &[(0, 8)]);
        missing.note(&[fault(1, 1), fault(6, 2)]);
        let failed: io::Result<_> = missing.install(PageRange::new(0, 8), |_| {
            arrived(&missing.map, PageRange::new(0, 4));
            assert!(!missing.is_complete());
            Err(io::ErrorKind::OutOfMemory.into())
        });
        assert_eq!(failed.unwrap_err().kind(), io::ErrorKind::OutOfMemory);
        assert_eq!(lock(&missing.state).waiting.keys().copied().collect::<Vec<_>>(), [6]);
        assert_eq!(lock(&missing.state).latencies.count(), 1);
        let last: io::Result<_> = missing.install(PageRange::new(4, 4), |_| {
            arrived(&missing.map, PageRange::new(4, 4));
            // no page is missing, but the result of the installation is not recorded
            assert!(missing.pages().is_empty() && !missing.is_complete());
            Err(io::ErrorKind::Other.into())
        });
        assert!(last.is_err() && missing.is_complete() && matches!(missing.wait_turn(false), Turn::Complete));
    }

    #[test]
    fn a_set_is_whole_when_each_of_its_runs_is() {
        for (runs, block_pages, whole) in [
            (&[(0, 4), (8, 8)][..], 4, true),
            (&[(0, 4), (8, 9)], 4, false),
            (&[(2, 4)], 4, false),
            (&[(3, 5), (9, 1)], 1, true),
            (&[], 512, true),
        ] {
            let mut set = PageSet::empty(100);
            runs.iter().for_each(|&(first, count)| set.insert_range(PageRange::new(first, count)));
            assert_eq!(is_whole(&set, block_pages), whole, "{runs:?} {block_pages}");
        }
    }

    #[test]
    fn only_whole_blocks_that_were_left_behind_may_come() {
        let (missing, _) = missing(4, &[(0, 12), (16, 2)]);
        for (first, count, good) in
            [(0, 4, true), (8, 4, true), (8, 8, false), (12, 4, false), (0, 2, false), (2, 4, false), (16, 2, false)]
        {
            assert_eq!(missing.check(PageRange::new(first, count)).is_ok(), good, "{first}+{count}");
        }
        arrive(&missing, PageRange::new(0, 4), Installed::default());
        assert!(missing.check(PageRange::new(0, 4)).is_ok(), "again, behind a link that was lost");
    }

    #[test]
    fn a_store_fills_what_is_missing_and_nothing_else() {
        let (all, border) = (0..PAGES, STRIPE_PAGES + 8);
        let gone = [(0, 3), (5, 1), (STRIPE_PAGES - 2, 4), (border - 3, 6), (PAGES - 1, 1)];
        let (missing, pager) = missing(1, &gone);
        let lost = missing.pages();
        let ram = &pager.ram;
        all.clone().for_each(|page| ram.slice(PageRange::new(page, 1)).unwrap().copy_from(&[0xee; PAGE_SIZE]));
        let mut store = MemoryVersions::default();
        // the store also has pages that are not missing, has some pages as zeros, and lacks some
        // missing ones
        let kept = |page: u64| page % 7 != 5;
        let of = |page: u64| if page % 5 == 1 { 0 } else { page as u8 | 1 };
        for page in all.clone().filter(|&page| kept(page)) {
            store.put(page, (of(page) != 0).then_some(&[of(page); PAGE_SIZE])).unwrap();
        }
        store.commit(1, Default::default()).unwrap();
        missing.fill(pager.ram.layout(), &mut store).unwrap();
        for page in all {
            let mut bytes = [0; PAGE_SIZE];
            ram.slice(PageRange::new(page, 1)).unwrap().copy_to(&mut bytes);
            let want = if !lost.contains(page) {
                0xee
            } else if kept(page) {
                of(page)
            } else {
                0
            };
            assert_eq!(bytes, [want; PAGE_SIZE], "page {page}");
        }
        assert!(missing.pages().is_empty() && matches!(missing.wait_turn(false), Turn::Complete));
    }
}
