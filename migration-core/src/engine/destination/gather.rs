//! Pages in stores at the destination: who fetches them, what happens when a store fails, and when
//! the source is released.

use std::{
    collections::{BTreeSet, VecDeque},
    sync::Condvar,
};

use super::*;
use crate::{
    PageRange,
    page_map::{MapError, PageMap},
    paged_memory::{FetchError, MAX_FETCHED_PAGES, PagedMemory, Renewed},
    store::{Owner, Urgency},
    text::{Chain, describe},
    wire::{Located, TablePart},
};

/// The longest time for one attempt to read from a store. A fault is tried again afterwards.
const FETCH_TIME: Duration = Duration::from_secs(5);
/// After a fetch that has failed, and at which the source cannot help, the next attempt comes so
/// much later.
const BACK_OFF: Duration = Duration::from_millis(200);
/// How often threads look whether they shall end.
const TICK: Duration = Duration::from_millis(200);
/// For how long namespaces are kept for this VM. They are renewed far sooner.
const LEASE: Duration = Duration::from_secs(3600);
const RENEW_AFTER: Duration = Duration::from_secs(600);

/// What is to be fetched from stores, for one VM. Two threads do it: one for faults, and one for
/// all other pages, so that a fault never waits for a page that nobody wants yet.
pub(in crate::engine) struct Gatherer {
    pub(super) memory: PagedMemory,
    owner: Owner,
    state: Mutex<Queue>,
    changed: Condvar,
}

#[derive(Default)]
struct Queue {
    /// Pages that somebody waits for, each with the moment from which it is fetched.
    faults: VecDeque<(Instant, u64)>,
    running: bool,
    ended: bool,
    released: bool,
    /// Whether it was said of further pages that they are in stores.
    news: bool,
    /// Whether the source has said that nothing follows.
    source_done: bool,
    /// Entries of which the user was told that they have failed.
    told: BTreeSet<u8>,
}

impl Gatherer {
    pub(super) fn new(memory: PagedMemory, owner: Owner) -> Self {
        Self { memory, owner, state: Mutex::default(), changed: Condvar::new() }
    }

    fn change(&self, change: impl FnOnce(&mut Queue)) {
        change(&mut lock(&self.state));
        self.changed.notify_all();
    }

    /// Somebody waits for `page`, which is in a store.
    pub(super) fn fault(&self, page: u64) {
        self.change(|queue| queue.faults.push_back((Instant::now(), page)));
    }

    fn again(&self, page: u64) {
        self.change(|queue| queue.faults.push_back((Instant::now() + BACK_OFF, page)));
    }

    /// Returns the next page to be fetched for somebody who waits; `None` when this has ended.
    fn next_fault(&self) -> Option<u64> {
        let mut queue = lock(&self.state);
        loop {
            if queue.ended {
                return None;
            }
            let now = Instant::now();
            if let Some(at) = queue.faults.iter().position(|(due, _)| *due <= now) {
                return queue.faults.remove(at).map(|(_, page)| page);
            }
            let next = queue.faults.iter().map(|(due, _)| *due - now).min().unwrap_or(TICK).min(TICK);
            queue = self.changed.wait_timeout(queue, next).unwrap_or_else(|e| e.into_inner()).0;
        }
    }

    /// The VM runs: from now on pages that the source holds are fetched, too (rule 7).
    pub(super) fn run(&self) {
        self.change(|queue| queue.running = true);
    }

    pub(super) fn is_running(&self) -> bool {
        lock(&self.state).running
    }

    /// Waits until the VM runs. Returns whether it does.
    fn wait_running(&self) -> bool {
        let waiting = |queue: &mut Queue| !queue.running && !queue.ended;
        let queue = self.changed.wait_while(lock(&self.state), waiting).unwrap_or_else(|e| e.into_inner());
        !queue.ended
    }

    /// Waits for so long at most, or until this has ended. Returns whether it goes on.
    fn pause(&self, time: Duration) -> bool {
        let queue = lock(&self.state);
        let waited = self.changed.wait_timeout_while(queue, time, |queue| !queue.ended);
        !waited.unwrap_or_else(|e| e.into_inner()).0.ended
    }

    /// Waits until there is more to fetch, or for a tick. Returns whether this goes on.
    fn wait_for_news(&self) -> bool {
        let waiting = |queue: &mut Queue| !queue.ended && !queue.news;
        let queue = lock(&self.state);
        let waited = self.changed.wait_timeout_while(queue, TICK, waiting);
        let mut queue = waited.unwrap_or_else(|e| e.into_inner()).0;
        queue.news = false;
        !queue.ended
    }

    pub(super) fn end(&self) {
        self.change(|queue| queue.ended = true);
    }

    pub(super) fn is_released(&self) -> bool {
        lock(&self.state).released
    }

