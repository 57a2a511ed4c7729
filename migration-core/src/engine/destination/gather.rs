//! Pages in stores at the destination: who fetches them, what happens when a store fails, and when
//! the source is released.

use super::{fetchers::Gatherer, *};
use crate::{
    PageRange,
    page_map::{MapError, PageMap},
    paged_memory::{FetchError, Renewed},
    pager::Installed,
    store::Urgency,
    text::{Chain, describe},
    wire::{Located, TablePart},
};

/// The longest time for one attempt to read from a store. A fault is tried again afterwards.
const FETCH_TIME: Duration = Duration::from_secs(5);
/// For how long namespaces are kept for this VM. They are renewed far sooner.
const LEASE: Duration = Duration::from_secs(3600);
const RENEW_AFTER: Duration = Duration::from_secs(600);

/// Checks that the stores of a new entry are those of the source, and have what it puts there
/// (rule 11).
///
/// # Errors
/// [`MigrationError::Blocked`], with what is wrong.
fn check_entry(gatherer: &Gatherer, entry: u8) -> Result<(), MigrationError> {
    let why = match gatherer.memory.renew(entry, gatherer.owner, LEASE) {
        Renewed::Intact => return Ok(()),
        Renewed::Changed => format!(
            "page store {} is not the same at both ends, or is sealed with another key at one of them",
            gatherer.memory.stores_of(entry).join(" or ")
        ),
        Renewed::Silent { store, cause } => {
            format!("page store {store} does not answer at the destination: {}", Chain(&cause))
        }
    };
    Err(MigrationError::Blocked(why))
}

impl VmEntry {
    /// Starts the threads that fetch pages from stores, and the one that renews leases.
    pub(super) fn await_gathering(self: &Arc<Self>, session: &Arc<Session>) -> Result<(), MigrationError> {
        let Some(gatherer) = session.gatherer.clone() else { return Ok(()) };
        self.start_fetchers(session, &gatherer)?;
        let (entry, session) = (self.clone(), session.clone());
        self.watcher(Role::Background, "mig-renew", Box::new(move || entry.renew_leases(&session, &gatherer)))
    }

    /// Starts the threads that the present store table needs, as far as they are not there yet.
    fn start_fetchers(
        self: &Arc<Self>,
        session: &Arc<Session>,
        gatherer: &Arc<Gatherer>,
    ) -> Result<(), MigrationError> {
        let more = gatherer.more_threads();
        for _ in more.for_faults {
            let (entry, session, gatherer) = (self.clone(), session.clone(), gatherer.clone());
            let body = Box::new(move || entry.fetch_faults(&session, &gatherer));
            self.watcher(Role::Demand, "mig-store-fault", body)?;
        }
        for _ in more.for_prefetch {
            let (entry, session, gatherer) = (self.clone(), session.clone(), gatherer.clone());
            let body = Box::new(move || entry.gather(&session, &gatherer));
            self.watcher(Role::Bulk, "mig-gather", body)?;
        }
        Ok(())
    }

    /// Fetches the pages that somebody waits for.
    fn fetch_faults(&self, session: &Session, gatherer: &Gatherer) {
        while let Some(fault) = gatherer.next_fault() {
            if let Some(missing) = session.missing() {
                let page = PageRange::new(fault.page, 1);
                let fetched = missing.fetch(fault.entry, page, Urgency::Fault, Instant::now() + FETCH_TIME);
                self.fetched(session, &missing, fault.entry, fetched);
            }
            // another thread may have it in hand, and fail; or only the store has it
            let copy = session.map.read(|map| map.copy(fault.page));
            gatherer.fault_tried(fault, copy.map(|copy| copy.entry));
        }
    }

    /// Fetches all other pages, in turn from each entry.
    fn gather(&self, session: &Session, gatherer: &Gatherer) {
        while let Some(batch) = gatherer.next_batch(&session.map) {
            let within = PageRange::new(batch.first, session.ram.layout().pages().saturating_sub(batch.first));
            let done = session.missing().is_none_or(|missing| {
                let fetched = missing.fetch(batch.entry, within, Urgency::Prefetch, Instant::now() + FETCH_TIME);
                gatherer.fetched_ahead(fetched.as_ref().map_or(0, |installed| installed.pages));
                self.fetched(session, &missing, batch.entry, fetched)
            });
            gatherer.batch_tried(batch, !done);
        }
    }

    /// Pages of `entry` were fetched, or could not be: then they come from the source if it holds
    /// them (rule 13). Returns whether all went well.
    fn fetched(&self, session: &Session, missing: &Missing, entry: u8, fetched: Result<Installed, FetchError>) -> bool {
        let Some(gatherer) = &session.gatherer else { return true };
        let error = match fetched {
            // if there was nothing to fetch any more, no store was asked
            Ok(installed) if installed.pages + installed.duplicates == 0 => return true,
            Ok(_) => {
                gatherer.answered(entry);
                return true;
            }
            Err(error) => error,
        };
        match error {
            FetchError::Silent { .. } => self.entry_silent(session, missing, entry, &describe(&error)),
            FetchError::Unknown { .. } | FetchError::Lost { .. } => {
                gatherer.answered(entry);
                self.entry_failed(session, missing, entry, &describe(&error));
            }
            FetchError::Install { .. } => self.common.options.observer.event(&Event::Warning(describe(&error))),
        }
        false
    }

