//! A simulator: strategies and protocol machines in virtual time, over links that can be cut after
//! any action.
//!
//! Both [machines](crate::protocol) are the real ones, and so are the strategy, the [page
//! maps](crate::page_map) and the [page stores](crate::store). A page is a version number, a link
//! has a bandwidth and a latency, and a [`Guest`] reads and writes on the side on which it runs.
//! Each version that it reads is compared with the version that it wrote last.
//!
//! Every message is two *actions*, its sending and its arrival, so that both "sent but lost" and
//! "arrived but not answered" are tested. The same is true of requests to stores and their answers.
//! After each action a link can be cut, and a store can fail or lose its content. Nothing depends
//! on a real clock or a thread: the same configuration gives the same run.
//!
//! The messages about pages in stores are private to the simulator. They are not those of the [wire
//! format](crate::wire).
//!
//! ```
//! use std::time::Duration;
//! use migration_core::{sim::{Dirtying, Owner, SimConfig, Simulation}, strategy::PreCopy};
//!
//! let mut sim = Simulation::new(SimConfig {
//!     dirtying: Dirtying::Rate { pages_per_second: 5_000.0, working_set: 1_000 },
//!     ..SimConfig::default()
//! });
//! let attempt = sim.attempt(&mut PreCopy::<migration_core::strategy::ModelConvergence>::default());
//! assert!(attempt.error.is_none());
//! assert_eq!(sim.owner(), Owner::Destination);
//! assert!(attempt.downtime.unwrap() < Duration::from_millis(300));
//! assert_eq!(sim.broken(), &[] as &[String]);
//! ```
//!
//! Pages that the source cannot send at once go through a store. The source is free although the
//! destination still gathers pages:
//!
//! ```
//! use std::time::Duration;
//! use migration_core::{
//!     sim::{SimConfig, Simulation, StoreConfig},
//!     strategy::{Linear, PostCopy, ScatterGather},
//! };
//!
//! // the destination takes 20 MB/s, the source can send 125
//! let slow = SimConfig {
//!     bytes_per_second: 20e6,
//!     egress: Some(125e6),
//!     stores: vec![StoreConfig::named("a")],
//!     ..SimConfig::default()
//! };
//! let mut sim = Simulation::new(slow.clone());
//! let scatter = sim.attempt(&mut ScatterGather::new(["a"], Linear::default()));
//! sim.kill_source();
//! assert_eq!(sim.gather(Duration::from_secs(60)), 0);
//! assert_eq!(sim.broken(), &[] as &[String]);
//!
//! let post = Simulation::new(slow).attempt(&mut PostCopy { order: Box::new(Linear::default()) });
//! assert!(scatter.total < post.total / 4);
//! ```

mod config;
mod destination;
mod guest;
mod home;
mod link;
mod serve;
mod session;
mod source;
mod stores;

use std::{collections::BTreeMap, sync::Arc, time::Duration};

pub use config::{Attempt, Dirtying, FaultAt, GuestReport, Owner, SimConfig, StoreConfig, StoreFault, Touching};
use destination::DestinationHost;
use guest::{Configured, GuestState};
pub use guest::{Guest, GuestMemory, Span};
use link::{Message, Network};
use source::SourceHost;
use stores::{Entry, GetUnderWay, SimStore};

use crate::{
    MigrationError,
    protocol::{DestinationPhase, SourcePhase},
    store::ManualClock,
    strategy::{Destination, Linear, Place, Running, Strategy},
    text::describe,
    wire::Control,
};

/// Compiles and runs the example of the page `docs/store-strategies.md`.
#[cfg(doctest)]
#[doc = include_str!("../../../docs/store-strategies.md")]
struct StoreStrategiesPage;

/// Two hosts, a link, page stores and a VM.
pub struct Simulation {
    config: SimConfig,
    clock: Duration,
    actions: u64,
    epoch: u32,
    network: Network,
    source: SourceHost,
    destination: DestinationHost,
    guest: GuestState,
    stores: Vec<SimStore>,
    /// The clock of the stores' leases.
    leases: Arc<ManualClock>,
    /// The VM's store table. Entries are only appended.
    entries: Vec<Entry>,
    gets: BTreeMap<u64, GetUnderWay>,
    /// The number of the last request to a store.
    requests: u64,
    /// The commands that no strategy has taken, with their times.
    commands: Vec<(Duration, Destination)>,
    /// The time at which the last command was taken.
    commanded: Option<Duration>,
    /// The time at which the present attempt began.
    began: Duration,
    /// The name of the attempt's strategy, and the places in stores that it uses.
    strategy: &'static str,
    attempt_places: Vec<Place>,
    /// Whether the destination maps the source's memory.
    shared: bool,
    attempt: Attempt,
    broken: Vec<String>,
}

impl Simulation {
    /// Returns a simulation in which the guest of the configuration runs at the source.
    pub fn new(config: SimConfig) -> Self {
        let guest = Configured::new(config.dirtying.clone(), config.touching);
        Self::with_guest(config, Box::new(guest))
    }

    /// Returns a simulation in which `guest` runs at the source.
    pub fn with_guest(config: SimConfig, guest: Box<dyn Guest>) -> Self {
        let (pages, leases) = (config.pages, Arc::<ManualClock>::default());
        let stores = config.stores.iter().map(|store| SimStore::new(store.clone(), leases.clone())).collect();
        Self {
            clock: Duration::ZERO,
            actions: 0,
            epoch: 0,
            network: Network::new(),
            source: SourceHost::new(pages),
            destination: DestinationHost::new(pages),
            guest: GuestState::new(guest, pages),
            stores,
            leases,
            entries: Vec::new(),
            gets: BTreeMap::new(),
            requests: 0,
            commands: Vec::new(),
            commanded: None,
            began: Duration::ZERO,
            strategy: "",
            attempt_places: Vec::new(),
            shared: false,
            attempt: Attempt::default(),
            broken: Vec::new(),
            config,
        }
    }

