//! Leases in a folder that all hosts share.

use std::{
    fs::{DirBuilder, File, OpenOptions, TryLockError},
    io::{self, ErrorKind, Read as _, Write as _},
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use migration_core::{
    codec::{DecodeError, Reader, Writer},
    fence::{Holder, Lease, LeaseStore},
    vm::VmId,
};

use crate::{
    atomic_file::{AtomicFile, open_regular},
    file_errors::{at, damaged},
};

/// How long another process may have the lock of a lease. It needs it for two writes to the disk.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often it is tried to get the lock.
const RETRY: Duration = Duration::from_millis(2);

const MAGIC: [u8; 8] = *b"LMLEASE1";
/// Magic, holder, number, term, CRC-32.
const LEN: usize = 8 + 16 + 8 + 8 + 4;

/// A [`LeaseStore`] of one small file a VM, in a folder on a file system that keeps locks (`flock`)
/// and renames across all hosts that use it: a local one, NFS from version 4 on, a cluster file
/// system.
///
/// Leases and locks have mode 0600 whatever the umask, and no link is followed or written through.
/// Whoever can write to the folder decides who may run which VM.
#[derive(Clone, Debug)]
pub struct DirLeases {
    dir: PathBuf,
    patience: Duration,
}

impl DirLeases {
    /// Leases in `dir`, which is made with mode 0700 if it is not there.
    ///
    /// # Errors
    /// Returns an error if it cannot be.
    pub fn new(dir: impl Into<PathBuf>) -> io::Result<Self> {
        let dir = dir.into();
        DirBuilder::new().recursive(true).mode(0o700).create(&dir).map_err(at(&dir))?;
        Ok(Self { dir, patience: PATIENCE })
    }

    fn path(&self, vm: VmId) -> PathBuf {
        self.dir.join(format!("{vm}.lease"))
    }
}

impl LeaseStore for DirLeases {
    fn read(&self, vm: VmId) -> io::Result<Option<Lease>> {
        let path = self.path(vm);
        let Some((file, _)) = open_regular(&path)? else { return Ok(None) };
        let mut bytes = Vec::new();
        file.take(LEN as u64 + 1).read_to_end(&mut bytes).map_err(at(&path))?;
        decode(&bytes).map(Some).map_err(|error| damaged(&path, error))
    }

    fn swap(&self, vm: VmId, expected: Option<Lease>, new: Lease) -> io::Result<bool> {
        let path = self.path(vm);
        // the lock is on a file of its own: the lease's is replaced
        let _lock = lock(&path.with_extension("lock"), self.patience)?;
        if self.read(vm)? != expected {
            return Ok(false);
        }
        // whoever fences may be another user than whoever held it
        let fresh = AtomicFile::create_over(&path)?;
        fresh.file().write_all(&encode(new)).map_err(at(&path))?;
        fresh.commit()?;
        Ok(true)
    }
}

/// Waits for the lock of a lease, and holds it until the file is dropped.
///
/// # Errors
/// [`ErrorKind::TimedOut`] when somebody else holds it for longer than `patience`;
/// [`ErrorKind::InvalidData`] when something else than a file of its own is there.
fn lock(path: &Path, patience: Duration) -> io::Result<File> {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let open = OpenOptions::new().create(true).write(true).truncate(false).mode(0o600).custom_flags(flags).open(path);
    let file = match open {
        Ok(file) => file,
        Err(error) if error.raw_os_error() == Some(libc::ELOOP) => return Err(damaged(path, "not a regular file")),
        Err(error) => return Err(at(path)(error)),
    };
    let found = file.metadata().map_err(at(path))?;
    if !found.is_file() || found.nlink() != 1 {
        return Err(damaged(path, "not a regular file, or one with several names"));
    }
    let deadline = Instant::now() + patience;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::WouldBlock) if Instant::now() < deadline => thread::sleep(RETRY),
            Err(TryLockError::WouldBlock) => {
                let why = format!("another process has held the lock (flock) of this file for {patience:?}");
                return Err(at(path)(io::Error::new(ErrorKind::TimedOut, why)));
            }
            Err(TryLockError::Error(error)) => return Err(at(path)(error)),
        }
    }
}

