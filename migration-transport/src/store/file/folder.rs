//! The folder of a store: the names of its files, and what is common to all namespaces.
//!
//! | file | what it holds |
//! |---|---|
//! | `store` | the [`Identity`]: the random value from which the incarnation is made, and whether puts are synchronised |
//! | `lock` | nothing. Whoever creates or forgets a namespace has its lock (`flock`) |
//! | `<id>.table`, `<id>.pages` | a namespace: see [`space`](super::space) |
//! | `<id>.forgotten-<time>` | nothing. The id is remembered until this time, in milliseconds since 1970, in hexadecimal |
//! | `<id>.new`, `store.new-<random>` | a file that is being made |

use std::{
    collections::BTreeMap,
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, ErrorKind, Write as _},
    os::unix::fs::{DirBuilderExt as _, FileExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _},
    path::{self, Path, PathBuf},
    time::Duration,
};

use migration_core::store::{
    Incarnation, NamespaceId, StoreError,
    limits::{MAX_FORGOTTEN, MAX_NAMESPACES},
};

const MAGIC: [u8; 8] = *b"LMPAGES\0";
const IDENTITY_BYTES: usize = 8 + 4 + 16 + 1 + 4;
const VERSION: u32 = 2;
/// Most names that are looked at in the folder: two files for each namespace, one for each
/// forgotten id, and some that a crash has left.
const MAX_FILES: usize = 2 * MAX_NAMESPACES + MAX_FORGOTTEN + 1024;

/// Kinds of files that belong to a namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Table,
    Pages,
    New,
}

impl Kind {
    fn suffix(self) -> &'static str {
        match self {
            Self::Table => "table",
            Self::Pages => "pages",
            Self::New => "new",
        }
    }
}

/// What the folder records of the store as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Identity {
    /// It changes when the store may have lost something.
    pub(super) value: Incarnation,
    /// Whether a put is on the disk when it returns: the choice of whoever has made the store.
    pub(super) synchronise: bool,
}

/// What is in the folder.
#[derive(Default)]
pub(super) struct Contents {
    /// Ids that have a table, ascending.
    pub(super) namespaces: Vec<NamespaceId>,
    /// Forgotten ids, each with the time until which it is remembered.
    pub(super) forgotten: BTreeMap<NamespaceId, Duration>,
    /// Files of no use: of ids that are not remembered any more, and of namespaces without a table.
    leftovers: Vec<PathBuf>,
}

/// Holds the store's lock until it is dropped.
pub(super) struct StoreLock(File);

impl Drop for StoreLock {
    fn drop(&mut self) {
        // closing the file ends the lock as well
        let _ = self.0.unlock();
    }
}

pub(super) struct Folder {
    dir: PathBuf,
    /// Synchronising it makes names durable.
    handle: File,
}

