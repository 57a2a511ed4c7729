//! Where the checkpoints of fail-safe post-copy are kept: in memory, or in a folder that both ends have.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::Duration,
};

use migration_core::{
    checkpoint::{CheckpointStore, FailSafe, ForwardStores, MemoryStore},
    report::Outcome,
    vm::VmId,
};
use migration_kvm::fence::ProcessFence;
use migration_transport::DirStore;

use crate::{cli::Protect, sealing::Sealing};

type Store = Arc<Mutex<dyn CheckpointStore>>;

/// The folder of one attempt's checkpoints of one kind, below `dir`: both ends find it by what both know.
fn folder(dir: &Path, vm: VmId, epoch: u32, kind: &str) -> PathBuf {
    dir.join(format!("{vm}-{epoch}.{kind}"))
}

/// The protection that a user asked for, of one attempt.
pub(crate) struct Protection {
    pub(crate) fail_safe: FailSafe,
    folders: Vec<PathBuf>,
}

impl Protection {
    pub(crate) fn new(protect: &Protect, sealing: &Sealing, vm: VmId, epoch: u32, pages: u64) -> Result<Self, String> {
        let mut folders = Vec::new();
        let mut store = |kind: &str| -> Result<Store, String> {
            let Some(dir) = &protect.dir else { return Ok(Arc::new(Mutex::new(MemoryStore::default()))) };
            let path = folder(dir, vm, epoch, kind);
            let store = sealing.create(vm, pages, |pages| DirStore::create(&path, pages));
            let store = store.map_err(|e| format!("{}: {e}", path.display()))?;
            folders.push(path);
            Ok(Arc::new(Mutex::new(store)))
        };
        let fail_safe = FailSafe {
            interval: Duration::from_micros(protect.interval_us),
            detect: Duration::from_micros(protect.detect_us),
            reverse: protect.reverse.then(|| store("reverse")).transpose()?,
            forward: protect.forward.then(|| store("forward")).transpose()?,
            fence: Arc::new(ProcessFence),
        };
        Ok(Self { fail_safe, folders })
    }
}

impl Protection {
    /// The attempt has ended. What a VM that is lost could be restored from stays.
    pub(crate) fn end(self, outcome: Outcome) {
        for folder in self.folders.iter().filter(|_| outcome != Outcome::Lost) {
            remove(folder);
        }
    }
}

fn remove(folder: &Path) {
    if let Err(error) = fs::remove_dir_all(folder)
        && error.kind() != io::ErrorKind::NotFound
    {
        log!("{}: {error}; it can be removed by hand", folder.display());
    }
}

/// The folder in which sources put forward checkpoints.
pub(crate) struct Folder {
    pub(crate) dir: PathBuf,
    pub(crate) sealing: Arc<Sealing>,
}

impl ForwardStores for Folder {
    fn open(&self, vm: VmId, epoch: u32, pages: u64) -> io::Result<Box<dyn CheckpointStore>> {
        let folder = folder(&self.dir, vm, epoch, "forward");
        self.sealing.open(Some(vm), pages, |pages| DirStore::open(&folder, pages))
    }

    fn done(&self, vm: VmId, epoch: u32) {
        remove(&folder(&self.dir, vm, epoch, "forward"));
    }
}