    /// The source is done with the session, or gone for ever.
    pub(super) fn source_is_done(&self) {
        self.change(|queue| queue.source_done = true);
    }

    pub(super) fn is_source_done(&self) -> bool {
        lock(&self.state).source_done
    }
}

impl VmEntry {
    /// Starts the threads that fetch pages from stores.
    pub(super) fn await_gathering(self: &Arc<Self>, session: &Arc<Session>) -> Result<(), MigrationError> {
        let Some(gatherer) = session.gatherer.clone() else { return Ok(()) };
        let (entry, of_session, faults) = (self.clone(), session.clone(), gatherer.clone());
        let body = Box::new(move || entry.fetch_faults(&of_session, &faults));
        self.watcher(Role::Demand, "mig-store-fault", body)?;
        let (entry, session) = (self.clone(), session.clone());
        self.watcher(Role::Bulk, "mig-gather", Box::new(move || entry.gather(&session, &gatherer)))
    }

    /// Fetches the pages that somebody waits for.
    fn fetch_faults(&self, session: &Session, gatherer: &Gatherer) {
        while let Some(page) = gatherer.next_fault() {
            let Some(missing) = session.missing() else { continue };
            let fetched = missing.fetch(PageRange::new(page, 1), Urgency::Fault, Instant::now() + FETCH_TIME);
            if let Err(error) = fetched {
                self.store_failed(session, &missing, &error);
            }
            // another thread may have it in hand, and fail; or only the store has it
            if session.map.read(|map| map.in_store().contains(page)) {
                gatherer.again(page);
            }
        }
    }

    /// Fetches all other pages, one after the other, and renews the leases of the namespaces.
    fn gather(&self, session: &Session, gatherer: &Gatherer) {
        if !gatherer.wait_running() {
            return;
        }
        let (mut at, mut renewed) = (0, None::<Instant>);
        let mut go_on = true;
        while go_on {
            let Some(missing) = session.missing() else { return };
            if renewed.is_none_or(|at| at.elapsed() >= RENEW_AFTER) {
                renewed = Some(Instant::now());
                self.renew(session, &missing, gatherer);
            }
            let next = session.map.read(|map| map.unfetched().first_from(at).or_else(|| map.unfetched().first_from(0)));
            let Some(first) = next else {
                go_on = gatherer.wait_for_news();
                continue;
            };
            let within = PageRange::new(first, session.ram.layout().pages() - first);
            let fetched = missing.fetch(within, Urgency::Prefetch, Instant::now() + FETCH_TIME);
            at = first + 1;
            go_on = match fetched {
                Ok(_) => gatherer.pause(Duration::ZERO),
                Err(error) => {
                    at = first + MAX_FETCHED_PAGES;
                    self.store_failed(session, &missing, &error);
                    gatherer.pause(BACK_OFF)
                }
            };
        }
    }

    fn renew(&self, session: &Session, missing: &Missing, gatherer: &Gatherer) {
        for entry in session.map.read(PageMap::entries) {
            match gatherer.memory.renew(entry, gatherer.owner, LEASE) {
                Renewed::Intact => {}
                Renewed::Changed => {
                    self.entry_failed(session, missing, entry, &format!("entry {entry} has lost pages"));
                }
                // this is no attempt to read: the pages may be wanted much later
                Renewed::Silent { .. } => {}
            }
        }
    }

    /// Pages could not be fetched: they come from the source if it holds them (rule 13).
    fn store_failed(&self, session: &Session, missing: &Missing, error: &FetchError) {
        match *error {
            FetchError::Unknown { entry } | FetchError::Lost { entry, .. } | FetchError::Silent { entry, .. } => {
                self.entry_failed(session, missing, entry, &describe(error));
            }
            FetchError::Install { .. } => {
                self.common.options.observer.event(&Event::Warning(describe(error)));
            }
        }
    }

    /// An entry has lost pages, or does not answer. Pages that the source holds are asked of it,
    /// and the source is told.
    fn entry_failed(&self, session: &Session, missing: &Missing, entry: u8, why: &str) {
        let loss = session.map.change(|map| map.entry_lost(entry));
        let Some(gatherer) = &session.gatherer else { return };
        let first = lock(&gatherer.state).told.insert(entry);
        if first {
            let (held, only) = (loss.at_source.len(), loss.only_there.len());
            let what = format!(
                "a page store has failed: {why}; {held} pages come from the source, and whoever touches one of {only} others \
                 waits until it answers"
            );
            self.common.options.observer.event(&Event::Warning(what));
        }
        if !gatherer.is_released() && (first || !loss.at_source.is_empty()) {
            // best effort: a source that does not hear it learns it with its next list
            let _ = session.send_running(&Control::EntryLost { entry });
        }
        missing.ask_source(&loss.at_source);
    }

