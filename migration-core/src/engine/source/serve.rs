//! Post-copy at the source: streams the remaining pages to the destination, demanded pages first,
//! and reconnects after a loss of the link.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicU32, AtomicU64, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use super::{Engine, FIRST_BACK_OFF, MAX_BACK_OFF, fetcher::Fetcher};
use crate::{
    MigrationError, PageRange, PageSet,
    channel::ReadHalf,
    codec::DecodeError,
    engine::{
        control::read_frame,
        handle::{Input, PeerInputs},
        lane::{Lane, Work},
    },
    lock::lock,
    page::STRIPE_PAGES,
    page_map::{MapError, PageMap},
    protocol::{SourceEvent, SourcePhase},
    report::Event,
    strategy::{
        Linear, PushOrder,
        push_order::{DIRTIED, OrderError, checked_next},
    },
    text::describe,
    wire::{Bulk, HUGE_BLOCK, Header, add_missing, missing_frames},
};

/// The fewest pages in a push while the guest faults. With more, a demanded page would wait longer
/// behind them on a slow link. With fewer, the cost of a push would exceed its benefit.
const LEAST_PUSH: u64 = 16;
/// The number of pushes that are queued on a lane, so that it does not idle until the next one is
/// chosen.
const PUSHES_AHEAD: usize = 2;

/// The time that a push should take while the guest faults. It is short, so that a new fault soon
/// affects what is pushed next, and so that a page that is demanded while it is pushed arrives
/// soon. (Measured: with 1 ms, one fault in a hundred during a push at full rate waits 3 to 4 ms
/// for a page that is being sent already. With this value it waits about 1 ms, and the push takes
/// 1.3 times as long.)
const PUSH_TIME: Duration = Duration::from_micros(100);
/// The time that a push should take while the guest does not fault, on a link that is too slow for
/// a whole stripe in this time.
const CALM_PUSH_TIME: Duration = Duration::from_millis(4);
/// The number of pages of a push before the rate of the link is known.
const FIRST_PUSH: u64 = 128;
/// The time without a fault after which the guest is taken to have its working set. Pushes are as
/// large as possible then.
const CALM: Duration = Duration::from_millis(20);

/// The shortest time over which the rate of pushes is measured. Several lanes may complete at the
/// same moment, so a shorter time would mislead.
const RATE_WINDOW: Duration = Duration::from_millis(5);

/// Determines how many pages are pushed at a time.
struct Pace {
    last_fault: Option<Instant>,
    /// The number of pages pushed a second in the last window; 0 before the end of the first
    /// window.
    rate: f64,
    /// The present window: its beginning, and the number of pages whose push has completed in it.
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
            // Nothing is known of the link yet.
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
            // No push was under way, so the time until now says nothing about the link.
            (self.since, self.pages) = (Instant::now(), 0);
        }
        self.under_way.push_back(pages);
    }

    /// Records that the oldest outstanding push has completed.
    fn done(&mut self) {
        self.pages += self.under_way.pop_front().unwrap_or(0);
        let time = self.since.elapsed();
        if time >= RATE_WINDOW {
            self.rate = self.pages as f64 / time.as_secs_f64();
            (self.since, self.pages) = (Instant::now(), 0);
        }
    }
}

/// The location of each page, as the source knows it, and the state for sending the pages that
/// remain after the hand-over. Each sender of a page claims it first, so each page is sent once.
pub(super) struct Left {
    pub(super) map: Arc<Mutex<PageMap>>,
    /// The generation under which the pages are sent.
    pub(super) generation: AtomicU32,
    /// The number of pages that are sent together, aligned to this number: 1, or the pages of a
    /// huge page.
    pub(super) block: AtomicU64,
    /// The number of pages that were sent on demand, and the number of requests for which pages
    /// were sent. They are counted before the pages go out, so that all are counted when the
    /// destination has them.
    pub(super) demanded: AtomicU64,
    pub(super) requests: AtomicU64,
    /// Sends pages that the source has in stores only.
    pub(super) fetcher: OnceLock<Arc<Fetcher>>,
}

