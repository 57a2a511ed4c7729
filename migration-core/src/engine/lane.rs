//! A bulk lane at the source: finds out which pages of its stripes hold only zeros, and sends the
//! pages.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc,
    },
    time::{Duration, Instant},
};

use super::{handle::Input, stored::Fetched};
use crate::{
    MigrationError, PAGE_SIZE, PageRange, PageSet,
    channel::WriteHalf,
    page::STRIPE_PAGES,
    paged_memory::PagedMemory,
    ram::{GuestRam, RamSlice},
    tracker::Rearm,
    wire::{Bulk, Content, Extent, HUGE_BLOCK, MAX_EXTENTS, MAX_PAYLOAD},
};

/// The page data in one frame. It takes a few hundred microseconds on a fast link, and one system
/// call.
const FRAME_PAYLOAD: usize = 1 << 20;
// A system call takes at most 1024 pieces of memory. A frame of single pages has fewer.
const _: () = assert!(FRAME_PAYLOAD / PAGE_SIZE < 1000 && MAX_PAYLOAD / PAGE_SIZE < 1000);

/// The size of the first piece of a frame that is written at once, and of the smallest piece, in
/// bytes.
pub(super) const FIRST_PIECE: usize = 256 << 10;
const LEAST_PIECE: usize = 16 << 10;
/// A piece that took less time than the first limit makes the next piece larger. A piece that took
/// longer than the second limit makes it smaller.
const QUICK_PIECE: Duration = Duration::from_millis(10);
const SLOW_PIECE: Duration = Duration::from_millis(100);

/// Counters that all lanes share.
#[derive(Default)]
pub(super) struct Counters {
    pub(super) wire_bytes: Arc<AtomicU64>,
    pub(super) zero: AtomicU64,
    pub(super) plain: AtomicU64,
    /// The number of bytes of page data that were written to lanes.
    pub(super) page_bytes: AtomicU64,
    /// The number of pages that were sent in the present round.
    pub(super) round_sent: AtomicU64,
}

/// One round, as each lane gets it.
#[derive(Clone)]
pub(super) struct Job {
    pub(super) generation: u32,
    pub(super) pages: Arc<PageSet>,
    pub(super) rearm: Option<Arc<dyn Rearm>>,
    /// Set to end the round early.
    pub(super) stop: Arc<AtomicBool>,
}

/// Work for a lane.
pub(super) enum Work {
    /// Send the lane's part of a round.
    Round(Job),
    /// Send these pages, which no other lane sends, in this generation.
    Push(PageRange, u32),
    /// Send the mark of the *vacated* with this number, in this generation. The end of this work is
    /// not reported.
    Mark(u32, u32),
    /// Send pages that were read from stores, and that no other lane sends, in this generation. The
    /// end of this work is not reported: the value is dropped then.
    Fetched(Fetched, u32),
}

/// The result of a lane's work.
pub(super) struct LaneDone {
    pub(super) lane: u16,
    /// The first stripe that was not sent, if the round was stopped.
    pub(super) stopped_at: Option<u64>,
    /// The time of the round in which the lane did not write, because it read pages.
    pub(super) reading: Duration,
}

pub(super) struct Lane {
    pub(super) index: u16,
    pub(super) lanes: u16,
    pub(super) ram: Arc<dyn GuestRam>,
    /// Reads the pages of a round that are in stores; `None` if no pages are in stores.
    pub(super) stored: Option<Arc<PagedMemory>>,
    pub(super) writer: Box<dyn WriteHalf>,
    pub(super) peer: String,
    pub(super) sequence: u32,
    pub(super) payload_crc: bool,
    /// Whether pages move in blocks that the destination cannot split after the hand-over.
    pub(super) whole_blocks: bool,
    pub(super) counters: Arc<Counters>,
    /// The total time spent writing.
    pub(super) writing: Duration,
    /// The size of the next piece, in bytes. A piece is written at once.
    pub(super) piece: usize,
}

/// Returns the stripes of one lane among `lanes`, for a VM with `pages` pages.
pub(super) fn stripes(index: u16, lanes: u16, pages: u64) -> impl Iterator<Item = u64> {
    (u64::from(index)..pages.div_ceil(STRIPE_PAGES)).step_by(usize::from(lanes.max(1)))
}

