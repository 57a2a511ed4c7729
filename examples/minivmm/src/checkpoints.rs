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

/// The protection that a user asked for, of one attempt. If it is dropped before the attempt has
/// begun, nothing is left of it.
pub(crate) struct Protection {
    pub(crate) fail_safe: FailSafe,
    folders: Folders,
}

/// What was made for the attempt.
#[derive(Default)]
struct Folders {
    paths: Vec<PathBuf>,
    begun: bool,
}

impl Drop for Folders {
    fn drop(&mut self) {
        // once it has begun, a thread that dies must not take along what the VM could be restored from
        if !self.begun {
            self.paths.iter().for_each(|path| remove(path));
        }
    }
}

impl Protection {
    pub(crate) fn new(protect: &Protect, sealing: &Sealing, vm: VmId, epoch: u32, pages: u64) -> Result<Self, String> {
        let mut folders = Folders::default();
        let mut store = |kind: &str| -> Result<Store, String> {
            let Some(dir) = &protect.dir else { return Ok(Arc::new(Mutex::new(MemoryStore::default()))) };
            let path = folder(dir, vm, epoch, kind);
            let store = sealing.create(vm, pages, |pages| DirStore::create(&path, pages));
            let store = store.map_err(|e| format!("{}: {e}", path.display()))?;
            folders.paths.push(path);
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
    /// The attempt begins: from now on [`end`](Self::end) says what stays.
    pub(crate) fn begin(mut self) -> Self {
        self.folders.begun = true;
        self
    }

    /// The attempt has ended. What a VM that is lost could be restored from stays.
    pub(crate) fn end(self, outcome: Outcome) {
        for folder in self.folders.paths.iter().filter(|_| outcome != Outcome::Lost) {
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

#[cfg(test)]
mod tests {
    use super::*;

    fn protection(dir: &Path, epoch: u32) -> Result<Protection, String> {
        let dir = Some(dir.to_owned());
        let protect = Protect { reverse: true, forward: true, interval_us: 1000, detect_us: 1000, dir };
        Protection::new(&protect, &Sealing::load(None)?, VmId([7; 16]), epoch, 16)
    }

    fn left(dir: &Path) -> usize {
        fs::read_dir(dir).unwrap().count()
    }

    #[test]
    fn what_was_made_for_an_attempt_that_does_not_begin_goes() {
        let dir = tempfile::tempdir().unwrap();
        let made = protection(dir.path(), 1).unwrap();
        assert_eq!(left(dir.path()), 2);
        drop(made);
        assert_eq!(left(dir.path()), 0);
        // half of it: the second folder is somebody else's
        let other = folder(dir.path(), VmId([7; 16]), 2, "forward");
        fs::create_dir(&other).unwrap();
        fs::write(other.join("notes"), "of others").unwrap();
        assert!(protection(dir.path(), 2).is_err());
        assert_eq!((left(dir.path()), left(&other)), (1, 1));
    }

    #[test]
    fn what_a_lost_vm_could_be_restored_from_stays() {
        let dir = tempfile::tempdir().unwrap();
        protection(dir.path(), 1).unwrap().begin().end(Outcome::Completed);
        assert_eq!(left(dir.path()), 0);
        protection(dir.path(), 2).unwrap().begin().end(Outcome::Lost);
        // the thread has died
        drop(protection(dir.path(), 3).unwrap().begin());
        assert_eq!(left(dir.path()), 4);
    }
}
