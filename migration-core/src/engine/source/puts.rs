//! Putting pages into the stores of places: while the guest runs, and after the hand-over.

use std::sync::mpsc;

use super::{
    places::SourceStores,
    putter::{Job, JobDone, PlaceDone, PlaceThread, PutFailure, PutJob, PutPages, Putter},
    *,
};
use crate::{
    PAGE_SIZE, PageRange,
    page_map::StoreCopy,
    paged_memory::{EntryStore, StoreEntry, TableError},
    report::StoreReport,
    store::{Namespace, Purpose, Record},
    strategy::{Place, Portion, Put},
    tracker::Rearm,
};

/// The most pages of one put: 2 MiB, as in a stripe.
const MAX_PUT_PAGES: u64 = 512;
/// The longest time after which a store is asked whether it still has the pages that it was given.
const LONGEST_TRUST: Duration = Duration::from_secs(30);
/// The time after which a store that has failed is asked again, if nothing is put there meanwhile.
const TRY_AGAIN: Duration = Duration::from_secs(5);
/// The longest time that the end of a migration waits for stores. The guest runs meanwhile.
const CLOSING_TIME: Duration = Duration::from_secs(2);

/// A place of the strategy, with its namespace in the stores of the place.
pub(super) struct OpenPlace {
    /// The number of the place. No other place of this migration has it, even after this one is
    /// closed.
    number: usize,
    pub(super) place: Place,
    /// The namespace. It is set before any store may have it.
    namespace: Namespace,
    /// An earlier namespace of which the stores have lost pages.
    lost_namespace: Option<Namespace>,
    /// The number of the namespace in the store table; `None` before it was created.
    entry: Option<u8>,
    jobs: mpsc::Sender<Job>,
    /// The generation of the last put.
    generation: u32,
    /// Whether a job is under way.
    busy: bool,
    /// Whether the stores have failed. Nothing is put there until they have answered again.
    failed: bool,
    /// Whether the stores have lost pages. The place then needs a new namespace.
    lost: bool,
    /// Since when the stores fail, and the reason, while a copy of the VM is kept ready there.
    pub(super) degraded: Option<(Instant, String)>,
    /// When the stores are asked next whether they have lost pages.
    ask_at: Instant,
}

impl OpenPlace {
    /// Returns the names of the place's stores.
    fn names(&self) -> Vec<String> {
        match &self.place {
            Place::Stores { names, .. } => names.clone(),
            _ => Vec::new(),
        }
    }

    fn is_ready(&self) -> bool {
        !self.busy && !self.failed && self.entry.is_some()
    }

    fn start(&mut self, job: Job) -> bool {
        self.busy = true;
        // The thread ends only when this end of the channel is dropped.
        self.jobs.send(job).is_ok()
    }
}