/// Returns the pages of a stripe. Those of the last stripe may extend beyond the end of RAM.
pub(super) fn stripe_pages(stripe: u64) -> PageRange {
    PageRange::new(stripe.saturating_mul(STRIPE_PAGES), STRIPE_PAGES)
}

/// A frame that is being assembled.
pub(super) struct Batch<'a> {
    extents: Vec<Extent>,
    slices: Vec<RamSlice<'a>>,
    payload: usize,
    pages: u64,
    /// The most bytes of page data in the frame.
    most: usize,
}

impl Default for Batch<'_> {
    fn default() -> Self {
        Self { extents: Vec::new(), slices: Vec::new(), payload: 0, pages: 0, most: FRAME_PAYLOAD }
    }
}

impl Lane {
    /// Returns the lane on which a destination sends pages back in checkpoints.
    pub(super) fn for_checkpoints(
        ram: Arc<dyn GuestRam>,
        writer: Box<dyn WriteHalf>,
        peer: String,
        wire_bytes: Arc<AtomicU64>,
    ) -> Self {
        let counters = Arc::new(Counters { wire_bytes, ..Counters::default() });
        Self {
            index: 0,
            lanes: 1,
            ram,
            stored: None,
            writer,
            peer,
            sequence: 0,
            payload_crc: false,
            whole_blocks: false,
            counters,
            piece: FIRST_PIECE,
            writing: Duration::ZERO,
        }
    }

    /// Works until the sender of work is dropped or the link fails.
    pub(super) fn run(mut self, jobs: mpsc::Receiver<Work>, inputs: mpsc::Sender<Input>) {
        let mut pushes = false;
        while let Ok(work) = jobs.recv() {
            let done = match work {
                Work::Round(job) => self.round(&job),
                Work::Push(range, generation) => {
                    if !std::mem::replace(&mut pushes, true) {
                        // The guest waits for pages on other lanes.
                        self.writer.keep_queue_short();
                    }
                    let lane = self.index;
                    self.push(range, generation).map(|()| LaneDone { lane, stopped_at: None, reading: Duration::ZERO })
                }
                Work::Mark(number, generation) => {
                    let bytes = Bulk::Vacated { number }.encode(0, self.sequence, generation);
                    match self.write(&bytes, &[]) {
                        Ok(()) => continue,
                        Err(error) => Err(error),
                    }
                }
                Work::Fetched(fetched, generation) => match self.send_fetched(&fetched, generation) {
                    Ok(()) => continue,
                    Err(error) => Err(error),
                },
            };
            let failed = done.is_err();
            // The engine may have ended already, after another failure.
            if inputs.send(Input::Lane(done)).is_err() || failed {
                return;
            }
        }
    }

    pub(super) fn round(&mut self, job: &Job) -> Result<LaneDone, MigrationError> {
        let ram = self.ram.clone();
        let (layout, mut batch, mut pages) = (ram.layout(), Batch::default(), 0);
        let (began, written) = (Instant::now(), self.writing);
        let mut stopped_at = None;
        for stripe in stripes(self.index, self.lanes, layout.pages()) {
            if job.stop.load(Ordering::Relaxed) {
                stopped_at = Some(stripe);
                break;
            }
            let range = stripe_pages(stripe);
            if job.pages.count_in(range) == 0 {
                continue;
            }
            if let Some(rearm) = &job.rearm {
                // Re-arm before the pages are first read, so that a later write is reported again.
                rearm.before_read(range, &job.pages)?;
            }
            for run in job.pages.ranges_in(range) {
                for (_, _, piece) in layout.split(run) {
                    pages += piece.count;
                    if self.stored.is_none() {
                        self.add(&mut batch, &*ram, piece, job.generation)?;
                        continue;
                    }
                    for resident in self.send_stored(piece, job.generation)? {
                        self.add(&mut batch, &*ram, resident, job.generation)?;
                    }
                }
            }
        }
        self.flush(&mut batch, job.generation)?;
        let end = Bulk::RoundEnd { pages };
        let bytes = end.encode(0, self.sequence, job.generation);
        self.write(&bytes, &[])?;
        let reading = began.elapsed().saturating_sub(self.writing - written);
        Ok(LaneDone { lane: self.index, stopped_at, reading })
    }

