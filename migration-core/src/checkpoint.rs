//! Checkpoints of a VM that runs elsewhere: who makes them, and where they are found.
//!
//! A checkpoint is the set of pages that were written since the one before, and the state of vCPUs
//! and devices, all of one moment. The first one builds on what RAM held when the VM was handed
//! over. Increments come page by page; each is applied whole or not at all. They are kept as the
//! versions of a [`VersionStore`].

use std::{
    io,
    sync::{Arc, Mutex},
    time::Duration,
};

use crate::{
    fence::Fence,
    store::{MemoryVersions, VersionStore},
    vm::VmId,
};

/// Where a destination finds the forward checkpoint of a VM whose source has died.
pub trait ForwardStores: Send + Sync {
    /// Returns the store into which the source of this VM, of `pages` pages, has put what it left
    /// behind in the attempt with this epoch.
    ///
    /// # Errors
    /// Returns an error if there is none, or it cannot be read.
    fn open(&self, vm: VmId, epoch: u32, pages: u64) -> io::Result<Box<dyn VersionStore>>;

    /// It is not needed any more, if there is one.
    fn done(&self, vm: VmId, epoch: u32);
}

/// Protects a VM against the death of one side while the source still has pages that the
/// destination lacks.
///
/// *Reverse* checkpoints (PostCopyFT: Fernando, Terner, Gopalan and Yang, INFOCOM 2019) go back
/// from the destination at intervals; if it dies the VM runs on at the source, from the last one
/// (the first is the hand-over itself), and nobody has seen output of anything later. A *forward*
/// checkpoint (V-Recover, by the same group) is put into a store that both sides reach before the
/// hand-over; if the source dies the destination takes from there what it lacks, and loses nothing.
#[derive(Clone)]
pub struct FailSafe {
    /// From the end of one reverse checkpoint to the beginning of the next.
    pub interval: Duration,
    /// How long the other side may be silent (half a second at the least), or its link lost, before
    /// it counts as dead. Safety does not depend on it: the fence is asked before anything
    /// restarts.
    pub detect: Duration,
    /// Where reverse checkpoints are kept, of this attempt only; `None` for none.
    pub reverse: Option<Arc<Mutex<dyn VersionStore>>>,
    /// Where the forward checkpoint goes, of this attempt only; `None` for none. It has to outlive
    /// this host.
    pub forward: Option<Arc<Mutex<dyn VersionStore>>>,
    /// Makes certain that the destination is dead.
    pub fence: Arc<dyn Fence>,
}

impl FailSafe {
    /// Reverse checkpoints in memory, every 100 ms.
    pub fn in_memory(fence: Arc<dyn Fence>) -> Self {
        Self {
            interval: Duration::from_millis(100),
            detect: Duration::from_secs(1),
            reverse: Some(Arc::new(Mutex::new(MemoryVersions::default()))),
            forward: None,
            fence,
        }
    }
}
