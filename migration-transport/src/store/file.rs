//! A page store of sparse files.

mod folder;
mod space;
#[cfg(test)]
mod tests;

use std::{
    fmt, fs, iter,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use migration_core::{
    store::{
        Clock, Incarnation, NamespaceId, Owner, PageData, PageStore, PageToGet, PageToPut, Record, StoreError, Stored,
        Urgency, VmNamespace, check_get, check_lease, check_put,
        limits::{MAX_FORGOTTEN, MAX_LEASE, MAX_NAMESPACES, UNSEEN_LEASE},
    },
    vm::VmId,
};

use folder::{Contents, Folder, Kind};
use space::{BYTES_PER_PAGE, Header, Space, runs};

/// The kernel's identifier of the present boot.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
/// How long a header that does not make sense is waited for: a renewal may be in the middle of it.
const HEADER_PATIENCE: Duration = Duration::from_secs(1);

/// How a [`FilePageStore`] works. All users of a store choose the same.
#[derive(Clone, Debug)]
pub struct FilePageStoreOptions {
    /// Most bytes that all pages may take, 4224 for each page; `None` for what the file system has.
    pub limit: Option<u64>,
    /// Whether a put is on the disk when it returns.
    ///
    /// Without this, a crash of the host loses pages, and so the incarnation includes the boot of
    /// this host: it changes with every restart. All users must then run on one host. On others the
    /// incarnation differs, which counts as a loss. The folder records the choice, and is not
    /// opened with another one.
    pub synchronise: bool,
    /// Most namespaces, at most [`MAX_NAMESPACES`].
    pub max_namespaces: usize,
}

impl Default for FilePageStoreOptions {
    fn default() -> Self {
        Self { limit: None, synchronise: true, max_namespaces: MAX_NAMESPACES }
    }
}

/// Keeps pages in sparse files, for several processes, and for several hosts if the files' folder
/// is on a shared file system.
///
/// Each namespace has a sparse file, with page *n* at offset 4096 · *n*, and a table with the
/// trailers. The file system
/// must have sparse files, hard links, and locks (`flock`) that all users see. On NFS, mount
/// without `nolock`.
///
/// A page takes 4224 bytes, and blocks of the table that are partly used. No state is kept in
/// memory, so that processes may come and go, and any of them may crash. If a writer or its host
/// crashes in the middle of a put, pages of that put can be missing: then neither their earlier nor
/// their new content is handed out.
///
/// The folder must belong to the user of this process or to root, and nobody else may be able to
/// change it. Checksums find damage; **they do not stop anyone who can write there from replacing a
/// VM's memory**, and nothing is encrypted: wrap the store in `migration_crypto::Sealed` if that
/// matters.
///
/// The store cannot notice that its folder was replaced by an earlier copy, or that files were
/// removed by hand. Leases run on the clock of the host that asks, so the clocks of the hosts must
/// agree to within a fraction of a lease. A `get` notices its deadline between reads of 1 MiB, and
/// not while the file system blocks. It makes no difference between faults and prefetches: no read
/// waits for another one, and only a page that seems to be missing waits for a put that is under
/// way.
///
/// # Example
///
/// ```
/// use std::time::{Duration, Instant};
///
/// use migration_core::{
///     PAGE_SIZE,
///     store::{Namespace, Owner, PageStore, PageToGet, PageToPut, Purpose, Record, Urgency},
///     vm::VmId,
/// };
/// use migration_transport::{FilePageStore, FilePageStoreOptions};
///
/// # let parent = tempfile::tempdir()?;
/// # let folder = parent.path().join("pages");
/// let store = FilePageStore::open(&folder, "rack-7", FilePageStoreOptions::default())?;
/// // in earnest the name is random: `migration_crypto::random_namespace`
/// let record = Record { vm: VmId([1; 16]), purpose: Purpose::Home, owner: Owner::new("host-7")? };
/// let namespace = Namespace::new([7; 16]).of(record.vm);
/// store.create(namespace.id, &record, Duration::from_secs(60))?;
/// store.put(namespace, 1, &[PageToPut { page: 40, value: &[0x5a; PAGE_SIZE] }])?;
///
/// // another process
/// let store = FilePageStore::open(&folder, "rack-7", FilePageStoreOptions::default())?;
/// let wanted = [PageToGet { page: 40, generation: 1 }];
/// let deadline = Instant::now() + Duration::from_secs(5);
/// store.get(namespace, &wanted, Urgency::Fault, deadline, &mut |page, data| {
///     assert_eq!((page, data.page()), (40, Some(&[0x5a; PAGE_SIZE])));
/// })?;
/// store.forget(namespace)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct FilePageStore {
    name: String,
    folder: Folder,
    options: FilePageStoreOptions,
    clock: Arc<dyn Clock>,
    /// The boot of this host, if data does not survive it.
    boot: Option<[u8; 16]>,
    /// Something was lost and the other users could not be told: this one does nothing any more.
    broken: AtomicBool,
}