/// Opening places.
impl Engine<'_> {
    /// Creates the namespace of a place, and starts the thread that puts pages there.
    pub(super) fn open_place(&mut self, place: Place) -> Result<(), MigrationError> {
        let Place::Stores { names, purpose } = &place else { return Ok(()) };
        let options = self.options.stores.clone();
        let options = options.ok_or_else(|| MigrationError::Blocked(format!("there are no page stores: {place}")))?;
        let find = |name: &String| {
            let found = options.stores.iter().find(|store| store.name() == name).cloned();
            found.ok_or_else(|| MigrationError::Blocked(format!("there is no page store {name}: {place}")))
        };
        let stores: Vec<_> = names.iter().map(find).collect::<Result<_, _>>()?;
        for store in &stores {
            if self.report.stores.iter().all(|report| report.name != store.name()) {
                self.report.stores.push(StoreReport { name: store.name().into(), ..StoreReport::default() });
            }
        }
        let (at, namespace, (jobs, work)) = (self.places.open.len(), (options.new_namespace)(), mpsc::channel());
        self.places.numbers += 1;
        let number = self.places.numbers;
        let putter = Putter {
            place: number,
            ram: Arc::downgrade(&self.ram),
            record: Record { vm: self.id, purpose: *purpose, owner: options.owner },
            lease: options.lease,
            stores,
            namespace: namespace.clone(),
            incarnations: Vec::new(),
        };
        let (tx, name) = (self.tx.clone(), format!("mig-put-{number}"));
        let (ends, ended) = mpsc::channel();
        let body = Box::new(move || putter.run(work, tx, ends));
        let joiner = self.options.spawner.spawn(Role::Bulk, self.options.impact, &name, body);
        let joiner = joiner.map_err(|cause| MigrationError::Thread { role: "puts into a page store", cause })?;
        self.places.putters.push(PlaceThread { place: place.to_string(), joiner, ended });
        // From here on the namespace is forgotten if the attempt fails, even if only some stores
        // have it.
        self.places.open.push(OpenPlace {
            number,
            place,
            namespace: namespace.clone(),
            lost_namespace: None,
            entry: None,
            jobs,
            generation: 0,
            busy: false,
            failed: false,
            lost: false,
            degraded: None,
            ask_at: Instant::now() + trust(&options),
        });
        self.places.open[at].start(Job::Open { namespace, lost: None });
        self.await_place(at)?;
        self.places.error.take().map_or(Ok(()), Err)
    }

    /// Gives a namespace that was created a number in the store table.
    fn opened(&mut self, place: usize, created: Vec<EntryStore>) -> Result<(), TableError> {
        let connected = self.is_connected();
        let Some(open) = self.places.open.get_mut(place) else { return Ok(()) };
        let entry = StoreEntry::new(open.namespace.clone(), created)?;
        let free = |&number: &u8| !connected && self.rounds.map().entry_reopened(number).is_ok();
        let number = match open.entry.filter(free) {
            // No destination knows what the number stood for.
            Some(number) => self.places.table.replace(number, entry).map(|()| number)?,
            None => self.places.table.append(entry)?,
        };
        (open.entry, open.lost, open.lost_namespace) = (Some(number), false, None);
        Ok(())
    }

    /// Asks the stores of a failed place again. If they have lost pages, a new namespace is
    /// created.
    fn revive(&mut self, place: usize) {
        let Some(options) = self.options.stores.as_ref() else { return };
        let Some(open) = self.places.open.get_mut(place).filter(|open| !open.busy) else { return };
        if !open.lost && open.entry.is_some() {
            open.start(Job::Renew);
            return;
        }
        if open.lost && open.lost_namespace.is_none() {
            let lost = std::mem::replace(&mut open.namespace, (options.new_namespace)());
            open.lost_namespace = Some(lost);
        }
        let (namespace, lost) = (open.namespace.clone(), open.lost_namespace.clone());
        open.start(Job::Open { namespace, lost });
    }

    /// Asks the stores of the places that are due whether they have lost pages. Done while no
    /// destination is connected; afterwards the destination asks. Returns when the next place is
    /// due.
    pub(super) fn tend_places(&mut self) -> Instant {
        let now = Instant::now();
        for place in 0..self.places.open.len() {
            if self.places.open[place].ask_at <= now {
                self.revive(place);
            }
        }
        let waiting = self.places.open.iter().filter(|open| !open.busy);
        waiting.map(|open| open.ask_at).min().unwrap_or(now + LONGEST_TRUST)
    }
}

/// Returns how long an answer of a store is relied on.
fn trust(options: &SourceStores) -> Duration {
    (options.lease / 3).min(LONGEST_TRUST)
}

