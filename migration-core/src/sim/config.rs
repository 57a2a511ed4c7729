//! The world of a simulation, and what comes out of one.

use std::time::Duration;

use crate::{
    MigrationError, PAGE_SIZE, histogram::Latencies, page::PageRange, spawner::GuestImpact, strategy::Destination,
};

/// How the guest of a [`SimConfig`] writes while it runs.
#[derive(Clone, Debug, Default)]
pub enum Dirtying {
    /// Not at all.
    #[default]
    Idle,
    /// Round and round over the first `working_set` pages.
    Rate {
        /// Pages a second, unthrottled.
        pages_per_second: f64,
        /// The number of different pages.
        working_set: u64,
    },
    /// Each range at its time since the start, if the guest runs then, or as soon as it does.
    Script(Vec<(Duration, PageRange)>),
}

/// What the guest of a [`SimConfig`] reads while it runs, one page after the other.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Touching {
    /// Nothing.
    #[default]
    Nothing,
    /// Page after page.
    Sequential {
        /// The rate as long as no page is missing.
        pages_per_second: f64,
    },
    /// Any page.
    Random {
        /// The rate as long as no page is missing.
        pages_per_second: f64,
    },
}

/// A page store in memory, and the way to it.
#[derive(Clone, Debug)]
pub struct StoreConfig {
    /// The name by which strategies know it.
    pub name: String,
    /// Bytes a second that it takes, and that it hands out.
    pub bytes_per_second: f64,
    /// The latency to it, one way.
    pub latency: Duration,
    /// The number of pages for which it has room.
    pub pages: u64,
}

impl StoreConfig {
    /// Returns a store as fast as the default link, with room for every page.
    pub fn named(name: impl Into<String>) -> Self {
        let latency = Duration::from_micros(200);
        Self { name: name.into(), bytes_per_second: 125e6, latency, pages: u64::MAX / PAGE_SIZE as u64 }
    }
}

/// What happens to a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoreFault {
    /// It starts anew, and has lost everything.
    LosesContent,
    /// Every request fails from now on. What it has is not lost.
    Fails,
    /// Requests are answered again.
    Recovers,
}

/// A fault of a store, and when it happens.
#[derive(Clone, Debug)]
pub struct FaultAt {
    /// The action after which it happens, counted over the whole simulation.
    pub action: u64,
    /// The name of the store.
    pub store: String,
    /// What happens.
    pub fault: StoreFault,
}

/// The world of a simulation.
#[derive(Clone, Debug)]
pub struct SimConfig {
    /// Pages of RAM.
    pub pages: u64,
    /// The direct link's bandwidth in bytes a second, which is what the destination can receive
    /// from the source and from stores together.
    pub bytes_per_second: f64,
    /// The link's latency, one way.
    pub latency: Duration,
    /// Bytes a second that the source can send altogether, or `None` for what the direct link
    /// carries. After the hand-over, stores get what the direct link leaves.
    pub egress: Option<f64>,
    /// Pages that travel in one action.
    pub chunk: u64,
    /// What the guest writes.
    pub dirtying: Dirtying,
    /// When the guest reports which pages free, in the order of time. It takes a page back by
    /// writing there. What a free page holds counts for nothing.
    pub freeing: Vec<(Duration, PageRange)>,
    /// What the guest reads.
    pub touching: Touching,
    /// The link is lost after each of these actions, counted over the whole simulation. It is back
    /// for the next connection.
    pub cuts: Vec<u64>,
    /// The source dies after this action.
    pub dies_after: Option<u64>,
    /// The page stores, which both hosts reach.
    pub stores: Vec<StoreConfig>,
    /// What happens to them.
    pub store_faults: Vec<FaultAt>,
    /// The name of the destination, for strategies that connect by themselves.
    pub destination: Destination,
    /// Loading the state fails at the destination this many times.
    pub failing_loads: u32,
    /// Bytes of the VM's state.
    pub state_bytes: usize,
    /// How long saving the state takes. The VMM says so beforehand.
    pub save_time: Duration,
    /// How long loading the state takes. The VMM says so beforehand.
    pub load_time: Duration,
    /// See [`crate::engine::SourceOptions`].
    pub downtime_limit: Duration,
    /// See [`crate::engine::SourceOptions`].
    pub timeout: Option<Duration>,
    /// What the time-out does: stop the guest, or give up.
    pub stop_on_timeout: bool,
    /// What the time-out does first of all: hand the guest over and let the rest follow.
    pub post_copy_on_timeout: bool,
    /// See [`crate::engine::SourceOptions`].
    pub impact: GuestImpact,
}

impl Default for SimConfig {
    fn default() -> Self {
        Self {
            pages: 65_536,
            bytes_per_second: 125e6,
            latency: Duration::from_micros(200),
            egress: None,
            chunk: 512,
            dirtying: Dirtying::Idle,
            freeing: Vec::new(),
            touching: Touching::Nothing,
            cuts: Vec::new(),
            dies_after: None,
            stores: Vec::new(),
            store_faults: Vec::new(),
            destination: Destination::named("destination"),
            failing_loads: 0,
            state_bytes: 0,
            save_time: Duration::ZERO,
            load_time: Duration::ZERO,
            downtime_limit: Duration::from_millis(300),
            timeout: None,
            stop_on_timeout: false,
            post_copy_on_timeout: false,
            impact: GuestImpact::Balanced,
        }
    }
}

/// Who owns the VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// The source.
    Source,
    /// The source does not know, the destination does not run it.
    InDoubt,
    /// The destination.
    Destination,
}

/// How an attempt went.
#[derive(Debug, Default)]
pub struct Attempt {
    /// Why it failed; `None` if the destination runs the VM and has released the source.
    pub error: Option<MigrationError>,
    /// Errors after which the strategy went on.
    pub reported: Vec<String>,
    /// From the pause until *running* arrived or the guest resumed.
    pub downtime: Option<Duration>,
    /// What the strategy expected.
    pub predicted_downtime: Option<Duration>,
    /// Why the downtime limit was not kept, if the strategy said so.
    pub stalled: Option<String>,
    /// Virtual time it took: the *eviction time*, after which the source is free.
    pub total: Duration,
    /// Virtual time from the command to the end, if a command named the destination.
    pub since_command: Option<Duration>,
    /// Pages sent in each round.
    pub rounds: Vec<u64>,
    /// Pages that were acknowledged by stores, each time counted.
    pub put: u64,
    /// Puts that failed.
    pub failed_puts: u64,
    /// Pages left out because they were free, each time counted.
    pub skipped: u64,
    /// How often the link was lost.
    pub cuts: u32,
    /// The strongest throttle.
    pub throttle_percent: u8,
    /// Touches of missing pages.
    pub faults: u64,
    /// Links lost while pages were missing at the destination, and found again.
    pub recoveries: u32,
}

/// What the guest has had of a simulation so far.
#[derive(Clone, Debug, Default)]
pub struct GuestReport {
    /// Virtual time for which it ran and did not wait. Throttling is not taken off.
    pub ran: Duration,
    /// Virtual time for which it waited for pages.
    pub waited: Duration,
    /// Touches that were done.
    pub touches: u64,
    /// How long each touch of a missing page waited.
    pub faults: Latencies,
}
