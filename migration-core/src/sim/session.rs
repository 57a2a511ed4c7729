//! The source's side of a session: the preparation before a strategy begins, the offer in the
//! pause, and the roll-back when an attempt fails.

use std::collections::BTreeSet;

use bytes::Bytes;

use super::{
    Simulation,
    link::{Message, bytes_of},
    stores::VM,
};
use crate::{
    MigrationError, PageSet,
    page::{RamLayout, RamRegion},
    page_map::PageMap,
    protocol::SourcePhase,
    state::{Section, VmState},
    store::Purpose,
    strategy::{Place, Strategy, Verbs as _},
    vm::VmDescription,
    wire::{Control, FEATURE_SHARED_RAM, Hello, STATE_CHUNK, missing_frames},
};

impl Simulation {
    /// Prepares the attempt before the strategy begins.
    pub(super) fn prepare(&mut self, strategy: &dyn Strategy) -> Result<(), MigrationError> {
        let name = strategy.name();
        if strategy.needs_store() {
            return Err(MigrationError::Blocked(format!("{name} puts pages into a store, and there is none")));
        }
        self.source.keeps = strategy.keeps_stored_pages();
        let stored = self.source.map.in_store().len();
        if !self.source.keeps && strategy.needs_post_copy() && stored > 0 {
            let why =
                format!("{stored} pages are in stores, and {name} neither keeps them there nor sends them before");
            return Err(MigrationError::Blocked(why));
        }
        self.attempt_places = strategy.stores();
        for place in &self.attempt_places {
            self.stores_of(place)?;
        }
        self.strategy = name;
        self.shared = strategy.shares_ram();
        if strategy.connects_itself() { Ok(()) } else { self.open_session() }
    }

    /// Connects, makes the destination build the VM, and sends the store table and all locations.
    pub(super) fn open_session(&mut self) -> Result<(), MigrationError> {
        self.network.connected = true;
        let region = RamRegion { gpa: 0, len: bytes_of(self.config.pages) };
        let layout = RamLayout::new(vec![region]).map_err(|e| MigrationError::GaveUp(e.to_string()))?;
        let (host_needs, config) = (Bytes::new(), Bytes::new());
        let vm = VmDescription { id: VM, layout, devices: Vec::new(), host_needs, config };
        let features = if self.shared { FEATURE_SHARED_RAM } else { 0 };
        let hello = Hello { features, streams: 1, strategy: self.strategy.to_owned(), vm };
        self.send_message(Message::Control(Control::Hello(Box::new(hello))))?;
        self.wait_for(|sim| sim.source.machine.phase() == SourcePhase::Copying)?;
        for place in self.attempt_places.clone() {
            if matches!(place, Place::Stores { purpose: Purpose::Attempt, .. }) && self.entry_for(&place).is_none() {
                // if this store does not work, pages move by the other routes
                if let Err(error) = self.create_entry(&place)? {
                    self.report(&error);
                }
            }
        }
        let table = self.open_entries();
        if table.is_empty() {
            return Ok(());
        }
        self.send_table(table)?;
        self.announce(&PageSet::empty(self.config.pages))?;
        self.send_message(Message::LocationsEnd)?;
        self.wait_for(|sim| sim.source.locations_taken)
    }

    /// Sends entries of the store table, and waits until the destination has acknowledged them. No
    /// entry is used before.
    pub(super) fn send_table(&mut self, entries: Vec<u8>) -> Result<(), MigrationError> {
        self.source.table_taken = false;
        self.send_message(Message::Table(entries.clone()))?;
        self.wait_for(|sim| sim.source.table_taken)?;
        self.source.table.extend(entries);
        Ok(())
    }

    /// Returns the entries to which pages refer, or into which pages can be put.
    fn open_entries(&self) -> Vec<u8> {
        let mut entries = BTreeSet::new();
        if self.source.keeps {
            entries.extend(self.source.map.entries());
        }
        let open = self.entries.iter().enumerate().filter(|(_, entry)| entry.is_for(Purpose::Attempt) && !entry.closed);
        entries.extend(open.filter_map(|(number, _)| u8::try_from(number).ok()));
        entries.into_iter().collect()
    }