/// Results of the places' threads.
impl Engine<'_> {
    /// Records the result of a job that has ended.
    pub(super) fn place_done(&mut self, done: PlaceDone) {
        if let Some(deferred) = &mut self.places.deferred {
            deferred.push(done);
            return;
        }
        let PlaceDone { place: number, what } = done;
        let asks = self.options.stores.as_ref().map_or(LONGEST_TRUST, trust);
        // The place may have been closed.
        let Some(place) = self.places.open.iter().position(|open| open.number == number) else { return };
        let Some(open) = self.places.open.get_mut(place) else { return };
        open.busy = false;
        open.ask_at = Instant::now() + asks;
        let is_put = matches!(what, JobDone::Put { .. });
        let result = match what {
            JobDone::Opened(Ok(created)) => {
                let blocked = |error: TableError| PutFailure::Here(MigrationError::Blocked(error.to_string()));
                self.opened(place, created).map_err(blocked)
            }
            JobDone::Opened(Err(failure)) => {
                if failure.is_loss() {
                    // The name of the namespace is taken.
                    open.lost = true;
                    open.lost_namespace = None;
                }
                Err(failure)
            }
            JobDone::Put { run, copy, result } => self.put_ended(place, run, copy, result),
            JobDone::Renewed(result) => result,
        };
        match result {
            Ok(()) => self.store_answers(place),
            Err(failure) => self.store_failed(place, failure),
        }
        if is_put && !self.places.putting {
            // The put has ended after the command that cut its increment short.
            self.report_staging();
        }
    }

    /// Records the result of a put. Pages that were neither written nor demanded meanwhile are in
    /// the store now (rule 10).
    fn put_ended(
        &mut self,
        place: usize,
        run: PageRange,
        copy: StoreCopy,
        result: Result<PutPages, PutFailure>,
    ) -> Result<(), PutFailure> {
        let untold = !self.is_connected();
        let names = self.places.open.get(place).map(OpenPlace::names).unwrap_or_default();
        let pages: u64 = result.iter().flat_map(|put| &put.stored).map(|run| run.count).sum();
        self.report_of(&names, |store| {
            store.pages += pages;
            store.bytes += pages * PAGE_SIZE as u64;
        });
        let mut map = self.rounds.map();
        let result = result.map(|put| {
            put.stored.into_iter().for_each(|run| drop(map.put_done(run, copy)));
            // A destination may have other content in these pages.
            let zeros = put.zeros.into_iter().filter(|_| untold);
            zeros.for_each(|run| drop(map.put_found_zeros(run, copy)));
        });
        // Covers the other pages of zeros, and all pages of a failed put.
        map.put_failed(run, copy);
        result
    }

    /// Marks a place as working again, because its stores have done what they were asked.
    fn store_answers(&mut self, place: usize) {
        let Some(open) = self.places.open.get_mut(place).filter(|open| !open.lost) else { return };
        if self.staging.is_some() && std::mem::take(&mut open.failed) {
            open.degraded = None;
            let names = open.names();
            self.report_of(&names, |store| store.failed = None);
            self.report_staging();
        }
    }

    /// Marks a place as failed, because one of its stores has failed. A copy that is kept ready is
    /// out of date from now on, and is continued when the store answers again. Without such a copy,
    /// no more pages are put there.
    fn store_failed(&mut self, place: usize, failure: PutFailure) {
        let Some(open) = self.places.open.get_mut(place) else { return };
        open.failed = true;
        if failure.is_loss() {
            open.lost = true;
            if let Some(entry) = open.entry {
                self.lose_entry(entry);
                // Best effort: the destination also detects the loss by itself.
                let _ = self.send_control(&Control::EntryLost { entry });
            }
        }
        let failed = match &failure {
            PutFailure::Here(_) => self.places.open.get(place).map(OpenPlace::names).unwrap_or_default(),
            PutFailure::Store { name, .. } => vec![name.clone()],
        };
        let error = failure.into_error();
        let why = describe(&error);
        self.report_of(&failed, |store| store.failed = Some(why.clone()));
        if self.staging.is_none() {
            let what = format!("no page goes there any more: {why}");
            self.options.observer.event(&Event::Warning(what));
        } else if let Some(open) = self.places.open.get_mut(place) {
            let now = Instant::now();
            open.ask_at = now + TRY_AGAIN;
            let since = open.degraded.take().map_or(now, |(since, _)| since);
            open.degraded = Some((since, why));
            self.report_staging();
        }
        self.places.error = Some(error);
    }

    /// Records that an entry has lost pages. They are sent from here (rule 13).
    pub(super) fn lose_entry(&mut self, entry: u8) {
        self.rounds.map().entry_lost(entry);
        self.places.vacated = false;
        let Some(open) = self.places.open.iter_mut().find(|open| open.entry == Some(entry)) else { return };
        (open.failed, open.lost) = (true, true);
        let names = open.names();
        self.report_of(&names, |store| {
            let lost = "pages were lost, or the destination did not get them in time";
            store.failed.get_or_insert_with(|| lost.to_owned());
        });
    }

    /// Changes the reports of the named stores.
    fn report_of(&mut self, names: &[String], change: impl Fn(&mut StoreReport)) {
        self.report.stores.iter_mut().filter(|store| names.contains(&store.name)).for_each(change);
    }

    /// Counts the pages that this migration has put into stores, and those that were there before.
    pub(super) fn count_stored(&mut self) {
        let map = self.rounds.map();
        let all = map.with_copies().len();
        let own = self.places.open.iter().filter_map(|open| open.entry);
        let stored: u64 = own.map(|entry| map.copies_in(entry)).sum();
        drop(map);
        let pages = &mut self.report.pages;
        (pages.stored, pages.cold) = (stored, all.saturating_sub(stored));
        pages.direct = pages.distinct.saturating_sub(stored);
    }
}

