//! Places in page stores to which the source puts pages: while the guest runs, and on the way of
//! pages that the hand-over has left behind.

use std::{sync::mpsc, time::Duration};

use super::*;
use crate::{
    PageRange,
    engine::pages::Copied,
    page_map::StoreCopy,
    paged_memory::{EntryStore, StoreEntry, StoreTable},
    spawner::Joiner,
    store::{Namespace, Owner, PageStore, PageToPut, Purpose, Record, StoreError},
    strategy::{Place, Portion, Put},
    text::Chain,
    wire::{FEATURE_STORES, TablePart, add_missing, located_frames},
};

/// Most pages of one put: 2 MiB, as a stripe.
const MAX_PUT_PAGES: u64 = 512;

/// The page stores of a source.
#[derive(Clone)]
pub struct SourceStores {
    /// The stores that this host was started with.
    pub stores: Vec<Arc<dyn PageStore>>,
    /// Makes the secret name of a namespace. It must be as random as a key: see
    /// `migration_crypto::random_namespace`.
    pub new_namespace: Arc<dyn Fn() -> Namespace + Send + Sync>,
    /// Who answers for the namespaces, as the stores record it.
    pub owner: Owner,
    /// For how long the stores keep what they are given, unless the destination renews it.
    pub lease: Duration,
}

/// The places of one migration, and what the destination was told of them.
#[derive(Default)]
pub(super) struct Places {
    /// The places of the strategy.
    pub(super) wanted: Vec<Place>,
    table: StoreTable,
    /// For each of the first entries, the number that it has in the VM's own table: they have pages
    /// that were in stores when the migration began.
    kept: Vec<u8>,
    open: Vec<OpenPlace>,
    /// How many parts of the table were sent, and the last one that was acknowledged.
    parts: u32,
    received: u32,
    /// Whether *vacated* was said, and not answered.
    vacated: bool,
    /// What the destination has listed so far that it lacks.
    lacking: Option<PageSet>,
    pub(super) threads: Vec<Box<dyn Joiner>>,
    /// Why the last put has failed, if nobody was told.
    error: Option<MigrationError>,
    /// Puts that have ended since the destination was asked for its list of missing pages; `None`
    /// while it is not asked.
    deferred: Option<Vec<PutDone>>,
}

/// How many places and entries there are.
pub(super) struct Opened {
    places: usize,
    entries: usize,
}

impl Places {
    /// Adds an entry of the VM's own table, where it has this number. Returns its number here.
    pub(super) fn keep_entry(&mut self, number: u8, entry: StoreEntry) -> Result<u8, MigrationError> {
        self.kept.push(number);
        self.table.append(entry).map_err(|error| MigrationError::Blocked(error.to_string()))
    }

    pub(super) fn has_entries(&self) -> bool {
        !self.table.is_empty()
    }

    /// Returns whether the destination was told of an entry of the VM's own table.
    pub(super) fn is_known(&self, number: u8) -> bool {
        self.kept.iter().take(self.table.known()).any(|&kept| kept == number)
    }

    pub(super) fn opened(&self) -> Opened {
        Opened { places: self.open.len(), entries: self.table.len() }
    }

    /// The destination is about to list what it lacks. The list is compared with what this side has
    /// recorded now, so puts that end meanwhile are recorded after it.
    pub(super) fn defer_puts(&mut self) {
        self.deferred = Some(Vec::new());
    }
}

/// A namespace in the stores of a place.
struct OpenPlace {
    place: Place,
    entry: u8,
    namespace: Namespace,
    stores: Vec<Arc<dyn PageStore>>,
    jobs: mpsc::Sender<PutJob>,
    /// The generation of the last put.
    generation: u32,
    idle: bool,
    failed: bool,
}

/// Pages for a place.
struct PutJob {
    run: PageRange,
    copy: StoreCopy,
    rearm: Option<Arc<dyn crate::tracker::Rearm>>,
}

/// How a put has ended.
pub(in crate::engine) struct PutDone {
    place: usize,
    run: PageRange,
    copy: StoreCopy,
    result: Result<Vec<PageRange>, PutFailure>,
}

/// Why a put has failed.
enum PutFailure {
    /// A page could not be read.
    Ram(MigrationError),
    /// A store has failed, or has lost what it had.
    Store { name: String, cause: Option<StoreError> },
}

impl PutFailure {
    /// Whether what was put before is lost, too.
    fn is_loss(&self) -> bool {
        matches!(self, Self::Store { cause: None | Some(StoreError::Absent(_)), .. })
    }