fn encode(lease: Lease) -> Vec<u8> {
    let mut w = Writer::new();
    let term = u64::try_from(lease.term.as_micros()).unwrap_or(u64::MAX);
    w.bytes(&MAGIC).bytes(&lease.holder.0).u64(lease.number).u64(term);
    let mut bytes = w.into_bytes();
    bytes.extend(crc32fast::hash(&bytes).to_le_bytes());
    bytes
}

fn decode(bytes: &[u8]) -> Result<Lease, DecodeError> {
    let mut r = Reader::new(bytes);
    if r.array::<8>("magic")? != MAGIC {
        return Err(DecodeError::invalid("magic", "this is no lease"));
    }
    let holder = Holder(r.array("holder")?);
    let (number, term) = (r.u64("number")?, Duration::from_micros(r.u64("term")?));
    let crc = r.u32("crc")?;
    r.finish()?;
    if crc32fast::hash(&bytes[..LEN - 4]) != crc {
        return Err(DecodeError::invalid("crc", "the lease is damaged"));
    }
    Ok(Lease { holder, number, term })
}

#[cfg(test)]
mod tests {
    use std::{
        fs::{self, Permissions},
        os::unix::fs::{PermissionsExt as _, symlink},
        sync::Arc,
        thread,
    };

    use migration_core::fence::{Fence, LeaseFence, LeaseHolder};

    use super::*;

    const VM: VmId = VmId([9; 16]);

    fn folder(name: &str) -> PathBuf {
        let dir = std::env::temp_dir().join(format!("leases-{}-{name}", std::process::id()));
        // from an earlier process of this number
        let _ = fs::remove_dir_all(&dir);
        dir
    }

    fn lease(holder: u8, number: u64) -> Lease {
        Lease { holder: Holder([holder; 16]), number, term: Duration::from_millis(100) }
    }