impl Left {
    pub(super) fn new(map: Arc<Mutex<PageMap>>) -> Self {
        Self {
            map,
            generation: AtomicU32::new(0),
            block: AtomicU64::new(1),
            demanded: AtomicU64::new(0),
            requests: AtomicU64::new(0),
            fetcher: OnceLock::new(),
        }
    }

    /// Changes the map. The remaining pages that are here in stores only are given to the fetcher
    /// before any other sender can claim them.
    pub(super) fn change(&self, change: impl FnOnce(&mut PageMap) -> Result<(), MapError>) -> Result<(), MapError> {
        let mut map = lock(&self.map);
        change(&mut map)?;
        self.fetcher.get().map_or(Ok(()), |fetcher| fetcher.take_over(&mut map))
    }

    /// Sets the lanes on which pages are sent from now on.
    pub(super) fn attach(&self, lanes: &[mpsc::Sender<Work>]) {
        if let Some(fetcher) = self.fetcher.get() {
            fetcher.attach(lanes, self.generation.load(Ordering::Relaxed));
        }
    }

    /// Claims the remaining pages of the block around `page`. Returns nothing if they were sent.
    fn claim(&self, page: u64) -> Vec<PageRange> {
        lock(&self.map).claim_block(page, self.block.load(Ordering::Relaxed))
    }

    /// Claims the pages that `order` chooses next, widened to a whole block.
    ///
    /// # Errors
    /// Returns an error that says what is wrong with the order.
    fn next(&self, order: &mut dyn PushOrder, most: u64) -> Result<Option<PageRange>, OrderError> {
        let mut map = lock(&self.map);
        let block = self.block.load(Ordering::Relaxed).max(1);
        let Some(wanted) = checked_next(order, map.unclaimed(), most.max(block))? else { return Ok(None) };
        // Only the remaining pages of a block are sent.
        let whole = PageRange::new(wanted.first / block * block, block);
        let range = map.unclaimed().ranges_in(if block == 1 { wanted } else { whole }).next();
        let Some(run) = range else { return Ok(None) };
        map.claim(run).map_err(|_| OrderError::NotUnsent { order: order.name(), run })?;
        Ok(range)
    }
}

/// A demand lane at the source. It reads requests, and answers each one immediately.
pub(super) struct DemandLane {
    pub(super) lane: Lane,
    pub(super) reader: Box<dyn ReadHalf>,
    pub(super) left: Arc<Left>,
}

impl DemandLane {
    /// Answers requests until the link ends.
    pub(super) fn run(mut self, inputs: PeerInputs) {
        let mut sequence = 0;
        loop {
            if let Err(error) = self.request(&mut sequence, &inputs) {
                // The engine may be gone, because the migration is over.
                let _ = inputs.send(Input::Lane(Err(error)));
                return;
            }
        }
    }

    fn request(&mut self, sequence: &mut u32, inputs: &PeerInputs) -> Result<(), MigrationError> {
        let (header, body) = read_frame(&mut *self.reader, sequence, &self.lane.peer)?;
        let bytes = (Header::LEN + body.len()) as u64;
        self.lane.counters.wire_bytes.fetch_add(bytes, Ordering::Relaxed);
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
            let fetched = claimed.is_empty() && self.left.fetcher.get().is_some_and(|fetcher| fetcher.demand(page));
            let count = claimed.iter().map(|range| range.count).sum::<u64>() + u64::from(fetched);
            self.left.demanded.fetch_add(count, Ordering::Relaxed);
            self.left.requests.fetch_add(u64::from(count > 0), Ordering::Relaxed);
            for range in claimed {
                self.lane.push(range, generation)?;
            }
            // The engine may be gone.
            let _ = inputs.send(Input::Demanded(page));
        }
        Ok(())
    }
}

/// Widens a set of pages to whole blocks.
fn widen(pages: &mut PageSet, block: u64) {
    if block <= 1 {
        return;
    }
    let blocks: Vec<u64> = pages.ranges().flat_map(|r| r.first / block..r.end().div_ceil(block)).collect();
    for at in blocks {
        pages.insert_range(PageRange::new(at * block, block));
    }
}

