//! Leases in a folder that all hosts share.

use std::{
    fs::{self, File},
    io::{self, ErrorKind, Read as _, Write as _},
    path::PathBuf,
    time::Duration,
};

use migration_core::{
    codec::{DecodeError, Reader, Writer},
    fence::{Holder, Lease, LeaseStore},
    vm::VmId,
};

const MAGIC: [u8; 8] = *b"LMLEASE1";
/// Magic, holder, number, term, CRC-32.
const LEN: usize = 8 + 16 + 8 + 8 + 4;

/// A [`LeaseStore`] of one small file a VM, in a folder on a file system that keeps locks (`flock`) and renames across all
/// hosts that use it: a local one, NFS from version 4 on, a cluster file system.
#[derive(Clone, Debug)]
pub struct DirLeases {
    dir: PathBuf,
}

impl DirLeases {
    /// Leases in `dir`, which is made if it is not there.
    ///
    /// # Errors
    /// When it cannot be.
    pub fn new(dir: impl Into<PathBuf>) -> io::Result<Self> {
        let dir = dir.into();
        fs::create_dir_all(&dir)?;
        Ok(Self { dir })
    }

    fn path(&self, vm: VmId) -> PathBuf {
        self.dir.join(format!("{vm}.lease"))
    }
}

impl LeaseStore for DirLeases {
    fn read(&self, vm: VmId) -> io::Result<Option<Lease>> {
        let path = self.path(vm);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(e),
        };
        let mut bytes = Vec::new();
        file.take(LEN as u64 + 1).read_to_end(&mut bytes)?;
        let damaged = |e: DecodeError| io::Error::new(ErrorKind::InvalidData, format!("{}: {e}", path.display()));
        decode(&bytes).map(Some).map_err(damaged)
    }

    fn swap(&self, vm: VmId, expected: Option<Lease>, new: Lease) -> io::Result<bool> {
        let path = self.path(vm);
        // the lock is on a file of its own: the lease's is replaced
        let lock = File::options().create(true).write(true).truncate(false).open(path.with_extension("lock"))?;
        lock.lock()?;
        if self.read(vm)? != expected {
            return Ok(false);
        }
        let fresh = path.with_extension("new");
        let mut file = File::create(&fresh)?;
        file.write_all(&encode(new))?;
        file.sync_all()?;
        fs::rename(&fresh, &path)?;
        File::open(&self.dir)?.sync_all()?;
        Ok(true)
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
    use std::{sync::Arc, thread};

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
}
