//! The destination host. It receives the VM, runs it, and fetches missing pages from where they
//! are.

use std::{collections::BTreeSet, time::Duration};

use super::{
    Simulation,
    link::{Event, Message},
    stores::{GetUnderWay, Side, not_found},
};
use crate::{
    MigrationError, PageRange, PageSet,
    page_map::{LocatedRun, Location, PageCopy, PageMap, StoreCopy},
    protocol::{DestinationAction, DestinationMachine, DestinationPhase, OnDestinationLoss},
    state::VmState,
    wire::{Control, ErrorCode, FaultSummary, SessionToken, Welcome, add_missing, missing_frames},
};

/// The largest number of pages that are read ahead from stores at a time: 256 KiB.
const PREFETCH_PAGES: u64 = 64;
/// The time after which stores are asked again for a page that no store has.
const ASK_AGAIN: Duration = Duration::from_millis(100);

/// The destination host.
pub(super) struct DestinationHost {
    pub(super) machine: DestinationMachine,
    pub(super) map: PageMap,
    /// The version of each page in RAM; `None` while there is no VM.
    ram: Option<Vec<u64>>,
    pub(super) runs: bool,
    /// Whether the session's link is not its first one.
    pub(super) reattached: bool,
    /// The number of times that a state was loaded, or failed to load.
    loads: u32,
    /// The entries of the store table that the destination has acknowledged.
    table: BTreeSet<u8>,
    /// The entries that the destination has found to have lost pages.
    lost: BTreeSet<u8>,
    check: Option<Check>,
    /// The pages that were requested from stores.
    asked: PageSet,
    /// The number of these pages for which no guest waits.
    prefetching: u64,
    /// Whether the destination waits before it asks stores again.
    waits: bool,
    /// The number of actions after which the destination last began to check stores before a
    /// release.
    pub(super) checked_after: Option<u64>,
}

/// A check of the stores of several entries for losses.
struct Check {
    number: u64,
    /// The number of stores that have not answered.
    waiting: usize,
    lost: BTreeSet<u8>,
    then: Then,
}

/// The step that follows a check.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Then {
    /// Report to the source which entries it can use.
    UseTable,
    /// Release the source.
    Release,
}

impl DestinationHost {
    pub(super) fn new(pages: u64) -> Self {
        Self {
            machine: DestinationMachine::new(),
            map: PageMap::new(pages),
            ram: None,
            runs: false,
            reattached: false,
            loads: 0,
            table: BTreeSet::new(),
            lost: BTreeSet::new(),
            check: None,
            asked: PageSet::empty(pages),
            prefetching: 0,
            waits: false,
            checked_after: None,
        }
    }

    /// Resets the state of the host, with RAM for a new VM or with none.
    fn clear(&mut self, ram: Option<Vec<u64>>) {
        let (machine, loads) = (std::mem::take(&mut self.machine), self.loads);
        *self = Self { machine, loads, ram, ..Self::new(self.map.pages()) };
    }

    /// Returns the version that a guest reads in a page that is not missing.
    pub(super) fn content(&self, page: u64) -> u64 {
        self.ram.as_ref().map_or(0, |ram| ram[page as usize])
    }

    pub(super) fn write(&mut self, page: u64, version: u64) {
        if let Some(ram) = &mut self.ram {
            ram[page as usize] = version;
        }
    }

    fn lacks(&self) -> PageSet {
        self.map.source_pages()
    }
}

/// Messages of the source.
impl Simulation {
    pub(super) fn destination_takes(&mut self, message: Message) -> Vec<Message> {
        match message {
            Message::Control(frame) => {
                let action = self.destination.machine.handle(self.source.machine.epoch(), frame);
                return match action {
                    Ok(action) => self.destination_does(action),
                    Err(violation) => control([Control::error(violation.code, violation.to_string())]),
                };
            }
            Message::Pages { range, versions } => return self.pages_arrive(range, &versions),
            Message::RoundEnd(generation) => return control([Control::RoundReceived { generation }]),
            Message::Table(entries) => {
                self.destination.table.extend(&entries);
                self.begin_check(entries, Then::UseTable);
            }
            Message::Located(runs) => self.located(runs),
            Message::LocationsEnd => return vec![Message::LocationsTaken],
            Message::Vacated => self.vacated(),
            _ => self.broken.push("the source sent what only a destination sends".into()),
        }
        Vec::new()
    }

