//! Post-copy at the source: what was left behind is sent, to whoever waits first, and the lost link is waited out.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use bytes::Bytes;

use super::{
    STRIPE_PAGES,
    control::read_frame,
    handle::{Input, PeerInputs, lock},
    lane::{Lane, Work},
    source::{Engine, FIRST_BACK_OFF, MAX_BACK_OFF},
};
use crate::{
    MigrationError, PageRange, PageSet,
    channel::ReadHalf,
    codec::DecodeError,
    protocol::{SourceEvent, SourcePhase},
    strategy::{PushOrder, push_order::DIRTIED},
    wire::{Bulk, Control, HUGE_BLOCK, MAX_BODY, STATE_CHUNK},
};

/// Fewest pages in a push while the guest faults: more, and a demanded page would wait behind them on a slow link; fewer,
/// and they would cost more than they carry.
const LEAST_PUSH: u64 = 16;
/// Pushes that a lane is given ahead, so that it does not idle until the next one is chosen.
const PUSHES_AHEAD: usize = 2;

/// A push takes about so long while the guest faults: a new fault then changes soon what comes next, and a page that is
/// asked for while it is pushed is not far behind. (Measured: with 1 ms, one fault in a hundred beside a push at full rate
/// waits 3 to 4 ms for a page that is on its way already, with this about 1 ms, and the push takes 1.3 times as long.)
const PUSH_TIME: Duration = Duration::from_micros(100);
/// And so long while it does not, on a link that is too slow for a whole block in this time.
const CALM_PUSH_TIME: Duration = Duration::from_millis(4);
/// Pages of a push as long as nothing is known of the link.
const FIRST_PUSH: u64 = 128;
/// Without a fault for so long, the guest has what it works on, and pushes are as large as they can be.
const CALM: Duration = Duration::from_millis(20);

/// The rate of pushes is measured over so long, at least: lanes may be done at the same moment.
const RATE_WINDOW: Duration = Duration::from_millis(5);

/// How much to push at a time.
struct Pace {
    last_fault: Option<Instant>,
    /// Pages that were pushed a second in the last window; 0 before the first one.
    rate: f64,
    /// The present window: its beginning, and pages whose push was done in it.
    since: Instant,
    pages: u64,
    under_way: VecDeque<u64>,
}

impl Pace {
    fn new() -> Self {
        Self { last_fault: None, rate: 0.0, since: Instant::now(), pages: 0, under_way: VecDeque::new() }
    }

    fn is_calm(&self) -> bool {
        self.last_fault.is_none_or(|at| at.elapsed() >= CALM)
    }

    fn most(&self, block: u64) -> u64 {
        if self.rate == 0.0 {
            // nothing is known of the link yet
            return FIRST_PUSH.max(block);
        }
        let time = if self.is_calm() { CALM_PUSH_TIME } else { PUSH_TIME };
        ((self.rate * time.as_secs_f64()) as u64).clamp(LEAST_PUSH, STRIPE_PAGES).max(block)
    }

    fn fault(&mut self) {
        self.last_fault = Some(Instant::now());
    }

    fn pushed(&mut self, pages: u64) {
        if self.under_way.is_empty() {
            // nothing was under way: that time says nothing of the link
            (self.since, self.pages) = (Instant::now(), 0);
        }
        self.under_way.push_back(pages);
    }

    /// A push is done: about the oldest one.
    fn done(&mut self) {
        self.pages += self.under_way.pop_front().unwrap_or(0);
        let time = self.since.elapsed();
        if time >= RATE_WINDOW {
            self.rate = self.pages as f64 / time.as_secs_f64();
            (self.since, self.pages) = (Instant::now(), 0);
        }
    }
}

/// The pages that are still to be sent after the hand-over. Whoever sends one takes it out first, so each moves once.
#[derive(Default)]
pub(super) struct Left {
    pages: Mutex<PageSet>,
    /// The generation as which they move.
    pub(super) generation: AtomicU32,
    /// Pages that move together, aligned: 1, or those of a huge page.
    pub(super) block: AtomicU64,
    /// Pages that were sent because they were asked for, and requests that had some sent. Counted before they go out, so
    /// that all are counted when the destination has them.
    pub(super) demanded: AtomicU64,
    pub(super) requests: AtomicU64,
}

impl Left {
    pub(super) fn set(&self, pages: PageSet) {
        *lock(&self.pages) = pages;
    }

    pub(super) fn pages(&self) -> PageSet {
        lock(&self.pages).clone()
    }

    /// Takes out what is left of the block around `page`; nothing if it was sent.
    fn claim(&self, page: u64) -> Vec<PageRange> {
        let mut pages = lock(&self.pages);
        if !pages.contains(page) {
            return Vec::new();
        }
        let block = self.block.load(Ordering::Relaxed).max(1);
        let around = PageRange::new(page / block * block, block);
        let claimed: Vec<_> = pages.ranges_in(around).collect();
        pages.remove_range(around);
        claimed
    }