    /// Schedules a command to move the VM to `to`, after `after` from now. A strategy that
    /// [waits](Running::wait) for a command takes it.
    pub fn command(&mut self, after: Duration, to: Destination) {
        self.commands.push((self.clock + after, to));
    }

    /// Runs `strategy`, then acts on its result as the engine does: rolls everything back; or
    /// repeats *run* until the destination answers, and streams missing pages until the source is
    /// released.
    pub fn attempt(&mut self, strategy: &mut dyn Strategy) -> Attempt {
        self.began = self.clock;
        self.attempt = Attempt::default();
        self.commanded = None;
        self.source.paused_at = None;
        self.source.failing.clear();
        self.source.put_failure = None;
        self.epoch += 1;
        self.source.begin_session(self.epoch);
        let result = self.prepare(strategy).and_then(|()| strategy.migrate(Running::new(self)));
        let mut error = result.err();
        while self.source.machine.phase() == SourcePhase::InDoubt && !self.source.dead {
            if self.source.runs {
                self.broken.push("the source runs a VM that is in doubt".into());
            }
            // an error leaves the doubt as it is
            let _ = self.repeat_run();
        }
        if self.source.machine.phase() == SourcePhase::Serving && !self.source.dead {
            error = self.serve_all(&mut Linear::default()).err();
        }
        if self.source.machine.phase() == SourcePhase::Completed {
            error = None;
        }
        self.conclude();
        if let Some(paused) = self.source.paused_at {
            self.attempt.downtime.get_or_insert(self.clock - paused);
        }
        self.attempt.since_command = self.commanded.map(|at| self.clock - at);
        self.attempt.total = self.clock - self.began;
        self.attempt.error = error;
        std::mem::take(&mut self.attempt)
    }

    /// Ends the attempt. The source reports the end to the destination.
    fn conclude(&mut self) {
        let last = if self.source.machine.owns() {
            self.roll_back();
            self.source.machine.abandon()
        } else {
            Some(Control::Done)
        };
        if let Some(last) = last
            && self.network.connected
            && self.send_message(Message::Control(last)).is_ok()
        {
            // the message may be lost
            self.pass(self.config.latency * 2);
        }
        self.source.machine.link_lost();
        self.disconnect();
    }

    /// Returns the present owner of the VM.
    pub fn owner(&self) -> Owner {
        match (self.source.machine.owns() && !self.source.dead, self.destination.machine.phase()) {
            (_, DestinationPhase::Running) => Owner::Destination,
            (true, _) => Owner::Source,
            (false, _) => Owner::InDoubt,
        }
    }

    /// Returns whether the guest runs at the source or at the destination.
    pub fn guest_runs(&self) -> bool {
        self.source.runs || self.destination.runs
    }

    /// Returns what the guest has experienced so far.
    pub fn guest_report(&self) -> &GuestReport {
        &self.guest.report
    }

    /// Returns the number of actions so far.
    pub fn actions(&self) -> u64 {
        self.actions
    }

    /// Returns the virtual time since the simulation began.
    pub fn now(&self) -> Duration {
        self.clock
    }

    /// Returns the phase of the destination.
    pub fn destination_phase(&self) -> DestinationPhase {
        self.destination.machine.phase()
    }

    /// Returns the number of pages that are missing at the destination.
    pub fn missing(&self) -> u64 {
        self.destination.map.missing().len()
    }

    /// Returns the number of actions after which the destination last began to check, before it
    /// releases the source, whether the stores have lost anything. Content that stores lose later
    /// cannot be recovered from the source.
    pub fn checked_after(&self) -> Option<u64> {
        self.destination.checked_after
    }

    /// Returns the present throttle at the source in percent.
    pub fn throttle_in_force(&self) -> u8 {
        self.source.throttle
    }

    /// Returns whether the source still tracks dirty pages. Between attempts it does so only while
    /// a copy of the VM is kept ready in a store.
    pub fn is_tracking(&self) -> bool {
        self.source.tracking
    }

    /// Returns the violations that the simulation has found: two owners, or a page that is lost, is
    /// stale, or was read as zeros.
    pub fn broken(&self) -> &[String] {
        &self.broken
    }

    /// Kills the source host and the VM that runs there.
    pub fn kill_source(&mut self) {
        self.source.dead = true;
        self.source.runs = false;
        self.source.puts.clear();
        self.disconnect();
    }

    /// Takes the VM over at the destination, as a person's command does. Returns whether the
    /// destination accepts the command.
    pub fn force_take_over(&mut self) -> bool {
        match self.destination.machine.force_take_over() {
            Ok(action) => {
                self.destination_does(action);
                true
            }
            Err(_) => false,
        }
    }

    fn note_broken(&mut self, result: Result<(), MigrationError>) {
        if let Err(error) = result {
            self.broken.push(describe(&error));
        }
    }

    /// Checks the invariants that hold at any moment.
    fn check(&mut self) {
        if self.source.runs && self.destination.runs {
            self.broken.push(format!("two owners run the VM after action {}", self.actions));
        }
        if self.source.runs && !self.source.machine.owns() {
            self.broken.push(format!("the source runs a VM that it does not own after action {}", self.actions));
        }
    }
}
