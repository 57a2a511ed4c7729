//! The limits of a destination, and the reasons why a receiver ends without a VM.

use std::{io, sync::Arc, time::Duration};

use thiserror::Error;

use super::*;
use crate::store::{Owner, PageStore};

/// The owner that is recorded if the options name no owner.
const DESTINATION: Owner = match Owner::new("a migration's destination") {
    Ok(owner) => owner,
    Err(_) => panic!("the text is printable"),
};

/// The limits and choices of a destination.
#[derive(Clone)]
pub struct ReceiverOptions {
    /// The largest number of bulk lanes. A source that requests more gets this number.
    pub max_streams: u16,
    /// The largest size of a VM's RAM in bytes.
    pub max_ram_bytes: u64,
    /// The largest number of VMs that are received, or held for their sources, at the same time.
    /// With 1, the default, the receiver ends when the VM has arrived. With more, the receiver runs
    /// until it is stopped, each VM has its own session and connections, and `patience` does not
    /// apply. A VM that has arrived does not count any more when its source knows that it runs
    /// here.
    pub max_vms: usize,
    /// The longest time without data from a peer. It applies until the peer has introduced itself,
    /// until its lanes are open, and on the control lane.
    pub idle_timeout: Duration,
    /// The time for which an attempt that has sent no page keeps its place, although another source
    /// wants it. Each MiB of page data adds a second, up to the size of RAM. After that the next
    /// source takes the place. After 16 times as long the attempt ends in any case. This does not
    /// apply to a VM that is ready or runs here.
    pub progress_grace: Duration,
    /// The only VM that is accepted, and an epoch that the epoch of its attempt must exceed. A VM
    /// that was [relinquished](crate::engine::ephemeral) returns under a higher epoch than the one
    /// under which it left. `None` accepts any VM.
    pub awaits: Option<(VmId, u32)>,
    /// The longest time to wait for a source, and then, when the VM runs here, for the source's
    /// last message. `None` waits without a limit. An attempt that is under way at the end of this
    /// time is not ended: the time-outs of an attempt apply to it.
    pub patience: Option<Duration>,
    /// In fail-safe post-copy, makes sure that the source is dead, so that held output can be
    /// released.
    pub fence: Arc<dyn Fence>,
    /// In fail-safe post-copy, the stores with the forward checkpoints of sources that have died;
    /// `None` if there are none.
    pub forward: Option<Arc<dyn ForwardStores>>,
    /// The page stores from which pages of a VM may be fetched. A source can name these, and no
    /// others.
    pub stores: Vec<Arc<dyn PageStore>>,
    /// The owner of the namespaces of VMs that have arrived here, as the stores record it.
    pub owner: Owner,
    /// Starts threads.
    pub spawner: Arc<dyn Spawner>,
    /// Receives the events. The events do not name the VM. See [`Observer`] for what an observer
    /// must not do.
    pub observer: Arc<dyn Observer>,
}

impl Default for ReceiverOptions {
    fn default() -> Self {
        Self {
            max_streams: MAX_STREAMS,
            max_ram_bytes: 1 << 40,
            max_vms: 1,
            idle_timeout: Duration::from_secs(10),
            progress_grace: Duration::from_secs(60),
            awaits: None,
            patience: None,
            fence: Arc::new(NoFence),
            forward: None,
            stores: Vec::new(),
            owner: DESTINATION,
            spawner: Arc::new(StdSpawner),
            observer: Arc::new(NoObserver),
        }
    }
}

/// The reason why a receiver has ended without a VM.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ReceiveError {
    /// [`ReceiverHandle::stop`] was called.
    #[error("stopped")]
    Stopped,
    /// No VM was handed over in time.
    #[error("no VM was handed over within {0:?}")]
    TimedOut(Duration),
    /// The listener is broken.
    #[error("listening")]
    Listener(#[from] io::Error),
}
