//! The source host, and its verbs.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use super::{
    Simulation,
    link::{Message, bytes_of, link_error},
    session::stored_of,
    stores::PutUnderWay,
};
use crate::{
    MigrationError, PAGE_SIZE, PageRange, PageSet,
    page_map::PageMap,
    protocol::{SourceEvent, SourceMachine, SourcePhase},
    store::{Purpose, limits::MAX_RUN_PAGES},
    strategy::{Destination, Link, Place, Portion, PushOrder, Put, Round, Until, Verbs, Wake, push_order::DIRTIED},
    text::describe,
    wire::add_missing,
};

/// The time from a harvest until the list of free pages is read.
const LOOK: Duration = Duration::from_micros(50);
/// The interval at which the number of written pages is checked during a wait for it.
const DIRTY_LOOK: Duration = Duration::from_millis(1);
/// The longest wait for a number of written pages. A guest that has not written them in this time
/// never will.
const LONGEST_WAIT: Duration = Duration::from_secs(600);

/// The source host.
pub(super) struct SourceHost {
    pub(super) machine: SourceMachine,
    pub(super) map: PageMap,
    /// The version of each page in RAM.
    pub(super) ram: Vec<u64>,
    /// The pages written since the last harvest.
    pub(super) dirty: PageSet,
    pub(super) tracking: bool,
    pub(super) runs: bool,
    pub(super) dead: bool,
    pub(super) throttle: u8,
    /// The heat of each page, as push orders get it.
    pub(super) heat: Vec<u8>,
    pub(super) paused_at: Option<Duration>,
    /// The reason why the session fails, if it does.
    pub(super) failure: Option<MigrationError>,
    /// The last round that the destination has acknowledged.
    received: u32,
    /// The entries of the store table that the destination has acknowledged.
    pub(super) table: BTreeSet<u8>,
    pub(super) table_taken: bool,
    pub(super) locations_taken: bool,
    /// The list of missing pages that the destination is sending, and whether it is complete.
    pub(super) listed: PageSet,
    pub(super) resumed: bool,
    /// The pages that were demanded since the push order was last informed.
    pub(super) demanded: Vec<u64>,
    pub(super) vacated: bool,
    pub(super) puts: BTreeMap<u64, PutUnderWay>,
    /// The pages that stores have acknowledged since this set was cleared, and the first failure.
    pub(super) put: PageSet,
    pub(super) put_failure: Option<MigrationError>,
    /// The entries into which nothing more is put in this attempt.
    pub(super) failing: BTreeSet<u8>,
    /// The pages that were read from stores to be sent, and the number of pages that are being
    /// read.
    pub(super) buffer: BTreeMap<u64, u64>,
    pub(super) reading: u64,
    /// Whether the strategy leaves stored pages in their stores.
    pub(super) keeps: bool,
    /// The bandwidth of the last round in bytes a second.
    bytes_per_second: f64,
}

impl SourceHost {
    pub(super) fn new(pages: u64) -> Self {
        let none = PageSet::empty(pages);
        Self {
            machine: SourceMachine::new(0),
            map: PageMap::new(pages),
            ram: (1..=pages).collect(),
            dirty: none.clone(),
            tracking: false,
            runs: true,
            dead: false,
            throttle: 0,
            heat: Vec::new(),
            paused_at: None,
            failure: None,
            received: 0,
            table: BTreeSet::new(),
            table_taken: false,
            locations_taken: false,
            listed: none.clone(),
            resumed: false,
            demanded: Vec::new(),
            vacated: false,
            puts: BTreeMap::new(),
            put: none,
            put_failure: None,
            failing: BTreeSet::new(),
            buffer: BTreeMap::new(),
            reading: 0,
            keeps: false,
            bytes_per_second: 0.0,
        }
    }

    /// Begins a session. Nothing of an earlier one counts.
    pub(super) fn begin_session(&mut self, epoch: u32) {
        self.machine = SourceMachine::new(epoch);
        self.map.nothing_announced();
        self.failure = None;
        self.received = 0;
        (self.table_taken, self.locations_taken, self.resumed, self.vacated) = (false, false, false, false);
        self.table.clear();
        self.buffer.clear();
        self.reading = 0;
        self.listed.clear();
        self.demanded.clear();
    }
}