impl FilePageStore {
    /// Opens the store in `folder`, which is made with mode 0700 if it does not exist; the folder
    /// that it is in must. `name` is the name under which both sides have configured the store.
    ///
    /// # Errors
    /// Returns [`StoreError::Io`] if the folder cannot be used, belongs to others, or can be
    /// changed by others; [`StoreError::OtherOptions`] if the store was made with another choice of
    /// [`synchronise`](FilePageStoreOptions::synchronise); and [`StoreError::Damaged`] if the
    /// folder holds something else.
    pub fn open(folder: &Path, name: impl Into<String>, options: FilePageStoreOptions) -> Result<Self, StoreError> {
        Self::open_with_clock(folder, name, options, Arc::new(WallClock))
    }

    /// As [`open`](Self::open), with leases that run on `clock`. All users of the store must read
    /// the same clock.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_with_clock(
        folder: &Path,
        name: impl Into<String>,
        options: FilePageStoreOptions,
        clock: Arc<dyn Clock>,
    ) -> Result<Self, StoreError> {
        let boot = match options.synchronise {
            true => None,
            false => Some(boot_id()?),
        };
        let folder = Folder::open(folder)?;
        let made = folder.identity(options.synchronise)?.synchronise;
        if made != options.synchronise {
            let named = |synchronise| if synchronise { "to synchronise" } else { "not to synchronise" };
            let store = folder.dir().display().to_string();
            return Err(StoreError::OtherOptions { store, made: named(made), opened: named(options.synchronise) });
        }
        Ok(Self { name: name.into(), folder, options, clock, boot, broken: AtomicBool::new(false) })
    }

    fn incarnation(&self) -> Result<Incarnation, StoreError> {
        if self.broken.load(Ordering::Relaxed) {
            let why = std::io::Error::other("pages were lost, and the store could not be marked: open it again");
            return Err(StoreError::io(format!("using {}", self.folder.dir().display()))(why));
        }
        let mut incarnation = self.folder.read_identity()?.value;
        // either of them changes the result if it changes
        for (byte, boot) in iter::zip(&mut incarnation.0, self.boot.unwrap_or_default()) {
            *byte ^= boot;
        }
        Ok(incarnation)
    }

    /// Marks the store as one that has lost something. The kernel drops what it could not write to
    /// the disk, also of puts that were acknowledged before, and reports it once.
    fn note_loss(&self, error: StoreError) -> StoreError {
        if self.folder.change_identity(self.options.synchronise).is_err() {
            self.broken.store(true, Ordering::Relaxed);
        }
        error
    }

    /// Makes the files of a namespace. The caller has the store's lock.
    ///
    /// 1. The file for the pages. Without a table it is no namespace, and somebody else's `create`
    ///    removes it.
    /// 2. The table under another name, with its header.
    /// 3. Its right name: from now on the namespace exists, whole.
    fn make(&self, id: NamespaceId, header: &Header) -> Result<(), StoreError> {
        let synchronise = self.options.synchronise;
        let new = self.folder.path(id, Kind::New);
        self.folder.make_file(&self.folder.path(id, Kind::Pages), &[], synchronise)?;
        self.folder.make_file(&new, &header.encode(), synchronise)?;
        self.folder.rename(&new, &self.folder.path(id, Kind::Table))?;
        self.folder.synchronise(synchronise)
    }

    /// Reads the header of a namespace that may be absent.
    fn header(&self, id: NamespaceId) -> Result<Option<Header>, StoreError> {
        let deadline = Instant::now() + HEADER_PATIENCE;
        match Space::open(&self.folder, id).and_then(|space| space.header_of_reader(deadline)) {
            Ok(header) => Ok(Some(header)),
            Err(StoreError::Absent(_)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Changes the header of a namespace in one step.
    fn change_header(&self, namespace: VmNamespace, change: impl FnOnce(&mut Header)) -> Result<(), StoreError> {
        let space = Space::open_to_write(&self.folder, namespace.id)?;
        let mut header = space.header()?;
        header.check_vm(namespace)?;
        change(&mut header);
        space.set_header(&header)
    }

    /// Returns how many bytes there is room for.
    fn find_room(&self) -> Result<u64, StoreError> {
        let shown = || format!("asking for the room of {}", self.folder.dir().display());
        let system = rustix::fs::statvfs(self.folder.dir()).map_err(|errno| StoreError::io(shown())(errno.into()))?;
        let free = system.f_bavail.saturating_mul(system.f_frsize);
        let Some(limit) = self.options.limit else { return Ok(free) };
        let mut used = 0u64;
        for id in self.folder.contents(self.clock.now())?.namespaces {
            // a header that cannot be read does not stop the others
            let pages = self.header(id).ok().flatten().map_or(0, |header| header.pages);
            used = used.saturating_add(pages.saturating_mul(BYTES_PER_PAGE));
        }
        Ok(free.min(limit.saturating_sub(used)))
    }

    /// Compares and replaces pages. The caller's lock on `space` makes this one step.
    ///
    /// 1. What is newer in the store is left out.
    /// 2. The number of pages is written: it may be too large after a crash, never too small.
    /// 3. Values and entries are written, and are on the disk if that was chosen. If writing fails,
    ///    for example because the disk is full, the pages are counted again: repeated attempts do
    ///    not use up the room.
    fn put_locked(
        &self,
        space: &Space,
        vm: VmId,
        generation: u32,
        pages: &[PageToPut<'_>],
        room: u64,
    ) -> Result<Vec<bool>, StoreError> {
        let mut header = space.header()?;
        header.check_vm(VmNamespace { id: space.id(), vm })?;
        let there = space.generations(vm, pages)?;
        let taken: Vec<_> = there.iter().map(|there| there.is_none_or(|there| there <= generation)).collect();
        let new = there.iter().filter(|there| there.is_none()).count() as u64;
        let needed = new * BYTES_PER_PAGE;
        if needed > room {
            return Err(StoreError::NoRoom { needed, room });
        }
        if new > 0 {
            header.pages = header.pages.saturating_add(new);
            space.set_header(&header)?;
        }
        let to_store: Vec<_> = iter::zip(pages, &taken).filter_map(|(&page, &taken)| taken.then_some(page)).collect();
        if let Err(error) = space.write(vm, generation, &to_store) {
            if let Ok(after) = space.generations(vm, pages) {
                let stored = iter::zip(&there, &after).filter(|(before, after)| before.is_none() && after.is_some());
                header.pages = header.pages.saturating_sub(new).saturating_add(stored.count() as u64);
                // if this fails too, more is counted than there is
                let _ = space.set_header(&header);
            }
            return Err(error);
        }
        if self.options.synchronise {
            space.synchronise().map_err(|error| self.note_loss(error))?;
        }
        Ok(taken)
    }

    fn forget_locked(&self, namespace: VmNamespace, contents: &Contents) -> Result<(), StoreError> {
        let now = self.clock.now();
        let id = namespace.id;
        // a damaged header says neither which leases were granted nor which VM it is: nobody can
        // read those pages, and so anybody may remove them
        let lease = match self.header(id) {
            Ok(Some(header)) => {
                header.check_vm(namespace)?;
                header.lease.min(MAX_LEASE)
            }
            Ok(None) => UNSEEN_LEASE,
            Err(_) => MAX_LEASE,
        };
        let until = now.saturating_add(lease);
        if contents.forgotten.get(&id).is_none_or(|&remembered| remembered < until) {
            self.folder.remember(id, until, self.options.synchronise)?;
        }
        // a put that is under way has the lock; those that come after it find that the table is
        // gone
        let space = Space::open_to_write(&self.folder, id);
        self.folder.remove(&self.folder.path(id, Kind::Table))?;
        drop(space);
        self.folder.remove(&self.folder.path(id, Kind::Pages))?;
        self.folder.synchronise(self.options.synchronise)
    }
}

impl PageStore for FilePageStore {
    fn name(&self) -> &str {
        &self.name
    }

    fn room(&self) -> u64 {
        self.find_room().unwrap_or(0)
    }

    fn create(&self, namespace: NamespaceId, record: &Record, lease: Duration) -> Result<Incarnation, StoreError> {
        check_lease(lease)?;
        let now = self.clock.now();
        let _lock = self.folder.lock()?;
        let contents = self.folder.contents(now)?;
        self.folder.tidy(&contents)?;
        if contents.forgotten.contains_key(&namespace) {
            return Err(StoreError::Forgotten(namespace));
        }
        match self.header(namespace)? {
            Some(header) if !header.record.same_namespace(record) => return Err(StoreError::Occupied(namespace)),
            Some(_) => {
                let of = VmNamespace { id: namespace, vm: record.vm };
                self.change_header(of, |header| header.extend_lease(now, lease))?;
            }
            None => {
                let limit = self.options.max_namespaces.min(MAX_NAMESPACES);
                if contents.namespaces.len() >= limit {
                    return Err(StoreError::TooMany { what: "namespaces", limit });
                }
                self.make(namespace, &Header { record: *record, lease, ends: now.saturating_add(lease), pages: 0 })?;
            }
        }
        self.incarnation()
    }

    fn renew(&self, namespace: VmNamespace, owner: Owner, lease: Duration) -> Result<Incarnation, StoreError> {
        check_lease(lease)?;
        let now = self.clock.now();
        self.change_header(namespace, |header| {
            header.extend_lease(now, lease);
            header.record.owner = owner;
        })?;
        self.incarnation()
    }

    fn put(&self, namespace: VmNamespace, generation: u32, pages: &[PageToPut<'_>]) -> Result<Stored, StoreError> {
        check_put(pages)?;
        let room = self.find_room()?;
        let space = Space::open_to_write(&self.folder, namespace.id)?;
        let taken = self.put_locked(&space, namespace.vm, generation, pages, room)?;
        // after the pages were stored, so that a loss before that is noticed
        Ok(Stored { incarnation: self.incarnation()?, taken })
    }

    fn get(
        &self,
        namespace: VmNamespace,
        pages: &[PageToGet],
        _urgency: Urgency,
        deadline: Instant,
        take: &mut dyn FnMut(u64, PageData<'_>),
    ) -> Result<(), StoreError> {
        check_get(pages)?;
        let mut missing = Vec::new();
        let mut space: Option<Space> = None;
        for run in runs(pages, |page| page.page) {
            if Instant::now() >= deadline {
                return Err(StoreError::TimedOut);
            }
            if space.is_none() {
                let open = Space::open(&self.folder, namespace.id)?;
                open.header_of_reader(deadline)?.check_vm(namespace)?;
                space = Some(open);
            }
            if let Some(space) = &space {
                let mut take = |page, value: &[u8]| take(page, PageData::new(value));
                missing.extend(space.read(namespace.vm, &pages[run], deadline, &mut take)?);
            }
        }
        StoreError::left_out(namespace.id, missing)
    }

    fn record(&self, namespace: NamespaceId) -> Result<Option<Record>, StoreError> {
        Ok(self.header(namespace)?.map(|header| header.record))
    }

    fn forget(&self, namespace: VmNamespace) -> Result<(), StoreError> {
        let _lock = self.folder.lock()?;
        let contents = self.folder.contents(self.clock.now())?;
        self.folder.tidy(&contents)?;
        if contents.forgotten.len() >= MAX_FORGOTTEN && !contents.forgotten.contains_key(&namespace.id) {
            return Err(StoreError::TooMany { what: "forgotten ids", limit: MAX_FORGOTTEN });
        }
        self.forget_locked(namespace, &contents)
    }

    fn expired(&self) -> Result<Vec<(NamespaceId, Record)>, StoreError> {
        let now = self.clock.now();
        let mut ended = Vec::new();
        for id in self.folder.contents(now)?.namespaces {
            let header = self.header(id)?.filter(|header| header.ends <= now);
            ended.extend(header.map(|header| (id, header.record)));
        }
        Ok(ended)
    }
}

impl fmt::Debug for FilePageStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FilePageStore")
            .field("name", &self.name)
            .field("folder", &self.folder.dir())
            .field("options", &self.options)
            .finish_non_exhaustive()
    }
}

/// The time of day: the only clock that several hosts, and a host after a restart, have in common.
struct WallClock;

impl Clock for WallClock {
    fn now(&self) -> Duration {
        SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
    }
}

/// Reads the identifier of this boot: a UUID, with hyphens.
fn boot_id() -> Result<[u8; 16], StoreError> {
    let text = fs::read_to_string(BOOT_ID).map_err(StoreError::io(format!("reading {BOOT_ID}")))?;
    let digits: String = text.chars().filter(char::is_ascii_hexdigit).collect();
    match (digits.len(), u128::from_str_radix(&digits, 16)) {
        (32, Ok(id)) => Ok(id.to_be_bytes()),
        _ => Err(StoreError::Damaged { what: BOOT_ID.to_owned(), cause: "this is no UUID".into() }),
    }
}
