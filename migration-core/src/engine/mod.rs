//! Runs strategies on real VMs, over real channels.
//!
//! At the source, [`migrate`] (or [`Migration::start`], which does not block) takes a
//! [`SourceVm`](crate::vm::SourceVm), a [`Connector`] and a strategy.
//! [`stage`] (or [`Migration::stage`]) protects a VM until a command names its destination. At the
//! destination, a [`Receiver`] takes a [`Listener`](crate::channel::Listener) and a
//! [`DestinationHost`](crate::vm::DestinationHost). Both create threads only through the
//! [`Spawner`] in their options, and end all of them before they return.

mod control;
mod destination;
mod dirty_log;
pub mod ephemeral;
mod estimate;
mod events;
mod handle;
mod lane;
mod limits;
mod pages;
mod progress;
mod rounds;
mod snapshot;
mod source;
mod stored;
mod tracking;

use std::{io, sync::Arc, time::Duration};

pub use destination::{
    AttemptError, Gathering, OneAttempt, ReceiveError, Receiver, ReceiverEvent, ReceiverHandle, ReceiverOptions,
    ReceiverQueue, VmHandle, VmStatus,
};
pub use handle::{Commands, Controller, Migration, NoEviction, NoPostCopy, NoSwitchOver, NoTuning};
pub use snapshot::{RestoreOptions, RestoreReport, Restored, SnapshotOptions, SnapshotReport, restore, snapshot};
pub use source::{PauseLimits, SourceStores, migrate, stage};

pub use crate::page::STRIPE_PAGES;
use crate::{
    channel::Connector,
    checkpoint::FailSafe,
    report::{NoObserver, Observer},
    spawner::{GuestImpact, Spawner, StdSpawner},
    strategy::Destination,
};

/// What to do when the downtime limit cannot be kept. This is the case when the time that the user
/// allowed has passed before the hand-over, or as soon as it is certain that neither another round
/// nor a throttle can help (see [`ModelConvergence`](crate::strategy::ModelConvergence)).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum OnTimeout {
    /// The guest runs on at the source.
    #[default]
    Cancel,
    /// Pause the guest and send all remaining pages, whatever the downtime.
    Stop,
    /// Hand the guest over, and send the remaining pages after that. Where the destination cannot
    /// serve missing pages, this is the same as `Cancel`.
    PostCopy,
}

/// The pages that a fault on a page of a transparent huge page fetches in post-copy. (RAM in huge
/// pages that cannot be split always moves in whole huge pages.)
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum HugePages {
    /// The page alone, which gives the shortest wait. The other pages of its block are pushed
    /// later, as small pages.
    #[default]
    Split,
    /// The whole block of 2 MiB. The block stays a huge page, and the wait is that for 2 MiB.
    Whole,
}

/// A function that returns the connector of a destination by its name.
pub type Destinations = Arc<dyn Fn(&Destination) -> io::Result<Arc<dyn Connector>> + Send + Sync>;

/// The limits and choices of one migration, at its source.
#[derive(Clone)]
pub struct SourceOptions {
    /// The number of bulk lanes, 1 to [`MAX_STREAMS`](crate::wire::MAX_STREAMS).
    pub streams: u16,
    /// The longest acceptable downtime, until a [`Controller`] sets another one.
    pub downtime_limit: Duration,
    /// How long the guest may stay paused for a hand-over that does not succeed.
    pub pause_limits: PauseLimits,
    /// The longest time until the hand-over; `None` means no limit.
    pub timeout: Option<Duration>,
    /// What happens after `timeout`, or as soon as it is certain that the downtime limit cannot be
    /// kept.
    pub on_timeout: OnTimeout,
    /// The number of lanes for pages that the guest waits for at the destination, 1 to
    /// [`MAX_DEMAND_LANES`](crate::wire::MAX_DEMAND_LANES). 0 excludes post-copy.
    pub demand_lanes: u16,
    /// The pages that a fault on a huge page fetches.
    pub huge: HugePages,
    /// Protects the VM against the death of its destination in post-copy. The migration is refused
    /// if the destination does not support that.
    pub fail_safe: Option<FailSafe>,
    /// The page stores that pages may be sent through; `None` if there are none. See
    /// [`Strategy::stores`](crate::strategy::Strategy::stores).
    pub stores: Option<SourceStores>,
    /// Finds the destination that a strategy [connects](crate::strategy::Running::connect) to by
    /// its name. Without this function, the strategy can only name the address of the migration's
    /// own connector.
    pub destinations: Option<Destinations>,
    /// How much the guest may be disturbed.
    pub impact: GuestImpact,
    /// Whether page data has a checksum in addition to that of TCP. It costs a copy of every page.
    pub payload_crc: bool,
    /// How long the peer may be silent before the link counts as lost.
    pub idle_timeout: Duration,
    /// How long the destination may take to build the VM.
    pub setup_timeout: Duration,
    /// The last epoch that is void. The attempt uses the next one.
    pub last_epoch: u32,
    /// The time in doubt after which the user is notified by
    /// [`Event::InDoubt`](crate::report::Event::InDoubt). Reconnecting continues.
    pub in_doubt_grace: Duration,
    /// Starts the threads of the migration.
    pub spawner: Arc<dyn Spawner>,
    /// Receives the events of the migration. See [`Observer`] for what it may not do.
    pub observer: Arc<dyn Observer>,
}

impl Default for SourceOptions {
    fn default() -> Self {
        Self {
            streams: 2,
            downtime_limit: Duration::from_millis(300),
            pause_limits: PauseLimits::default(),
            timeout: None,
            on_timeout: OnTimeout::Cancel,
            demand_lanes: 2,
            huge: HugePages::Split,
            fail_safe: None,
            stores: None,
            destinations: None,
            impact: GuestImpact::Balanced,
            payload_crc: false,
            idle_timeout: Duration::from_secs(10),
            setup_timeout: Duration::from_secs(60),
            last_epoch: 0,
            in_doubt_grace: Duration::from_secs(5),
            spawner: Arc::new(StdSpawner),
            observer: Arc::new(NoObserver),
        }
    }
}