    #[test]
    fn whoever_fences_may_be_another_user() {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: to give a file away needs root");
            return;
        }
        let dir = folder("other");
        let store = DirLeases::new(&dir).unwrap();
        assert!(store.swap(VM, None, lease(1, 1)).unwrap());
        std::os::unix::fs::chown(store.path(VM), Some(54321), None).unwrap();
        assert!(store.swap(VM, Some(lease(1, 1)), lease(2, 2)).unwrap());
        assert_eq!(store.read(VM).unwrap(), Some(lease(2, 2)));
        fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn of_many_who_swap_one_does() {
        let dir = folder("many");
        let store = DirLeases::new(&dir).unwrap();
        assert_eq!(store.read(VM).unwrap(), None);
        for number in 0..20 {
            let before = store.read(VM).unwrap();
            let won: usize = thread::scope(|scope| {
                let all: Vec<_> = (1..5)
                    .map(|holder| {
                        let store = DirLeases::new(&dir).unwrap();
                        scope.spawn(move || store.swap(VM, before, lease(holder, number)).unwrap())
                    })
                    .collect();
                all.into_iter().map(|one| usize::from(one.join().unwrap())).sum()
            });
            assert_eq!(won, 1);
        }
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn a_holder_and_a_fence() {
        let dir = folder("fence");
        let store = Arc::new(DirLeases::new(&dir).unwrap());
        let (a, b) = (Holder([1; 16]), Holder([2; 16]));
        drop(LeaseHolder::take(store.clone(), VM, a, Duration::from_millis(50)).unwrap());
        LeaseFence::new(store.clone(), VM, b).fence(&a.0).unwrap();
        assert_eq!(store.read(VM).unwrap().unwrap().holder, b);
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn a_damaged_file_is_no_lease() {
        let dir = folder("damaged");
        let store = DirLeases::new(&dir).unwrap();
        store.swap(VM, None, lease(1, 1)).unwrap();
        let (path, good) = (store.path(VM), encode(lease(1, 1)));
        let refused = |bytes: &[u8]| {
            fs::write(&path, bytes).unwrap();
            store.read(VM).is_err() && store.swap(VM, Some(lease(1, 1)), lease(1, 2)).is_err()
        };
        for length in 0..good.len() {
            assert!(refused(&good[..length]));
        }
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 0x10;
            assert!(refused(&bad));
        }
        assert!(refused(&[&good[..], &[0]].concat()));
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn leases_are_private_and_written_through_no_link() {
        let dir = folder("links");
        let store = DirLeases::new(&dir).unwrap();
        let mode = |path: &Path| fs::symlink_metadata(path).unwrap().mode() & 0o7777;
        assert_eq!(mode(&dir), 0o700);
        // as under a umask of 0
        fs::set_permissions(&dir, Permissions::from_mode(0o777)).unwrap();
        let victim = dir.join("victim");
        fs::write(&victim, "untouched").unwrap();
        let path = store.path(VM);
        for name in ["new", "lease.new"] {
            fs::hard_link(&victim, path.with_extension(name)).unwrap();
        }
        assert!(store.swap(VM, None, lease(1, 1)).unwrap());
        assert_eq!(fs::read_to_string(&victim).unwrap(), "untouched");
        assert_eq!((mode(&path), mode(&path.with_extension("lock"))), (0o600, 0o600));
        assert!(store.swap(VM, Some(lease(1, 1)), lease(1, 2)).unwrap());
        assert_eq!(fs::read_to_string(&victim).unwrap(), "untouched");
        // a lease or a lock that is a link is none
        for name in ["lease", "lock"] {
            fs::remove_file(path.with_extension(name)).unwrap();
            symlink(&victim, path.with_extension(name)).unwrap();
            assert_eq!(store.swap(VM, None, lease(1, 3)).unwrap_err().kind(), ErrorKind::InvalidData, "{name}");
            fs::remove_file(path.with_extension(name)).unwrap();
        }
        fs::hard_link(&victim, path.with_extension("lock")).unwrap();
        assert_eq!(store.swap(VM, None, lease(1, 3)).unwrap_err().kind(), ErrorKind::InvalidData);
        assert_eq!(fs::read_to_string(&victim).unwrap(), "untouched");
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn a_lock_is_neither_a_link_nor_a_pipe() {
        let dir = folder("pipe");
        let store = DirLeases::new(&dir).unwrap();
        let lock = store.path(VM).with_extension("lock");
        let victim = dir.join("victim");
        fs::write(&victim, "").unwrap();
        symlink(&victim, &lock).unwrap();
        assert_eq!(store.swap(VM, None, lease(1, 1)).unwrap_err().kind(), ErrorKind::InvalidData);
        fs::remove_file(&lock).unwrap();
        // a pipe that nobody reads would block whoever opens it
        let mode = nix::sys::stat::Mode::S_IRUSR | nix::sys::stat::Mode::S_IWUSR;
        nix::unistd::mkfifo(&lock, mode).unwrap();
        let error = store.swap(VM, None, lease(1, 1)).unwrap_err();
        assert!(error.kind() != ErrorKind::InvalidData && error.to_string().contains(".lock: "), "{error}");
        let _reader = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&lock).unwrap();
        assert_eq!(store.swap(VM, None, lease(1, 1)).unwrap_err().kind(), ErrorKind::InvalidData);
        assert_eq!(store.read(VM).unwrap(), None);
        fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn a_lock_that_is_never_released_is_an_error() {
        let dir = folder("locked");
        let store = DirLeases { patience: Duration::from_millis(50), ..DirLeases::new(&dir).unwrap() };
        let path = store.path(VM).with_extension("lock");
        let held = File::create(&path).unwrap();
        held.lock().unwrap();
        let error = store.swap(VM, None, lease(1, 1)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TimedOut);
        assert!(error.to_string().contains(".lock: ") && error.to_string().contains("flock"), "{error}");
        drop(held);
        assert!(store.swap(VM, None, lease(1, 1)).unwrap());
        fs::remove_dir_all(dir).unwrap();
    }
}
