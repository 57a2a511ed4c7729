//! Places in page stores into which the source puts pages: while the guest runs, and after the
//! hand-over, for pages that are sent through a store.

use std::{num::NonZeroU64, time::Duration};

use super::{
    puts::OpenPlace,
    putter::{PlaceDone, PlaceThread, RearmGate},
    *,
};
use crate::{
    paged_memory::{StoreEntry, StoreTable},
    spawner::Joiner,
    store::{Namespace, Owner, PageStore},
    strategy::Place,
    wire::{FEATURE_STORES, TablePart, add_missing, located_frames},
};

/// The page stores of a source.
#[derive(Clone)]
pub struct SourceStores {
    /// The stores that this host was started with.
    pub stores: Vec<Arc<dyn PageStore>>,
    /// Makes the secret name of a namespace. The name must be as random as a key: see
    /// `migration_crypto::random_namespace`.
    pub new_namespace: Arc<dyn Fn() -> Namespace + Send + Sync>,
    /// The owner of the namespaces, as the stores record it.
    pub owner: Owner,
    /// How long the stores keep the pages that they are given, unless the destination renews the
    /// lease.
    pub lease: Duration,
    /// The most bytes a second that the destination reads from stores before the guest needs them;
    /// `None` means no limit. Pages that the guest waits for do not count.
    pub gather_rate: Option<NonZeroU64>,
}

/// The places of one migration, and the state of what the destination was told about them.
#[derive(Default)]
pub(super) struct Places {
    /// The places that the strategy has named.
    pub(super) wanted: Vec<Place>,
    pub(super) table: StoreTable,
    /// For each of the first entries of `table`, its number in the VM's own table. These entries
    /// have pages that were in stores when the migration began.
    kept: Vec<u8>,
    pub(super) open: Vec<OpenPlace>,
    /// The number of the place that was opened last.
    pub(super) numbers: usize,
    /// The number of parts of the table that were sent, and the number of the last part that was
    /// acknowledged.
    parts: u32,
    received: u32,
    /// The number of entries that the table had when the last part was sent.
    sent_entries: usize,
    /// Whether *vacated* was sent, and has no answer yet.
    pub(super) vacated: bool,
    /// The pages that the destination has listed as missing so far; `None` while no list is being
    /// received.
    lacking: Option<PageSet>,
    /// The error of the last job, if it failed and no caller has taken the error yet.
    pub(super) error: Option<MigrationError>,
    /// Jobs that have ended since the destination was asked for its list of missing pages; `None`
    /// while no such list is awaited.
    pub(super) deferred: Option<Vec<PlaceDone>>,
    pub(super) threads: Vec<Box<dyn Joiner>>,
    /// The threads of all places, including closed ones.
    pub(super) putters: Vec<PlaceThread>,
    /// Whether the strategy is putting pages at this moment.
    pub(super) putting: bool,
    /// The gate that stops the threads from re-arming pages.
    pub(super) gate: Arc<RearmGate>,
}

/// The number of places and entries at one moment.
pub(super) struct Opened {
    places: usize,
    entries: usize,
}

impl Places {
    /// Adds an entry of the VM's own table, where it has this number. Returns its number in the
    /// store table of this migration.
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

    /// Resets what belongs to a session that is over. The next destination knows nothing of it.
    pub(super) fn end_session(&mut self) {
        self.table.begin_session(self.table.len());
        (self.parts, self.received, self.sent_entries) = (0, 0, 0);
        (self.vacated, self.lacking) = (false, None);
    }

    /// Defers the results of puts, because the destination is about to list its missing pages. The
    /// list is compared with the state that this side has recorded now, so puts that end meanwhile
    /// are recorded after the list.
    pub(super) fn defer_puts(&mut self) {
        self.deferred = Some(Vec::new());
    }
}