    /// A part of the store table has come.
    pub(super) fn store_table(&self, session: &Session, part: &TablePart) -> Result<(), MigrationError> {
        let gatherer = session.gatherer()?;
        let received = gatherer.memory.receive(part.first, &part.entries);
        received.map_err(|error| MigrationError::Blocked(format!("the store table: {error}")))?;
        session.send_control(&Control::StoreTableReceived { number: part.number })
    }

    /// The source says where pages are.
    pub(super) fn located(&self, session: &Session, located: &Located) -> Result<(), MigrationError> {
        located.check(session.ram.layout().pages())?;
        let gatherer = session.gatherer()?;
        if !gatherer.memory.has_entry(located.copy.entry) {
            let why = format!("the store table has no entry {}", located.copy.entry);
            return Err(DecodeError::invalid("located", why).into());
        }
        let changed = session.map.change(|map| {
            let change = |&run| map.located(run, located.copy, located.held);
            located.runs.iter().flat_map(change).collect::<Vec<_>>()
        });
        gatherer.change(|queue| queue.news = true);
        if let Some(missing) = session.missing() {
            missing.ask_stores(&changed);
        }
        Ok(())
    }

    /// The source has found that an entry has lost pages.
    pub(super) fn entry_lost(&self, session: &Session, entry: u8) {
        let loss = session.map.change(|map| map.entry_lost(entry));
        if let Some(missing) = session.missing() {
            missing.ask_source(&loss.at_source);
        }
    }

    /// Answers *vacated*: the source is released, or told what is only there (rule 17).
    pub(super) fn answer_vacated(&self, session: &Session, missing: &Missing) {
        if self.release_source(session, missing).is_ok() {
            // best effort: a source that does not hear it comes back and asks
            let _ = session.report_released(missing);
            return self.report_phase();
        }
        // as above
        let _ = session.list_missing();
    }

    /// Decides that the source is not needed any more: no page is only there, and what it holds is
    /// safe in its stores.
    ///
    /// # Errors
    /// What is in the way.
    pub(super) fn release_source(&self, session: &Session, missing: &Missing) -> Result<(), String> {
        let gatherer = session.gatherer.as_ref().ok_or("no page can be in a store")?;
        if gatherer.is_released() {
            return Ok(());
        }
        for entry in session.map.read(PageMap::depends_on) {
            let why = match gatherer.memory.renew(entry, gatherer.owner, LEASE) {
                Renewed::Intact => continue,
                Renewed::Changed => format!("entry {entry} has lost pages"),
                Renewed::Silent { store, cause } => format!("store {store} does not answer: {}", Chain(&cause)),
            };
            self.entry_failed(session, missing, entry, &why);
            return Err(why);
        }
        session.map.change(PageMap::released).map_err(|error: MapError| error.to_string())?;
        let mut state = lock(&self.state);
        let ours = state.session.as_ref().is_some_and(|present| std::ptr::eq(&**present, session));
        if ours {
            state.machine.complete().map_err(|violation| violation.to_string())?;
        }
        drop(state);
        gatherer.change(|queue| queue.released = true);
        Ok(())
    }

    /// All pages are here, and the source is released: nobody needs the namespaces any more (rule
    /// 14).
    pub(super) fn forget_namespaces(&self, gatherer: &Gatherer) {
        for error in gatherer.memory.forget_all() {
            let what = format!("a namespace of the migration stays until its lease ends: {}", Chain(&error));
            self.common.options.observer.event(&Event::Warning(what));
        }
        if gatherer.is_source_done() {
            self.finished.store(true, Ordering::Relaxed);
        }
    }

    /// The source has said its last word. While pages are in stores the session goes on without it.
    pub(super) fn source_is_done(&self, session: &Session) {
        if let Some(gatherer) = &session.gatherer {
            // first: whoever gathers the last page looks at this then
            gatherer.source_is_done();
            let gathers = session.missing().is_some_and(|missing| !missing.is_complete());
            if gathers && !session.has_guest_ended() {
                return;
            }
        }
        self.finished.store(true, Ordering::Relaxed);
    }
}

impl VmHandle {
    /// A person states that the source is dead, while the VM runs here and pages of it are in
    /// stores. If no page is only at the source, and the stores have lost nothing, the VM does not
    /// depend on it any more (rule 19).
    ///
    /// # Errors
    /// What is in the way, in words.
    pub fn release_source(&self) -> Result<(), String> {
        let session = lock(&self.entry.state).session.clone().ok_or("no VM was received here")?;
        let missing = session.missing().ok_or("no page of the VM was left behind")?;
        self.entry.release_source(&session, &missing)?;
        self.entry.source_is_done(&session);
        self.entry.report_phase();
        Ok(())
    }
}