    fn into_error(self) -> MigrationError {
        match self {
            Self::Ram(error) => error,
            Self::Store { name, cause: Some(cause) } => MigrationError::page_store(&name)(cause),
            Self::Store { name, cause: None } => MigrationError::Blocked(format!("page store {name} has lost pages")),
        }
    }
}

/// Puts pages into all stores of a place, on a thread of its own.
struct Putter {
    place: usize,
    ram: Arc<dyn GuestRam>,
    vm: VmId,
    namespace: Namespace,
    stores: Vec<(Arc<dyn PageStore>, EntryStore)>,
}

impl Putter {
    fn run(self, jobs: mpsc::Receiver<PutJob>, inputs: mpsc::Sender<Input>) {
        while let Ok(job) = jobs.recv() {
            let result = self.put(&job);
            let done = PutDone { place: self.place, run: job.run, copy: job.copy, result };
            // the engine may be gone: the migration is over
            if inputs.send(Input::Put(done)).is_err() {
                return;
            }
        }
    }

    /// Returns the runs that all stores have. Zeros go to no store (rule 3).
    fn put(&self, job: &PutJob) -> Result<Vec<PageRange>, PutFailure> {
        let mut wanted = PageSet::empty(self.ram.layout().pages());
        wanted.insert_range(job.run);
        // a copy: the guest may write between two looks
        let mut copied = Copied::default();
        copied.take(&*self.ram, &wanted, job.rearm.as_deref()).map_err(PutFailure::Ram)?;
        let pages: Vec<_> = copied.pages().filter_map(|(page, data)| Some(PageToPut { page, value: data? })).collect();
        if pages.is_empty() {
            return Ok(Vec::new());
        }
        let mut taken = vec![true; pages.len()];
        for (store, EntryStore { name, incarnation }) in &self.stores {
            let failure = |cause| PutFailure::Store { name: name.clone(), cause };
            let put = store.put(self.namespace.of(self.vm), job.copy.generation, &pages);
            let stored = put.map_err(|cause| failure(Some(cause)))?;
            if stored.incarnation != *incarnation {
                // what was put before may be gone (rule 11)
                return Err(failure(None));
            }
            taken.iter_mut().zip(stored.taken).for_each(|(all, this)| *all &= this);
        }
        let stored = pages.iter().zip(taken).filter(|(_, taken)| *taken);
        Ok(PageRange::runs_of(stored.map(|(page, _)| page.page)))
    }

    /// Creates the namespace in all stores. Returns their incarnations.
    fn create(&self, options: &SourceStores, purpose: Purpose) -> Result<Vec<EntryStore>, MigrationError> {
        let record = Record { vm: self.vm, purpose, owner: options.owner };
        let create = |(store, _): &(Arc<dyn PageStore>, EntryStore)| {
            let created = store.create(self.namespace.id(), &record, options.lease);
            let incarnation = created.map_err(MigrationError::page_store(store.name()))?;
            Ok(EntryStore { name: store.name().into(), incarnation })
        };
        self.stores.iter().map(create).collect()
    }
}