    /// Takes out what `order` wants to push next, widened to whole blocks.
    fn next(&self, order: &mut dyn PushOrder, most: u64) -> Option<PageRange> {
        let mut pages = lock(&self.pages);
        let block = self.block.load(Ordering::Relaxed).max(1);
        let wanted = order.next(&pages, most.max(block))?;
        // of a block, what is left of it
        let whole = PageRange::new(wanted.first / block * block, block);
        let range = if block == 1 { wanted } else { pages.ranges_in(whole).next()? };
        pages.remove_range(range);
        Some(range)
    }
}

/// A demand lane at the source: reads requests, and answers them on the spot.
pub(super) struct DemandLane {
    pub(super) lane: Lane,
    pub(super) reader: Box<dyn ReadHalf>,
    pub(super) left: Arc<Left>,
}

impl DemandLane {
    /// Serves until the link ends.
    pub(super) fn run(mut self, inputs: PeerInputs) {
        let mut sequence = 0;
        loop {
            if let Err(error) = self.request(&mut sequence, &inputs) {
                // the engine may be gone: the migration is over
                let _ = inputs.send(Input::Lane(Err(error)));
                return;
            }
        }
    }

    fn request(&mut self, sequence: &mut u32, inputs: &PeerInputs) -> Result<(), MigrationError> {
        let (header, body) = read_frame(&mut *self.reader, sequence, &self.lane.peer)?;
        let generation = self.left.generation.load(Ordering::Acquire);
        let Bulk::Request { pages } = Bulk::decode(&header, &body, self.lane.ram.layout().pages())? else {
            return Err(DecodeError::invalid("kind", "only requests come from a destination").into());
        };
        if header.number != generation || generation == 0 {
            let why = format!("pages of {} are asked for, those of {generation} are left", header.number);
            return Err(DecodeError::invalid("generation", why).into());
        }
        for page in pages {
            let claimed = self.left.claim(page);
            let count: u64 = claimed.iter().map(|range| range.count).sum();
            self.left.demanded.fetch_add(count, Ordering::Relaxed);
            self.left.requests.fetch_add(u64::from(count > 0), Ordering::Relaxed);
            for range in claimed {
                self.lane.push(range, generation)?;
            }
            // as above
            let _ = inputs.send(Input::Demanded(page));
        }
        Ok(())
    }
}

/// A page set on the wire.
pub(crate) fn missing_frames(pages: &PageSet) -> Vec<Control> {
    let words_each = STATE_CHUNK / 8;
    let pieces = pages.words().chunks(words_each).enumerate();
    let with_some = pieces.filter(|(_, words)| words.iter().any(|&word| word != 0));
    let frames = with_some.map(|(i, words)| {
        let bitmap = encode_bitmap(words);
        debug_assert!(bitmap.len() < MAX_BODY);
        Control::Missing { first: (i * words_each * 64) as u64, bitmap }
    });
    frames.collect()
}