impl Folder {
    /// Opens a folder that only this user can change, or makes it.
    pub(super) fn open(dir: &Path) -> Result<Self, StoreError> {
        let dir = path::absolute(dir).map_err(StoreError::io("finding the store's folder"))?;
        let step = |what: &str| format!("{what} {}", dir.display());
        match DirBuilder::new().mode(0o700).create(&dir) {
            Err(error) if error.kind() != ErrorKind::AlreadyExists => {
                return Err(StoreError::io(step("making"))(error));
            }
            _ => {}
        }
        let flags = libc::O_DIRECTORY | libc::O_NOFOLLOW;
        let open = OpenOptions::new().read(true).custom_flags(flags).open(&dir);
        let handle = open.map_err(StoreError::io(step("opening")))?;
        let metadata = handle.metadata().map_err(StoreError::io(step("looking at")))?;
        let ours = [rustix::process::geteuid().as_raw(), 0].contains(&metadata.uid());
        if !ours || metadata.permissions().mode() & 0o022 != 0 {
            let why = io::Error::new(ErrorKind::PermissionDenied, "others own this folder, or can change it");
            return Err(StoreError::io(step("opening"))(why));
        }
        Ok(Self { dir, handle })
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    pub(super) fn path(&self, id: NamespaceId, kind: Kind) -> PathBuf {
        self.dir.join(format!("{id}.{}", kind.suffix()))
    }

    /// Opens a file that exists. It must be an ordinary one: a link or a pipe is refused.
    pub(super) fn open_file(&self, path: &Path) -> Result<File, StoreError> {
        let open = || {
            let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
            let file = OpenOptions::new().read(true).write(true).custom_flags(flags).open(path)?;
            match file.metadata()?.is_file() {
                true => Ok(file),
                false => Err(io::Error::new(ErrorKind::InvalidInput, "this is not an ordinary file")),
            }
        };
        open().map_err(StoreError::io(format!("opening {}", path.display())))
    }

    /// Makes a file with this content, or empties one that a crash has left.
    pub(super) fn make_file(&self, path: &Path, content: &[u8], synchronise: bool) -> Result<(), StoreError> {
        let make = || {
            remove_if_there(path)?;
            let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
            file.write_all(content)?;
            match synchronise {
                true => file.sync_all(),
                false => Ok(()),
            }
        };
        make().map_err(StoreError::io(format!("making {}", path.display())))
    }

    pub(super) fn rename(&self, from: &Path, to: &Path) -> Result<(), StoreError> {
        fs::rename(from, to).map_err(StoreError::io(format!("renaming {}", from.display())))
    }

    pub(super) fn remove(&self, path: &Path) -> Result<(), StoreError> {
        remove_if_there(path).map_err(StoreError::io(format!("removing {}", path.display())))
    }

    /// Makes names durable, if `really` is set.
    pub(super) fn synchronise(&self, really: bool) -> Result<(), StoreError> {
        match really {
            true => self.handle.sync_all().map_err(StoreError::io(format!("synchronising {}", self.dir.display()))),
            false => Ok(()),
        }
    }

    /// Waits for the store's lock.
    pub(super) fn lock(&self) -> Result<StoreLock, StoreError> {
        let path = self.dir.join("lock");
        let lock = || {
            let mut options = OpenOptions::new();
            options.write(true).create(true).truncate(false).mode(0o600);
            let file = options.custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(&path)?;
            file.lock()?;
            Ok(StoreLock(file))
        };
        lock().map_err(StoreError::io(format!("locking {}", path.display())))
    }

    /// Returns the identity of the store. Makes it if this is a new store.
    pub(super) fn identity(&self, synchronise: bool) -> Result<Identity, StoreError> {
        match self.read_identity() {
            Err(StoreError::Io { cause, .. }) if cause.kind() == ErrorKind::NotFound => {}
            other => return other,
        }
        let value = Incarnation::random();
        let new = self.dir.join(format!("store.new-{value}"));
        self.make_file(&new, &Identity { value, synchronise }.encode(), synchronise)?;
        // of two processes that make the store at once, one wins
        let linked = fs::hard_link(&new, self.identity_path());
        self.remove(&new)?;
        match linked {
            Err(error) if error.kind() != ErrorKind::AlreadyExists => {
                return Err(StoreError::io(format!("making {}", self.identity_path().display()))(error));
            }
            _ => self.synchronise(synchronise)?,
        }
        self.read_identity()
    }

    /// Reads the identity of the store.
    pub(super) fn read_identity(&self) -> Result<Identity, StoreError> {
        let path = self.identity_path();
        let file = self.open_file(&path)?;
        let mut bytes = [0; IDENTITY_BYTES];
        file.read_exact_at(&mut bytes, 0).map_err(StoreError::io(format!("reading {}", path.display())))?;
        match Identity::decode(&bytes) {
            Some(identity) => Ok(identity),
            None => Err(StoreError::Damaged {
                what: path.display().to_string(),
                cause: "it is not what a store of this version has written".into(),
            }),
        }
    }

    /// Gives the store another random value, because it may have lost something.
    pub(super) fn change_identity(&self, synchronise: bool) -> Result<(), StoreError> {
        let _lock = self.lock()?;
        let value = Incarnation::random();
        let new = self.dir.join(format!("store.new-{value}"));
        self.make_file(&new, &Identity { value, synchronise }.encode(), true)?;
        self.rename(&new, &self.identity_path())?;
        self.synchronise(true)
    }

    fn identity_path(&self) -> PathBuf {
        self.dir.join("store")
    }

    /// Lists the folder. `now` decides which ids are not remembered any more.
    ///
    /// # Errors
    /// Returns [`StoreError::TooMany`] if there are more files than a store makes.
    pub(super) fn contents(&self, now: Duration) -> Result<Contents, StoreError> {
        let failed = || StoreError::io(format!("listing {}", self.dir.display()));
        let mut contents = Contents::default();
        let mut pages = Vec::new();
        for (at, entry) in fs::read_dir(&self.dir).map_err(failed())?.enumerate() {
            if at >= MAX_FILES {
                return Err(StoreError::TooMany { what: "files", limit: MAX_FILES });
            }
            let entry = entry.map_err(failed())?;
            let name = entry.file_name();
            let Some((id, kind)) = name.to_str().and_then(split_name) else { continue };
            match kind {
                "table" => contents.namespaces.push(id),
                "pages" => pages.push(id),
                "new" => contents.leftovers.push(entry.path()),
                _ => match remembered_until(kind) {
                    Some(until) if until > now => {
                        let longest = contents.forgotten.entry(id).or_default();
                        *longest = until.max(*longest);
                    }
                    Some(_) => contents.leftovers.push(entry.path()),
                    None => {}
                },
            }
        }
        contents.namespaces.sort_unstable();
        let orphans = pages.iter().filter(|id| contents.namespaces.binary_search(id).is_err());
        contents.leftovers.extend(orphans.map(|&id| self.path(id, Kind::Pages)));
        Ok(contents)
    }

    /// Removes what is of no use any more. The caller has the store's lock.
    pub(super) fn tidy(&self, contents: &Contents) -> Result<(), StoreError> {
        contents.leftovers.iter().try_for_each(|path| self.remove(path))
    }

    /// Remembers `id` until this time. The caller has the store's lock.
    pub(super) fn remember(&self, id: NamespaceId, until: Duration, synchronise: bool) -> Result<(), StoreError> {
        let until = u64::try_from(until.as_nanos().div_ceil(1_000_000)).unwrap_or(u64::MAX);
        self.make_file(&self.dir.join(format!("{id}.forgotten-{until:x}")), &[], synchronise)?;
        self.synchronise(synchronise)
    }
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

impl Identity {
    fn encode(self) -> [u8; IDENTITY_BYTES] {
        let mut bytes = [0; IDENTITY_BYTES];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        bytes[12..28].copy_from_slice(&self.value.0);
        bytes[28] = self.synchronise.into();
        let checksum = crc32fast::hash(&bytes[..29]);
        bytes[29..].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8; IDENTITY_BYTES]) -> Option<Self> {
        let mut value = Incarnation([0; 16]);
        value.0.copy_from_slice(&bytes[12..28]);
        let identity = Self { value, synchronise: bytes[28] != 0 };
        (*bytes == identity.encode()).then_some(identity)
    }
}

/// Splits a name into the id and what follows it.
fn split_name(name: &str) -> Option<(NamespaceId, &str)> {
    let (id, kind) = name.split_once('.')?;
    let canonical = id.len() == 32 && id.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    let id = u128::from_str_radix(id, 16).ok().filter(|_| canonical)?;
    Some((NamespaceId(id.to_be_bytes()), kind))
}

fn remembered_until(kind: &str) -> Option<Duration> {
    let digits = kind.strip_prefix("forgotten-")?;
    u64::from_str_radix(digits, 16).ok().map(Duration::from_millis)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_that_a_store_makes_are_looked_at() {
        let id = NamespaceId([0xab; 16]);
        assert_eq!(split_name(&format!("{id}.table")), Some((id, "table")));
        assert_eq!(split_name(&format!("{id}.forgotten-ff")), Some((id, "forgotten-ff")));
        for bad in ["store", "lock", ".table", "+b.table", &format!("A{}.table", "b".repeat(31)), &"a".repeat(40)] {
            assert_eq!(split_name(bad), None, "{bad}");
        }
        assert_eq!(remembered_until("forgotten-ff"), Some(Duration::from_millis(255)));
        assert_eq!(remembered_until("forgotten-"), None);
        assert_eq!(remembered_until("forgotten-1ffffffffffffffff"), None);
    }

    #[test]
    fn a_damaged_identity_is_refused() {
        for synchronise in [false, true] {
            let identity = Identity { value: Incarnation([7; 16]), synchronise };
            assert_eq!(Identity::decode(&identity.encode()), Some(identity));
            for at in 0..IDENTITY_BYTES {
                let mut bytes = identity.encode();
                bytes[at] ^= 1;
                assert_eq!(Identity::decode(&bytes), None, "byte {at}");
            }
        }
    }

    #[test]
    fn what_cannot_be_removed_is_an_error_and_what_is_not_there_is_none() {
        let folder = tempfile::tempdir().unwrap();
        remove_if_there(&folder.path().join("none")).unwrap();
        assert!(remove_if_there(folder.path()).is_err());
    }

    #[test]
    fn a_folder_is_no_link_and_its_lock_neither() {
        let parent = tempfile::tempdir().unwrap();
        let (real, link) = (parent.path().join("real"), parent.path().join("link"));
        let folder = Folder::open(&real).unwrap();
        std::os::unix::fs::symlink(&real, &link).unwrap();
        assert!(Folder::open(&link).is_err());
        fs::write(parent.path().join("file"), "").unwrap();
        assert!(Folder::open(&parent.path().join("file")).is_err());
        let victim = parent.path().join("victim");
        std::os::unix::fs::symlink(&victim, real.join("lock")).unwrap();
        assert!(folder.lock().is_err());
        assert!(!victim.exists());
    }
}