/// Messages of the destination.
impl Simulation {
    pub(super) fn source_takes(&mut self, message: Message) -> Result<(), MigrationError> {
        let frame = match message {
            Message::Control(frame) => frame,
            Message::Demand(page) => return self.demanded(page),
            Message::TableTaken(lost) => {
                self.source.table_taken = true;
                self.lost_at_source(&lost);
                return Ok(());
            }
            Message::LocationsTaken => {
                self.source.locations_taken = true;
                return Ok(());
            }
            Message::Lost(lost) => {
                self.lost_at_source(&lost);
                return Ok(());
            }
            Message::Lacks(pages) => {
                self.source.vacated = false;
                return Ok(self.source.map.lacks(&pages)?);
            }
            _ => return Err(MigrationError::GaveUp("only a source sends this".into())),
        };
        match self.source.machine.handle(self.source.machine.epoch(), frame)? {
            SourceEvent::Refused(code, text) => return Err(MigrationError::Peer { code, text }),
            SourceEvent::RoundReceived(generation) => self.source.received = generation,
            SourceEvent::Running => {
                if let Some(paused) = self.source.paused_at {
                    self.attempt.downtime.get_or_insert(self.clock - paused);
                }
            }
            SourceEvent::Missing { first, bitmap } => {
                add_missing(&mut self.source.listed, first, &bitmap)?;
            }
            SourceEvent::Resume { .. } => {
                let none = PageSet::empty(self.config.pages);
                let lacking = std::mem::replace(&mut self.source.listed, none);
                self.source.map.lacking(&lacking)?;
                (self.source.resumed, self.source.vacated) = (true, false);
            }
            _ => {}
        }
        Ok(())
    }

    /// Records that the destination has found entries to have lost pages.
    fn lost_at_source(&mut self, lost: &[u8]) {
        for &entry in lost {
            self.source.map.entry_lost(entry);
            self.source.failing.insert(entry);
            self.entries[usize::from(entry)].closed = true;
        }
    }
}

/// Rounds and puts.
impl Simulation {
    /// Sends `pages` until all are sent, or until `enough` returns `true` before the next chunk.
    /// Returns the pages that were sent.
    pub(super) fn transfer(
        &mut self,
        pages: &PageSet,
        enough: impl Fn(&Self) -> bool,
    ) -> Result<PageSet, MigrationError> {
        let mut sent = PageSet::empty(pages.capacity());
        for range in pages.ranges() {
            let mut at = range.first;
            while at < range.end() {
                self.wait_for_link()?;
                if enough(self) {
                    return Ok(sent);
                }
                let chunk = PageRange::new(at, self.config.chunk.max(1).min(range.end() - at));
                self.read_through(chunk)?;
                self.send_pages(chunk, false)?;
                sent.insert_range(chunk);
                at = chunk.end();
            }
        }
        Ok(sent)
    }

    /// Sends pages in their present state. The guest continues while they are on their way.
    pub(super) fn send_pages(&mut self, range: PageRange, urgently: bool) -> Result<(), MigrationError> {
        let stored = self.source.map.in_store();
        let version = |page: u64| match self.source.buffer.get(&page) {
            Some(&version) if stored.contains(page) => version,
            _ => self.source.ram[page as usize],
        };
        let versions = range.pages().map(version).collect();
        let message = Message::Pages { range, versions };
        if urgently { self.send_urgently(message) } else { self.send_message(message) }
    }

    /// Sends one round. Returns its result, and the pages that the destination has acknowledged.
    fn round(&mut self, pages: &PageSet, enough: impl Fn(&Self) -> bool) -> Result<(Round, PageSet), MigrationError> {
        let (began, generation) = (self.clock, self.source.machine.begin_round()?);
        self.source.map.sending(pages)?;
        let sent = self.transfer(pages, enough)?;
        self.send_message(Message::RoundEnd(generation))?;
        self.wait_for(|sim| sim.source.received >= generation)?;
        self.source.map.acknowledged(&sent)?;
        let (pages_sent, time) = (sent.len(), self.clock - began);
        self.attempt.rounds.push(pages_sent);
        let wire_bytes = bytes_of(pages_sent);
        if time > Duration::ZERO && pages_sent > 0 {
            self.source.bytes_per_second = wire_bytes as f64 / time.as_secs_f64();
        }
        Ok((Round { generation, asked: pages.len(), sent: pages_sent, wire_bytes, time }, sent))
    }