/// Words of a page set as they travel.
pub(super) fn encode_bitmap(words: &[u64]) -> Bytes {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// Adds pages from the wire to a set.
pub(crate) fn add_missing(pages: &mut PageSet, first: u64, bitmap: &[u8]) -> Result<(), DecodeError> {
    let words: Vec<u64> =
        bitmap.chunks_exact(8).map(|w| u64::from_le_bytes(w.try_into().unwrap_or_default())).collect();
    let last = words.iter().rposition(|&w| w != 0).map(|i| i as u64 * 64 + 63 - u64::from(words[i].leading_zeros()));
    let Some(last) = last else { return Ok(()) };
    if first.checked_add(last).is_none_or(|last| last >= pages.capacity()) {
        return Err(DecodeError::invalid("bitmap", format!("page {first}+{last} is outside RAM")));
    }
    pages.insert_bitmap(first, last + 1, &words);
    Ok(())
}

impl Engine<'_> {
    /// Widens `missing` to whole blocks, and tells the destination of it.
    pub(super) fn leave_behind(&mut self, mut missing: PageSet) -> Result<(), MigrationError> {
        let block = self.left.block.load(Ordering::Relaxed);
        if block > 1 {
            let blocks: Vec<u64> = missing.ranges().flat_map(|r| r.first / block..=(r.end() - 1) / block).collect();
            for at in blocks {
                missing.insert_range(PageRange::new(at * block, block));
            }
        }
        for frame in missing_frames(&missing) {
            self.say(&frame)?;
        }
        let (end, generation) = self.machine.post_copy(missing.len(), self.report.demand_lanes)?;
        self.say(&end)?;
        self.lacking = missing.len();
        self.missing_pages = self.lacking;
        (self.left_behind, self.never_sent) = (missing.clone(), missing.clone());
        self.touched.union_with(&missing);
        // until the hand-over they are the guest's here, and may have to be given back
        self.owed.union_with(&missing);
        self.left.generation.store(generation, Ordering::Release);
        self.left.set(missing);
        Ok(())
    }

    /// Sends all that was left behind, across as many losses of the link as come.
    pub(super) fn serve_all(&mut self, order: &mut dyn PushOrder) -> Result<(), MigrationError> {
        let dirtied = std::mem::take(&mut self.dirtied_last);
        self.heat_up(&dirtied, DIRTIED);
        order.begin(&lock(&self.left.pages), &self.heat);
        let mut back_off = FIRST_BACK_OFF;
        while self.machine.phase() == SourcePhase::Serving {
            let Err(error) = self.push(order) else { continue };
            if self.machine.phase() != SourcePhase::Serving {
                // the VM has ended
                break;
            }
            let lacked = self.lacking;
            self.reconnect(error.to_string());
            if self.lacking == lacked && self.machine.phase() == SourcePhase::Serving {
                // the links work, but no page arrives on them
                thread::sleep(back_off);
                back_off = (back_off * 2).min(MAX_BACK_OFF);
            } else {
                back_off = FIRST_BACK_OFF;
            }
        }
        self.came_back()
    }

    fn push(&mut self, order: &mut dyn PushOrder) -> Result<(), MigrationError> {
        let block = self.left.block.load(Ordering::Relaxed).max(1);
        let generation = self.left.generation.load(Ordering::Relaxed);
        let mut free: Vec<u16> = (0..self.report.streams).flat_map(|lane| [lane; PUSHES_AHEAD]).collect();
        let ahead = free.len();
        let mut pace = Pace::new();
        while self.machine.phase() == SourcePhase::Serving {
            let most = pace.most(block);
            // while the guest waits, a lane gets its next push only when it is done with the last one
            let least_free = if pace.is_calm() { 0 } else { ahead - ahead / PUSHES_AHEAD };
            while free.len() > least_free
                && let Some(range) = self.left.next(order, most)
                && let Some(lane) = free.pop()
            {
                self.report.pages.pushed += range.count;
                self.report.pages.prepaged += if order.prepaged() { range.count } else { 0 };
                pace.pushed(range.count);
                if let Some(lane) = self.lanes.get(usize::from(lane)) {
                    // a lane that is gone has said why, which arrives as an input
                    let _ = lane.send(Work::Push(range, generation));
                }
            }
            match self.next_input(Instant::now() + Duration::from_secs(3600))? {
                Some(Input::Demanded(page)) => {
                    order.fault(page);
                    pace.fault();
                }
                Some(Input::Lane(Ok(done))) => {
                    pace.done();
                    free.insert(0, done.lane);
                }
                Some(Input::Control(epoch, frame)) => {
                    if let SourceEvent::Complete(summary) = self.frame(epoch, frame)? {
                        self.report.faults.served = summary;
                    }
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// After a reattachment: what the destination still lacks, and new lanes to send it on.
    pub(super) fn resume_serving(&mut self) -> Result<(), MigrationError> {
        let mut missing = PageSet::empty(self.report.pages.total);
        let deadline = Instant::now() + self.options.idle_timeout;
        let expected = loop {
            if let Some(Input::Control(epoch, frame)) = self.next_input(deadline)? {
                match self.frame(epoch, frame)? {
                    SourceEvent::Missing { first, bitmap } => add_missing(&mut missing, first, &bitmap)?,
                    SourceEvent::Resume { missing } => break missing,
                    SourceEvent::Complete(summary) => {
                        self.report.faults.served = summary;
                        return Ok(());
                    }
                    _ => {}
                }
            }
            self.in_time(deadline, "the list of missing pages")?;
        };
        if missing.len() != expected {
            let why = format!("{} are listed, {expected} announced", missing.len());
            return Err(DecodeError::invalid("missing pages", why).into());
        }
        let (never_sent, listed) = (self.never_sent().clone(), &self.left_behind);
        for (of, in_, why) in [
            (&missing, listed, "is said to be missing, and was not left behind"),
            (&never_sent, &missing, "is not said to be missing, and was not sent"),
        ] {
            let mut wrong = of.clone();
            wrong.subtract(in_);
            if let Some(page) = wrong.first_from(0) {
                return Err(DecodeError::invalid("missing pages", format!("page {page} {why}")).into());
            }
        }
        self.lacking = expected;
        let sent = self.report.pages.pushed + self.left.demanded.load(Ordering::Relaxed);
        self.missing_pages = expected.saturating_add(sent);
        self.left.set(missing);
        self.open_lanes()
    }

    /// The pages that were never taken out to be sent. The destination cannot have them, but may have any other: what is under
    /// way when the link is lost may still arrive when the list of missing pages is made, or behind it.
    pub(super) fn never_sent(&mut self) -> &PageSet {
        self.never_sent.intersect_with(&lock(&self.left.pages));
        &self.never_sent
    }

    /// The granularity in which pages are left behind.
    pub(super) fn set_block(&self, whole: bool) {
        self.left.block.store(if whole { HUGE_BLOCK } else { 1 }, Ordering::Relaxed);
    }
}
