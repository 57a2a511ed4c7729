//! Checkpoints in a directory: they outlive the process that took them.
//!
//! | file | what it holds |
//! |---|---|
//! | `pages-<n>` | an increment: records of a page number, the length of its data (0 for zeros), a CRC-32, the data |
//! | `latest` | the manifest: number and state of the checkpoint, which increments it is made of, a CRC-32 |
//! | `latest.new` | a manifest that is being written |

mod files;
mod owner;
#[cfg(test)]
mod tests;

use std::{
    fs::{self, DirBuilder, File, OpenOptions, Permissions, TryLockError},
    io::{self, ErrorKind, Write as _},
    iter,
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _},
    path::{self, Path, PathBuf},
};

use bytes::Bytes;
use migration_core::{
    PageSet,
    state::MAX_STATE,
    store::{PageContent, VersionStore, check_version_read, not_in_version},
};

use files::{Appender, Files, Increment, Index, MAX_INCREMENTS, Manifest, Place, increment_of};

use crate::file_errors::at;

const MANIFEST: &str = "latest";
const NEW_MANIFEST: &str = "latest.new";

/// Records beyond twice the live pages that may lie on disk before they are merged: small VMs then
/// merge rarely.
const SLACK: u64 = 16384;

/// Keeps the checkpoints of one VM in a directory of its own, on any file system that has `fsync`
/// and atomic renames.
///
/// A checkpoint counts from the moment its [commit](VersionStore::commit) has renamed its manifest.
/// A crash at any moment, of the process or of the host, leaves the one before or the new one,
/// whole; when `commit` returns it is the new one.
///
/// On disk a page takes 4112 bytes and a page of zeros 16. At most twice the live pages and 16384
/// records are kept, in at most 4096 increments; when a commit would leave more, it first writes
/// all live pages into one new increment, which needs room for these once more, and takes as long
/// as that takes. In memory, each live page takes about 40 bytes, and twice that meanwhile. A state
/// may have up to [`MAX_STATE`] bytes.
///
/// The directory must belong to the user of this process or to root. On NFS it may also belong to
/// the user to which the server gives what this process makes there (`root_squash`, `all_squash`):
/// whoever else is mapped to that user can change it.
///
/// The directory is locked (`flock`) while a store has it. CRCs find damage; **they do not stop
/// anyone who can write there from replacing the VM's memory**, and nothing is encrypted.
///
/// After a failed `put` or `commit`, [`discard`](VersionStore::discard) must be called before the
/// next checkpoint can be taken. When it is not known whether a checkpoint reached the disk, the
/// store takes no further one: it still restores the one before, and [`open`](Self::open) finds
/// out.
///
/// # Example
///
/// ```
/// use migration_core::{PAGE_SIZE, store::VersionStore};
/// use migration_transport::DirVersions;
///
/// # let parent = tempfile::tempdir()?;
/// # let dir = parent.path().join("vm-7");
/// let mut store = DirVersions::create(&dir, 1024)?;
/// store.put(3, Some(&[7; PAGE_SIZE]))?;
/// store.put(4, None)?;
/// store.commit(1, b"state".as_slice().into())?;
/// drop(store);
///
/// // another process, later
/// let mut store = DirVersions::open(&dir, 1024)?;
/// assert_eq!(store.latest(), Some((1, b"state".as_slice().into())));
/// let mut pages = Vec::new();
/// store.restore(&mut |page, data| Ok(pages.push((page, data.is_some()))))?;
/// assert_eq!(pages, [(3, true), (4, false)]);
/// store.remove()?;
/// # Ok::<(), std::io::Error>(())
/// ```
pub struct DirVersions {
    dir: PathBuf,
    /// Holds the lock; syncing it makes names durable.
    handle: File,
    pages: u64,
    slack: u64,
    /// Number of the next increment; none is used twice.
    next: u32,
    latest: Option<(u32, Bytes)>,
    /// What the manifest names, ascending.
    increments: Vec<Increment>,
    index: Index,
    staged: Option<Appender>,
    health: Health,
}

