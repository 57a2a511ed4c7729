//! Where the checkpoints of fail-safe post-copy lie: in folders below one that both ends have.
//!
//! | folder | holds | made by |
//! |---|---|---|
//! | `<VM>-<epoch>.reverse` | checkpoints that come back from the destination | the source |
//! | `<VM>-<epoch>.forward` | what the destination lacks | the source; read by the destination if it dies |
//!
//! Both ends find a folder by what both know: the VM and the epoch of the attempt.

use std::{
    fs,
    io::{self, ErrorKind},
    path::{Path, PathBuf},
    sync::Arc,
};

use migration_core::{
    checkpoint::ForwardStores,
    report::{Event, Observer, Outcome},
    store::VersionStore,
    vm::VmId,
};

use crate::DirVersions;

/// What a checkpoint is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CheckpointKind {
    /// The source restarts the VM from it if the destination dies.
    Reverse,
    /// The destination takes from it what it lacks if the source dies.
    Forward,
}

impl CheckpointKind {
    fn suffix(self) -> &'static str {
        match self {
            Self::Reverse => "reverse",
            Self::Forward => "forward",
        }
    }
}

/// Opens the store in one folder. Wraps it if it is to be sealed, for example.
pub trait OpenStore: Send + Sync {
    /// Makes the store of a VM with so many pages in `folder`, which does not exist.
    ///
    /// # Errors
    /// What the file system says.
    fn create(&self, folder: &Path, vm: VmId, pages: u64) -> io::Result<Box<dyn VersionStore>>;

    /// Opens what [`create`](Self::create) made.
    ///
    /// # Errors
    /// Returns an error if it is of another VM, damaged, or sealed by another key; what the file
    /// system says.
    fn open(&self, folder: &Path, vm: VmId, pages: u64) -> io::Result<Box<dyn VersionStore>>;
}

/// Opens plain [`DirVersions`]s.
#[derive(Clone, Copy, Debug, Default)]
pub struct PlainStores;

impl OpenStore for PlainStores {
    fn create(&self, folder: &Path, _: VmId, pages: u64) -> io::Result<Box<dyn VersionStore>> {
        Ok(Box::new(DirVersions::create(folder, pages)?))
    }

    fn open(&self, folder: &Path, _: VmId, pages: u64) -> io::Result<Box<dyn VersionStore>> {
        Ok(Box::new(DirVersions::open(folder, pages)?))
    }
}

/// The folder below which checkpoints lie. A destination finds forward checkpoints by it.
#[derive(Clone)]
pub struct CheckpointFolders {
    dir: PathBuf,
    stores: Arc<dyn OpenStore>,
    observer: Arc<dyn Observer>,
}

impl CheckpointFolders {
    /// Returns the folders below `dir`, whose stores `stores` opens. `observer` is warned of a
    /// folder that cannot be removed.
    pub fn new(dir: impl Into<PathBuf>, stores: Arc<dyn OpenStore>, observer: Arc<dyn Observer>) -> Self {
        Self { dir: dir.into(), stores, observer }
    }

    /// Returns the folder of one attempt's checkpoints of one kind.
    pub fn path(&self, vm: VmId, epoch: u32, kind: CheckpointKind) -> PathBuf {
        self.dir.join(format!("{vm}-{epoch}.{}", kind.suffix()))
    }

    /// Returns the folders of an attempt to migrate a VM with so many pages, before any is made.
    pub fn attempt(&self, vm: VmId, epoch: u32, pages: u64) -> AttemptFolders {
        AttemptFolders { folders: self.clone(), vm, epoch, pages, made: Vec::new(), begun: false }
    }

    fn remove(&self, folder: &Path) {
        if let Err(error) = fs::remove_dir_all(folder)
            && error.kind() != ErrorKind::NotFound
        {
            let what = format!("{}: {error}; it can be removed by hand", folder.display());
            self.observer.event(&Event::Warning(what));
        }
    }
}

impl ForwardStores for CheckpointFolders {
    fn open(&self, vm: VmId, epoch: u32, pages: u64) -> io::Result<Box<dyn VersionStore>> {
        self.stores.open(&self.path(vm, epoch, CheckpointKind::Forward), vm, pages)
    }

    fn done(&self, vm: VmId, epoch: u32) {
        self.remove(&self.path(vm, epoch, CheckpointKind::Forward));
    }
}

