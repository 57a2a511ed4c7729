//! Limits of a destination, and why it ends without a VM.

use std::{io, sync::Arc, time::Duration};

use thiserror::Error;

use super::*;

/// Limits and choices at a destination.
#[derive(Clone)]
pub struct ReceiverOptions {
    /// Most bulk lanes; a source that wants more gets this many.
    pub max_streams: u16,
    /// Most bytes of RAM that a VM may have.
    pub max_ram_bytes: u64,
    /// Most VMs that are received, or held for their sources, at once. With 1, which is the default, the receiver is for one VM: it
    /// ends when that has arrived. With more it goes on until it is stopped, each VM has a session and connections of its own,
    /// and `patience` does not apply. A VM that has arrived does not count once its source knows that it runs here.
    pub max_vms: usize,
    /// How long a peer may be silent: before it has introduced itself, while its lanes are awaited, on the control lane.
    pub idle_timeout: Duration,
    /// How long an attempt that has sent no page may keep other sources out. Page data earns more time, at 1 MiB/s and up to what
    /// all of RAM earns once. After that the next source takes the session; after 16 times as long the attempt ends in any case.
    /// Once the VM is ready, or runs here, this does not apply.
    pub progress_grace: Duration,
    /// The only VM that may come, and the epoch above which: one that was [lent](crate::engine::ephemeral) comes back as what it was, and by
    /// nothing older than its leaving. `None` for any.
    pub awaits: Option<(VmId, u32)>,
    /// How long to wait for a source, and, once the VM runs here, for its source's last word; `None` for ever. An attempt that
    /// is under way when the time passes has the time-outs of an attempt.
    pub patience: Option<Duration>,
    /// In fail-safe post-copy, makes certain that a source is dead: output that is held for its sake may then leave.
    pub fence: Arc<dyn Fence>,
    /// In fail-safe post-copy, where to find what a source that has died had left behind; `None` if nowhere.
    pub forward: Option<Arc<dyn ForwardStores>>,
    /// Starts threads.
    pub spawner: Arc<dyn Spawner>,
    /// Is told how it goes; see [`Observer`] for what it may not do.
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
            spawner: Arc::new(StdSpawner),
            observer: Arc::new(NoObserver),
        }
    }
}

/// Why a receiver ended without a VM.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ReceiveError {
    /// [`ReceiverHandle::stop`] was called.
    #[error("stopped")]
    Stopped,
    /// No source came in time.
    #[error("no VM was handed over within {0:?}")]
    TimedOut(Duration),
    /// The listener is broken.
    #[error("listening: {0}")]
    Listener(#[from] io::Error),
}