    /// Puts at most `most` of `pages` into the stores of an entry. Removes those that all stores
    /// have acknowledged from the set.
    pub(super) fn put_into(&mut self, number: u8, pages: &mut PageSet, most: u64) -> Result<Put, MigrationError> {
        let began = self.clock;
        let mut round = Round { asked: pages.len().min(most), ..Round::default() };
        self.source.put.clear();
        self.source.put_failure = None;
        let mut left = most;
        for range in pages.clone().ranges() {
            let mut at = range.first;
            while at < range.end() && left > 0 && self.source.put_failure.is_none() && !self.must_stop_putting() {
                let chunk = self.config.chunk.clamp(1, MAX_RUN_PAGES as u64).min(left).min(range.end() - at);
                let chunk = PageRange::new(at, chunk);
                self.start_put(number, chunk)?;
                (left, at) = (left - chunk.count, chunk.end());
                self.wait_for_stores(|sim| sim.network.to_stores.free_at <= sim.clock)?;
            }
        }
        self.wait_for_stores(|sim| sim.source.puts.is_empty())?;
        pages.subtract(&self.source.put);
        round.sent = self.source.put.len();
        (round.wire_bytes, round.time) = (bytes_of(round.sent), self.clock - began);
        let failed = self.source.put_failure.take();
        self.attempt.reported.extend(failed.as_ref().map(describe));
        Ok(Put { round, failed })
    }

    fn must_stop_putting(&self) -> bool {
        self.command_due().is_some() || self.timed_out()
    }

    /// Waits for answers of stores. If the link is up when the wait begins, it must not be lost
    /// during the wait.
    fn wait_for_stores(&mut self, done: impl Fn(&Self) -> bool) -> Result<(), MigrationError> {
        let connected = self.network.connected;
        while !done(self) {
            let until = Some(self.network.to_stores.free_at).filter(|&at| at > self.clock);
            if self.source.dead || connected && !self.network.connected {
                return Err(link_error());
            }
            if !self.step(until) {
                return Err(MigrationError::GaveUp("no store has a request under way".into()));
            }
        }
        Ok(())
    }

    /// Returns the position of a command that is due.
    fn command_due(&self) -> Option<usize> {
        self.commands.iter().position(|(at, _)| *at <= self.clock)
    }

    pub(super) fn timed_out(&self) -> bool {
        self.config.timeout.is_some_and(|timeout| self.clock - self.began >= timeout)
    }
}

impl Verbs for Simulation {
    fn pages(&self) -> u64 {
        self.config.pages
    }

    fn start_tracking(&mut self) -> Result<PageSet, MigrationError> {
        if !self.source.tracking {
            self.source.dirty.clear();
        }
        self.source.tracking = true;
        let mut pages = PageSet::full(self.config.pages);
        let stored = self.source.map.in_store().clone();
        if self.source.keeps {
            pages.subtract(self.source.map.with_copies());
            self.source.map.free_for_now(&stored);
        } else {
            self.source.map.sending(&stored)?;
        }
        self.source.map.dirtied(&pages)?;
        self.harvest()
    }

    fn send(&mut self, pages: &PageSet) -> Result<Round, MigrationError> {
        Ok(self.round(pages, Self::timed_out)?.0)
    }

    fn put(&mut self, pages: &mut PageSet, portion: Portion<'_>) -> Result<Put, MigrationError> {
        if *portion.place == Place::Destination {
            let mut part = pages.clone();
            part.keep_first(portion.most);
            let (round, sent) = self.round(&part, Self::must_stop_putting)?;
            pages.subtract(&sent);
            return Ok(Put { round, failed: None });
        }
        let entry = match self.entry_for(portion.place) {
            Some(entry) => entry,
            None => match self.create_entry(portion.place)? {
                Ok(entry) => entry,
                Err(error) => return Ok(Put { round: Round::default(), failed: Some(error) }),
            },
        };
        if self.network.connected && !self.source.table.contains(&entry) {
            self.send_table(vec![entry])?;
        }
        self.put_into(entry, pages, portion.most)
    }

    fn wait(&mut self, until: Until) -> Result<Wake, MigrationError> {
        let (began, connected) = (self.clock, self.network.connected);
        let end = until.time.map(|time| began + time);
        loop {
            if let Some(command) = self.command_due().filter(|_| until.command) {
                let (_, to) = self.commands.remove(command);
                self.commanded = Some(self.clock);
                return Ok(Wake::Command(to));
            }
            if until.dirty.is_some_and(|pages| self.source.dirty.len() >= pages) {
                return Ok(Wake::Dirty);
            }
            if end.is_some_and(|end| self.clock >= end) {
                return Ok(Wake::Time);
            }
            if self.source.dead || connected && !self.network.connected {
                return Err(link_error());
            }
            let command = self.commands.iter().map(|&(at, _)| at).min();
            if until.command && command.is_none() {
                return Err(MigrationError::Cancelled("no command is to come".into()));
            }
            if self.clock - began > LONGEST_WAIT {
                return Err(MigrationError::GaveUp("what the strategy waits for does not happen".into()));
            }
            let look = until.dirty.map(|_| self.clock + DIRTY_LOOK);
            let command = command.filter(|_| until.command);
            self.step(end.into_iter().chain(command).chain(look).min());
        }
    }