impl DirVersions {
    /// Makes `dir`, in a directory that exists, with mode 0700; an empty directory of the same user
    /// is taken as it is, but for its mode. A symbolic link is not followed. The VM has `pages`
    /// pages: no page at or beyond that is taken.
    ///
    /// # Errors
    /// [`ErrorKind::AlreadyExists`] when there is anything in it; [`ErrorKind::ResourceBusy`] when
    /// another store has it; [`ErrorKind::PermissionDenied`] when it belongs to another user than
    /// it may; what the file system says.
    pub fn create(dir: &Path, pages: u64) -> io::Result<Self> {
        let dir = path::absolute(dir)?;
        // only of one that was there already it matters whose it is: the file system decides whom
        // new ones belong to
        let mut made = true;
        match DirBuilder::new().mode(0o700).create(&dir) {
            Ok(()) => dir.parent().map_or(Ok(()), |parent| File::open(parent)?.sync_all()),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                made = false;
                Ok(())
            }
            Err(error) => Err(error),
        }
        .map_err(at(&dir))?;
        let store = Self::lock(dir, pages)?;
        if !made {
            owner::check(&store.handle, &store.dir)?;
        }
        if fs::read_dir(&store.dir)?.next().is_some() {
            return Err(at(&store.dir)(io::Error::new(ErrorKind::AlreadyExists, "the directory is not empty")));
        }
        store.handle.set_permissions(Permissions::from_mode(0o700)).map_err(at(&store.dir))?;
        Ok(store)
    }

    /// Opens what [`create`](Self::create) made, for reading and for further checkpoints, and
    /// checks all of it. If nothing was committed, [`latest`](VersionStore::latest) is `None`.
    /// Deletes what unfinished work left; if the checkpoint is damaged, everything stays as it is.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidData`] when a file is damaged, missing, or holds a page at or beyond
    /// `pages`: the words say which; [`ErrorKind::ResourceBusy`] when another store has the
    /// directory; [`ErrorKind::PermissionDenied`] when it belongs to another user than it may, or
    /// others can change it; what the file system says.
    pub fn open(dir: &Path, pages: u64) -> io::Result<Self> {
        let mut store = Self::lock(path::absolute(dir)?, pages)?;
        let mode = owner::check(&store.handle, &store.dir)?;
        if mode & 0o022 != 0 {
            let why = format!("others can change what is in this directory (mode {mode:04o})");
            return Err(at(&store.dir)(io::Error::new(ErrorKind::PermissionDenied, why)));
        }
        if let Some(manifest) = Manifest::read(&store.dir.join(MANIFEST))? {
            for increment in &manifest.increments {
                increment.scan(&store.dir, pages, &mut store.index)?;
            }
            store.next = manifest.increments.last().map_or(0, |last| last.file).saturating_add(1);
            store.latest = Some((manifest.number, manifest.state));
            store.increments = manifest.increments;
        }
        // its rename may be all that a crash has left behind: it must last before the files of the
        // one before go
        store.sync_names()?;
        store.sweep()?;
        Ok(store)
    }

    /// Deletes the checkpoint and the directory.
    ///
    /// # Errors
    /// What the file system says: also when the directory holds files of others, which stay.
    pub fn remove(mut self) -> io::Result<()> {
        self.staged = None;
        self.increments.clear();
        // the manifest goes first: without it, increments are only unfinished work
        let manifest = self.dir.join(MANIFEST);
        match fs::remove_file(&manifest) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(at(&manifest)(error)),
            _ => self.sync_names()?,
        }
        self.sweep()?;
        fs::remove_dir(&self.dir).map_err(at(&self.dir))
    }

    fn lock(dir: PathBuf, pages: u64) -> io::Result<Self> {
        let flags = libc::O_DIRECTORY | libc::O_NOFOLLOW;
        let handle = OpenOptions::new().read(true).custom_flags(flags).open(&dir).map_err(at(&dir))?;
        handle
            .try_lock()
            .map_err(|error| match error {
                TryLockError::WouldBlock => io::Error::new(ErrorKind::ResourceBusy, "another store has this directory"),
                TryLockError::Error(error) => error,
            })
            .map_err(at(&dir))?;
        Ok(Self {
            dir,
            handle,
            pages,
            slack: SLACK,
            next: 1,
            latest: None,
            increments: Vec::new(),
            index: Index::new(),
            staged: None,
            health: Health::Good,
        })
    }

    fn usable(&self) -> io::Result<()> {
        let why = match self.health {
            Health::Good => return Ok(()),
            Health::StageFailed => "a part of this checkpoint could not be kept: it must be discarded",
            Health::Unknown => "whether the last checkpoint reached the disk is not known: open the directory again",
        };
        Err(at(&self.dir)(io::Error::other(why)))
    }

    fn new_increment(&mut self) -> io::Result<Appender> {
        let file = self.next;
        self.next = file.checked_add(1).ok_or_else(|| at(&self.dir)(io::Error::other("increment numbers ran out")))?;
        Appender::create(&self.dir, file)
    }

    fn append(&mut self, page: u64, data: PageContent<'_>) -> io::Result<()> {
        if page >= self.pages {
            let why = format!("page {page} of a VM with {}", self.pages);
            return Err(at(&self.dir)(io::Error::new(ErrorKind::InvalidInput, why)));
        }
        if self.staged.is_none() {
            self.staged = Some(self.new_increment()?);
        }
        self.staged.as_mut().map_or(Ok(()), |staged| staged.append(page, data))
    }

    /// Returns everything of a commit that can be taken back: the increments and the manifest are
    /// on disk, the latter under its other name. Returns the increments, and the index if it is a
    /// new one for all pages.
    fn prepare(&mut self, number: u32, state: &Bytes) -> io::Result<(Vec<Increment>, Option<Index>)> {
        let mut increments = self.increments.clone();
        let mut live = self.index.len() as u64;
        if let Some(staged) = &mut self.staged {
            staged.flush()?;
            increments.push(staged.increment);
            live += staged.index.keys().filter(|page| !self.index.contains_key(page)).count() as u64;
        }
        let records: u64 = increments.iter().map(|increment| increment.records).sum();
        let mut compacted = None;
        if records > 2 * live + self.slack || increments.len() > MAX_INCREMENTS {
            let mut whole = self.new_increment()?;
            let mut files = Files::new(&self.dir);
            let nothing = Index::new();
            for (page, place) in merged(&self.index, self.staged.as_ref().map_or(&nothing, |staged| &staged.index)) {
                whole.append(page, files.read(page, place)?)?;
            }
            whole.sync()?;
            increments = vec![whole.increment];
            compacted = Some(whole.index);
        } else if let Some(staged) = &mut self.staged {
            staged.sync()?;
        }
        let path = self.dir.join(NEW_MANIFEST);
        let bytes = Manifest::encode(number, &increments, state);
        let write = || {
            // a file that is there is a leftover of a crash, or a link that somebody has put there:
            // it goes, whatever it leads to
            match fs::remove_file(&path) {
                Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?;
            file.write_all(&bytes)?;
            file.sync_all()
        };
        write().map_err(at(&path))?;
        Ok((increments, compacted))
    }

    fn sync_names(&self) -> io::Result<()> {
        self.handle.sync_all().map_err(at(&self.dir))
    }

    /// Deletes what no manifest names. Files that are not of a store are left alone.
    fn sweep(&self) -> io::Result<()> {
        let entries: Vec<_> = fs::read_dir(&self.dir).and_then(Iterator::collect).map_err(at(&self.dir))?;
        for entry in entries {
            let name = entry.file_name();
            let Some(name) = name.to_str() else { continue };
            let named = |file| self.increments.binary_search_by_key(&file, |increment| increment.file).is_ok();
            if name == NEW_MANIFEST || increment_of(name).is_some_and(|file| !named(file)) {
                fs::remove_file(entry.path()).map_err(at(&entry.path()))?;
            }
        }
        Ok(())
    }
}