/// The folders of one attempt at its source. If this is dropped before the attempt has
/// [begun](Self::begin), nothing is left of them.
pub struct AttemptFolders {
    folders: CheckpointFolders,
    vm: VmId,
    epoch: u32,
    pages: u64,
    made: Vec<PathBuf>,
    begun: bool,
}

impl AttemptFolders {
    /// Makes the store for one kind of checkpoints.
    ///
    /// # Errors
    /// Returns an error if there is such a folder already; what the file system says.
    pub fn create(&mut self, kind: CheckpointKind) -> io::Result<Box<dyn VersionStore>> {
        let path = self.folders.path(self.vm, self.epoch, kind);
        let store = self.folders.stores.create(&path, self.vm, self.pages);
        let store = store.map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))?;
        self.made.push(path);
        Ok(store)
    }

    /// The attempt begins. From now on only [`end`](Self::end) removes a folder: a thread that dies
    /// must not take along what the VM could be restored from.
    pub fn begin(&mut self) {
        self.begun = true;
    }

    /// The attempt has ended. Removes what was made for it, unless the VM is lost and could be
    /// restored from that.
    pub fn end(mut self, outcome: Outcome) {
        for folder in std::mem::take(&mut self.made).iter().filter(|_| outcome != Outcome::Lost) {
            self.folders.remove(folder);
        }
    }
}

impl Drop for AttemptFolders {
    fn drop(&mut self) {
        if !self.begun {
            self.made.iter().for_each(|folder| self.folders.remove(folder));
        }
    }
}

#[cfg(test)]
mod tests {
    use migration_core::report::NoObserver;

    use super::*;

    const VM: VmId = VmId([7; 16]);

    fn folders(dir: &Path) -> CheckpointFolders {
        CheckpointFolders::new(dir, Arc::new(PlainStores), Arc::new(NoObserver))
    }

    fn made(dir: &Path, epoch: u32) -> io::Result<AttemptFolders> {
        let mut attempt = folders(dir).attempt(VM, epoch, 16);
        drop(attempt.create(CheckpointKind::Reverse)?);
        drop(attempt.create(CheckpointKind::Forward)?);
        Ok(attempt)
    }

    fn left(dir: &Path) -> usize {
        fs::read_dir(dir).unwrap().count()
    }

    #[test]
    fn what_was_made_for_an_attempt_that_does_not_begin_goes() {
        let dir = tempfile::tempdir().unwrap();
        let attempt = made(dir.path(), 1).unwrap();
        assert_eq!(left(dir.path()), 2);
        drop(attempt);
        assert_eq!(left(dir.path()), 0);
        // half of it: the second folder is somebody else's
        let other = folders(dir.path()).path(VM, 2, CheckpointKind::Forward);
        fs::create_dir(&other).unwrap();
        fs::write(other.join("notes"), "of others").unwrap();
        let error = made(dir.path(), 2).err().unwrap();
        assert!(error.to_string().contains("-2.forward"), "{error}");
        assert_eq!((left(dir.path()), left(&other)), (1, 1));
    }

    #[test]
    fn what_a_lost_vm_could_be_restored_from_stays() {
        let dir = tempfile::tempdir().unwrap();
        let begun = |epoch| {
            let mut attempt = made(dir.path(), epoch).unwrap();
            attempt.begin();
            attempt
        };
        begun(1).end(Outcome::Completed);
        assert_eq!(left(dir.path()), 0);
        begun(2).end(Outcome::Lost);
        // the thread has died
        drop(begun(3));
        assert_eq!(left(dir.path()), 4);
    }

    #[test]
    fn the_other_end_finds_a_forward_checkpoint_and_removes_it() {
        let dir = tempfile::tempdir().unwrap();
        let mut attempt = folders(dir.path()).attempt(VM, 5, 16);
        let mut store = attempt.create(CheckpointKind::Forward).unwrap();
        store.put(3, Some(&[9; 4096])).unwrap();
        store.commit(1, b"state".to_vec().into()).unwrap();
        drop(store);
        attempt.begin();
        let there = folders(dir.path());
        assert!(there.open(VM, 4, 16).is_err(), "of another attempt");
        let found = there.open(VM, 5, 16).unwrap();
        assert_eq!(found.latest().unwrap(), (1, b"state".to_vec().into()));
        drop(found);
        there.done(VM, 5);
        there.done(VM, 5);
        assert_eq!(left(dir.path()), 0);
    }
}