/// Putting pages.
impl Engine<'_> {
    /// Puts pages of the running guest into the stores of a place.
    pub(super) fn put_pages(&mut self, pages: &mut PageSet, portion: Portion<'_>) -> Result<Put, MigrationError> {
        let Some(place) = self.places.open.iter().position(|open| open.place == *portion.place) else {
            let why = format!("the strategy has not named this place: {}", portion.place);
            return Err(MigrationError::Blocked(why));
        };
        self.places.putting = true;
        let put = self.put_into(place, pages, portion.most);
        self.places.putting = false;
        let put = put?;
        self.increment_ended(put.round.sent, put.failed.is_some());
        Ok(put)
    }

    fn put_into(&mut self, place: usize, pages: &mut PageSet, most: u64) -> Result<Put, MigrationError> {
        let mut resident = pages.clone();
        if let Some(stored) = self.rounds.stored() {
            // These pages are in a store already.
            resident.subtract(&stored.pages());
        }
        let (began, asked) = (Instant::now(), resident.len().min(most));
        self.places.error = None;
        if self.staging.is_some() && self.places.open[place].failed {
            self.revive(place);
        }
        self.await_place(place)?;
        self.share_table()?;
        let gate = &self.places.gate;
        let rearm = self.rounds.rearm(self.vm.tracker(), self.guest.paused).map(|rearm| gate.pass(rearm));
        let (mut left, mut at) = (asked, 0);
        while left > 0
            && !self.round_is_over()
            && self.places.open[place].is_ready()
            && let Some(first) = resident.first_from(at)
        {
            let most = MAX_PUT_PAGES.min(left);
            let run = resident.run_at(first, most).unwrap_or(PageRange::new(first, 1));
            (at, left) = (run.end(), left - run.count);
            if self.start_put(place, run, rearm.clone()) {
                self.await_place(place)?;
            }
        }
        self.share_locations()?;
        let stored = self.leave_out_stored(pages);
        let round = Round { asked, sent: stored, time: began.elapsed(), ..Round::default() };
        Ok(Put { round, failed: self.places.error.take() })
    }

    /// Removes from `pages` those that are in stores, and those that were found to hold zeros.
    /// Returns the number of removed pages.
    fn leave_out_stored(&mut self, pages: &mut PageSet) -> u64 {
        let before = pages.len();
        let mut stored = pages.clone();
        {
            let map = self.rounds.map();
            stored.intersect_with(map.with_copies());
            pages.subtract(&stored);
            pages.intersect_with(map.unsent());
        }
        self.rounds.gone(&stored);
        before - pages.len()
    }

    /// Gives a run of pages to a place. Returns whether the place has accepted it.
    fn start_put(&mut self, place: usize, run: PageRange, rearm: Option<Arc<dyn Rearm>>) -> bool {
        let connected = self.is_connected();
        let Some(open) = self.places.open.get_mut(place).filter(|open| open.is_ready()) else { return false };
        let Some(entry) = open.entry else { return false };
        if connected && self.places.table.usable(entry).is_err() {
            // The destination could not be told where the pages are (rule 15).
            return false;
        }
        let copy = StoreCopy { entry, generation: open.generation + 1 };
        if self.rounds.map().put_started(run, copy).is_err() {
            return false;
        }
        open.generation = copy.generation;
        open.start(Job::Put(PutJob { run, copy, rearm }))
    }

    /// Waits until the job of a place has ended, or a command has come.
    fn await_place(&mut self, place: usize) -> Result<(), MigrationError> {
        let far = Instant::now() + Duration::from_secs(1 << 30);
        while !self.is_commanded() && self.places.open.get(place).is_some_and(|open| open.busy) {
            if let Some(Input::Control(epoch, frame)) = self.next_input(far)? {
                self.frame(epoch, frame)?;
            }
        }
        Ok(())
    }

    /// Gives the next run to each place that `order` sends pages through and that is ready.
    pub(super) fn fill_places(&mut self, order: &mut dyn PushOrder) {
        for place in 0..self.places.open.len() {
            let open = &self.places.open[place];
            if !open.is_ready() || !order.through().contains(&open.place) {
                continue;
            }
            let wanted = {
                let map = self.rounds.map();
                crate::strategy::push_order::checked_next(order, map.unclaimed(), MAX_PUT_PAGES).ok().flatten()
            };
            // A wrong order is detected and reported when the lanes are filled.
            let Some(run) = wanted else { return };
            self.start_put(place, run, None);
        }
    }

    /// Ends the threads of all places. Forgets the namespaces of an attempt that has failed before
    /// *run*, the namespaces of a copy that is not kept ready any more, and those of entries that
    /// the destination never had (rule 14).
    pub(super) fn close_places(&mut self, failed: bool) {
        if let Some(fetcher) = self.post_copy.left.fetcher.get() {
            fetcher.end();
        }
        let known = self.places.table.known();
        for open in std::mem::take(&mut self.places.open) {
            let attempt = matches!(open.place, Place::Stores { purpose: Purpose::Attempt, .. });
            // A namespace that replaces a lost one is in no table yet.
            let unknown = open.lost_namespace.is_some() || open.entry.is_none_or(|entry| usize::from(entry) >= known);
            let forgotten = if failed { attempt || self.staging.is_some() } else { unknown };
            self.close_place(open, forgotten);
        }
        // The thread waits for a store that hangs, and the caller does not.
        let deadline = Instant::now() + CLOSING_TIME;
        for thread in std::mem::take(&mut self.places.putters) {
            thread.end(deadline).into_iter().for_each(|what| self.options.observer.event(&Event::Warning(what)));
        }
        for thread in std::mem::take(&mut self.places.threads) {
            thread.join();
        }
    }

    /// Closes a place. Its thread ends after its current jobs; if `forget` is set, it forgets the
    /// place's namespaces first.
    pub(super) fn close_place(&self, open: OpenPlace, forget: bool) {
        if forget {
            let namespaces = [Some(open.namespace), open.lost_namespace].into_iter().flatten().collect();
            // A thread that has ended has nothing to forget.
            let _ = open.jobs.send(Job::Forget(namespaces));
        }
    }
}
