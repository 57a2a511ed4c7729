//! A VM whose cold pages are in stores while no migration is under way.

use std::time::Duration;

use super::{
    Simulation,
    link::Event,
    stores::{GetUnderWay, Side, not_found},
};
use crate::{
    MigrationError, PageRange, PageSet,
    page_map::{Location, PageCopy, StoreCopy},
    store::Purpose,
    strategy::Place,
};

/// The time after which a guest at the source repeats a get that failed.
const ASK_AGAIN: Duration = Duration::from_millis(100);

impl Simulation {
    /// Reads the pages of `range` that are in stores, to send them. They do not become resident.
    pub(super) fn read_through(&mut self, range: PageRange) -> Result<(), MigrationError> {
        self.source.buffer.clear();
        let mut wanted = PageSet::empty(self.config.pages);
        self.source.map.in_store().ranges_in(range).for_each(|run| wanted.insert_range(run));
        for run in self.source.map.located_runs(&wanted) {
            let (range, copy) = (run.pages, run.copy);
            self.source.reading += range.count;
            self.start_get(Side::Buffer, GetUnderWay { range, copy, replica: 0, urgent: false });
        }
        self.wait_for(|sim| sim.source.reading == 0)
    }

    /// Takes a store's answer with pages that are to be sent.
    pub(super) fn got_in_buffer(&mut self, asked: GetUnderWay, found: Vec<(u64, u64)>) {
        let lacking = not_found(asked.range, &found);
        self.source.reading = self.source.reading.saturating_sub(found.len() as u64);
        self.source.buffer.extend(found);
        if lacking.is_empty() || self.ask_next_store(Side::Buffer, &asked, &lacking) {
            return;
        }
        let count = lacking.iter().map(|run| run.count).sum();
        self.source.reading = self.source.reading.saturating_sub(count);
        let error = self.lacking(asked.copy.entry, count, lacking[0].first);
        self.source.failure.get_or_insert(error);
    }

    pub(super) fn fault_at_source(&mut self, page: u64) {
        if let Location::Store(copy) = self.source.map.location(page) {
            let range = PageRange::new(page, 1);
            self.start_get(Side::Source, GetUnderWay { range, copy, replica: 0, urgent: true });
        }
    }

    pub(super) fn got_at_source(&mut self, asked: GetUnderWay, found: Vec<(u64, u64)>) {
        let lacking = not_found(asked.range, &found);
        for (page, version) in found {
            self.return_to_source(page, version, asked.copy);
        }
        if !lacking.is_empty() && !self.ask_next_store(Side::Source, &asked, &lacking) {
            self.network.at(self.clock + ASK_AGAIN, Event::AskAgain);
        }
    }

    /// Installs a page that was read back. After the pause begins, nothing is installed any more.
    fn return_to_source(&mut self, page: u64, version: u64, copy: StoreCopy) {
        let range = PageRange::new(page, 1);
        let free = !self.source.map.free_runs(range, PageCopy::Store(copy), 1).is_empty();
        if !free || !self.source.runs {
            return;
        }
        let returned = self.source.map.claim_stored(range, copy).and_then(|()| self.source.map.returned(range));
        self.note_broken(returned.map_err(Into::into));
        self.source.ram[page as usize] = version;
        if !self.source.tracking {
            // no tracker would see a write, so the copy does not count any more
            let mut pages = PageSet::empty(self.config.pages);
            pages.insert(page);
            let dirtied = self.source.map.dirtied(&pages);
            self.note_broken(dirtied.map_err(Into::into));
        }
        self.page_is_there(page);
    }

    /// Puts pages into stores and drops them from RAM, as a VMM does with cold pages of a VM
    /// outside a migration. Pages that the guest writes during the put stay in RAM. Returns the
    /// number of pages that were evicted.
    ///
    /// # Errors
    /// Returns an error if there is no such store, if the guest's pages are tracked, or if the
    /// guest does not run at the source: no page is evicted during a migration.
    pub fn evict(&mut self, range: PageRange, stores: &[&str]) -> Result<u64, MigrationError> {
        if self.source.tracking || !self.source.runs {
            return Err(MigrationError::Blocked("no page is evicted while the VM is tracked, or elsewhere".into()));
        }
        // the last page stays, because the VMM touches it while it saves the state
        let end = range.end().min(self.config.pages - 1);
        let mut pages = PageSet::empty(self.config.pages);
        pages.insert_range(PageRange::new(range.first, end.saturating_sub(range.first)));
        pages.subtract(self.source.map.in_store());
        self.source.map.dirtied(&pages)?;
        let names = stores.iter().map(|&name| name.to_owned()).collect();
        let place = Place::Stores { names, purpose: Purpose::Home };
        let entry = match self.entry_for(&place) {
            Some(entry) => entry,
            None => self.create_entry(&place)??,
        };
        self.source.dirty.clear();
        // pages that a store does not accept stay in RAM
        self.put_into(entry, &mut pages, u64::MAX)?.or_keep_for_later();
        let mut cold = self.source.put.clone();
        cold.subtract(&self.source.dirty);
        self.source.map.dirtied(&self.source.dirty)?;
        for run in cold.ranges() {
            self.source.map.evicted(run)?;
            run.pages().for_each(|page| self.source.ram[page as usize] = 0);
        }
        self.source.dirty.clear();
        Ok(cold.len())
    }
}