    /// Sends a run of pages.
    pub(super) fn push(&mut self, range: PageRange, generation: u32) -> Result<(), MigrationError> {
        // A block of huge pages goes in one frame, so that the destination installs it in one step.
        let (ram, mut batch) = (self.ram.clone(), Batch { most: MAX_PAYLOAD, ..Batch::default() });
        for (_, _, piece) in ram.layout().split(range) {
            if !self.whole_blocks {
                self.add(&mut batch, &*ram, piece, generation)?;
                continue;
            }
            for first in piece.pages().step_by(HUGE_BLOCK as usize) {
                let block = PageRange::new(first, HUGE_BLOCK.min(piece.end() - first));
                self.add_whole(&mut batch, &*ram, block, generation)?;
            }
        }
        self.flush(&mut batch, generation)
    }

    /// Adds a block that the destination can only install as a whole. All of the block is sent as
    /// data unless all of it is zero.
    fn add_whole<'a>(
        &mut self,
        batch: &mut Batch<'a>,
        ram: &'a (dyn GuestRam + 'static),
        block: PageRange,
        generation: u32,
    ) -> Result<(), MigrationError> {
        let memory = ram.slice(block)?;
        let (count, bytes) = (block.count, block.count as usize * PAGE_SIZE);
        let content = if memory.is_zero() { Content::Zero } else { Content::Plain };
        let full = batch.payload + bytes > batch.most && content == Content::Plain;
        if full || batch.extents.len() >= MAX_EXTENTS {
            self.flush(batch, generation)?;
        }
        batch.extents.push(Extent { range: block, content });
        batch.pages += count;
        if content == Content::Zero {
            self.counters.zero.fetch_add(count, Ordering::Relaxed);
        } else {
            batch.slices.push(memory);
            batch.payload += bytes;
            self.counters.plain.fetch_add(count, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Adds a run of pages inside one region.
    fn add<'a>(
        &mut self,
        batch: &mut Batch<'a>,
        ram: &'a (dyn GuestRam + 'static),
        run: PageRange,
        generation: u32,
    ) -> Result<(), MigrationError> {
        self.add_pages(batch, ram.slice(run)?, run, generation)
    }

    /// Adds a run of pages whose contents are in `memory`.
    pub(super) fn add_pages<'a>(
        &mut self,
        batch: &mut Batch<'a>,
        memory: RamSlice<'a>,
        run: PageRange,
        generation: u32,
    ) -> Result<(), MigrationError> {
        let is_zero = |i: u64| memory.skip(i as usize * PAGE_SIZE).take(PAGE_SIZE).is_zero();
        let mut at = 0;
        let mut zero = is_zero(0);
        while at < run.count {
            // The longest run of pages of the same kind that has room in the frame.
            let room = if zero { run.count } else { ((batch.most - batch.payload) / PAGE_SIZE) as u64 };
            let mut end = at + 1;
            let mut next_zero = zero;
            while end < run.count && end - at < room {
                next_zero = is_zero(end);
                if next_zero != zero {
                    break;
                }
                end += 1;
            }
            let count = end - at;
            let content = if zero { Content::Zero } else { Content::Plain };
            batch.extents.push(Extent { range: PageRange::new(run.first + at, count), content });
            batch.pages += count;
            if zero {
                self.counters.zero.fetch_add(count, Ordering::Relaxed);
            } else {
                let bytes = count as usize * PAGE_SIZE;
                batch.slices.push(memory.skip(at as usize * PAGE_SIZE).take(bytes));
                batch.payload += bytes;
                self.counters.plain.fetch_add(count, Ordering::Relaxed);
            }
            if batch.payload >= batch.most || batch.extents.len() >= MAX_EXTENTS {
                self.flush(batch, generation)?;
            }
            // If a run ended for lack of room, the next page has not been examined yet.
            if end < run.count && next_zero == zero {
                next_zero = is_zero(end);
            }
            (at, zero) = (end, next_zero);
        }
        Ok(())
    }

    pub(super) fn flush(&mut self, batch: &mut Batch<'_>, generation: u32) -> Result<(), MigrationError> {
        if batch.extents.is_empty() {
            return Ok(());
        }
        let next = Batch { most: batch.most, ..Batch::default() };
        let Batch { extents, slices, payload, pages, .. } = std::mem::replace(batch, next);
        if self.payload_crc {
            // The guest may write between the checksum and the send, so both must use the same
            // copy.
            let mut copy = vec![0; payload];
            let mut at = 0;
            for slice in slices {
                slice.copy_to(&mut copy[at..at + slice.len()]);
                at += slice.len();
            }
            let frame = Bulk::Pages { extents, payload_crc: crc32fast::hash(&copy) };
            let mut bytes = frame.encode(0, self.sequence, generation);
            bytes.extend_from_slice(&copy);
            self.write(&bytes, &[])?;
        } else {
            let bytes = Bulk::Pages { extents, payload_crc: 0 }.encode(0, self.sequence, generation);
            self.write(&bytes, &slices)?;
        }
        self.counters.page_bytes.fetch_add(payload as u64, Ordering::Relaxed);
        self.counters.round_sent.fetch_add(pages, Ordering::Relaxed);
        Ok(())
    }

    /// Writes a frame in pieces. Each piece is counted when it is written: on a slow link a whole
    /// frame takes so long that the destination would seem to accept nothing.
    pub(super) fn write(&mut self, head: &[u8], slices: &[RamSlice<'_>]) -> Result<(), MigrationError> {
        self.sequence = self.sequence.wrapping_add(1);
        let (mut head, mut from, mut skip) = (head, 0, 0);
        loop {
            let (mut bytes, mut piece) = (head.len(), Vec::new());
            while bytes < self.piece
                && let Some(slice) = slices.get(from)
            {
                let part = slice.skip(skip).take(self.piece - bytes);
                bytes += part.len();
                skip += part.len();
                if skip == slice.len() {
                    (from, skip) = (from + 1, 0);
                }
                piece.push(part);
            }
            let began = Instant::now();
            self.writer.write_all(head, &piece).map_err(MigrationError::link(&self.peer))?;
            self.counters.wire_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
            let time = began.elapsed();
            self.writing += time;
            self.pace(time);
            head = &[];
            if from == slices.len() {
                return Ok(());
            }
        }
    }

    /// Adjusts the size of the next piece to the time that the last one took.
    fn pace(&mut self, time: Duration) {
        if time < QUICK_PIECE {
            self.piece = (self.piece * 2).min(MAX_PAYLOAD);
        } else if time > SLOW_PIECE {
            self.piece = (self.piece / 2).max(LEAST_PIECE);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        collections::BTreeMap,
        io,
        sync::{Mutex, PoisonError},
    };

    use proptest::{prelude::*, test_runner::TestCaseError};

    use super::{super::pages::tests::Noted, *};
    use crate::{HeapRam, RamLayout, RamRegion, wire::Header};

    /// Two stripes and a part of one, in two regions whose border lies in the second stripe.
    const PAGES: u64 = 2 * STRIPE_PAGES + 40;
    const BORDER: u64 = STRIPE_PAGES + 24;

    fn layout() -> RamLayout {
        let regions =
            vec![RamRegion { gpa: 0, len: BORDER << 12 }, RamRegion { gpa: 1 << 40, len: (PAGES - BORDER) << 12 }];
        RamLayout::new(regions).unwrap()
    }

    /// The bytes that were written and the length of each write; and how often the queue was to be
    /// kept short.
    #[derive(Clone, Default)]
    struct Written(Arc<Mutex<(Vec<u8>, Vec<usize>)>>, Arc<AtomicU64>);

    impl WriteHalf for Written {
        fn write_all(&mut self, head: &[u8], slices: &[RamSlice<'_>]) -> io::Result<()> {
            let mut written = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            let before = written.0.len();
            written.0.extend_from_slice(head);
            for slice in slices {
                let at = written.0.len();
                written.0.resize(at + slice.len(), 0);
                slice.copy_to(&mut written.0[at..]);
            }
            let len = written.0.len() - before;
            written.1.push(len);
            Ok(())
        }

        fn set_idle_timeout(&mut self, _: Option<Duration>) -> io::Result<()> {
            Ok(())
        }

        fn keep_queue_short(&mut self) {
            self.1.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn lane(ram: &Arc<HeapRam>, index: u16, lanes: u16) -> (Lane, Written) {
        let written = Written::default();
        let mut lane = Lane::for_checkpoints(ram.clone(), Box::new(written.clone()), "there".into(), Arc::default());
        (lane.index, lane.lanes) = (index, lanes);
        (lane, written)
    }

    /// Returns the frames on a lane, each with its page data, after checking header, sequence and
    /// checksum.
    fn frames(written: &Written, crc: bool, generation: u32) -> Vec<(Bulk, Vec<u8>)> {
        let bytes = written.0.lock().unwrap().0.clone();
        let (mut rest, mut frames) = (&bytes[..], Vec::new());
        while let Some((header, behind)) = rest.split_first_chunk() {
            let header = Header::decode(header).unwrap();
            assert_eq!((header.sequence, header.number), (frames.len() as u32, generation));
            let (body, behind) = behind.split_at(header.body as usize);
            let frame = Bulk::decode(&header, body, PAGES).unwrap();
            let (data, behind) = behind.split_at(header.payload as usize);
            if let Bulk::Pages { payload_crc, .. } = &frame {
                assert_eq!(*payload_crc, if crc { crc32fast::hash(data) } else { 0 });
            }
            frames.push((frame, data.to_vec()));
            rest = behind;
        }
        assert!(rest.is_empty());
        frames
    }

    /// Returns one byte of each page that has arrived. Checks that adjacent extents of the same
    /// kind are joined.
    fn arrived(frames: &[(Bulk, Vec<u8>)], most: usize) -> BTreeMap<u64, u8> {
        let mut pages = BTreeMap::new();
        let mut last: Option<(u64, Content, usize)> = None;
        for (frame, data) in frames {
            let Bulk::Pages { extents, .. } = frame else { continue };
            assert!(data.len() <= most && extents.len() <= MAX_EXTENTS);
            let mut data = data.chunks(PAGE_SIZE);
            for (at, extent) in extents.iter().enumerate() {
                for page in extent.range.pages() {
                    let byte = if extent.content == Content::Plain { data.next().unwrap()[9] } else { 0 };
                    assert_eq!(pages.insert(page, byte), None, "page {page} comes twice");
                }
                // Adjacent runs of the same kind are one extent, unless a frame, a stripe or a
                // region ends between them.
                if let Some((end, content, payload)) = last
                    && (end, content) == (extent.range.first, extent.content)
                {
                    let border = end % STRIPE_PAGES == 0 || end == BORDER;
                    assert!(border || (at == 0 && payload == most), "cut at page {end}");
                }
                last = Some((extent.range.end(), extent.content, frame.payload()));
            }
        }
        pages
    }

    fn filled(runs: &[(u64, u64, u8)]) -> Arc<HeapRam> {
        let ram = Arc::new(HeapRam::new(layout()).unwrap());
        for &(first, count, byte) in runs {
            for page in first..(first + count).min(PAGES) {
                ram.slice(PageRange::new(page, 1)).unwrap().skip(9).copy_from(&[byte]);
            }
        }
        ram
    }

    fn byte(ram: &Arc<HeapRam>, page: u64) -> u8 {
        let mut byte = [0];
        ram.slice(PageRange::new(page, 1)).unwrap().skip(9).copy_to(&mut byte);
        byte[0]
    }

    fn counts(lane: &Lane) -> [u64; 5] {
        let c = &lane.counters;
        [&c.zero, &c.plain, &c.page_bytes, &c.round_sent, &c.wire_bytes].map(|counter| counter.load(Ordering::Relaxed))
    }

    /// Checks the counters against the pages that have arrived.
    fn check_counts(lane: &Lane, pages: &BTreeMap<u64, u8>, zero: u64, written: &Written) -> Result<(), TestCaseError> {
        let plain = pages.len() as u64 - zero;
        let bytes = written.0.lock().unwrap().0.len() as u64;
        prop_assert_eq!(counts(lane), [zero, plain, plain * PAGE_SIZE as u64, pages.len() as u64, bytes]);
        Ok(())
    }

    fn runs() -> impl Strategy<Value = Vec<(u64, u64, u8)>> {
        prop::collection::vec((0..PAGES, 0u64..300, 0u8..3), 0..12)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(150))]

        #[test]
        fn a_round_sends_each_page_of_the_lane_s_stripes_once(
            content in runs(), sent in runs(), index in 0u16..3, lanes in 1u16..4, crc: bool,
        ) {
            let ram = filled(&content);
            let mut set = PageSet::empty(PAGES);
            sent.iter().for_each(|&(first, count, _)| set.insert_range(PageRange::new(first, count)));
            let (mut lane, written) = lane(&ram, index.min(lanes - 1), lanes);
            lane.payload_crc = crc;
            let (rearm, pages) = (Arc::new(Noted::default()), Arc::new(set));
            let job = Job { generation: 3, pages: pages.clone(), rearm: Some(rearm.clone()), stop: Arc::default() };
            let done = lane.round(&job).unwrap();
            prop_assert!(done.lane == lane.index && done.stopped_at.is_none());
            let frames = frames(&written, crc, 3);
            let came = arrived(&frames, FRAME_PAYLOAD);
            let own = |page: u64| page / STRIPE_PAGES % u64::from(lanes) == u64::from(lane.index);
            let want: BTreeMap<u64, u8> = pages.iter().filter(|&p| own(p)).map(|p| (p, byte(&ram, p))).collect();
            prop_assert_eq!(&came, &want);
            prop_assert_eq!(&frames.last().unwrap().0, &Bulk::RoundEnd { pages: want.len() as u64 });
            check_counts(&lane, &came, want.values().filter(|&&byte| byte == 0).count() as u64, &written)?;
            let stripes: Vec<_> = (0..3).map(stripe_pages).filter(|r| own(r.first) && pages.count_in(*r) > 0).collect();
            let rearmed = rearm.0.lock().unwrap().clone();
            prop_assert_eq!(rearmed, stripes);
        }

        #[test]
        fn a_push_sends_what_it_is_asked_for(
            content in runs(), first in 0..PAGES, count in 1u64..PAGES, whole: bool, crc: bool,
        ) {
            let ram = filled(&content);
            let (mut lane, written) = lane(&ram, 0, 1);
            (lane.payload_crc, lane.whole_blocks) = (crc, whole);
            let range = PageRange::new(first, count.min(PAGES - first));
            lane.push(range, 5).unwrap();
            let frames = frames(&written, crc, 5);
            let came = if whole {
                let (mut came, mut blocks) = (BTreeMap::new(), Vec::new());
                for (frame, data) in &frames {
                    let Bulk::Pages { extents, .. } = frame else { panic!("not pages") };
                    let mut data = data.chunks(PAGE_SIZE);
                    for extent in extents {
                        let zero = extent.range.pages().all(|page| byte(&ram, page) == 0);
                        prop_assert_eq!(extent.content, if zero { Content::Zero } else { Content::Plain });
                        for page in extent.range.pages() {
                            came.insert(page, if zero { 0 } else { data.next().unwrap()[9] });
                        }
                        blocks.push(extent.range);
                    }
                }
                let mut want = Vec::new();
                for (_, _, piece) in layout().split(range) {
                    let starts = piece.pages().step_by(HUGE_BLOCK as usize);
                    want.extend(starts.map(|first| PageRange::new(first, HUGE_BLOCK.min(piece.end() - first))));
                }
                prop_assert_eq!(&blocks, &want);
                // No more frames are used than needed: there is one more only where the next block
                // has no room.
                let full = frames.windows(2).all(|w| w[0].1.len() + w[1].1.len() > MAX_PAYLOAD);
                prop_assert!(full, "{:?}", frames.iter().map(|f| f.1.len()).collect::<Vec<_>>());
                let zero: u64 = frames.iter().flat_map(|(frame, _)| match frame {
                    Bulk::Pages { extents, .. } => extents.clone(),
                    _ => Vec::new(),
                }).filter(|e| e.content == Content::Zero).map(|e| e.range.count).sum();
                check_counts(&lane, &came, zero, &written)?;
                came
            } else {
                let came = arrived(&frames, MAX_PAYLOAD);
                check_counts(&lane, &came, came.values().filter(|&&byte| byte == 0).count() as u64, &written)?;
                came
            };
            prop_assert_eq!(came, range.pages().map(|p| (p, byte(&ram, p))).collect::<BTreeMap<_, _>>());
        }
    }

    #[test]
    fn a_frame_takes_only_so_many_extents() {
        // Every other page is sent, so that no page can be joined with another.
        let pages = 2 * MAX_EXTENTS as u64 + 10;
        let layout = RamLayout::new(vec![RamRegion { gpa: 0, len: pages << 12 }]).unwrap();
        let ram = Arc::new(HeapRam::new(layout).unwrap());
        let (mut lane, written) = lane(&ram, 0, 1);
        let mut set = PageSet::empty(pages);
        (0..pages).step_by(2).for_each(|page| _ = set.insert(page));
        let job = Job { generation: 1, pages: Arc::new(set), rearm: None, stop: Arc::default() };
        lane.round(&job).unwrap();
        let bytes = written.0.lock().unwrap().0.clone();
        let (first, _) = bytes.split_first_chunk().unwrap();
        let first = Header::decode(first).unwrap();
        assert_eq!(first.body as usize, 8 + 12 * MAX_EXTENTS);
        let (second, _) = bytes[Header::LEN + first.body as usize..].split_first_chunk().unwrap();
        assert_eq!(Header::decode(second).unwrap().body, 8 + 12 * 5);
        assert_eq!(lane.counters.zero.load(Ordering::Relaxed), MAX_EXTENTS as u64 + 5);
    }

    #[test]
    fn a_page_behind_a_full_frame_is_looked_at() {
        // As many pages with data as a frame takes; then zeros; then data up to the end of the
        // stripe.
        let (full, zeros) = ((FRAME_PAYLOAD / PAGE_SIZE) as u64, 10);
        for (first, second) in [(1, 0), (0, 1)] {
            let ram = filled(&[(0, full, first), (full, zeros, second), (full + zeros, full, first)]);
            let (mut lane, written) = lane(&ram, 0, 1);
            let mut set = PageSet::empty(PAGES);
            set.insert_range(PageRange::new(0, STRIPE_PAGES));
            let job = Job { generation: 1, pages: Arc::new(set), rearm: None, stop: Arc::default() };
            lane.round(&job).unwrap();
            let came = arrived(&frames(&written, false, 1), FRAME_PAYLOAD);
            assert!(came.iter().all(|(&page, &came)| came == byte(&ram, page)) && came.len() as u64 == STRIPE_PAGES);
            let zero = came.values().filter(|&&byte| byte == 0).count() as u64;
            check_counts(&lane, &came, zero, &written).unwrap();
        }
    }

    #[test]
    fn pushes_fill_their_frames() {
        let ram = filled(&[(0, PAGES, 1)]);
        let most = (MAX_PAYLOAD / PAGE_SIZE) as u64;
        for whole_blocks in [false, true] {
            let (mut lane, written) = lane(&ram, 0, 1);
            lane.whole_blocks = whole_blocks;
            lane.push(PageRange::new(0, PAGES), 1).unwrap();
            let sizes: Vec<u64> = frames(&written, false, 1).iter().map(|f| (f.1.len() / PAGE_SIZE) as u64).collect();
            // Whole blocks are not cut: the first region has one block and 24 pages, the second one
            // has 16 pages more than that.
            let want = if whole_blocks { [most, BORDER - most, most, 16] } else { [most, most, 40, 0] };
            assert!(sizes.iter().eq(want.iter().filter(|&&pages| pages > 0)), "{sizes:?}");
        }
    }

    #[test]
    fn a_lane_works_until_nobody_has_work_and_keeps_its_queue_short_for_pushes() {
        let ram = filled(&[(0, PAGES, 1)]);
        let (lane, written) = lane(&ram, 0, 1);
        let ((work, jobs), (tx, inputs)) = (mpsc::channel(), mpsc::channel());
        let job = |stop| Job { generation: 1, pages: Arc::new(PageSet::full(PAGES)), rearm: None, stop };
        let short = || written.1.load(Ordering::Relaxed);
        std::thread::scope(|scope| {
            scope.spawn(|| lane.run(jobs, tx));
            let done = || match inputs.recv().unwrap() {
                Input::Lane(Ok(done)) => (done.lane, done.stopped_at, short()),
                _ => panic!("the lane has failed"),
            };
            work.send(Work::Round(job(Arc::default()))).unwrap();
            assert_eq!(done(), (0, None, 0));
            work.send(Work::Round(job(Arc::new(AtomicBool::new(true))))).unwrap();
            assert_eq!(done(), (0, Some(0), 0));
            for _ in 0..2 {
                work.send(Work::Push(PageRange::new(0, 2), 2)).unwrap();
                assert_eq!(done(), (0, None, 1));
            }
            work.send(Work::Push(PageRange::new(PAGES, 1), 2)).unwrap();
            assert_eq!(done(), (0, None, 1), "there is nothing to push");
            drop(work);
        });
        assert!(inputs.recv().is_err());
    }

    #[test]
    fn a_round_that_is_stopped_says_where_and_how_long_it_read() {
        let ram = filled(&[(0, PAGES, 1)]);
        let (mut lane, written) = lane(&ram, 1, 2);
        // The lane has spent much time writing before this round.
        lane.writing = Duration::from_secs(1000);
        let stop = Arc::new(AtomicBool::new(false));
        let job = Job { generation: 1, pages: Arc::new(PageSet::full(PAGES)), rearm: None, stop: Arc::clone(&stop) };
        let done = lane.round(&job).unwrap();
        assert!(done.stopped_at.is_none() && done.reading > Duration::ZERO);
        stop.store(true, Ordering::Relaxed);
        assert_eq!(lane.round(&job).unwrap().stopped_at, Some(1));
        let sizes = written.0.lock().unwrap().1.len();
        lane.writing = Duration::ZERO;
        assert_eq!(lane.round(&job).unwrap().stopped_at, Some(1));
        assert_eq!(written.0.lock().unwrap().1.len(), sizes + 1, "the end of the round");
    }

    #[test]
    fn a_frame_is_written_in_pieces_that_suit_the_link() {
        let ram = filled(&[(0, PAGES, 1)]);
        let (written, wire_bytes) = (Written::default(), Arc::<AtomicU64>::default());
        let writer = Box::new(written.clone());
        let mut lane = Lane::for_checkpoints(ram.clone(), writer, "there".into(), wire_bytes.clone());
        let (head, slice) = ([7; 100], ram.slice(PageRange::new(0, 300)).unwrap());
        lane.piece = 1000 * PAGE_SIZE;
        lane.write(&head, &[slice.take(10), slice.skip(10)]).unwrap();
        assert_eq!(written.0.lock().unwrap().1, [100 + slice.len()]);
        assert_eq!(written.0.lock().unwrap().0.len(), 100 + slice.len());

        // The first write has the size of a piece. The size of the next pieces depends on the time
        // that a write took.
        *written.0.lock().unwrap() = Default::default();
        let mut want = head.to_vec();
        want.resize(100 + slice.len(), 0);
        slice.copy_to(&mut want[100..]);
        lane.piece = LEAST_PIECE;
        lane.write(&head, &[slice.take(10), slice.skip(10).take(9000), slice.skip(9010)]).unwrap();
        let (bytes, sizes) = std::mem::take(&mut *written.0.lock().unwrap());
        assert!(bytes == want && sizes[0] == LEAST_PIECE && sizes.is_sorted_by(|a, b| *b <= 2 * *a));
        assert!(sizes[..sizes.len() - 1].iter().all(|&size| size >= LEAST_PIECE));
        assert_eq!(wire_bytes.load(Ordering::Relaxed), 2 * want.len() as u64);

        for (piece, time, next) in [
            (FIRST_PIECE, QUICK_PIECE - Duration::from_nanos(1), 2 * FIRST_PIECE),
            (MAX_PAYLOAD, Duration::ZERO, MAX_PAYLOAD),
            (FIRST_PIECE, QUICK_PIECE, FIRST_PIECE),
            (FIRST_PIECE, SLOW_PIECE, FIRST_PIECE),
            (FIRST_PIECE, SLOW_PIECE + Duration::from_nanos(1), FIRST_PIECE / 2),
            (LEAST_PIECE, Duration::MAX, LEAST_PIECE),
        ] {
            lane.piece = piece;
            lane.pace(time);
            assert_eq!(lane.piece, next, "{piece} {time:?}");
        }
    }
}
