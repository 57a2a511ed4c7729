//! A bulk lane at the source: finds out what the pages of its stripes hold, and sends them.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc,
    },
    time::{Duration, Instant},
};

use super::{STRIPE_PAGES, handle::Input};
use crate::{
    MigrationError, PAGE_SIZE, PageRange, PageSet,
    channel::WriteHalf,
    ram::{GuestRam, RamSlice},
    tracker::Rearm,
    wire::{Bulk, Content, Extent, HUGE_BLOCK, MAX_EXTENTS, MAX_PAYLOAD},
};

/// Page data in one frame: a few hundred microseconds on a fast link, and one system call.
const FRAME_PAYLOAD: usize = 1 << 20;
/// Most pieces of memory in one frame; a system call takes 1024.
const MAX_SLICES: usize = 1000;

/// The first piece of a frame that is written at once, and the smallest one, in bytes.
pub(super) const FIRST_PIECE: usize = 256 << 10;
const LEAST_PIECE: usize = 16 << 10;
/// After a piece that took less time than this the next one is larger, and smaller after one that took longer than that.
const QUICK_PIECE: Duration = Duration::from_millis(10);
const SLOW_PIECE: Duration = Duration::from_millis(100);

/// What all lanes count together.
#[derive(Default)]
pub(super) struct Counters {
    pub(super) wire_bytes: Arc<AtomicU64>,
    pub(super) zero: AtomicU64,
    pub(super) plain: AtomicU64,
    /// Bytes of page data that were written to lanes.
    pub(super) page_bytes: AtomicU64,
    /// Pages of the present round.
    pub(super) round_sent: AtomicU64,
}

/// One round, for each lane.
#[derive(Clone)]
pub(super) struct Job {
    pub(super) generation: u32,
    pub(super) pages: Arc<PageSet>,
    pub(super) rearm: Option<Arc<dyn Rearm>>,
    /// Set to end the round early.
    pub(super) stop: Arc<AtomicBool>,
}

/// What a lane is asked for.
pub(super) enum Work {
    /// Its part of a round.
    Round(Job),
    /// These pages, which nobody else sends, as part of this generation.
    Push(PageRange, u32),
}

/// How a lane came to the end of a piece of work.
pub(super) struct LaneDone {
    pub(super) lane: u16,
    /// The first stripe that was not sent, if the round was stopped.
    pub(super) stopped_at: Option<u64>,
    /// The time of a round in which it did not write, but read pages.
    pub(super) reading: Duration,
}

pub(super) struct Lane {
    pub(super) index: u16,
    pub(super) lanes: u16,
    pub(super) ram: Arc<dyn GuestRam>,
    pub(super) writer: Box<dyn WriteHalf>,
    pub(super) peer: String,
    pub(super) sequence: u32,
    pub(super) payload_crc: bool,
    /// After the hand-over, pages move in blocks that the destination cannot split.
    pub(super) whole_blocks: bool,
    pub(super) counters: Arc<Counters>,
    /// Time spent writing so far.
    pub(super) writing: Duration,
    /// Bytes that are written at once.
    pub(super) piece: usize,
}

/// The stripes of one lane among `lanes`, of a VM with `pages` pages.
pub(super) fn stripes(index: u16, lanes: u16, pages: u64) -> impl Iterator<Item = u64> {
    (u64::from(index)..pages.div_ceil(STRIPE_PAGES)).step_by(usize::from(lanes.max(1)))
}

/// The pages of a stripe; the last one may reach beyond the end of RAM.
pub(super) fn stripe_pages(stripe: u64) -> PageRange {
    PageRange::new(stripe.saturating_mul(STRIPE_PAGES), STRIPE_PAGES)
}

/// A frame in the making.
struct Batch<'a> {
    extents: Vec<Extent>,
    slices: Vec<RamSlice<'a>>,
    payload: usize,
    pages: u64,
    /// Most bytes of page data.
    most: usize,
}

impl Default for Batch<'_> {
    fn default() -> Self {
        Self { extents: Vec::new(), slices: Vec::new(), payload: 0, pages: 0, most: FRAME_PAYLOAD }
    }
}

impl Lane {
    /// The lane on which a destination sends pages back.
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

    /// Works until the sender of work is gone or the link fails.
    pub(super) fn run(mut self, jobs: mpsc::Receiver<Work>, inputs: mpsc::Sender<Input>) {
        let mut pushes = false;
        while let Ok(work) = jobs.recv() {
            let done = match work {
                Work::Round(job) => self.round(&job),
                Work::Push(range, generation) => {
                    if !std::mem::replace(&mut pushes, true) {
                        // the guest waits for what comes on other lanes
                        self.writer.keep_queue_short();
                    }
                    let lane = self.index;
                    self.push(range, generation).map(|()| LaneDone { lane, stopped_at: None, reading: Duration::ZERO })
                }
            };
            let failed = done.is_err();
            // the engine may be gone already, having failed for another reason
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
                // before the first look at the pages: what is written after it is reported again
                rearm.before_read(range, &job.pages)?;
            }
            for run in job.pages.ranges_in(range) {
                for (_, _, piece) in layout.split(run) {
                    self.add(&mut batch, &*ram, piece, job.generation)?;
                    pages += piece.count;
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
        // a block of huge pages in one frame: the destination then takes it in as one
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

    /// Adds a block that the destination can only install as one: all of it is data unless all of it is zero.
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
        if full || batch.extents.len() >= MAX_EXTENTS || batch.slices.len() >= MAX_SLICES {
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
        let memory = ram.slice(run)?;
        let is_zero = |i: u64| memory.skip(i as usize * PAGE_SIZE).take(PAGE_SIZE).is_zero();
        let mut at = 0;
        let mut zero = is_zero(0);
        while at < run.count {
            // the longest stretch of the same kind, as far as a frame holds it
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
            if batch.payload >= batch.most || batch.extents.len() >= MAX_EXTENTS || batch.slices.len() >= MAX_SLICES {
                self.flush(batch, generation)?;
            }
            // after a stretch that ended for lack of room the next page has not been looked at
            if end < run.count && next_zero == zero {
                next_zero = is_zero(end);
            }
            (at, zero) = (end, next_zero);
        }
        Ok(())
    }

    fn flush(&mut self, batch: &mut Batch<'_>, generation: u32) -> Result<(), MigrationError> {
        if batch.extents.is_empty() {
            return Ok(());
        }
        let next = Batch { most: batch.most, ..Batch::default() };
        let Batch { extents, slices, payload, pages, .. } = std::mem::replace(batch, next);
        if self.payload_crc {
            // the guest may write between the checksum and the send: both must see the same copy
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

    /// Writes a frame, in pieces of which each is counted when it is written: on a slow link a whole frame takes so long that the
    /// destination would seem to take nothing.
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

    /// The next piece is as large as the time of the last one suggests.
    fn pace(&mut self, time: Duration) {
        if time < QUICK_PIECE {
            self.piece = (self.piece * 2).min(MAX_PAYLOAD);
        } else if time > SLOW_PIECE {
            self.piece = (self.piece / 2).max(LEAST_PIECE);
        }
    }
}
