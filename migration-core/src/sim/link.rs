//! The network: links with a bandwidth and a latency, the messages on their way, and the virtual
//! time.

use std::{collections::BTreeMap, io, time::Duration};

use super::{
    Simulation, StoreFault,
    stores::{Answer, Request},
};
use crate::{MigrationError, PAGE_SIZE, PageRange, PageSet, page_map::LocatedRun, wire::Control};

/// A link in one direction. Messages leave one after the other, without waiting for answers. So the
/// latency is paid once, not for each message.
pub(super) struct Pipe {
    /// The time at which everything that was sent so far has left.
    pub(super) free_at: Duration,
}

impl Pipe {
    pub(super) fn new() -> Self {
        Self { free_at: Duration::ZERO }
    }

    /// Sends `bytes` bytes after everything else. Returns the time at which the last byte has left.
    pub(super) fn send(&mut self, now: Duration, bytes: u64, rate: f64) -> Duration {
        self.free_at = self.free_at.max(now) + time_of(bytes, rate);
        self.free_at
    }

    /// Sends `bytes` bytes before everything else, which is delayed. Returns the time at which the
    /// last byte has left.
    pub(super) fn send_urgently(&mut self, now: Duration, bytes: u64, rate: f64) -> Duration {
        let time = time_of(bytes, rate);
        self.free_at = self.free_at.max(now) + time;
        now + time
    }
}

fn time_of(bytes: u64, rate: f64) -> Duration {
    // an extremely slow link takes a day, so that no sum of times overflows
    Duration::try_from_secs_f64(bytes as f64 / rate).unwrap_or(DAY).min(DAY)
}

const DAY: Duration = Duration::from_secs(24 * 3600);

/// The size in bytes of a message that is neither pages nor a frame of the wire format.
const SMALL: u64 = 40;

/// A message between the hosts.
pub(super) enum Message {
    /// A frame of the protocol.
    Control(Control),
    /// Pages, with their versions when they were read.
    Pages { range: PageRange, versions: Vec<u64> },
    /// A round is complete.
    RoundEnd(u32),
    /// The guest at the destination waits for a page.
    Demand(u64),
    /// The numbers of the entries of the store table that are in use.
    Table(Vec<u8>),
    /// The destination has the table. These of its entries have lost pages.
    TableTaken(Vec<u8>),
    /// The locations of pages.
    Located(Vec<LocatedRun>),
    /// All locations were sent. The destination has to acknowledge them.
    LocationsEnd,
    /// The destination has acknowledged all locations.
    LocationsTaken,
    /// Every page was sent or located.
    Vacated,
    /// The destination has found that these entries have lost pages.
    Lost(Vec<u8>),
    /// The destination needs these pages from the source.
    Lacks(PageSet),
}

impl Message {
    fn bytes(&self, epoch: u32) -> u64 {
        match self {
            Self::Control(frame) => frame.encode(0, 0, epoch).len() as u64,
            Self::Pages { range, .. } => range.bytes(),
            Self::Located(runs) => SMALL * runs.len() as u64,
            _ => SMALL,
        }
    }
}

/// An event at a certain time.
pub(super) enum Event {
    /// A message arrives at the destination.
    ToDestination(Message),
    /// A message arrives at the source.
    ToSource(Message),
    /// A request arrives at a store.
    AtStore(Request),
    /// The answer of a store arrives.
    FromStore(Answer),
    /// The destination has loaded the state, if `true`, or has failed to.
    Loaded(bool),
    /// The requests to stores that failed are repeated.
    AskAgain,
}

/// All links, and the messages on their way.
pub(super) struct Network {
    pub(super) connected: bool,
    events: BTreeMap<(Duration, u64), Event>,
    numbered: u64,
    pub(super) to_destination: Pipe,
    to_source: Pipe,
    /// The link from the source to all stores.
    pub(super) to_stores: Pipe,
}

impl Network {
    pub(super) fn new() -> Self {
        Self {
            connected: false,
            events: BTreeMap::new(),
            numbered: 0,
            to_destination: Pipe::new(),
            to_source: Pipe::new(),
            to_stores: Pipe::new(),
        }
    }

    pub(super) fn at(&mut self, time: Duration, event: Event) {
        self.events.insert((time, self.numbered), event);
        self.numbered += 1;
    }

    fn next_at(&self) -> Option<Duration> {
        self.events.first_key_value().map(|(&(at, _), _)| at)
    }

    /// Drops the link between the hosts, and all messages on it.
    fn drop_link(&mut self) {
        self.connected = false;
        let on_link = |event: &Event| matches!(event, Event::ToDestination(_) | Event::ToSource(_) | Event::Loaded(_));
        self.events.retain(|_, event| !on_link(event));
    }
}

pub(super) fn link_error() -> MigrationError {
    MigrationError::link("the simulated link")(io::ErrorKind::ConnectionReset.into())
}

impl Simulation {
    /// Counts an action. Then lets everything happen that is configured to happen after it.
    pub(super) fn act(&mut self) {
        self.actions += 1;
        let due = self.config.store_faults.iter().filter(|fault| fault.action == self.actions);
        let due: Vec<_> = due.map(|fault| (fault.store.clone(), fault.fault)).collect();
        for (store, fault) in due {
            self.store_fault(&store, fault);
        }
        if self.config.dies_after == Some(self.actions) {
            self.kill_source();
        }
        if self.network.connected && self.config.cuts.contains(&self.actions) {
            self.attempt.cuts += 1;
            self.cut();
        }
    }

