//! Post-copy at the source: what was left behind is sent, to whoever waits first, and the lost link
//! is waited out.

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

/// Fewest pages in a push while the guest faults: more, and a demanded page would wait behind them
/// on a slow link; fewer, and they would cost more than they carry.
const LEAST_PUSH: u64 = 16;
/// Pushes that a lane is given ahead, so that it does not idle until the next one is chosen.
const PUSHES_AHEAD: usize = 2;

/// A push takes about so long while the guest faults: a new fault then changes soon what comes
/// next, and a page that is asked for while it is pushed is not far behind. (Measured: with 1 ms,
/// one fault in a hundred beside a push at full rate waits 3 to 4 ms for a page that is on its way
/// already, with this about 1 ms, and the push takes 1.3 times as long.)
const PUSH_TIME: Duration = Duration::from_micros(100);
/// And so long while it does not, on a link that is too slow for a whole block in this time.
const CALM_PUSH_TIME: Duration = Duration::from_millis(4);
/// Pages of a push as long as nothing is known of the link.
const FIRST_PUSH: u64 = 128;
/// Without a fault for so long, the guest has what it works on, and pushes are as large as they can
/// be.
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

/// Where each page is, as the source knows it, and what it takes to send those that were left
/// behind. Whoever sends one claims it first, so each moves once.
pub(super) struct Left {
    pub(super) map: Arc<Mutex<PageMap>>,
    /// The generation as which they move.
    pub(super) generation: AtomicU32,
    /// Pages that move together, aligned: 1, or those of a huge page.
    pub(super) block: AtomicU64,
    /// Pages that were sent because they were asked for, and requests that had some sent. Counted
    /// before they go out, so that all are counted when the destination has them.
    pub(super) demanded: AtomicU64,
    pub(super) requests: AtomicU64,
    /// Sends pages that are here in stores only.
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

    /// Changes the map. What is left then, and is here in stores only, is the fetcher's before
    /// anybody can claim it.
    pub(super) fn change(&self, change: impl FnOnce(&mut PageMap) -> Result<(), MapError>) -> Result<(), MapError> {
        let mut map = lock(&self.map);
        change(&mut map)?;
        self.fetcher.get().map_or(Ok(()), |fetcher| fetcher.take_over(&mut map))
    }

    /// Pages move on these lanes from now on.
    pub(super) fn attach(&self, lanes: &[mpsc::Sender<Work>]) {
        if let Some(fetcher) = self.fetcher.get() {
            fetcher.attach(lanes, self.generation.load(Ordering::Relaxed));
        }
    }

    /// Takes out what is left of the block around `page`; nothing if it was sent.
    fn claim(&self, page: u64) -> Vec<PageRange> {
        lock(&self.map).claim_block(page, self.block.load(Ordering::Relaxed))
    }

    /// Takes out what `order` wants to push next, widened to whole blocks.
    ///
    /// # Errors
    /// What is wrong with the order.
    fn next(&self, order: &mut dyn PushOrder, most: u64) -> Result<Option<PageRange>, OrderError> {
        let mut map = lock(&self.map);
        let block = self.block.load(Ordering::Relaxed).max(1);
        let Some(wanted) = checked_next(order, map.unclaimed(), most.max(block))? else { return Ok(None) };
        // of a block, what is left of it
        let whole = PageRange::new(wanted.first / block * block, block);
        let range = map.unclaimed().ranges_in(if block == 1 { wanted } else { whole }).next();
        let Some(run) = range else { return Ok(None) };
        map.claim(run).map_err(|_| OrderError::NotUnsent { order: order.name(), run })?;
        Ok(range)
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
            // as above
            let _ = inputs.send(Input::Demanded(page));
        }
        Ok(())
    }
}

/// Widens a set to whole blocks.
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
    /// Widens `missing` to whole blocks, and tells the destination of it.
    pub(super) fn leave_behind(&mut self, mut missing: PageSet) -> Result<(), MigrationError> {
        widen(&mut missing, self.post_copy.left.block.load(Ordering::Relaxed));
        // a page of such a block that is in a store stays there (rule 6)
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

    /// Sends all that was left behind, across as many losses of the link as come.
    pub(super) fn serve_all(&mut self, order: &mut dyn PushOrder) -> Result<(), MigrationError> {
        let dirtied = std::mem::take(&mut self.post_copy.dirtied_last);
        self.heat_up(&dirtied, DIRTIED);
        // without the lock: faults are served meanwhile
        let unsent = self.rounds.map().unclaimed().clone();
        order.begin(&unsent, &self.post_copy.heat);
        if let Some(fetcher) = self.post_copy.left.fetcher.get() {
            fetcher.push();
        }
        let mut back_off = FIRST_BACK_OFF;
        while self.machine.phase() == SourcePhase::Serving {
            let Err(error) = self.push(order) else { continue };
            if self.machine.phase() != SourcePhase::Serving {
                // the VM has ended
                break;
            }
            let lacked = self.post_copy.lacking;
            self.reconnect(describe(&error));
            if self.post_copy.lacking == lacked && self.machine.phase() == SourcePhase::Serving {
                // the links work, but no page arrives on them
                thread::sleep(back_off);
                back_off = (back_off * 2).min(MAX_BACK_OFF);
            } else {
                back_off = FIRST_BACK_OFF;
            }
        }
        self.came_back()
    }

    /// Takes what `order` wants to push next. One that is wrong must not keep the guest waiting:
    /// then it is the next page, and the user is told once.
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
            // while the guest waits, a lane gets its next push only when it is done with the last
            // one
            let least_free = if pace.is_calm() { 0 } else { ahead - ahead / PUSHES_AHEAD };
            while free.len() > least_free
                && let Some(range) = self.next_push(order, most)
                && let Some(lane) = free.pop()
            {
                self.report.pages.pushed += range.count;
                self.report.pages.prepaged += if order.prepaged() { range.count } else { 0 };
                pace.pushed(range.count);
                if let Some(lane) = self.peer.lanes.get(usize::from(lane)) {
                    // a lane that is gone has said why, which arrives as an input
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

    /// After a reattachment: what the destination still lacks, and new lanes to send it on.
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

    /// Counts what the fetcher has sent since this was called last.
    pub(super) fn count_fetched(&mut self) {
        self.report.pages.pushed += self.post_copy.left.fetcher.get().map_or(0, |fetcher| fetcher.take_pushed());
    }

    /// The granularity in which pages are left behind.
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
        // a fault that lies ahead is as good as one just now, however slow this test is
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
        // a window that has just begun
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
        // 50 in a second and a bit
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

    /// An order that always says the same.
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

    /// Reads what it was given, and counts what is written.
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

    /// What a source says to one request, with 10 pages from page 100 left: the error, if any, and
    /// the pages that it sends, that it counts as demanded, and how many requests it counts.
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
        // each page that is sent is an extent of zeros
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