    pub(super) fn destination_does(&mut self, action: DestinationAction) -> Vec<Message> {
        match action {
            DestinationAction::Build { .. } => {
                self.destination.clear(Some(vec![0; self.config.pages as usize]));
                let session = SessionToken([1; 16]);
                let welcome = Control::Welcome(Welcome { version: 1, features: 0, streams: 1, session });
                let prepared = self.destination.machine.prepared(Some(self.config.load_time));
                control([welcome].into_iter().chain(prepared.ok()))
            }
            DestinationAction::Missing { first, bitmap } => {
                let mut missing = PageSet::empty(self.config.pages);
                let added = add_missing(&mut missing, first, &bitmap).map_err(MigrationError::from);
                let left = added.and_then(|()| Ok(self.destination.map.leave_behind(&missing)?));
                self.note_broken(left);
                Vec::new()
            }
            DestinationAction::Load { state, post_copy, .. } => {
                if post_copy.is_some() {
                    // the list is complete: locations cannot replace pages that are here any more
                    let none = PageSet::empty(self.config.pages);
                    let left = self.destination.map.leave_behind(&none);
                    self.note_broken(left.map_err(Into::into));
                }
                let fails = self.destination.loads < self.config.failing_loads || VmState::decode(&state).is_err();
                self.destination.loads += 1;
                self.network.at(self.clock + self.config.load_time, Event::Loaded(!fails));
                Vec::new()
            }
            DestinationAction::Start { running } => {
                if self.shared {
                    let received = self.destination.map.received(PageRange::new(0, self.config.pages));
                    self.note_broken(received.map_err(Into::into));
                    self.destination.ram = Some(self.guest.newest.clone());
                }
                self.check_copy();
                self.destination.runs = running;
                self.guest.waiting = None;
                self.running()
            }
            DestinationAction::AnswerRunning => self.running(),
            DestinationAction::Discard(_) => {
                self.destination.clear(None);
                Vec::new()
            }
            DestinationAction::Pong => control([Control::Pong]),
            // the simulator has its own messages for locations
            DestinationAction::StoreTable(_)
            | DestinationAction::Located(_)
            | DestinationAction::Vacated(_)
            | DestinationAction::EntryLost(_)
            | DestinationAction::None
            | DestinationAction::Finish
            | DestinationAction::LoadPiece(_) => Vec::new(),
        }
    }

    /// Handles the end of loading the state: `whole` says whether it succeeded.
    pub(super) fn loaded(&mut self, whole: bool) {
        if whole {
            let ready = self.destination.machine.loaded();
            control(ready).into_iter().for_each(|ready| self.reply(ready));
        } else {
            self.destination_loss();
            self.reply(Message::Control(Control::error(ErrorCode::State, "the state cannot be loaded")));
        }
    }

    pub(super) fn destination_loss(&mut self) {
        if self.destination.machine.link_lost() == OnDestinationLoss::Discard {
            self.destination.clear(None);
        }
    }

    /// Returns the messages that say that the VM runs, and on a new link which pages are missing.
    fn running(&mut self) -> Vec<Message> {
        let mut replies = control([Control::Running]);
        if self.destination.map.missing_at_hand_over().is_empty() {
            return replies;
        }
        if self.destination.machine.is_complete() || self.destination.map.missing().is_empty() {
            let complete = self.destination.machine.complete();
            replies.extend(control(complete.map(|()| Control::Complete(FaultSummary::default()))));
        } else if self.destination.reattached {
            // this message is first, so that the source does not name these entries again
            replies.push(Message::Lost(self.destination.lost.iter().copied().collect()));
            let lacks = self.destination.lacks();
            replies.extend(control(missing_frames(&lacks)));
            replies.extend(control([Control::PostCopy { missing: lacks.len(), demand_lanes: 0 }]));
            let waiting = self.guest.waiting.map(|(page, _)| page).filter(|&page| lacks.contains(page));
            replies.extend(waiting.map(Message::Demand));
        }
        replies
    }

    /// Checks that all pages that the destination has are in their last state.
    pub(super) fn check_copy(&mut self) {
        if self.destination.ram.is_none() {
            return self.broken.push("the destination starts a VM that it does not have".into());
        }
        let (missing, free) = (self.destination.map.missing(), &self.guest.free);
        let stale = (0..self.config.pages).filter(|&page| {
            let newest = self.guest.newest[page as usize];
            self.destination.content(page) != newest && !missing.contains(page) && !free.contains(page)
        });
        let stale = stale.count();
        if stale > 0 {
            self.broken.push(format!("{stale} pages are stale or lost at the destination"));
        }
    }