impl Engine<'_> {
    pub(super) fn may_use_stores(&self) -> bool {
        self.peer.features & FEATURE_STORES != 0
    }

    /// Creates a namespace for each place of the strategy that has none, and sends the destination
    /// all entries, and the locations of all pages that are in stores. Returns when the destination
    /// has acknowledged that.
    pub(super) fn open_places(&mut self) -> Result<(), MigrationError> {
        if !self.uses_stores {
            return Ok(());
        }
        self.agree_on_stores()?;
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
        // This part is empty. Its acknowledgement confirms that the locations were read.
        self.send_table()?;
        self.await_table()
    }

    /// Closes the places that a failed session has opened, and forgets their namespaces. The other
    /// entries of the table were not sent to any destination.
    pub(super) fn forget_places_since(&mut self, before: Opened) {
        let opened = self.places.open.split_off(before.places);
        for open in opened {
            self.close_place(open, true);
        }
        self.places.table.begin_session(before.entries);
        (self.places.parts, self.places.received, self.places.sent_entries) = (0, 0, 0);
    }

    /// Returns an error if the destination does not fetch pages from stores.
    pub(super) fn agree_on_stores(&mut self) -> Result<(), MigrationError> {
        if !self.may_use_stores() {
            let why = "pages are in page stores or to go through them, and the destination does not fetch from any: it is \
                       older, was started without page stores, or cannot fetch single pages";
            return Err(MigrationError::Blocked(why.into()));
        }
        self.machine.allow_stores();
        Ok(())
    }

    /// Sends the entries that the destination has not acknowledged: an empty part if there are
    /// none.
    fn send_table(&mut self) -> Result<(), MigrationError> {
        self.places.parts += 1;
        self.places.sent_entries = self.places.table.len();
        let (first, entries) = self.places.table.unacknowledged();
        let gather_rate = self.options.stores.as_ref().and_then(|stores| stores.gather_rate);
        // a protected VM has every page here: it leaves also while its store fails
        let must_answer = self.staging.is_none();
        let part = TablePart { number: self.places.parts, gather_rate, must_answer, first, entries: entries.to_vec() };
        self.send_control(&Control::StoreTable(part))
    }

    /// Waits until the destination has the whole table, and has read all frames before it.
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

    /// Records that the destination has a part of the table.
    pub(super) fn table_received(&mut self, number: u32) -> Result<(), MigrationError> {
        if number > self.places.parts || number <= self.places.received {
            return Err(DecodeError::invalid("store table received", "no such part is under way").into());
        }
        self.places.received = number;
        if number == self.places.parts {
            let sent = self.places.sent_entries;
            self.places.table.acknowledged(sent).map_err(|e| DecodeError::invalid("store table", e.to_string()))?;
        }
        Ok(())
    }

    /// Sends the table once more after a reattachment. Locations that were sent may be lost.
    pub(super) fn repeat_table(&mut self) -> Result<(), MigrationError> {
        (self.places.vacated, self.places.lacking) = (false, None);
        if self.places.table.is_empty() {
            return Ok(());
        }
        self.places.table.repeat();
        self.places.received = self.places.parts;
        self.send_table()
    }

    /// Sends the destination the entries that it does not know, if there are any.
    pub(super) fn share_table(&mut self) -> Result<(), MigrationError> {
        if !self.is_connected() || self.places.table.unacknowledged().1.is_empty() {
            return Ok(());
        }
        self.send_table()?;
        self.await_table()
    }

    /// Sends the destination the locations of pages in stores. Returns when the destination has
    /// read them, or at once if no destination is connected yet.
    pub(super) fn share_locations(&mut self) -> Result<(), MigrationError> {
        if !self.is_connected() {
            return Ok(());
        }
        self.announce()?;
        self.send_table()?;
        self.await_table()
    }

    /// Sends the locations of the pages in stores that the destination does not know yet (rule 16).
    pub(super) fn announce(&mut self) -> Result<(), MigrationError> {
        // Without a table, no page can be in a store. The early return leaves the map's lock to the
        // demand lanes.
        if self.places.table.is_empty() || self.rounds.map().unannounced().is_empty() {
            return Ok(());
        }
        let mut runs = {
            let map = self.rounds.map();
            map.located_runs(map.unannounced())
        };
        // After a reattachment the destination may not have the table yet.
        runs.retain(|run| self.places.table.usable(run.copy.entry).is_ok());
        let mut pages = PageSet::empty(self.report.pages.total);
        runs.iter().for_each(|run| pages.insert_range(run.pages));
        for frame in located_frames(&runs) {
            self.send_control(&Control::Located(frame))?;
        }
        self.rounds.map().announced(&pages);
        Ok(())
    }

    /// Sends which entries have lost pages, after a reattachment. The destination may not know a
    /// loss that was found while the link was lost (rule 13).
    pub(super) fn repeat_losses(&mut self) -> Result<(), MigrationError> {
        let lost = self.rounds.map().lost_entries();
        lost.into_iter().try_for_each(|entry| self.send_control(&Control::EntryLost { entry }))
    }

    /// Records the puts that were deferred, because the destination has listed its missing pages,
    /// or the attempt to ask has ended.
    pub(super) fn record_deferred_puts(&mut self) {
        self.places.deferred.take().into_iter().flatten().for_each(|done| self.place_done(done));
    }

    /// Sends *vacated* once every page was sent or located, and a mark after the pages on each lane
    /// (rule 17).
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
            // A lane that has ended has reported why, in an input.
            let _ = lane.send(Work::Mark(number, generation));
        }
        Ok(())
    }

    /// Adds a part of the destination's list of missing pages.
    pub(super) fn lacks(&mut self, first: u64, bitmap: &[u8]) -> Result<(), MigrationError> {
        let pages = self.report.pages.total;
        let lacking = self.places.lacking.get_or_insert_with(|| PageSet::empty(pages));
        Ok(add_missing(lacking, first, bitmap)?)
    }

    /// Completes the list of missing pages. These pages are sent again, or their locations are.
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
}
