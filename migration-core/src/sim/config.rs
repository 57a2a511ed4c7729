//! The configuration and the results of a simulation.

use std::time::Duration;

use crate::{
    MigrationError, PAGE_SIZE, histogram::Latencies, page::PageRange, spawner::GuestImpact, strategy::Destination,
};

/// The writes of the guest of a [`SimConfig`] while it runs.
#[derive(Clone, Debug, Default)]
pub enum Dirtying {
    /// The guest does not write.
    #[default]
    Idle,
    /// The guest writes the first `working_set` pages in turn, repeatedly.
    Rate {
        /// The number of pages a second, without throttling.
        pages_per_second: f64,
        /// The number of different pages.
        working_set: u64,
    },
    /// The guest writes each range at its time since the start, or as soon as it runs after that
    /// time.
    Script(Vec<(Duration, PageRange)>),
}

/// The reads of the guest of a [`SimConfig`] while it runs, one page after the other.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Touching {
    /// The guest does not read.
    #[default]
    Nothing,
    /// The guest reads the pages in ascending order.
    Sequential {
        /// The number of pages a second while no page is missing.
        pages_per_second: f64,
    },
    /// The guest reads pages in random order.
    Random {
        /// The number of pages a second while no page is missing.
        pages_per_second: f64,
    },
}

/// A page store in memory, and the link to it.
#[derive(Clone, Debug)]
pub struct StoreConfig {
    /// The name by which strategies refer to the store.
    pub name: String,
    /// The number of bytes a second that the store receives, and that it sends.
    pub bytes_per_second: f64,
    /// The one-way latency of the link.
    pub latency: Duration,
    /// The number of pages for which it has room.
    pub pages: u64,
}

impl StoreConfig {
    /// Returns a store with the bandwidth and the latency of the default link, and with room for
    /// every page.
    pub fn named(name: impl Into<String>) -> Self {
        let latency = Duration::from_micros(200);
        Self { name: name.into(), bytes_per_second: 125e6, latency, pages: u64::MAX / PAGE_SIZE as u64 }
    }
}

/// A fault of a store, or the end of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoreFault {
    /// The store restarts, and has lost everything.
    LosesContent,
    /// Every request fails from now on. The content of the store is not lost.
    Fails,
    /// The store answers requests again.
    Recovers,
}

/// A fault of a store, and the time at which it happens.
#[derive(Clone, Debug)]
pub struct FaultAt {
    /// The action after which the fault happens, counted over the whole simulation.
    pub action: u64,
    /// The name of the store.
    pub store: String,
    /// The fault.
    pub fault: StoreFault,
}

/// The configuration of a simulation.
#[derive(Clone, Debug)]
pub struct SimConfig {
    /// The number of pages of RAM.
    pub pages: u64,
    /// The bandwidth of the direct link in bytes a second. The destination receives at this rate
    /// from the source and from stores together.
    pub bytes_per_second: f64,
    /// The one-way latency of the direct link.
    pub latency: Duration,
    /// The number of bytes a second that the source can send in total, or `None` for the bandwidth
    /// of the direct link. After the hand-over, the stores get what the direct link leaves.
    pub egress: Option<f64>,
    /// The number of pages that are sent in one action.
    pub chunk: u64,
    /// The writes of the guest.
    pub dirtying: Dirtying,
    /// The times at which the guest reports ranges of pages free, in ascending order. The guest
    /// uses a free page again by writing to it. The content of a free page does not matter.
    pub freeing: Vec<(Duration, PageRange)>,
    /// The reads of the guest.
    pub touching: Touching,
    /// The actions after which the link is lost, counted over the whole simulation. The link is
    /// restored for the next connection.
    pub cuts: Vec<u64>,
    /// The action after which the source dies.
    pub dies_after: Option<u64>,
    /// The page stores, which both hosts reach.
    pub stores: Vec<StoreConfig>,
    /// The faults of the page stores.
    pub store_faults: Vec<FaultAt>,
    /// The name of the destination, for strategies that connect by themselves.
    pub destination: Destination,
    /// The number of times that loading the state fails at the destination.
    pub failing_loads: u32,
    /// The size of the VM's state in bytes.
    pub state_bytes: usize,
    /// The time that saving the state takes. The VMM reports it in advance.
    pub save_time: Duration,
    /// The time that loading the state takes. The VMM reports it in advance.
    pub load_time: Duration,
    /// See [`crate::engine::SourceOptions`].
    pub downtime_limit: Duration,
    /// See [`crate::engine::SourceOptions`].
    pub timeout: Option<Duration>,
    /// Whether the time-out stops the guest. If `false`, the migration gives up.
    pub stop_on_timeout: bool,
    /// Whether the time-out hands the guest over and lets the other pages follow. Takes precedence
    /// over `stop_on_timeout`.
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

/// The owner of the VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// The source.
    Source,
    /// Unknown: the source does not know, and the destination does not run the VM.
    InDoubt,
    /// The destination.
    Destination,
}

/// The result of an attempt.
#[derive(Debug, Default)]
pub struct Attempt {
    /// The reason why the attempt failed; `None` if the destination runs the VM and has released
    /// the source.
    pub error: Option<MigrationError>,
    /// The errors after which the strategy continued.
    pub reported: Vec<String>,
    /// The time from the pause until *running* arrived or the guest resumed.
    pub downtime: Option<Duration>,
    /// The downtime that the strategy expected.
    pub predicted_downtime: Option<Duration>,
    /// The reason why the downtime limit was not kept, if the strategy reported one.
    pub stalled: Option<String>,
    /// The virtual time of the attempt: the *eviction time*, after which the source is free.
    pub total: Duration,
    /// The virtual time from the command to the end, if a command named the destination.
    pub since_command: Option<Duration>,
    /// The number of pages sent in each round.
    pub rounds: Vec<u64>,
    /// The number of pages that stores acknowledged. A page counts each time.
    pub put: u64,
    /// The number of puts that failed.
    pub failed_puts: u64,
    /// The number of pages that were skipped because they were free. A page counts each time.
    pub skipped: u64,
    /// The number of times that the link was lost.
    pub cuts: u32,
    /// The strongest throttle in percent.
    pub throttle_percent: u8,
    /// The number of touches of missing pages.
    pub faults: u64,
    /// The number of times that the link was lost and restored while pages were missing at the
    /// destination.
    pub recoveries: u32,
}

/// What the guest of a simulation has experienced so far.
#[derive(Clone, Debug, Default)]
pub struct GuestReport {
    /// The virtual time for which the guest ran and did not wait. Time lost by throttling is
    /// included.
    pub ran: Duration,
    /// The virtual time for which the guest waited for pages.
    pub waited: Duration,
    /// The number of completed touches.
    pub touches: u64,
    /// The time that each touch of a missing page waited.
    pub faults: Latencies,
}
