//! Runs strategies on real VMs, over real channels.
//!
//! At the source, [`migrate`] (or [`Migration::start`], which does not block) takes a
//! [`SourceVm`](crate::vm::SourceVm), a [`Connector`](crate::channel::Connector) and a strategy.
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

/// What to do when the downtime limit cannot be kept: when the time that the user allowed has
/// passed before the hand-over, or as soon as it is certain that neither another round nor a
/// throttle can help (see [`ModelConvergence`](crate::strategy::ModelConvergence)).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum OnTimeout {
    /// The guest runs on at the source.
    #[default]
    Cancel,
    /// Pause the guest and send the rest, whatever the downtime.
    Stop,
    /// Hand the guest over and let the rest follow; where the destination cannot serve missing
    /// pages, as `Cancel`.
    PostCopy,
}

/// In post-copy, what a fault on a page of a transparent huge page fetches. (RAM in huge pages that
/// cannot be split moves in whole ones in any case.)
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum HugePages {
    /// The page alone: the shortest wait. The others of its block follow with the push, as small
    /// pages.
    #[default]
    Split,
    /// The whole block of 2 MiB: it stays huge, and the wait is that for 2 MiB.
    Whole,
}

/// Finds the way to a destination by its name.
pub type Destinations = Arc<dyn Fn(&Destination) -> io::Result<Arc<dyn Connector>> + Send + Sync>;

/// Limits and choices of one migration, at its source.
#[derive(Clone)]
pub struct SourceOptions {
    /// Bulk lanes, 1 to [`MAX_STREAMS`](crate::wire::MAX_STREAMS).
    pub streams: u16,
    /// The longest downtime that is acceptable, until a [`Controller`] sets another one.
    pub downtime_limit: Duration,
    /// How long the guest may stay paused for a hand-over that does not come about.
    pub pause_limits: PauseLimits,
    /// How long the migration may take until the hand-over; `None` for ever.
    pub timeout: Option<Duration>,
    /// What happens then, or sooner, as soon as it is certain that the downtime limit cannot be
    /// kept.
    pub on_timeout: OnTimeout,
    /// Lanes for pages that the guest waits for at the destination, 1 to
    /// [`MAX_DEMAND_LANES`](crate::wire::MAX_DEMAND_LANES); 0 rules post-copy out.
    pub demand_lanes: u16,
    /// How pages that the guest waits for are cut out of huge pages.
    pub huge: HugePages,
    /// In post-copy, protects the VM against the death of its destination; the migration is refused
    /// if the destination cannot do its part.
    pub fail_safe: Option<FailSafe>,
    /// The page stores through which pages may go; `None` if there are none. See
    /// [`Strategy::stores`](crate::strategy::Strategy::stores).
    pub stores: Option<SourceStores>,
    /// Finds the destination that a strategy [connects](crate::strategy::Running::connect) to by
    /// its name. Without it the strategy can only name the address of the migration's own
    /// connector.
    pub destinations: Option<Destinations>,
    /// How much the guest may be disturbed.
    pub impact: GuestImpact,
    /// Checksum of page data, beside TCP's own: costs a copy of every page.
    pub payload_crc: bool,
    /// How long the peer may be silent before the link counts as lost.
    pub idle_timeout: Duration,
    /// How long the destination may take to build the VM.
    pub setup_timeout: Duration,
    /// Epochs up to this one are void; the attempt uses the next.
    pub last_epoch: u32,
    /// After this time in doubt the user is told
    /// ([`Event::InDoubt`](crate::report::Event::InDoubt)); reconnecting goes on.
    pub in_doubt_grace: Duration,
    /// Starts threads.
    pub spawner: Arc<dyn Spawner>,
    /// Is told how it goes; see [`Observer`] for what it may not do.
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