impl Engine<'_> {
    /// Widens `missing` to whole blocks, and sends the destination the list of these pages.
    pub(super) fn leave_behind(&mut self, mut missing: PageSet) -> Result<(), MigrationError> {
        widen(&mut missing, self.post_copy.left.block.load(Ordering::Relaxed));
        // A page of such a block that is in a store stays there (rule 6).
        missing.subtract(self.rounds.map().with_copies());
        self.announce()?;
        for frame in missing_frames(&missing) {
            self.send_control(&frame)?;
        }
        let (end, generation) = self.machine.post_copy(missing.len(), self.report.demand_lanes)?;
        self.send_control(&end)?;
        self.post_copy.lacking = missing.len();
        self.post_copy.missing_pages = self.post_copy.lacking;
        self.rounds.gone(&missing);
        self.post_copy.left.change(|map| map.leave_behind(&missing))?;
        self.post_copy.left.generation.store(generation, Ordering::Release);
        self.post_copy.left.attach(&self.peer.lanes);
        Ok(())
    }

    /// Streams all remaining pages. Reconnects as often as the link is lost.
    pub(super) fn serve_all(&mut self, order: &mut dyn PushOrder) -> Result<(), MigrationError> {
        let dirtied = std::mem::take(&mut self.post_copy.dirtied_last);
        self.heat_up(&dirtied, DIRTIED);
        // The set is cloned, so that the lock is free and faults are served meanwhile.
        let unsent = self.rounds.map().unclaimed().clone();
        order.begin(&unsent, &self.post_copy.heat);
        if let Some(fetcher) = self.post_copy.left.fetcher.get() {
            fetcher.push();
        }
        let mut back_off = FIRST_BACK_OFF;
        while self.machine.phase() == SourcePhase::Serving {
            let Err(error) = self.push(order) else { continue };
            if self.machine.phase() != SourcePhase::Serving {
                // The VM has ended.
                break;
            }
            let lacked = self.post_copy.lacking;
            self.reconnect(describe(&error));
            if self.post_copy.lacking == lacked && self.machine.phase() == SourcePhase::Serving {
                // The link works each time, but no page arrives.
                thread::sleep(back_off);
                back_off = (back_off * 2).min(MAX_BACK_OFF);
            } else {
                back_off = FIRST_BACK_OFF;
            }
        }
        self.came_back()
    }

    /// Claims the pages that `order` chooses next. An order that is wrong must not keep the guest
    /// waiting: the next remaining pages are claimed instead, and the user is warned once.
    fn next_push(&mut self, order: &mut dyn PushOrder, most: u64) -> Option<PageRange> {
        let left = &self.post_copy.left;
        let why = match left.next(order, most) {
            Ok(range) => return range,
            Err(why) => why,
        };
        let range = left.next(&mut Linear::default(), most).ok().flatten();
        if !std::mem::replace(&mut self.post_copy.order_is_wrong, true) {
            self.options.observer.event(&Event::Warning(format!("{why}: pages go one after the other in its place")));
        }
        range
    }

    fn push(&mut self, order: &mut dyn PushOrder) -> Result<(), MigrationError> {
        let block = self.post_copy.left.block.load(Ordering::Relaxed).max(1);
        let generation = self.post_copy.left.generation.load(Ordering::Relaxed);
        let mut free: Vec<u16> = (0..self.report.streams).flat_map(|lane| [lane; PUSHES_AHEAD]).collect();
        let ahead = free.len();
        let mut pace = Pace::new();
        while self.machine.phase() == SourcePhase::Serving {
            let most = pace.most(block);
            // While the guest faults, a lane gets its next push only when it has completed the last
            // one.
            let least_free = if pace.is_calm() { 0 } else { ahead - ahead / PUSHES_AHEAD };
            while free.len() > least_free
                && let Some(range) = self.next_push(order, most)
                && let Some(lane) = free.pop()
            {
                self.report.pages.pushed += range.count;
                self.report.pages.prepaged += if order.prepaged() { range.count } else { 0 };
                pace.pushed(range.count);
                if let Some(lane) = self.peer.lanes.get(usize::from(lane)) {
                    // A lane that has ended has reported why, in an input.
                    let _ = lane.send(Work::Push(range, generation));
                }
            }
            self.fill_places(order);
            self.announce()?;
            self.vacate()?;
            match self.next_input(Instant::now() + Duration::from_secs(3600))? {
                Some(Input::Demanded(page)) => {
                    order.fault(page);
                    pace.fault();
                }
                Some(Input::Lane(Ok(done))) => {
                    pace.done();
                    free.insert(0, done.lane);
                }
                Some(Input::Control(epoch, frame)) => match self.frame(epoch, frame)? {
                    SourceEvent::Complete(summary) | SourceEvent::Released(summary) => {
                        self.report.faults.served = summary;
                    }
                    SourceEvent::Missing { first, bitmap } if self.may_use_stores() => self.lacks(first, &bitmap)?,
                    SourceEvent::Resume { missing } if self.may_use_stores() => self.lacks_these(missing)?,
                    _ => {}
                },
                _ => {}
            }
        }
        Ok(())
    }

    /// Resumes streaming after a reattachment: reads the list of pages that the destination still
    /// lacks, and opens new lanes.
    pub(super) fn resume_serving(&mut self) -> Result<(), MigrationError> {
        let mut missing = PageSet::empty(self.report.pages.total);
        let deadline = Instant::now() + self.options.idle_timeout;
        let expected = loop {
            if let Some(Input::Control(epoch, frame)) = self.next_input(deadline)? {
                match self.frame(epoch, frame)? {
                    SourceEvent::Missing { first, bitmap } => add_missing(&mut missing, first, &bitmap)?,
                    SourceEvent::Resume { missing } => break missing,
                    SourceEvent::Complete(summary) | SourceEvent::Released(summary) => {
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
        let listed = self.post_copy.left.change(|map| map.lacking(&missing));
        listed.map_err(|error| DecodeError::invalid("missing pages", error.to_string()))?;
        self.post_copy.lacking = expected;
        self.count_fetched();
        let sent = self.report.pages.pushed + self.post_copy.left.demanded.load(Ordering::Relaxed);
        self.post_copy.missing_pages = expected.saturating_add(sent);
        self.open_lanes()?;
        self.post_copy.left.attach(&self.peer.lanes);
        self.repeat_table()
    }

    /// Adds the pages that the fetcher has sent since the last call to the report.
    pub(super) fn count_fetched(&mut self) {
        self.report.pages.pushed += self.post_copy.left.fetcher.get().map_or(0, |fetcher| fetcher.take_pushed());
    }

    /// Sets the granularity in which missing pages are left at the source: huge pages if `whole`,
    /// single pages otherwise.
    pub(super) fn set_block(&self, whole: bool) {
        self.post_copy.left.block.store(if whole { HUGE_BLOCK } else { 1 }, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use std::{io, sync::mpsc};

    use proptest::prelude::*;

    use super::*;
    use crate::{GuestRam, HeapRam, RamLayout, RamRegion, RamSlice, channel::WriteHalf, strategy::Linear};

    const HOUR: Duration = Duration::from_secs(3600);

    #[test]
    fn a_push_is_short_while_the_guest_faults_and_long_when_it_is_calm() {
        let mut pace = Pace::new();
        assert_eq!((pace.is_calm(), pace.most(1), pace.most(512)), (true, FIRST_PUSH, 512));
        // A fault that lies ahead of the present time counts as a recent one, however slow this
        // test is.
        pace.fault();
        assert!(pace.last_fault.is_some());
        for (rate, faulting, calm) in
            [(1e4, LEAST_PUSH, 40), (1e6, 100, STRIPE_PAGES), (1e9, STRIPE_PAGES, STRIPE_PAGES)]
        {
            pace.rate = rate;
            pace.last_fault = Some(Instant::now() + HOUR);
            assert_eq!((pace.is_calm(), pace.most(1), pace.most(512)), (false, faulting, 512), "{rate}");
            pace.last_fault = Instant::now().checked_sub(CALM);
            assert_eq!((pace.is_calm(), pace.most(1), pace.most(512)), (true, calm, 512), "{rate}");
        }
    }

    #[test]
    fn the_rate_is_that_of_a_window_in_which_something_was_under_way() {
        let mut pace = Pace::new();
        // The window has just begun.
        pace.since = Instant::now() + HOUR;
        pace.pages = 5;
        pace.pushed(20);
        assert_eq!(pace.pages, 0, "nothing was under way before");
        pace.since = Instant::now() + HOUR;
        pace.pushed(30);
        pace.done();
        assert_eq!((pace.pages, pace.rate), (20, 0.0));
        pace.since = Instant::now().checked_sub(Duration::from_secs(1)).unwrap();
        pace.done();
        // 50 pages in a little more than a second.
        assert!(pace.rate > 5.0 && pace.rate < 50.0 && pace.pages == 0, "{}", pace.rate);
        pace.done();
        assert_eq!(pace.pages, 0, "nothing is under way");
    }

    fn left(pages: &[(u64, u64)], block: u64) -> Left {
        let mut set = PageSet::empty(2000);
        pages.iter().for_each(|&(first, count)| set.insert_range(PageRange::new(first, count)));
        let mut map = PageMap::new(2000);
        map.leave_behind(&set).unwrap();
        let left = Left::new(Arc::new(Mutex::new(map)));
        left.block.store(block, Ordering::Relaxed);
        left
    }

    #[test]
    fn whoever_takes_a_page_takes_what_is_left_of_its_block() {
        let range = |first, count| PageRange::new(first, count);
        let single = left(&[(10, 20), (600, 2)], 1);
        assert_eq!(single.claim(12), [range(12, 1)]);
        assert!(single.claim(12).is_empty() && single.claim(5).is_empty());
        let order = &mut Linear::default();
        assert_eq!(single.next(order, 100).unwrap(), Some(range(10, 2)));
        assert_eq!(single.next(order, 5).unwrap(), Some(range(13, 5)));

        let huge = left(&[(512, 10), (530, 3), (1024, 512), (1536, 464)], 512);
        assert_eq!(huge.claim(531), [range(512, 10), range(530, 3)]);
        assert!(huge.claim(512).is_empty());
        let order = &mut Linear::default();
        assert_eq!(huge.next(order, 1).unwrap(), Some(range(1024, 512)), "a whole block, however little was asked for");
        assert_eq!(huge.next(order, 1).unwrap(), Some(range(1536, 464)), "the last one of RAM is shorter");
        assert!(huge.next(order, 1).unwrap().is_none() && lock(&huge.map).unclaimed().is_empty());
    }

    /// An order that always makes the same choice.
    struct Always(Option<PageRange>);

    impl PushOrder for Always {
        fn name(&self) -> &'static str {
            "always"
        }

        fn begin(&mut self, _: &PageSet, _: &[u8]) {}

        fn fault(&mut self, _: u64) {}

        fn next(&mut self, _: &PageSet, _: u64) -> Option<PageRange> {
            self.0
        }
    }

    #[test]
    fn an_order_that_is_wrong_is_found_out() {
        let range = |first, count| PageRange::new(first, count);
        for (wrong, why) in [
            (None, "chose nothing of 20 pages"),
            (Some(range(5, 10)), "chose pages 5+10, which are not all unsent"),
            (Some(range(10, 0)), "chose pages 10+0"),
            (Some(range(u64::MAX, 2)), "not all unsent"),
        ] {
            let left = left(&[(10, 20)], 1);
            let said = left.next(&mut Always(wrong), 100).unwrap_err().to_string();
            assert!(said.contains(why), "{said}");
            assert_eq!(lock(&left.map).unclaimed().len(), 20, "nothing is claimed");
        }
        assert_eq!(left(&[], 1).next(&mut Always(None), 100), Ok(None));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn whole_blocks_and_no_others_are_left_behind(
            runs in prop::collection::vec((0u64..2000, 1u64..600), 0..4), block in prop::sample::select(vec![1u64, 4, 512]),
        ) {
            let mut set = PageSet::empty(2000);
            runs.iter().for_each(|&(first, count)| set.insert_range(PageRange::new(first, count)));
            let mut wide = set.clone();
            widen(&mut wide, block);
            for page in 0..2000 {
                let around = PageRange::new(page / block * block, block);
                prop_assert_eq!(wide.contains(page), set.count_in(around) > 0, "page {}", page);
            }
        }
    }

    /// A channel that reads the bytes that it was given, and counts the pages that are written.
    struct Wire(VecDeque<u8>, Arc<AtomicU64>);

    impl ReadHalf for Wire {
        fn read_exact(&mut self, buf: &mut [u8]) -> io::Result<()> {
            for byte in buf {
                *byte = self.0.pop_front().ok_or(io::ErrorKind::UnexpectedEof)?;
            }
            Ok(())
        }

        fn read_ram(&mut self, _: &[RamSlice<'_>]) -> io::Result<()> {
            unreachable!("no page comes to a source")
        }

        fn set_idle_timeout(&mut self, _: Option<Duration>) -> io::Result<()> {
            Ok(())
        }
    }

    impl WriteHalf for Wire {
        fn write_all(&mut self, head: &[u8], _: &[RamSlice<'_>]) -> io::Result<()> {
            let header = Header::decode(head.first_chunk().unwrap()).unwrap();
            let Bulk::Pages { extents, .. } = Bulk::decode(&header, &head[Header::LEN..], 2000).unwrap() else {
                panic!("not pages")
            };
            self.1.fetch_add(extents.iter().map(|e| e.range.count).sum(), Ordering::Relaxed);
            Ok(())
        }

        fn set_idle_timeout(&mut self, _: Option<Duration>) -> io::Result<()> {
            Ok(())
        }
    }

    /// Lets a source with 10 remaining pages from page 100 on answer one request. Returns the
    /// error, if any; the numbers of pages that it sends, of pages that it counts as demanded, and
    /// of requests that it counts; and the pages that it reports as demanded.
    fn requested(generation: u32, number: u32, pages: &[u64]) -> (Option<MigrationError>, [u64; 3], Vec<u64>) {
        let layout = RamLayout::new(vec![RamRegion { gpa: 0, len: 2000 << 12 }]).unwrap();
        let ram: Arc<dyn GuestRam> = Arc::new(HeapRam::new(layout).unwrap());
        let left = Arc::new(left(&[(100, 10)], 1));
        left.generation.store(generation, Ordering::Release);
        let (sent, wire_bytes) = (Arc::<AtomicU64>::default(), Arc::<AtomicU64>::default());
        let writer = Box::new(Wire(VecDeque::new(), sent.clone()));
        let lane = Lane::for_checkpoints(ram, writer, "the destination".into(), wire_bytes.clone());
        let request = Bulk::Request { pages: pages.to_vec() }.encode(0, 0, number);
        let len = request.len() as u64;
        let reader = Box::new(Wire(request.into(), Arc::default()));
        let mut demand = DemandLane { lane, reader, left: left.clone() };
        let (tx, rx) = mpsc::channel();
        let inputs = PeerInputs::new(tx, Arc::default(), Arc::default());
        let error = demand.request(&mut 0, &inputs).err();
        // Each page that is sent is an extent of zeros.
        let pages = sent.load(Ordering::Relaxed);
        assert_eq!(wire_bytes.load(Ordering::Relaxed), len + pages * (Header::LEN as u64 + 4 + 4 + 12));
        let told = rx.try_iter().filter_map(|input| if let Input::Demanded(page) = input { Some(page) } else { None });
        let told = told.collect();
        let counts = [&sent, &left.demanded, &left.requests].map(|count| count.load(Ordering::Relaxed));
        (error, counts, told)
    }

    #[test]
    fn only_pages_that_were_left_behind_are_sent_and_each_once() {
        let (error, counts, told) = requested(3, 3, &[100, 105, 100, 7]);
        assert!(error.is_none());
        assert_eq!((counts, told), ([2, 2, 2], vec![100, 105, 100, 7]));
        for (generation, number) in [(3, 2), (3, 0), (0, 0), (0, 3)] {
            let (error, counts, told) = requested(generation, number, &[100]);
            assert!(matches!(error, Some(MigrationError::Malformed(_))), "{generation} {number}");
            assert_eq!((counts, told), ([0; 3], Vec::new()));
        }
    }
}