    /// Renews the leases of the namespaces, as long as the VM needs them.
    fn renew_leases(&self, session: &Session, gatherer: &Gatherer) {
        let mut go_on = gatherer.wait_running();
        while go_on {
            let Some(missing) = session.missing() else { return };
            for entry in session.map.read(PageMap::entries) {
                match gatherer.memory.renew(entry, gatherer.owner, LEASE) {
                    Renewed::Intact => {}
                    Renewed::Changed => {
                        self.entry_failed(session, &missing, entry, &format!("entry {entry} has lost pages"));
                    }
                    // this is no attempt to read: the pages may be wanted much later
                    Renewed::Silent { .. } => {}
                }
            }
            go_on = gatherer.pause(RENEW_AFTER);
        }
    }

    /// A store of an entry does not answer. It may have its pages, so it is asked again. The source
    /// is to send those that it holds, if it can be reached: the first copy to arrive counts.
    fn entry_silent(&self, session: &Session, missing: &Missing, entry: u8, why: &str) {
        let Some(gatherer) = &session.gatherer else { return };
        gatherer.mark_silent(entry);
        let held = session.map.read(|map| map.held_in(entry));
        if gatherer.report(entry) {
            let what = format!(
                "a page store has failed: {why}; it is asked again, and the source for {} pages that it holds",
                held.len()
            );
            self.common.options.observer.event(&Event::Warning(what));
        }
        if held.is_empty() {
            return;
        }
        // as long as the source cannot be reached, it cannot help
        if gatherer.mark_given_up(entry) && session.send_running(&Control::EntryLost { entry }).is_err() {
            gatherer.unmark_given_up(entry);
        }
        missing.ask_source(&held);
    }

    /// An entry has lost pages. Those that the source holds are asked of it, and the source is told.
    fn entry_failed(&self, session: &Session, missing: &Missing, entry: u8, why: &str) {
        let loss = session.map.change(|map| map.entry_lost(entry));
        let Some(gatherer) = &session.gatherer else { return };
        let first = gatherer.report(entry);
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
    pub(super) fn store_table(
        self: &Arc<Self>,
        session: &Arc<Session>,
        part: &TablePart,
    ) -> Result<(), MigrationError> {
        let gatherer = session.gatherer()?;
        let known = gatherer.memory.entries();
        let received = gatherer.memory.receive(part.first, &part.entries);
        received.map_err(|error| MigrationError::Blocked(format!("the store table: {error}")))?;
        gatherer.limit(part.gather_rate);
        if session.missing().is_none() {
            // the VM is still at its source: better now than when its pages are there
            for entry in known..gatherer.memory.entries() {
                check_entry(gatherer, entry)?;
            }
        }
        self.start_fetchers(session, gatherer)?;
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
        gatherer.wake();
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
                Renewed::Changed => {
                    let why = format!("entry {entry} has lost pages");
                    self.entry_failed(session, missing, entry, &why);
                    why
                }
                Renewed::Silent { store, cause } => {
                    let why = format!("store {store} does not answer: {}", Chain(&cause));
                    self.entry_silent(session, missing, entry, &why);
                    why
                }
            };
            return Err(why);
        }
        self.released(session, gatherer)
    }

    /// The source is not needed any more: from now on only stores are asked.
    fn released(&self, session: &Session, gatherer: &Gatherer) -> Result<(), String> {
        session.map.change(PageMap::released).map_err(|error: MapError| error.to_string())?;
        let mut state = lock(&self.state);
        let ours = state.session.as_ref().is_some_and(|present| std::ptr::eq(&**present, session));
        if ours {
            state.machine.complete().map_err(|violation| violation.to_string())?;
        }
        drop(state);
        gatherer.release();
        Ok(())
    }

    /// The VM was taken over, and runs without its source: pages that are in stores come from there.
    pub(super) fn gather_alone(&self, session: &Session) {
        if let (Some(gatherer), Some(missing)) = (&session.gatherer, session.missing()) {
            if let Err(why) = self.released(session, gatherer) {
                // the take-over was refused if pages were only at the source; since then a store has
                // lost some
                let what = format!("the VM lacks pages that nobody has: {why}");
                self.common.options.observer.event(&Event::Warning(what));
            }
            missing.ask_stores_again();
        }
        self.source_is_done(session);
    }

    /// Returns whether pages of the VM are only at the source. The stores are asked whether they have
    /// lost pages that it holds (rule 19). One that is silent may have them.
    pub(super) fn needs_source(&self, session: &Session) -> bool {
        let Some(missing) = session.missing() else { return false };
        if let Some(gatherer) = &session.gatherer {
            for entry in session.map.read(PageMap::depends_on) {
                if let Renewed::Changed = gatherer.memory.renew(entry, gatherer.owner, LEASE) {
                    self.entry_failed(session, &missing, entry, &format!("entry {entry} has lost pages"));
                }
            }
        }
        missing.needs_source()
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

    /// Returns whether pages of the VM still come from stores although its source is done, or gone.
    pub(super) fn gathers_alone(&self) -> bool {
        let session = lock(&self.state).session.clone();
        session.is_some_and(|session| {
            let alone = session.gatherer.as_ref().is_some_and(|gatherer| gatherer.is_source_done());
            alone && session.missing().is_some_and(|missing| !missing.is_complete())
        })
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