    /// Takes pages from the source.
    fn pages_arrive(&mut self, range: PageRange, versions: &[u64]) -> Vec<Message> {
        if self.destination.machine.phase() != DestinationPhase::Running {
            if self.destination.machine.accepts_pages() && self.destination.ram.is_some() {
                let received = self.destination.map.received(range);
                self.note_broken(received.map_err(Into::into));
                range.pages().zip(versions).for_each(|(page, &version)| self.destination.write(page, version));
            }
            return Vec::new();
        }
        let mut installed = false;
        // a second copy of a page is dropped
        for run in self.destination.map.free_runs(range, PageCopy::Source, usize::MAX) {
            let arrived = self.destination.map.claim(run).and_then(|()| self.destination.map.arrived(run));
            self.note_broken(arrived.map_err(Into::into));
            for page in run.pages() {
                self.destination.write(page, versions[(page - range.first) as usize]);
                self.page_is_there(page);
            }
            installed = true;
        }
        if installed && self.destination.map.missing().is_empty() { self.complete() } else { Vec::new() }
    }

    /// Releases the source: no page is needed from it any more.
    fn complete(&mut self) -> Vec<Message> {
        let complete = self.destination.machine.complete();
        self.check_copy();
        control(complete.map(|()| Control::Complete(FaultSummary::default())))
    }
}

/// Pages in stores.
impl Simulation {
    /// Takes the source's announcement of locations.
    fn located(&mut self, runs: Vec<LocatedRun>) {
        for LocatedRun { pages, copy, held } in runs {
            if !self.destination.table.contains(&copy.entry) {
                self.broken.push(format!("a location names entry {}, which was not acknowledged", copy.entry));
            }
            let changed = self.destination.map.located(pages, copy, held);
            let waiting = self.guest.waiting.map(|(page, _)| page).filter(|_| self.destination.runs);
            if let Some(page) = waiting.filter(|page| changed.iter().any(|run| run.pages().contains(page))) {
                self.fault_at_destination(page);
            }
        }
    }

    /// Requests the page for which the guest waits from the place where it is.
    pub(super) fn fault_at_destination(&mut self, page: u64) {
        match self.destination.map.location(page) {
            Location::Source => self.reply(Message::Demand(page)),
            Location::Store(copy) => self.fetch(PageRange::new(page, 1), copy, true),
            _ => self.page_is_there(page),
        }
    }

    fn fetch(&mut self, range: PageRange, copy: StoreCopy, urgent: bool) {
        self.destination.asked.insert_range(range);
        self.destination.prefetching += if urgent { 0 } else { range.count };
        self.start_get(Side::Destination, GetUnderWay { range, copy, replica: 0, urgent });
    }

    /// Reads pages ahead for which no guest waits, once the source is released.
    pub(super) fn prefetch(&mut self) {
        if !self.destination.runs || !self.destination.machine.is_complete() || self.destination.waits {
            return;
        }
        while self.destination.prefetching < PREFETCH_PAGES {
            let mut wanted = self.destination.map.unfetched().clone();
            wanted.subtract(&self.destination.asked);
            let next = wanted.first_from(0).and_then(|page| wanted.run_at(page, PREFETCH_PAGES));
            let Some(run) = next else { return };
            let Some(copy) = self.destination.map.copy(run.first) else { return };
            let alike = self.destination.map.free_runs(run, PageCopy::Store(copy), 1);
            let Some(&range) = alike.first() else { return };
            self.fetch(range, copy, false);
        }
    }

    /// Takes the answer of a store of the entry: the pages that it has, or none.
    pub(super) fn got_at_destination(&mut self, asked: GetUnderWay, found: Vec<(u64, u64)>) {
        self.destination.asked.remove_range(asked.range);
        let many = if asked.urgent { 0 } else { asked.range.count };
        self.destination.prefetching = self.destination.prefetching.saturating_sub(many);
        let lacking = not_found(asked.range, &found);
        for (page, version) in found {
            let range = PageRange::new(page, 1);
            // the newest content may be elsewhere by now, or the page may be installed
            if self.destination.map.free_runs(range, PageCopy::Store(asked.copy), 1).is_empty() {
                continue;
            }
            let claimed = self.destination.map.claim_stored(range, asked.copy);
            let arrived = claimed.and_then(|()| self.destination.map.arrived(range));
            self.note_broken(arrived.map_err(Into::into));
            self.destination.write(page, version);
            self.page_is_there(page);
        }
        let lacking = self.still_in(asked.copy, &lacking);
        if !lacking.is_empty() {
            self.lacking_in_store(&asked, &lacking);
        }
        let all_there = self.destination.runs && self.destination.map.missing().is_empty();
        if all_there && !self.destination.machine.is_complete() {
            self.complete().into_iter().for_each(|reply| self.reply(reply));
        }
        self.prefetch();
    }

    /// Returns the parts of `runs` whose location is still this copy.
    fn still_in(&self, copy: StoreCopy, runs: &[PageRange]) -> Vec<PageRange> {
        let map = &self.destination.map;
        runs.iter().flat_map(|&run| map.free_runs(run, PageCopy::Store(copy), usize::MAX)).collect()
    }

