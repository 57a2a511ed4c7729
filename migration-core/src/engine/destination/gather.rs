//! Pages in stores at the destination: the threads that fetch them, the handling of a store that
//! fails, and the release of the source.

use super::{fetchers::Gatherer, *};
use crate::{
    PageRange,
    engine::stored::FETCH_TIME,
    page_map::{MapError, PageMap},
    paged_memory::{FetchError, Renewed},
    pager::Installed,
    store::Urgency,
    text::{Chain, describe},
    wire::{Located, TablePart},
};

/// The lease of the namespaces of this VM. It is renewed far more often.
const LEASE: Duration = Duration::from_secs(3600);
const RENEW_AFTER: Duration = Duration::from_secs(600);

/// Checks that the stores of a new entry are the stores of the source, and that they have the pages
/// that the source puts there (rule 11).
///
/// # Errors
/// Returns [`MigrationError::Blocked`] with the reason.
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
    /// Starts the threads that fetch pages from stores, and the thread that renews leases.
    pub(super) fn await_gathering(self: &Arc<Self>, session: &Arc<Session>) -> Result<(), MigrationError> {
        let Some(gatherer) = session.gatherer.clone() else { return Ok(()) };
        self.start_fetchers(session, &gatherer)?;
        let (entry, session) = (self.clone(), session.clone());
        self.watcher(Role::Background, "mig-renew", Box::new(move || entry.renew_leases(&session, &gatherer)))
    }

    /// Starts the threads that the present store table needs and that were not started yet.
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

    /// Fetches the pages for which the guest waits.
    fn fetch_faults(&self, session: &Session, gatherer: &Gatherer) {
        while let Some(fault) = gatherer.next_fault() {
            if let Some(missing) = session.missing() {
                let page = PageRange::new(fault.page, 1);
                let fetched = missing.fetch(fault.entry, page, Urgency::Fault, Instant::now() + FETCH_TIME);
                self.fetched(session, &missing, fault.entry, fetched);
            }
            // another thread may be fetching the page, and may fail; or only the store may have the
            // page
            let copy = session.map.read(|map| map.copy(fault.page));
            gatherer.fault_tried(fault, copy.map(|copy| copy.entry));
        }
    }

    /// Prefetches all other pages, from the entries in turn.
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

    /// Handles the result of a fetch from `entry`. Pages that could not be fetched come from the
    /// source, if it holds them (rule 13). Returns whether the fetch has succeeded.
    fn fetched(&self, session: &Session, missing: &Missing, entry: u8, fetched: Result<Installed, FetchError>) -> bool {
        let Some(gatherer) = &session.gatherer else { return true };
        let error = match fetched {
            // if there was nothing left to fetch, no store was asked
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
                    // this is not an attempt to read: the pages may be needed much later
                    Renewed::Silent { .. } => {}
                }
            }
            go_on = gatherer.pause(RENEW_AFTER);
        }
    }

    /// Handles a store of an entry that does not answer. The store may have the pages of the entry,
    /// so it is asked again. If the source can be reached, it is to send those of the pages that it
    /// holds: the first copy that arrives is used.
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
        // while the source cannot be reached, it cannot send the pages
        if gatherer.mark_given_up(entry) && session.send_running(&Control::EntryLost { entry }).is_err() {
            gatherer.unmark_given_up(entry);
        }
        missing.ask_source(&held);
    }

    /// Handles the loss of pages of an entry. The source is informed, and those of the pages that
    /// it holds are requested from it.
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
            // best effort: a source that does not receive this learns of the loss from its next
            // list
            let _ = session.send_running(&Control::EntryLost { entry });
        }
        missing.ask_source(&loss.at_source);
    }

    /// Handles a part of the store table.
    ///
    /// # Errors
    /// Returns an error if the part does not fit the table, or if a store of a new entry is not
    /// usable. The migration then fails while the VM is still at its source.
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
        if part.must_answer && session.missing().is_none() {
            // the VM is still at its source: a failure is better now than when its pages are in the
            // store
            for entry in known..gatherer.memory.entries() {
                check_entry(gatherer, entry)?;
            }
        }
        self.start_fetchers(session, gatherer)?;
        session.send_control(&Control::StoreTableReceived { number: part.number })
    }

    /// Records the stores in which pages are, as the source reports them.
    ///
    /// # Errors
    /// Returns an error if a page is outside of RAM, or if the store table has no such entry.
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

    /// Handles the report of the source that an entry has lost pages.
    pub(super) fn entry_lost(&self, session: &Session, entry: u8) {
        let loss = session.map.change(|map| map.entry_lost(entry));
        if let Some(missing) = session.missing() {
            missing.ask_source(&loss.at_source);
        }
    }

    /// Answers *vacated*: releases the source, or sends it the list of the pages that only it has
    /// (rule 17).
    pub(super) fn answer_vacated(&self, session: &Session, missing: &Missing) {
        if self.release_source(session, missing).is_ok() {
            // best effort: a source that does not receive this connects again and asks
            let _ = session.report_released(missing);
            return self.report_phase();
        }
        // best effort for the same reason
        let _ = session.list_missing();
    }

    /// Decides that the source is not needed any more: no page is only at the source, and the pages
    /// that it holds are safe in their stores.
    ///
    /// # Errors
    /// Returns the reason why the source is still needed.
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

    /// Records that the source is not needed any more. From now on pages come only from stores.
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

    /// Continues without the source after a take-over: missing pages come from stores.
    pub(super) fn gather_alone(&self, session: &Session) {
        if let (Some(gatherer), Some(missing)) = (&session.gatherer, session.missing()) {
            if let Err(why) = self.released(session, gatherer) {
                // the take-over was refused if pages were only at the source; since then a store
                // has lost some pages
                let what = format!("the VM lacks pages that nobody has: {why}");
                self.common.options.observer.event(&Event::Warning(what));
            }
            missing.ask_stores_again();
        }
        self.source_is_done(session);
    }

    /// Returns whether pages of the VM are only at the source. The stores are asked whether they
    /// have lost pages that the source holds (rule 19). A store that does not answer may have its
    /// pages.
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

    /// Forgets the namespaces. Called when all pages are here and the source is released, so that
    /// the namespaces are not needed any more (rule 14).
    pub(super) fn forget_namespaces(&self, gatherer: &Gatherer) {
        for error in gatherer.memory.forget_all() {
            let what = format!("a namespace of the migration stays until its lease ends: {}", Chain(&error));
            self.common.options.observer.event(&Event::Warning(what));
        }
        if gatherer.is_source_done() {
            self.finished.store(true, Ordering::Relaxed);
        }
    }

    /// Records that the source has sent its last message. While pages are in stores, the session
    /// continues without the source.
    pub(super) fn source_is_done(&self, session: &Session) {
        if let Some(gatherer) = &session.gatherer {
            // this comes first: the thread that fetches the last page checks it afterwards
            gatherer.source_is_done();
            let gathers = session.missing().is_some_and(|missing| !missing.is_complete());
            if gathers && !session.has_guest_ended() {
                return;
            }
        }
        self.finished.store(true, Ordering::Relaxed);
    }

    /// Returns whether pages of the VM still come from stores although the source is done or gone.
    pub(super) fn gathers_alone(&self) -> bool {
        let session = lock(&self.state).session.clone();
        session.is_some_and(|session| {
            let alone = session.gatherer.as_ref().is_some_and(|gatherer| gatherer.is_source_done());
            alone && session.missing().is_some_and(|missing| !missing.is_complete())
        })
    }
}

impl VmHandle {
    /// Makes a VM that runs here independent of its source, while pages of it are in stores. Called
    /// when a person states that the source is dead. If no page is only at the source, and the
    /// stores have lost no page, the VM does not depend on the source any more (rule 19).
    ///
    /// # Errors
    /// Returns the reason why this is not possible, as a text.
    pub fn release_source(&self) -> Result<(), String> {
        let session = lock(&self.entry.state).session.clone().ok_or("no VM was received here")?;
        let missing = session.missing().ok_or("no page of the VM was left behind")?;
        self.entry.release_source(&session, &missing)?;
        self.entry.source_is_done(&session);
        self.entry.report_phase();
        Ok(())
    }
}