impl VersionStore for DirVersions {
    fn put(&mut self, page: u64, data: PageContent<'_>) -> io::Result<()> {
        self.usable()?;
        // without this page it would not be a checkpoint, even if the caller went on
        self.append(page, data).inspect_err(|_| self.health = Health::StageFailed)
    }

    /// # Order
    ///
    /// 1. The increment reaches the disk, then the new manifest, then the names of both: what a
    ///    manifest names is there before the manifest can be.
    /// 2. The rename replaces the old manifest in one step. Until it is durable, either may be
    ///    found after a crash, so the files of both stay.
    /// 3. Only when it is durable, what the new one does not name is deleted.
    ///
    /// A failed `fsync` is not tried again: the kernel may have dropped what it could not write,
    /// and then says success.
    fn commit(&mut self, number: u32, state: Bytes) -> io::Result<()> {
        self.usable()?;
        if state.len() > MAX_STATE {
            let why = format!("a state of {} bytes, above the limit of {MAX_STATE}", state.len());
            return Err(at(&self.dir)(io::Error::new(ErrorKind::InvalidInput, why)));
        }
        self.health = Health::StageFailed;
        let (increments, compacted) = self.prepare(number, &state)?;
        self.sync_names()?;
        self.health = Health::Unknown;
        let manifest = self.dir.join(MANIFEST);
        fs::rename(self.dir.join(NEW_MANIFEST), &manifest).map_err(at(&manifest))?;
        self.sync_names()?;
        self.health = Health::Good;

        self.latest = Some((number, state));
        self.increments = increments;
        let staged = self.staged.take();
        if let Some(index) = compacted {
            self.index = index;
            // the checkpoint is safe; what stays behind now, the next compaction or `open` deletes
            let _ = self.sweep();
        } else if let Some(staged) = staged {
            self.index.extend(staged.index);
        }
        Ok(())
    }