    /// Handles a store that does not have pages, or does not answer. The next store of the entry is
    /// asked. If there is none, pages that the source holds come from the source, and the others
    /// are requested again later.
    fn lacking_in_store(&mut self, asked: &GetUnderWay, lacking: &[PageRange]) {
        if self.ask_next_store(Side::Destination, asked, lacking) {
            for &range in lacking {
                self.destination.asked.insert_range(range);
                self.destination.prefetching += if asked.urgent { 0 } else { range.count };
            }
            return;
        }
        let held = lacking.iter().flat_map(|run| run.pages()).any(|page| self.destination.map.is_held(page));
        if held {
            self.lose_entry(asked.copy.entry);
        }
        if !self.still_in(asked.copy, lacking).is_empty() && !self.destination.waits {
            self.destination.waits = true;
            self.network.at(self.clock + ASK_AGAIN, Event::AskAgain);
        }
    }

    /// Repeats the request of a guest that waits for a page in a store.
    pub(super) fn ask_again(&mut self) {
        self.destination.waits = false;
        if let Some((page, _)) = self.guest.waiting {
            self.fault(page);
        }
        self.prefetch();
    }

    /// Records that an entry has lost pages. Those that the source holds are requested from the
    /// source.
    fn lose_entry(&mut self, entry: u8) {
        let loss = self.destination.map.entry_lost(entry);
        self.destination.lost.insert(entry);
        self.reply(Message::Lost(vec![entry]));
        if loss.at_source.is_empty() {
            return;
        }
        let waiting = self.guest.waiting.map(|(page, _)| page).filter(|&page| loss.at_source.contains(page));
        self.reply(Message::Lacks(loss.at_source));
        if let Some(page) = waiting {
            self.reply(Message::Demand(page));
        }
    }

    /// Handles the source's report that it has sent or located every page.
    fn vacated(&mut self) {
        if self.destination.machine.is_complete() {
            return;
        }
        self.destination.checked_after = Some(self.actions);
        self.begin_check(self.destination.map.depends_on(), Then::Release);
    }

    fn begin_check(&mut self, entries: Vec<u8>, then: Then) {
        let number = self.numbered();
        let waiting = entries.iter().map(|&entry| self.entries[usize::from(entry)].store_count()).sum();
        self.destination.check = Some(Check { number, waiting, lost: BTreeSet::new(), then });
        for entry in entries {
            self.start_renew(entry, number);
        }
        self.conclude_check();
    }

    /// Takes a store's answer to a check: whether it still has the namespace and has lost nothing.
    pub(super) fn renewed(&mut self, entry: u8, number: u64, intact: bool) {
        let Some(check) = self.destination.check.as_mut().filter(|check| check.number == number) else { return };
        check.waiting -= 1;
        if !intact {
            check.lost.insert(entry);
        }
        self.conclude_check();
    }

    fn conclude_check(&mut self) {
        let Some(check) = self.destination.check.take_if(|check| check.waiting == 0) else { return };
        if check.then == Then::UseTable {
            return self.reply(Message::TableTaken(check.lost.into_iter().collect()));
        }
        let intact = check.lost.is_empty();
        check.lost.into_iter().for_each(|entry| self.lose_entry(entry));
        let lacks = self.destination.lacks();
        if !lacks.is_empty() {
            if intact {
                self.reply(Message::Lacks(lacks));
            }
        } else if intact {
            let released = self.destination.map.released();
            self.note_broken(released.map_err(Into::into));
            self.complete().into_iter().for_each(|reply| self.reply(reply));
            self.prefetch();
        } else {
            // no page depends on the entries that were lost
            self.vacated();
        }
    }

    /// Records a person's statement that the source is dead. If no page is only at the source, the
    /// destination does not need it any more. Returns whether that is so.
    pub fn release_by_hand(&mut self) -> bool {
        if !self.destination.runs || !self.source.dead {
            return false;
        }
        self.vacated();
        while self.destination.check.is_some() && self.step(None) {}
        self.destination.machine.is_complete()
    }

    /// Lets the guest run at the destination, which fetches pages from stores, until no page is
    /// missing or the time `most` has passed. Then forgets the namespaces to which no page refers.
    /// Returns the number of missing pages.
    pub fn gather(&mut self, most: Duration) -> u64 {
        let end = self.clock + most;
        while !self.destination.map.missing().is_empty() && self.clock < end {
            self.prefetch();
            self.step(Some(end));
        }
        let missing = self.destination.map.missing().len();
        if missing == 0 && self.destination.machine.is_complete() {
            self.check_copy();
            self.forget(|_| true);
        }
        missing
    }
}

fn control(frames: impl IntoIterator<Item = Control>) -> Vec<Message> {
    frames.into_iter().map(Message::Control).collect()
}
