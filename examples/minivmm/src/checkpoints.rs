//! The protection of fail-safe post-copy as users configure it: checkpoints in memory, or in a
//! folder that both ends can access.

use std::{
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::Duration,
};

use migration_core::{
    checkpoint::FailSafe,
    report::Outcome,
    store::{MemoryVersions, VersionStore},
    vm::VmId,
};
use migration_kvm::fence::ProcessFence;
use migration_transport::{AttemptFolders, CheckpointFolders, CheckpointKind, DirVersions, OpenStore};
use minivmm_client::{Protect, log::Logged};

use crate::sealing::Sealing;

/// The protection of one migration attempt.
pub(crate) struct Protection {
    pub(crate) fail_safe: FailSafe,
    folders: Option<AttemptFolders>,
}

impl Protection {
    /// Creates the stores that `protect` asks for. If the result is dropped before the attempt has
    /// begun, nothing of it remains.
    pub(crate) fn new(
        protect: &Protect,
        sealing: &Arc<Sealing>,
        vm: VmId,
        epoch: u32,
        pages: u64,
    ) -> Result<Self, String> {
        let mut folders = protect.dir.clone().map(|dir| folders(dir, sealing).attempt(vm, epoch, pages));
        let mut store = |kind| -> Result<Arc<Mutex<dyn VersionStore>>, String> {
            match &mut folders {
                None => Ok(Arc::new(Mutex::new(MemoryVersions::default()))),
                Some(folders) => Ok(Arc::new(Mutex::new(folders.create(kind).map_err(|e| e.to_string())?))),
            }
        };
        let fail_safe = FailSafe {
            interval: Duration::from_micros(protect.interval_us),
            detect: Duration::from_micros(protect.detect_us),
            reverse: protect.reverse.then(|| store(CheckpointKind::Reverse)).transpose()?,
            forward: protect.forward.then(|| store(CheckpointKind::Forward)).transpose()?,
            fence: Arc::new(ProcessFence),
        };
        Ok(Self { fail_safe, folders })
    }

    /// Records that the attempt begins. From now on [`end`](Self::end) decides which folders
    /// remain.
    pub(crate) fn begin(mut self) -> Self {
        self.folders.iter_mut().for_each(AttemptFolders::begin);
        self
    }

    /// Records that the attempt has ended. Checkpoints from which a lost VM could be restored
    /// remain.
    pub(crate) fn end(self, outcome: Outcome) {
        self.folders.into_iter().for_each(|folders| folders.end(outcome));
    }
}

/// Returns the checkpoint folders below `dir`, sealed if this minivmm has a seal key.
pub(crate) fn folders(dir: PathBuf, sealing: &Arc<Sealing>) -> CheckpointFolders {
    CheckpointFolders::new(dir, Arc::new(SealedStores(sealing.clone())), Arc::new(Logged))
}

struct SealedStores(Arc<Sealing>);

impl OpenStore for SealedStores {
    fn create(&self, folder: &Path, vm: VmId, pages: u64) -> io::Result<Box<dyn VersionStore>> {
        self.0.create(vm, pages, |pages| DirVersions::create(folder, pages))
    }

    fn open(&self, folder: &Path, vm: VmId, pages: u64) -> io::Result<Box<dyn VersionStore>> {
        self.0.open(Some(vm), pages, |pages| DirVersions::open(folder, pages))
    }
}