    /// Sends the locations that the destination does not know in their last state, except those of
    /// `others`.
    pub(super) fn announce(&mut self, others: &PageSet) -> Result<(), MigrationError> {
        if !self.source.keeps {
            // pages in stores were read and sent
            return Ok(());
        }
        let mut pages = self.source.map.unannounced().clone();
        pages.subtract(others);
        if pages.is_empty() {
            return Ok(());
        }
        self.send_message(Message::Located(self.source.map.located_runs(&pages)))?;
        self.source.map.announced(&pages);
        Ok(())
    }

    /// Undoes the effects of the attempt on the guest, which stays at the source.
    pub(super) fn roll_back(&mut self) {
        self.source.throttle = 0;
        self.source.puts.clear();
        // a guest that waits for a page requests it again
        self.gets.clear();
        self.forget(|entry| entry.is_for(Purpose::Attempt));
        for number in self.source.map.entries() {
            if self.entries[usize::from(number)].is_for(Purpose::Attempt) || self.is_forgotten(number) {
                self.source.map.entry_lost(number);
            }
        }
        self.source.map.taken_back();
        // a copy that is kept ready stays current only while writes are tracked
        let mut staged = self.source.map.with_copies().clone();
        staged.subtract(self.source.map.in_store());
        self.source.tracking &= !staged.is_empty();
        if !self.source.tracking {
            self.source.dirty.clear();
        }
        if self.source.map.with_copies().is_empty() {
            self.source.map = PageMap::new(self.config.pages);
        }
        self.source.runs = !self.source.dead;
        self.guest.waiting = None;
        self.check();
    }

    /// Returns the encoded state.
    fn state(&self) -> Bytes {
        let data = Bytes::from(vec![0; self.config.state_bytes]);
        Bytes::from(VmState { sections: vec![Section { name: "vm".into(), instance: 0, version: 1, data }] }.encode())
    }

    /// Offers the VM. `pages`, and the pages that saving the state dirtied, are sent, or left
    /// missing if `leave` is set.
    pub(super) fn offer(&mut self, mut pages: PageSet, leave: bool) -> Result<(), MigrationError> {
        self.pass(self.config.save_time);
        // saving the state dirties a page, as writes of kvmclock and steal time do
        self.write_at_source(self.config.pages - 1);
        pages.subtract(self.source.map.in_store());
        self.source.map.sending(&pages)?;
        let rest = self.harvest()?;
        let only_stored = stored_of(&rest, self.source.map.in_store());
        if !only_stored.is_empty() {
            let why = format!("{} pages are in stores only, and were not sent before the pause", only_stored.len());
            return Err(MigrationError::Blocked(why));
        }
        if !self.shared {
            self.leave_or_send(&rest, leave)?;
        }
        let state = self.state();
        for at in (0..state.len()).step_by(STATE_CHUNK) {
            let chunk = state.slice(at..state.len().min(at + STATE_CHUNK));
            self.send_message(Message::Control(Control::State(chunk)))?;
        }
        let offer = self.source.machine.offer(state.len() as u64, true)?;
        self.send_message(Message::Control(offer))?;
        self.wait_for(|sim| sim.source.machine.phase() == SourcePhase::Ready)
    }

    /// Sends the unsent pages in the pause, or names them as missing. Then sends the locations that
    /// have changed.
    fn leave_or_send(&mut self, rest: &PageSet, leave: bool) -> Result<(), MigrationError> {
        if !leave {
            self.source.machine.begin_round()?;
            self.attempt.rounds.push(rest.len());
            self.transfer(rest, |_| false)?;
            self.source.map.acknowledged(rest)?;
        }
        self.announce(rest)?;
        let left = if leave { rest.clone() } else { PageSet::empty(self.config.pages) };
        if !leave && (!self.source.keeps || self.source.map.with_copies().is_empty()) {
            return Ok(());
        }
        for frame in missing_frames(&left) {
            self.send_message(Message::Control(frame))?;
        }
        let (end, _) = self.source.machine.post_copy(left.len(), 1)?;
        self.send_message(Message::Control(end))?;
        Ok(self.source.map.leave_behind(&left)?)
    }
}

/// Returns the pages that are in both sets.
pub(super) fn stored_of(pages: &PageSet, in_store: &PageSet) -> PageSet {
    let mut both = pages.clone();
    both.intersect_with(in_store);
    both
}
