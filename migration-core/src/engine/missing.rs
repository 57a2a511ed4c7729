//! Post-copy at the destination: which pages are missing, who waits for them, and what was asked of the source.

use std::{
    collections::HashMap,
    io,
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use super::{STRIPE_PAGES, handle::lock};
use crate::{
    PAGE_SIZE, PageRange, PageSet, RamLayout,
    channel::WriteHalf,
    checkpoint::CheckpointStore,
    codec::DecodeError,
    histogram::Latencies,
    pager::{Fault, Installed, Pager},
    wire::{Bulk, FaultSummary, MAX_REQUESTS},
};

/// How often a thread that waits for faults looks whether it shall end.
const TICK: Duration = Duration::from_millis(200);

/// The missing pages of a VM that is handed over before they have moved.
pub(super) struct Missing {
    pub(super) pager: Arc<dyn Pager>,
    /// The generation as which they move.
    pub(super) generation: u32,
    /// All pages that were missing at the hand-over: no other may come.
    listed: PageSet,
    state: Mutex<State>,
    /// Told when no page is missing any more, or nobody wants them.
    changed: Condvar,
    lanes: Vec<Mutex<Option<Requests>>>,
    ended: AtomicBool,
    bytes: Arc<AtomicU64>,
}

struct State {
    pages: PageSet,
    /// Who waits, by block.
    waiting: HashMap<u64, Vec<Waiter>>,
    vcpus: Vec<u32>,
    latencies: Latencies,
    faults: u64,
    vcpu_faults: u64,
    duplicates: u64,
}

/// A fault that is not served yet.
struct Waiter {
    thread: Option<u32>,
    since: Instant,
}

/// The sending side of a demand lane.
struct Requests {
    writer: Box<dyn WriteHalf>,
    sequence: u32,
}

impl Missing {
    pub(super) fn new(
        pager: Arc<dyn Pager>,
        pages: PageSet,
        generation: u32,
        lanes: u16,
        bytes: Arc<AtomicU64>,
    ) -> Self {
        let listed = pages.clone();
        let state = State {
            pages,
            waiting: HashMap::new(),
            vcpus: Vec::new(),
            latencies: Latencies::default(),
            faults: 0,
            vcpu_faults: 0,
            duplicates: 0,
        };
        Self {
            pager,
            generation,
            listed,
            state: Mutex::new(state),
            changed: Condvar::new(),
            lanes: (0..lanes).map(|_| Mutex::default()).collect(),
            ended: AtomicBool::new(false),
            bytes,
        }
    }

    /// Checks pages that the source sends. One that has arrived before may come again, behind a link that was lost.
    pub(super) fn check(&self, range: PageRange) -> Result<(), DecodeError> {
        let granule = self.pager.granule();
        if self.listed.count_in(range) != range.count {
            let why = format!("pages {}+{} were not left behind", range.first, range.count);
            return Err(DecodeError::invalid("extent", why));
        }
        if !range.first.is_multiple_of(granule) || !range.count.is_multiple_of(granule) {
            let why = format!("pages {}+{} are no whole blocks of {granule}", range.first, range.count);
            return Err(DecodeError::invalid("extent", why));
        }
        Ok(())
    }

    pub(super) fn pages(&self) -> PageSet {
        lock(&self.state).pages.clone()
    }

    pub(super) fn set_vcpus(&self, threads: Vec<u32>) {
        lock(&self.state).vcpus = threads;
    }

    /// A demand lane is there. Whoever has waited without one is asked for on it.
    pub(super) fn attach(&self, index: u16, writer: Box<dyn WriteHalf>) -> io::Result<()> {
        let Some(lane) = self.lanes.get(usize::from(index)) else { return Err(io::ErrorKind::InvalidInput.into()) };
        *lock(lane) = Some(Requests { writer, sequence: 0 });
        let waiting: Vec<u64> = lock(&self.state).waiting.keys().copied().collect();
        let granule = self.pager.granule();
        for blocks in waiting.chunks(MAX_REQUESTS) {
            self.request(usize::from(index), blocks.iter().map(|block| block * granule).collect())?;
        }
        Ok(())
    }

    /// Waits for faults and asks for their pages, until none is missing or nobody wants them. `number` tells the threads
    /// that do so apart.
    pub(super) fn watch(&self, number: usize) -> Result<(), crate::vm::VmError> {
        let mut faults = Vec::new();
        while !self.ended.load(Ordering::Acquire) {
            faults.clear();
            self.pager.wait(TICK, &mut faults)?;
            if faults.is_empty() {
                continue;
            }
            let wanted = self.note(&faults);
            for pages in wanted.chunks(MAX_REQUESTS) {
                // without a lane the guest waits until there is one: it then asks for all that waits
                let _ = self.request(number % self.lanes.len().max(1), pages.to_vec());
            }
        }
        Ok(())
    }

    /// Records faults; those whose pages have to be asked for.
    fn note(&self, faults: &[Fault]) -> Vec<u64> {
        let (now, granule) = (Instant::now(), self.pager.granule());
        let mut wanted = Vec::new();
        let mut state = lock(&self.state);
        for fault in faults {
            if fault.thread.is_some()
                && let Some(waits) = state.waiting.get(&(fault.page / granule))
                && waits.iter().any(|waiter| waiter.thread == fault.thread)
            {
                // a signal took it out of its wait, for a pause or a checkpoint, and it came back: the same fault
                continue;
            }
            state.faults += 1;
            let by_vcpu = fault.thread.is_some_and(|thread| state.vcpus.contains(&thread));
            state.vcpu_faults += u64::from(by_vcpu);
            if !state.pages.contains(fault.page) {
                state.latencies.record(Duration::ZERO);
                // it came after the fault was read; if this fails the page is not there, and the next fault tells
                let _ = self.pager.wake(fault.page);
                continue;
            }
            let waits = state.waiting.entry(fault.page / granule).or_default();
            if waits.is_empty() {
                wanted.push(fault.page);
            }
            waits.push(Waiter { thread: fault.thread, since: now });
        }
        wanted
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

    /// Pages of `range` were installed.
    pub(super) fn arrived(&self, range: PageRange, installed: Installed) {
        let granule = self.pager.granule();
        let mut state = lock(&self.state);
        state.duplicates += installed.duplicates;
        state.pages.remove_range(range);
        if !state.waiting.is_empty() {
            let now = Instant::now();
            let blocks = range.first / granule..=(range.end().max(range.first + 1) - 1) / granule;
            let State { waiting, latencies, .. } = &mut *state;
            let mut served = |waits: Vec<Waiter>| waits.iter().for_each(|w| latencies.record(now - w.since));
            // whichever is shorter: the range or the list of those who wait
            if (waiting.len() as u64) < range.count {
                let found: Vec<u64> = waiting.keys().copied().filter(|block| blocks.contains(block)).collect();
                found.iter().filter_map(|block| waiting.remove(block)).for_each(&mut served);
            } else {
                blocks.filter_map(|block| waiting.remove(&block)).for_each(&mut served);
            }
        }
        if state.pages.is_empty() {
            drop(state);
            self.end();
        }
    }

    /// Installs every missing page from the store that its source has put it into, those that it does not have as zeros.
    pub(super) fn fill(&self, layout: &RamLayout, store: &mut dyn CheckpointStore) -> io::Result<()> {
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
            let installed = self.pager.install_zeros(range)?;
            self.arrived(range, installed);
        }
        Ok(())
    }

    fn fill_stripe(&self, layout: &RamLayout, stripe: Option<u64>, block: &[u8]) -> io::Result<()> {
        let Some(stripe) = stripe else { return Ok(()) };
        let within = PageRange::new(stripe.saturating_mul(STRIPE_PAGES), STRIPE_PAGES);
        for run in self.pages().ranges_in(within) {
            for (_, _, range) in layout.split(run) {
                let mut from = (range.first % STRIPE_PAGES) as usize * PAGE_SIZE;
                let installed = self.pager.install(range, &mut |slices| {
                    for slice in slices {
                        slice.copy_from(&block[from..from + slice.len()]);
                        from += slice.len();
                    }
                    Ok(())
                })?;
                self.arrived(range, installed);
            }
        }
        Ok(())
    }

    /// Ends the watch: all is here, or nobody wants it any more.
    pub(super) fn end(&self) {
        self.ended.store(true, Ordering::Release);
        // under the lock, so that nobody misses it between a look and its wait
        drop(lock(&self.state));
        self.changed.notify_all();
        self.pager.wake_waiters();
    }

    /// Waits until the watch has ended; whether no page is missing.
    pub(super) fn wait_ended(&self) -> bool {
        let mut state = lock(&self.state);
        while !self.ended.load(Ordering::Acquire) {
            state = self.changed.wait_timeout(state, TICK).unwrap_or_else(|e| e.into_inner()).0;
        }
        state.pages.is_empty()
    }

    /// Waits so long at most; whether the watch has ended.
    pub(super) fn wait_ended_for(&self, time: Duration) -> bool {
        let running = |_: &mut State| !self.ended.load(Ordering::Acquire);
        let waited = self.changed.wait_timeout_while(lock(&self.state), time, running);
        drop(waited.unwrap_or_else(|e| e.into_inner()));
        self.ended.load(Ordering::Acquire)
    }

    pub(super) fn summary(&self) -> FaultSummary {
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