    fn connect(&mut self, to: &Destination) -> Result<(), MigrationError> {
        let connected = if *to == self.config.destination {
            self.epoch += 1;
            self.source.begin_session(self.epoch);
            self.open_session()
        } else {
            let unknown = std::io::Error::new(std::io::ErrorKind::NotFound, "there is no such host");
            Err(MigrationError::link(to.name())(unknown))
        };
        if connected.is_err() {
            self.disconnect();
            self.forget(|entry| entry.is_for(Purpose::Attempt));
            self.source.machine.link_lost();
        }
        connected
    }

    fn locations(&self) -> Result<PageMap, MigrationError> {
        Ok(self.source.map.clone())
    }

    fn harvest(&mut self) -> Result<PageSet, MigrationError> {
        let pages = std::mem::replace(&mut self.source.dirty, PageSet::empty(self.config.pages));
        self.source.heat.resize(self.config.pages as usize, 0);
        for page in pages.iter() {
            let heat = &mut self.source.heat[page as usize];
            *heat = heat.saturating_add(DIRTIED);
        }
        self.source.map.dirtied(&pages)?;
        self.skip_free();
        Ok(self.source.map.unsent().clone())
    }

    fn throttle(&mut self, percent: u8) -> Result<(), MigrationError> {
        self.source.throttle = percent;
        self.attempt.throttle_percent = self.attempt.throttle_percent.max(percent);
        Ok(())
    }

    fn link(&self) -> Link {
        Link {
            bytes_per_second: self.source.bytes_per_second,
            bytes_per_page: PAGE_SIZE as f64,
            seconds_per_page: 0.0,
            fixed_downtime: self.config.latency * 4 + self.config.save_time + self.config.load_time,
            round_trip: self.config.latency * 2,
            round_trips: self.attempt.rounds.len() as u32 + 1,
            state_bytes: self.config.state_bytes as u64,
            pending_bytes: 0,
            downtime_limit: self.config.downtime_limit,
            elapsed: self.clock - self.began,
            timed_out: self.timed_out(),
            stop_on_timeout: self.config.stop_on_timeout,
            post_copy_on_timeout: self.config.post_copy_on_timeout,
            impact: self.config.impact,
            can_post_copy: true,
            post_copy_wanted: self.config.post_copy_on_timeout && self.timed_out(),
        }
    }

    fn expect_downtime(&mut self, prediction: Duration) {
        self.attempt.predicted_downtime = Some(prediction);
    }

    fn stalled(&mut self, why: &str) {
        self.attempt.stalled = Some(why.to_owned());
    }

    fn report(&mut self, error: &MigrationError) {
        self.attempt.reported.push(describe(error));
    }

    fn pause(&mut self) -> Result<(), MigrationError> {
        // the pause waits for no store: pages in stores are read and sent first, or the pause does
        // not begin
        let stored = stored_of(self.source.map.unsent(), self.source.map.in_store());
        if !stored.is_empty() {
            self.round(&stored, |_| false)?;
        }
        self.source.runs = false;
        self.guest.waiting = None;
        self.source.paused_at = Some(self.clock);
        Ok(())
    }

    fn resume(&mut self) -> Result<(), MigrationError> {
        self.source.runs = true;
        self.source.map.taken_back();
        self.check();
        Ok(())
    }

    fn send_rest(&mut self, pages: PageSet) -> Result<(), MigrationError> {
        self.offer(pages, false)
    }

    fn hand_over(&mut self, missing: PageSet) -> Result<(), MigrationError> {
        if self.source.machine.phase() == SourcePhase::Copying {
            self.offer(missing, true)?;
        } else if !missing.is_empty() {
            return Err(MigrationError::Blocked("the state was sent already".into()));
        }
        let run = self.source.machine.run()?;
        self.send_message(Message::Control(run))?;
        self.wait_for(|sim| matches!(sim.source.machine.phase(), SourcePhase::Serving | SourcePhase::Completed))
    }

    fn missing_at_hand_over(&self) -> u64 {
        self.source.map.at_source()
    }

    fn serve(&mut self, order: &mut dyn PushOrder) -> Result<(), MigrationError> {
        self.serve_all(order)
    }
}

impl Simulation {
    /// Skips the pages that are free, as the engine does.
    fn skip_free(&mut self) {
        if self.config.freeing.is_empty() {
            return;
        }
        // the guest continues between the harvest and the reading of the free pages, so that the
        // wrong order of the two would be found
        self.pass(LOOK);
        let before = self.source.map.unsent().len();
        self.source.map.free_for_now(&self.guest.free);
        self.attempt.skipped += before - self.source.map.unsent().len();
    }
}
