//! Reads and sends the remaining pages that the source has in page stores only. Pages that the
//! destination's guest waits for come first.
//!
//! The fetcher has claimed these pages in the page map, so that no lane reads them from RAM, and no
//! push order chooses them. Two threads read. One of them reads for demands only, so that a demand
//! never waits for a page that the guest does not need yet. The pages that were read go to the bulk
//! lanes in turn.
//!
//! A store that fails costs only time: each attempt has a deadline, and the pages are read again
//! after a pause, until the store has them (rule 13). Meanwhile a vCPU that touches one of them
//! waits.

use std::{
    collections::{BTreeSet, VecDeque},
    sync::{
        Arc, Condvar, Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    time::Instant,
};

use crate::{
    MigrationError, PageRange, PageSet,
    engine::{
        SourceOptions,
        lane::Work,
        stored::{BACK_OFF, FETCH_TIME, Fetched, resident},
    },
    lock::lock,
    page_map::{MapError, PageMap},
    paged_memory::{FetchError, MAX_FETCHED_PAGES, PagedMemory},
    report::{Event, Observer},
    spawner::{Joiner, Role},
    store::Urgency,
    text::Chain,
};

/// The most pieces that were read and that no lane has sent yet. They make 1 MiB, which a lane
/// sends in milliseconds.
const MAX_IN_HAND: u32 = 4;

/// Reads and sends pages that are in page stores only. See the module documentation.
pub(super) struct Fetcher {
    memory: Arc<PagedMemory>,
    observer: Arc<dyn Observer>,
    queue: Mutex<Queue>,
    changed: Condvar,
    /// The number of pages that were sent without a demand since
    /// [`take_pushed`](Fetcher::take_pushed) was last called.
    pushed: AtomicU64,
}

/// A fetcher, and its threads, which end after a call of [`end`](Fetcher::end).
pub(super) struct Started {
    pub(super) fetcher: Arc<Fetcher>,
    pub(super) threads: Vec<Box<dyn Joiner>>,
}

#[derive(Default)]
struct Queue {
    /// Pages that wait to be read.
    left: PageSet,
    /// Pages whose first read since the hand-over has not begun.
    never_read: PageSet,
    /// Pages that the destination's guest waits for, each with the earliest time of its next read.
    wanted: VecDeque<(Instant, u64)>,
    /// The number of pieces that are being read.
    reading: u32,
    /// The number of pieces that were read and not sent yet.
    in_hand: u32,
    /// Whether pages are read that the guest does not wait for.
    pushes: bool,
    /// The bulk lanes of the present link, and the generation under which pages are sent.
    lanes: Vec<mpsc::Sender<Work>>,
    generation: u32,
    /// A counter of the pieces that were sent, to take the lanes in turn.
    turn: usize,
    /// A counter of the links. Pages that were read for an earlier link are dropped.
    link: u64,
    /// Entries whose failure was reported to the user.
    told: BTreeSet<u8>,
    ended: bool,
}

/// Pages that one thread reads in one piece.
struct Piece {
    pages: PageRange,
    link: u64,
    urgency: Urgency,
}

/// A guard that counts as one piece in hand until it is dropped.
struct InHand(Arc<Fetcher>);

impl Drop for InHand {
    fn drop(&mut self) {
        let mut queue = lock(&self.0.queue);
        queue.in_hand = queue.in_hand.saturating_sub(1);
        drop(queue);
        self.0.changed.notify_all();
    }
}

impl Fetcher {
    /// Starts the threads, which have nothing to do yet.
    ///
    /// # Errors
    /// Returns [`MigrationError::Thread`] if the spawner has no thread.
    pub(super) fn start(memory: Arc<PagedMemory>, options: &SourceOptions) -> Result<Started, MigrationError> {
        let pages = memory.map().read(PageMap::pages);
        let none = PageSet::empty(pages);
        let queue = Queue { left: none.clone(), never_read: none, ..Queue::default() };
        let this = Arc::new(Self {
            memory,
            observer: options.observer.clone(),
            queue: Mutex::new(queue),
            changed: Condvar::new(),
            pushed: AtomicU64::new(0),
        });
        let mut threads = Vec::new();
        for (role, name, next) in [
            (Role::Demand, "mig-fetch-fault", Self::next_wanted as fn(&Self, &mut u64) -> Option<Piece>),
            (Role::Bulk, "mig-fetch", Self::next_push),
        ] {
            let fetcher = this.clone();
            let body = Box::new(move || fetcher.run(next));
            let thread = options.spawner.spawn(role, options.impact, name, body);
            threads.push(thread.map_err(|cause| {
                this.end();
                MigrationError::Thread { role: "reads from page stores", cause }
            })?);
        }
        Ok(Started { fetcher: this, threads })
    }

    /// Takes over the pages that are at the source, and there in stores only, and claims them in
    /// the map.
    ///
    /// # Errors
    /// Returns a [`MapError`] if one of the pages is claimed already.
    pub(super) fn take_over(&self, map: &mut PageMap) -> Result<(), MapError> {
        let mut stored = self.memory.map().read(|map| map.in_store().clone());
        stored.intersect_with(map.unclaimed());
        for run in stored.ranges() {
            map.claim(run)?;
        }
        self.change(|queue| {
            if queue.generation == 0 {
                queue.never_read.union_with(&stored);
            }
            queue.left.union_with(&stored);
        });
        Ok(())
    }

    /// Sets the lanes of a new link, and the generation of its pages. Demands are served from now
    /// on.
    pub(super) fn attach(&self, lanes: &[mpsc::Sender<Work>], generation: u32) {
        self.change(|queue| (queue.lanes, queue.generation) = (lanes.to_vec(), generation));
    }

    /// Removes the lanes of a link that is closed, and all queued pages. They are taken over again
    /// when the destination has listed the pages that it lacks.
    pub(super) fn detach(&self) {
        self.change(|queue| {
            queue.lanes.clear();
            queue.left.clear();
            queue.wanted.clear();
            queue.link += 1;
        });
    }

    /// Resets the fetcher after a hand-over that has failed: the VM runs on at the source.
    pub(super) fn take_back(&self) {
        self.detach();
        self.change(|queue| {
            queue.never_read.clear();
            queue.generation = 0;
        });
    }

    /// Records that the destination's guest waits for `page`. Returns whether the page was left
    /// here and had not been demanded before.
    pub(super) fn demand(&self, page: u64) -> bool {
        let mut queue = lock(&self.queue);
        let left = queue.left.contains(page) && !queue.wanted.iter().any(|&(_, wanted)| wanted == page);
        if left {
            queue.wanted.push_back((Instant::now(), page));
            self.changed.notify_all();
        }
        left
    }

    /// Starts to read and send all pages, because the VM runs at the destination now.
    pub(super) fn push(&self) {
        self.change(|queue| queue.pushes = true);
    }

    /// Returns the number of pages whose first read has not begun. The destination cannot have
    /// them.
    pub(super) fn never_read(&self) -> u64 {
        lock(&self.queue).never_read.len()
    }

    /// Returns whether all pages were given to lanes.
    pub(super) fn is_done(&self) -> bool {
        let queue = lock(&self.queue);
        queue.left.is_empty() && queue.reading == 0
    }

    /// Returns the number of pages that were sent since the last call, without those that were
    /// demanded.
    pub(super) fn take_pushed(&self) -> u64 {
        self.pushed.swap(0, Ordering::Relaxed)
    }

    /// Ends the threads.
    pub(super) fn end(&self) {
        self.change(|queue| queue.ended = true);
    }

    fn change(&self, change: impl FnOnce(&mut Queue)) {
        change(&mut lock(&self.queue));
        self.changed.notify_all();
    }

    fn run(self: Arc<Self>, next: fn(&Self, &mut u64) -> Option<Piece>) {
        let mut at = 0;
        while let Some(piece) = next(&self, &mut at) {
            self.clone().send(&piece);
        }
    }

    /// Returns the next page that the destination's guest waits for, or `None` when the fetcher has
    /// ended.
    fn next_wanted(&self, _: &mut u64) -> Option<Piece> {
        let mut queue = lock(&self.queue);
        while !queue.ended {
            let now = Instant::now();
            let due = queue.wanted.iter().find(|(due, page)| *due <= now && queue.left.contains(*page));
            let due = due.map(|&(_, page)| page).filter(|_| !queue.lanes.is_empty());
            if let Some(page) = due {
                return Some(queue.take(PageRange::new(page, 1), Urgency::Fault));
            }
            queue = self.wait(queue);
        }
        None
    }

    /// Returns the next pages from page `at` on, or `None` when the fetcher has ended.
    fn next_push(&self, at: &mut u64) -> Option<Piece> {
        let mut queue = lock(&self.queue);
        while !queue.ended {
            let room = queue.pushes && !queue.lanes.is_empty() && queue.in_hand < MAX_IN_HAND;
            let first = queue.left.first_from(*at).or_else(|| queue.left.first_from(0)).filter(|_| room);
            if let Some(run) = first.and_then(|first| queue.left.run_at(first, MAX_FETCHED_PAGES)) {
                *at = run.end();
                return Some(queue.take(run, Urgency::Prefetch));
            }
            queue = self.wait(queue);
        }
        None
    }

    fn wait<'a>(&self, queue: MutexGuard<'a, Queue>) -> MutexGuard<'a, Queue> {
        // The wait has a time-out, because nothing signals that a page whose read has failed is due
        // again.
        self.changed.wait_timeout(queue, BACK_OFF).unwrap_or_else(|e| e.into_inner()).0
    }

    /// Reads a piece, and gives it to a lane.
    fn send(self: Arc<Self>, piece: &Piece) {
        let read = self.memory.stored_runs(piece.pages).and_then(|runs| {
            let read = self.memory.read(&runs, piece.urgency, Instant::now() + FETCH_TIME)?;
            Ok((read, runs))
        });
        let failed = match read {
            Ok((read, runs)) => {
                let resident = resident(piece.pages, &runs);
                self.clone().give(piece, |in_hand| Fetched { read, resident, _in_hand: Box::new(in_hand) });
                false
            }
            Err(error) => {
                self.failed(piece, &error);
                true
            }
        };
        self.change(|queue| queue.reading -= 1);
        if failed && piece.urgency == Urgency::Prefetch {
            let queue = lock(&self.queue);
            drop(self.changed.wait_timeout_while(queue, BACK_OFF, |queue| !queue.ended));
        }
    }

    /// Gives pages that were read to the next lane, unless the link was lost meanwhile.
    fn give(self: Arc<Self>, piece: &Piece, fetched: impl FnOnce(InHand) -> Fetched) {
        let mut queue = lock(&self.queue);
        if queue.link != piece.link || queue.lanes.is_empty() {
            return;
        }
        let waiting = queue.wanted.len();
        queue.wanted.retain(|(_, page)| !piece.pages.pages().contains(page));
        // Demanded pages were counted when the demand arrived.
        let demanded = (waiting - queue.wanted.len()) as u64;
        (queue.in_hand, queue.turn) = (queue.in_hand + 1, queue.turn.wrapping_add(1));
        let (lane, generation) = (queue.lanes[queue.turn % queue.lanes.len()].clone(), queue.generation);
        drop(queue);
        self.pushed.fetch_add(piece.pages.count.saturating_sub(demanded), Ordering::Relaxed);
        // A lane that has ended has reported why, and the link is lost.
        let _ = lane.send(Work::Fetched(fetched(InHand(self)), generation));
    }

    /// Queues pages again that could not be read, and reports the first failure of each entry.
    fn failed(&self, piece: &Piece, error: &FetchError) {
        let entry = match *error {
            FetchError::Unknown { entry } | FetchError::Lost { entry, .. } | FetchError::Silent { entry, .. } => entry,
            FetchError::Install { .. } => u8::MAX,
        };
        let mut queue = lock(&self.queue);
        if queue.link == piece.link {
            queue.left.insert_range(piece.pages);
            let again = Instant::now() + BACK_OFF;
            let wanted = queue.wanted.iter_mut().filter(|(_, page)| piece.pages.pages().contains(page));
            wanted.for_each(|(due, _)| *due = again);
        }
        let first = queue.told.insert(entry);
        drop(queue);
        if first {
            let what =
                "pages that the destination lacks cannot be read, and are tried again; whoever touches one waits";
            self.observer.event(&Event::Warning(format!("{what}: {}", Chain(error))));
        }
    }
}

impl Queue {
    fn take(&mut self, pages: PageRange, urgency: Urgency) -> Piece {
        self.left.remove_range(pages);
        self.never_read.remove_range(pages);
        self.reading += 1;
        Piece { pages, link: self.link, urgency }
    }
}