impl Engine<'_> {
    pub(super) fn may_use_stores(&self) -> bool {
        self.peer.features & FEATURE_STORES != 0
    }

    /// Makes a namespace for each place of the strategy that has none, and tells the destination of
    /// all entries, and of all pages that are in stores. Returns when it has acknowledged that.
    pub(super) fn open_places(&mut self) -> Result<(), MigrationError> {
        if !self.uses_stores {
            return Ok(());
        }
        if !self.may_use_stores() {
            let why = "pages are in page stores or to go through them, and the destination does not fetch from any: it is \
                       older, was started without page stores, or cannot fetch single pages";
            return Err(MigrationError::Blocked(why.into()));
        }
        self.machine.allow_stores();
        let is_open = |place: &Place| self.places.open.iter().any(|open| open.place == *place);
        let wanted: Vec<_> = self.places.wanted.iter().filter(|place| !is_open(place)).cloned().collect();
        for place in wanted {
            self.open_place(place)?;
        }
        self.send_table()?;
        self.await_table()?;
        if self.rounds.map().unannounced().is_empty() {
            return Ok(());
        }
        self.announce()?;
        // an empty part: its acknowledgement says that the locations were read
        self.send_table()?;
        self.await_table()
    }

    /// The session has come to nothing: closes the places that it has opened, and forgets their
    /// namespaces. Whatever else is in the table was not sent to anybody.
    pub(super) fn forget_places_since(&mut self, before: Opened) {
        let opened = self.places.open.split_off(before.places);
        for open in opened {
            self.forget_place(&open);
        }
        self.places.table.begin_session(before.entries);
        (self.places.parts, self.places.received) = (0, 0);
    }

    fn forget_place(&self, open: &OpenPlace) {
        for store in &open.stores {
            if let Err(cause) = store.forget(open.namespace.of(self.id)) {
                let error = MigrationError::page_store(store.name())(cause);
                let what = format!("what was put stays until its lease ends: {}", Chain(&error));
                self.options.observer.event(&Event::Warning(what));
            }
        }
    }

    fn open_place(&mut self, place: Place) -> Result<(), MigrationError> {
        let Place::Stores { names, purpose } = &place else { return Ok(()) };
        let options = self.options.stores.clone();
        let options = options.ok_or_else(|| MigrationError::Blocked(format!("there are no page stores: {place}")))?;
        let find = |name: &String| {
            let found = options.stores.iter().find(|store| store.name() == name).cloned();
            found.ok_or_else(|| MigrationError::Blocked(format!("there is no page store {name}: {place}")))
        };
        let stores: Vec<_> = names.iter().map(find).collect::<Result<_, _>>()?;
        let namespace = (options.new_namespace)();
        let unknown = |store: Arc<dyn PageStore>| {
            let name = store.name().to_owned();
            (store, EntryStore { name, incarnation: crate::store::Incarnation([0; 16]) })
        };
        let mut putter = Putter {
            place: self.places.open.len(),
            ram: self.ram.clone(),
            vm: self.id,
            namespace: namespace.clone(),
            stores: stores.iter().cloned().map(unknown).collect(),
        };
        let (jobs, work) = mpsc::channel();
        // from here on the namespaces are forgotten if the attempt fails, also if only some were
        // made
        self.places.open.push(OpenPlace {
            place: place.clone(),
            entry: 0,
            namespace: namespace.clone(),
            stores: stores.clone(),
            jobs,
            generation: 0,
            idle: true,
            failed: true,
        });
        let created = putter.create(&options, *purpose)?;
        putter.stores = stores.into_iter().zip(created.iter().cloned()).collect();
        let blocked = |error: crate::paged_memory::TableError| MigrationError::Blocked(error.to_string());
        let entry = StoreEntry::new(namespace, created).map_err(blocked)?;
        let entry = self.places.table.append(entry).map_err(blocked)?;
        let tx = self.tx.clone();
        let name = format!("mig-put-{entry}");
        let thread =
            self.options.spawner.spawn(Role::Bulk, self.options.impact, &name, Box::new(move || putter.run(work, tx)));
        let thread = thread.map_err(|cause| MigrationError::Thread { role: "puts into a page store", cause })?;
        self.places.threads.push(thread);
        if let Some(open) = self.places.open.last_mut() {
            (open.entry, open.failed) = (entry, false);
        }
        Ok(())
    }

    /// Sends the entries that the destination has not acknowledged: an empty part if there are
    /// none.
    fn send_table(&mut self) -> Result<(), MigrationError> {
        self.places.parts += 1;
        let (first, entries) = self.places.table.unacknowledged();
        let part = TablePart { number: self.places.parts, first, entries: entries.to_vec() };
        self.send_control(&Control::StoreTable(part))
    }

    /// Waits until the destination has the whole table, and has read all that was said before.
    fn await_table(&mut self) -> Result<(), MigrationError> {
        let deadline = Instant::now() + self.options.idle_timeout;
        while self.places.received < self.places.parts {
            if let Some(Input::Control(epoch, frame)) = self.next_input(deadline)? {
                self.frame(epoch, frame)?;
            }
            self.in_time(deadline, "the destination to take the store table")?;
        }
        Ok(())
    }

    /// The destination has a part of the table.
    pub(super) fn table_received(&mut self, number: u32) -> Result<(), MigrationError> {
        if number > self.places.parts || number <= self.places.received {
            return Err(DecodeError::invalid("store table received", "no such part is under way").into());
        }
        self.places.received = number;
        if number == self.places.parts {
            let all = self.places.table.len();
            self.places.table.acknowledged(all).map_err(|e| DecodeError::invalid("store table", e.to_string()))?;
        }
        Ok(())
    }

    /// After a reattachment: the table is sent once more, and what was said about locations may be
    /// lost.
    pub(super) fn repeat_table(&mut self) -> Result<(), MigrationError> {
        (self.places.vacated, self.places.lacking) = (false, None);
        if self.places.table.is_empty() {
            return Ok(());
        }
        self.places.table.repeat();
        self.places.received = self.places.parts;
        self.send_table()
    }

    /// Says which pages are in stores that the destination does not know to be there (rule 16).
    pub(super) fn announce(&mut self) -> Result<(), MigrationError> {
        // without a table, no page can be in a store: the map's lock is left to the demand lanes
        if self.places.table.is_empty()
            || !self.places.table.unacknowledged().1.is_empty()
            || self.rounds.map().unannounced().is_empty()
        {
            return Ok(());
        }
        let (pages, runs) = {
            let map = self.rounds.map();
            (map.unannounced().clone(), map.located_runs(map.unannounced()))
        };
        for frame in located_frames(&runs) {
            self.send_control(&Control::Located(frame))?;
        }
        self.rounds.map().announced(&pages);
        Ok(())
    }

    /// After a reattachment: says which entries have lost pages. The destination may not have heard
    /// of a loss that was found while the link was lost (rule 13).
    pub(super) fn repeat_losses(&mut self) -> Result<(), MigrationError> {
        let lost = self.rounds.map().lost_entries();
        lost.into_iter().try_for_each(|entry| self.send_control(&Control::EntryLost { entry }))
    }

    /// The destination has listed what it lacks, or is not asked any more.
    pub(super) fn record_deferred_puts(&mut self) {
        self.places.deferred.take().into_iter().flatten().for_each(|done| self.put_ended(done));
    }

    /// A put has ended. What was neither written nor demanded meanwhile is in the store (rule 10).
    /// Why it has failed, if it has, is what [`await_put`](Self::await_put) returns.
    pub(super) fn put_ended(&mut self, done: PutDone) {
        if let Some(deferred) = &mut self.places.deferred {
            deferred.push(done);
            return;
        }
        let PutDone { place, run, copy, result } = done;
        let Some(open) = self.places.open.get_mut(place) else { return };
        open.idle = true;
        let failure = {
            let mut map = self.rounds.map();
            let failure = match result {
                Ok(stored) => {
                    stored.into_iter().for_each(|run| drop(map.put_done(run, copy)));
                    None
                }
                Err(failure) => Some(failure),
            };
            // zeros, and all that has failed
            map.put_failed(run, copy);
            failure
        };
        let Some(failure) = failure else { return };
        open.failed = true;
        let entry = open.entry;
        if failure.is_loss() {
            self.lose_entry(entry);
            // best effort: the destination finds it out by itself
            let _ = self.send_control(&Control::EntryLost { entry });
        }
        let error = failure.into_error();
        let what = format!("no page goes there any more: {}", Chain(&error));
        self.options.observer.event(&Event::Warning(what));
        self.places.error = Some(error);
    }

    /// An entry has lost pages: they are sent from here (rule 13).
    pub(super) fn lose_entry(&mut self, entry: u8) {
        self.rounds.map().entry_lost(entry);
        self.places.vacated = false;
        if let Some(open) = self.places.open.iter_mut().find(|open| open.entry == entry) {
            open.failed = true;
        }
    }

    /// Puts pages of the running guest into the stores of a place.
    pub(super) fn put_pages(&mut self, pages: &mut PageSet, portion: Portion<'_>) -> Result<Put, MigrationError> {
        let Some(place) = self.places.open.iter().position(|open| open.place == *portion.place) else {
            let why = format!("the strategy has not named this place: {}", portion.place);
            return Err(MigrationError::Blocked(why));
        };
        let mut resident = pages.clone();
        if let Some(stored) = self.rounds.stored() {
            // those are in a store already
            resident.subtract(&stored.pages());
        }
        let (began, asked) = (Instant::now(), resident.len().min(portion.most));
        let rearm = self.rounds.rearm(self.vm.tracker(), self.guest.paused);
        let (mut left, mut at, mut failed) = (asked, 0, None);
        while left > 0
            && failed.is_none()
            && !self.round_is_over()
            && let Some(first) = resident.first_from(at)
        {
            let most = MAX_PUT_PAGES.min(left);
            let run = resident.run_at(first, most).unwrap_or(PageRange::new(first, 1));
            (at, left) = (run.end(), left - run.count);
            if self.start_put(place, run, rearm.clone()) {
                failed = self.await_put(place)?;
            }
        }
        self.announce()?;
        self.send_table()?;
        self.await_table()?;
        let mut stored = pages.clone();
        stored.intersect_with(self.rounds.map().with_copies());
        self.rounds.gone(&stored);
        pages.subtract(&stored);
        let sent = stored.len();
        let round = Round { asked, sent, time: began.elapsed(), ..Round::default() };
        Ok(Put { round, failed })
    }

    /// Gives a run of pages to a place. Returns whether it was taken.
    fn start_put(&mut self, place: usize, run: PageRange, rearm: Option<Arc<dyn crate::tracker::Rearm>>) -> bool {
        let Some(open) = self.places.open.get_mut(place).filter(|open| open.idle && !open.failed) else { return false };
        let copy = StoreCopy { entry: open.entry, generation: open.generation + 1 };
        if self.rounds.map().put_started(run, copy).is_err() {
            return false;
        }
        (open.generation, open.idle) = (copy.generation, false);
        self.places.error = None;
        // the thread ends only with this side of the channel
        open.jobs.send(PutJob { run, copy, rearm }).is_ok()
    }

    /// Waits until the put into a place has ended. Returns why it has failed, if it has.
    fn await_put(&mut self, place: usize) -> Result<Option<MigrationError>, MigrationError> {
        let far = Instant::now() + Duration::from_secs(1 << 30);
        while self.places.open.get(place).is_some_and(|open| !open.idle) {
            if let Some(Input::Control(epoch, frame)) = self.next_input(far)? {
                self.frame(epoch, frame)?;
            }
        }
        Ok(self.places.error.take())
    }

    /// Gives each place through which `order` lets pages go the next run, if it has none.
    pub(super) fn fill_places(&mut self, order: &mut dyn PushOrder) {
        for place in 0..self.places.open.len() {
            let open = &self.places.open[place];
            if !open.idle || open.failed || !order.through().contains(&open.place) {
                continue;
            }
            let wanted = {
                let map = self.rounds.map();
                crate::strategy::push_order::checked_next(order, map.unclaimed(), MAX_PUT_PAGES).ok().flatten()
            };
            // an order that is wrong is found out on the lanes
            let Some(run) = wanted else { return };
            self.start_put(place, run, None);
        }
    }

    /// Says *vacated*, once every page was sent or located, with a mark behind the pages on each
    /// lane (rule 17).
    pub(super) fn vacate(&mut self) -> Result<(), MigrationError> {
        if !self.may_use_stores() || self.places.vacated || self.machine.phase() != SourcePhase::Serving {
            return Ok(());
        }
        let done = {
            let map = self.rounds.map();
            map.unclaimed().is_empty() && map.being_put().is_empty() && map.unannounced().is_empty()
        };
        let fetched = self.post_copy.left.fetcher.get().is_none_or(|fetcher| fetcher.is_done());
        if !done || !fetched {
            return Ok(());
        }
        self.places.vacated = true;
        let vacated = self.machine.vacated()?;
        let Control::Vacated { number } = vacated else { return Ok(()) };
        let generation = self.post_copy.left.generation.load(Ordering::Relaxed);
        self.send_control(&vacated)?;
        for lane in &self.peer.lanes {
            // a lane that is gone has said why, which arrives as an input
            let _ = lane.send(Work::Mark(number, generation));
        }
        Ok(())
    }

    /// A part of the list of what the destination lacks.
    pub(super) fn lacks(&mut self, first: u64, bitmap: &[u8]) -> Result<(), MigrationError> {
        let pages = self.report.pages.total;
        let lacking = self.places.lacking.get_or_insert_with(|| PageSet::empty(pages));
        Ok(add_missing(lacking, first, bitmap)?)
    }

    /// The list is complete: these pages are sent again, or it is said where they are.
    pub(super) fn lacks_these(&mut self, expected: u64) -> Result<(), MigrationError> {
        let pages = self.places.lacking.take().unwrap_or_else(|| PageSet::empty(self.report.pages.total));
        if pages.len() != expected {
            let why = format!("{} are listed, {expected} announced", pages.len());
            return Err(DecodeError::invalid("missing pages", why).into());
        }
        let listed = self.post_copy.left.change(|map| map.lacks(&pages));
        listed.map_err(|error| DecodeError::invalid("missing pages", error.to_string()))?;
        self.places.vacated = false;
        Ok(())
    }

    /// Ends the threads of all places. Forgets the namespaces of an attempt that has failed before
    /// *run*, and of entries that the destination never had (rule 14).
    pub(super) fn close_places(&mut self, failed: bool) {
        if let Some(fetcher) = self.post_copy.left.fetcher.get() {
            fetcher.end();
        }
        let known = self.places.table.known();
        for open in std::mem::take(&mut self.places.open) {
            let attempt = matches!(open.place, Place::Stores { purpose: Purpose::Attempt, .. });
            let forgotten = if failed { attempt } else { usize::from(open.entry) >= known };
            if forgotten {
                self.forget_place(&open);
            }
        }
        for thread in std::mem::take(&mut self.places.threads) {
            thread.join();
        }
    }
}