    fn discard(&mut self) {
        let staged = self.staged.take().map(Appender::abandon);
        if self.health == Health::StageFailed || (staged.is_some() && self.health == Health::Good) {
            self.health = Health::Good;
            // what stays behind has a number that is not used again; a later sweep deletes it
            let _ = self.sweep();
        }
    }

    fn latest(&self) -> Option<(u32, Bytes)> {
        self.latest.clone()
    }

    fn list(&mut self) -> io::Result<PageSet> {
        let mut set = PageSet::empty(self.pages);
        self.index.keys().for_each(|&page| _ = set.insert(page));
        Ok(set)
    }

    fn read(&mut self, pages: &[u64], take: &mut dyn FnMut(u64, PageContent<'_>) -> io::Result<()>) -> io::Result<()> {
        check_version_read(pages)?;
        let mut files = Files::new(&self.dir);
        for &page in pages {
            let place = *self.index.get(&page).ok_or_else(|| not_in_version(page))?;
            take(page, files.read(page, place)?)?;
        }
        Ok(())
    }

    fn restore(&mut self, take: &mut dyn FnMut(u64, PageContent<'_>) -> io::Result<()>) -> io::Result<()> {
        let mut files = Files::new(&self.dir);
        self.index.iter().try_for_each(|(&page, &place)| take(page, files.read(page, place)?))
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Health {
    Good,
    /// What is staged lacks something.
    StageFailed,
    /// A rename may or may not be on disk, so no file may be deleted.
    Unknown,
}

/// Pages ascending; `new` replaces `old`.
fn merged<'a>(old: &'a Index, new: &'a Index) -> impl Iterator<Item = (u64, Place)> + 'a {
    let mut next = 0;
    iter::from_fn(move || {
        let first = |index: &Index| index.range(next..).next().map(|(&page, &place)| (page, place));
        let found = match (first(old), first(new)) {
            (Some(old), Some(new)) if old.0 < new.0 => old,
            (Some(old), None) => old,
            (_, new) => new?,
        };
        next = found.0 + 1; // below the number of pages
        Some(found)
    })
}