    /// Applies `fault` to a store now. Does nothing if there is no store with this name.
    pub fn store_fault(&mut self, store: &str, fault: StoreFault) {
        if let Some(store) = self.stores.iter_mut().find(|other| other.name() == store) {
            store.fault(fault);
        }
    }

    fn cut(&mut self) {
        self.network.drop_link();
        self.destination_loss();
    }

    pub(super) fn disconnect(&mut self) {
        if self.network.connected {
            self.cut();
        }
    }

    /// Sends a message of the source without waiting for its arrival.
    pub(super) fn send_message(&mut self, message: Message) -> Result<(), MigrationError> {
        let bytes = message.bytes(self.epoch);
        let sent = self.network.to_destination.send(self.clock, bytes, self.config.bytes_per_second);
        self.on_its_way(sent, message)
    }

    /// Sends the source's answer to a demand, before all messages that wait for the link.
    pub(super) fn send_urgently(&mut self, message: Message) -> Result<(), MigrationError> {
        let bytes = message.bytes(self.epoch);
        let sent = self.network.to_destination.send_urgently(self.clock, bytes, self.config.bytes_per_second);
        self.on_its_way(sent, message)
    }

    fn on_its_way(&mut self, sent: Duration, message: Message) -> Result<(), MigrationError> {
        if self.network.connected {
            self.act();
        }
        if !self.network.connected {
            return Err(link_error());
        }
        self.network.at(sent + self.config.latency, Event::ToDestination(message));
        Ok(())
    }

    /// Sends a message of the destination, if the link is up.
    pub(super) fn reply(&mut self, message: Message) {
        if !self.network.connected {
            return;
        }
        self.act();
        if self.network.connected {
            let bytes = message.bytes(self.epoch);
            let sent = self.network.to_source.send(self.clock, bytes, self.config.bytes_per_second);
            self.network.at(sent + self.config.latency, Event::ToSource(message));
        }
    }

    /// Advances the clock to the next event, but not beyond `until`. Returns `false` if there is no
    /// event and no `until`.
    pub(super) fn step(&mut self, until: Option<Duration>) -> bool {
        let next = self.network.next_at();
        let Some(target) = next.into_iter().chain(until).min() else { return false };
        let began = self.clock;
        let arrived = self.run_guest(target.max(began));
        self.leases.advance(self.clock - began);
        if arrived
            && next.is_some_and(|at| at <= self.clock)
            && let Some((_, event)) = self.network.events.pop_first()
        {
            self.happen(event);
        }
        true
    }

    /// Lets time pass.
    pub(super) fn pass(&mut self, time: Duration) {
        let until = self.clock + time;
        while self.clock < until {
            self.step(Some(until));
        }
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::ToDestination(message) => {
                let replies = self.destination_takes(message);
                self.check();
                if self.network.connected {
                    self.act();
                }
                replies.into_iter().for_each(|reply| self.reply(reply));
            }
            Event::ToSource(message) => {
                if let Err(error) = self.source_takes(message) {
                    self.source.failure.get_or_insert(error);
                }
                if self.network.connected {
                    self.act();
                }
            }
            Event::AtStore(request) => {
                self.act();
                self.store_takes(request);
            }
            Event::FromStore(answer) => {
                self.take_answer(answer);
                self.act();
            }
            Event::Loaded(whole) => self.loaded(whole),
            Event::AskAgain => self.ask_again(),
        }
    }

    /// Waits until `done` returns `true`, while the link is up.
    pub(super) fn wait_for(&mut self, done: impl Fn(&Self) -> bool) -> Result<(), MigrationError> {
        loop {
            if let Some(error) = self.source.failure.take() {
                return Err(error);
            }
            if done(self) {
                return Ok(());
            }
            if !self.network.connected {
                return Err(link_error());
            }
            if !self.step(None) {
                let phase = self.source.machine.phase();
                return Err(MigrationError::GaveUp(format!("nothing is on its way, and the source is {phase:?}")));
            }
        }
    }

    /// Waits until the direct link is free.
    pub(super) fn wait_for_link(&mut self) -> Result<(), MigrationError> {
        while self.network.to_destination.free_at > self.clock {
            if let Some(error) = self.source.failure.take() {
                return Err(error);
            }
            if !self.network.connected {
                return Err(link_error());
            }
            self.step(Some(self.network.to_destination.free_at));
        }
        Ok(())
    }

    /// Returns the bandwidth that the source has for stores, in bytes a second.
    pub(super) fn egress_for_stores(&self) -> f64 {
        let egress = self.config.egress.unwrap_or(self.config.bytes_per_second);
        // after the hand-over, the stores get what the direct link leaves
        if self.source.machine.owns() { egress } else { egress - self.config.bytes_per_second }
    }
}

/// Returns the size of `pages` pages in bytes.
pub(super) fn bytes_of(pages: u64) -> u64 {
    pages * PAGE_SIZE as u64
}
