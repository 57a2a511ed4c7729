//! Files that appear complete or not at all, and files that are opened without trusting who created
//! them.

#[cfg(test)]
mod tests;

use std::{
    ffi::{OsStr, OsString},
    fs::{File, OpenOptions},
    hash::{BuildHasher as _, Hasher as _, RandomState},
    io::{self, ErrorKind},
    os::unix::fs::OpenOptionsExt as _,
    path::{self, Path, PathBuf},
};

use rustix::{
    fs::{
        AtFlags, FileType, FlockOperation, Mode, OFlags, Stat, fchmod, flock, fstat, openat, renameat, statat, unlinkat,
    },
    io::Errno,
    process::geteuid,
};

use crate::file_errors::{at, damaged};

/// The mode of files with a guest's memory or state.
const PRIVATE: Mode = Mode::RUSR.union(Mode::WUSR);
/// The mode of files that everyone may read, less the umask.
const SHARED: Mode = PRIVATE.union(Mode::RGRP).union(Mode::WGRP).union(Mode::ROTH).union(Mode::WOTH);
/// The number of names that are tried for the unfinished file. More than a few are taken only if
/// somebody interferes on purpose.
const MAX_NAMES: usize = 64;

/// A new file that gets its name when it is complete. Until then an older file of that name stays
/// unchanged.
///
/// The data goes to an unfinished file in the same folder, `NAME.new`. [`commit`](Self::commit)
/// writes it to the disk and renames it. If the object is dropped before that, the unfinished file
/// is removed.
///
/// This is safe even in a folder in which other users may create files:
///
/// - The unfinished file is created exclusively. If another user has put something at `NAME.new` (a
///   file, a hard link, a symbolic link, a FIFO), it is neither opened for writing nor removed. An
///   unpredictable name is used instead.
/// - A `NAME.new` that was left by a crash is removed. It is recognized as a regular file of the
///   caller without further links that no process has locked (`flock`).
/// - The mode is 0600 whatever the umask is, unless [`create_shared`](Self::create_shared) was
///   called.
/// - The folder is opened once. If its path leads elsewhere later, nothing is written there.
///
/// Symbolic links in the path of the folder are followed. A folder in which other users may rename
/// or remove files of the caller (writable for others, without the sticky bit) is never safe.
///
/// # Example
///
/// ```
/// use std::io::Write as _;
///
/// use migration_transport::AtomicFile;
///
/// # let folder = tempfile::tempdir()?;
/// # let path = folder.path().join("dump");
/// let mut new = AtomicFile::create(&path)?;
/// new.file().write_all(b"complete")?;
/// assert!(!path.exists());
/// new.commit()?;
/// assert_eq!(std::fs::read(&path)?, b"complete");
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug)]
pub struct AtomicFile {
    file: File,
    folder: Folder,
    name: OsString,
    /// The name of the unfinished file, or `None` after it was renamed or removed.
    unfinished: Option<OsString>,
}

impl AtomicFile {
    /// Creates the unfinished file for `path`, with mode 0600.
    ///
    /// # Errors
    /// - [`ErrorKind::AlreadyExists`] if something else than a regular file is at `path`, such as a
    ///   symbolic link,
    /// - [`ErrorKind::PermissionDenied`] if the file at `path` belongs to another user, or the
    ///   folder must not be written,
    /// - [`ErrorKind::ResourceBusy`] if a process of this user already writes a new file for
    ///   `path`,
    /// - [`ErrorKind::InvalidInput`] if `path` has no file name,
    /// - errors of the file system.
    pub fn create(path: &Path) -> io::Result<Self> {
        Self::create_with(path, PRIVATE, false)
    }

    /// Creates the unfinished file like [`create`](Self::create), and may replace a file of another
    /// user. For a caller that has checked the existing file.
    pub(crate) fn create_over(path: &Path) -> io::Result<Self> {
        Self::create_with(path, PRIVATE, true)
    }

    /// Creates the unfinished file like [`create`](Self::create), for a file that is no secret. Its
    /// mode is 0666 less the umask, and it may replace a file of another user.
    ///
    /// # Errors
    /// Fails like [`create`](Self::create), except that another user's file is no error.
    pub fn create_shared(path: &Path) -> io::Result<Self> {
        Self::create_with(path, SHARED, true)
    }

    fn create_with(path: &Path, mode: Mode, over_others: bool) -> io::Result<Self> {
        let path = path::absolute(path)?;
        let name =
            path.file_name().ok_or_else(|| at(&path)(io::Error::new(ErrorKind::InvalidInput, "not a file's path")))?;
        let folder = Folder::open(path.parent().unwrap_or(Path::new("/"))).map_err(at(&path))?;
        let replaced = folder.look(name).map_err(at(&path))?;
        if replaced.is_some_and(|found| !is_regular(&found)) {
            return Err(at(&path)(io::Error::new(ErrorKind::AlreadyExists, "the path is not that of a regular file")));
        }
        let (file, unfinished) = folder.create_unfinished(name, mode)?;
        let new = Self { file, name: name.to_owned(), folder, unfinished: Some(unfinished) };
        // the file system decides who owns files of this process (NFS maps root to another user)
        let own = fstat(&new.file).map_err(io::Error::from).map_err(at(&path))?.st_uid;
        match replaced {
            Some(found) if !over_others && found.st_uid != own => {
                let why = format!("the file there belongs to another user (uid {})", found.st_uid);
                Err(at(&path)(io::Error::new(ErrorKind::PermissionDenied, why)))
            }
            _ => Ok(new),
        }
    }

    /// Returns the file, open for reading and writing.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Writes everything to the disk and gives the file its name. After that the file survives a
    /// crash of the host.
    ///
    /// # Errors
    /// Fails with errors of the file system. The unfinished file is removed then, unless only the
    /// last step failed. In that case the file has its name, but it is unknown whether the name
    /// survives a crash of the host.
    pub fn commit(mut self) -> io::Result<()> {
        self.file.sync_all().map_err(at(&self.unfinished_path()))?;
        self.rename()?;
        self.sync_name()
    }

    /// Returns the path of the unfinished file for messages, or that of the finished file after it
    /// was renamed.
    pub(crate) fn unfinished_path(&self) -> PathBuf {
        self.folder.path.join(self.unfinished.as_ref().unwrap_or(&self.name))
    }

    /// Gives the file its name. Replaces a file of that name. A link of that name is itself
    /// replaced.
    pub(crate) fn rename(&mut self) -> io::Result<()> {
        let Some(unfinished) = &self.unfinished else { return Ok(()) };
        let path = self.folder.path.join(&self.name);
        if !self.folder.is_at(unfinished, &self.file)? {
            let why = format!("the unfinished file {} was removed or replaced", unfinished.display());
            return Err(at(&path)(io::Error::new(ErrorKind::NotFound, why)));
        }
        renameat(&self.folder.handle, unfinished, &self.folder.handle, &self.name)
            .map_err(io::Error::from)
            .map_err(at(&path))?;
        self.unfinished = None;
        Ok(())
    }

    /// Writes the names in the folder to the disk.
    pub(crate) fn sync_name(&self) -> io::Result<()> {
        self.folder.handle.sync_all().map_err(at(&self.folder.path))
    }

    /// Removes the unfinished file.
    pub(crate) fn discard(&mut self) {
        if let Some(unfinished) = self.unfinished.take()
            && self.folder.is_at(&unfinished, &self.file).unwrap_or(false)
        {
            // ignored: the next attempt removes the file
            let _ = unlinkat(&self.folder.handle, &unfinished, AtFlags::empty());
        }
    }
}

impl Drop for AtomicFile {
    fn drop(&mut self) {
        self.discard();
    }
}

/// The folder of a file. All names are looked up in this folder, even if its path leads elsewhere
/// later.
#[derive(Debug)]
struct Folder {
    handle: File,
    path: PathBuf,
}

impl Folder {
    fn open(path: &Path) -> io::Result<Self> {
        let handle = OpenOptions::new().read(true).custom_flags(libc::O_DIRECTORY).open(path)?;
        Ok(Self { handle, path: path.to_owned() })
    }

    /// Returns the metadata of the file with this name, without following a link.
    fn look(&self, name: &OsStr) -> io::Result<Option<Stat>> {
        match statat(&self.handle, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(found) => Ok(Some(found)),
            Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Returns whether `name` is the name of `file`.
    fn is_at(&self, name: &OsStr, file: &File) -> io::Result<bool> {
        let open = fstat(file)?;
        Ok(self.look(name)?.is_some_and(|found| (found.st_dev, found.st_ino) == (open.st_dev, open.st_ino)))
    }

    /// Creates and locks the unfinished file for `name`. Returns the file and its name.
    fn create_unfinished(&self, name: &OsStr, mode: Mode) -> io::Result<(File, OsString)> {
        let mut usual = name.to_owned();
        usual.push(".new");
        let mut unfinished = usual.clone();
        for _ in 0..MAX_NAMES {
            let failed = |error: Errno| at(&self.path.join(&unfinished))(error.into());
            let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let file = match openat(&self.handle, &unfinished, flags, mode) {
                Ok(file) => File::from(file),
                Err(Errno::EXIST) if unfinished == usual && self.remove_leftover(&usual)? => continue,
                // another user has taken the name, or `.new` makes it too long
                Err(Errno::EXIST | Errno::NAMETOOLONG) => {
                    unfinished = unpredictable_name();
                    continue;
                }
                Err(error) => return Err(failed(error)),
            };
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                // another process takes the file for a leftover and removes it
                Err(Errno::WOULDBLOCK) => continue,
                Err(error) => {
                    let _ = unlinkat(&self.handle, &unfinished, AtFlags::empty());
                    return Err(failed(error));
                }
            }
            if !self.is_at(&unfinished, &file)? {
                continue;
            }
            if mode == PRIVATE {
                // the umask may have removed permissions of the owner
                fchmod(&file, PRIVATE).map_err(failed)?;
            }
            return Ok((file, unfinished));
        }
        let why = format!("{MAX_NAMES} names for an unfinished file are taken");
        Err(at(&self.path.join(name))(io::Error::new(ErrorKind::AlreadyExists, why)))
    }

    /// Removes an unfinished file of the caller that was left by a crash. Returns whether the name
    /// may be free now.
    ///
    /// # Errors
    /// Fails with [`ErrorKind::ResourceBusy`] if a process still writes the file.
    fn remove_leftover(&self, name: &OsStr) -> io::Result<bool> {
        let ours = |found: &Stat| is_regular(found) && found.st_uid == geteuid().as_raw() && found.st_nlink == 1;
        // check before opening, because opening something else than a file may have effects
        match self.look(name)? {
            None => return Ok(true),
            Some(found) if !ours(&found) => return Ok(false),
            Some(_) => {}
        }
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = match openat(&self.handle, name, flags, Mode::empty()) {
            Ok(file) => File::from(file),
            Err(Errno::NOENT) => return Ok(true),
            Err(_) => return Ok(false),
        };
        let found = fstat(&file)?;
        if !ours(&found) {
            return Ok(false);
        }
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            // whoever can read a file can lock it, so the lock of a file that others may read
            // proves no writer
            Err(Errno::WOULDBLOCK) if found.st_mode & 0o077 != 0 => return Ok(false),
            Err(Errno::WOULDBLOCK) => {
                let why = io::Error::new(ErrorKind::ResourceBusy, "another process is writing this file");
                return Err(at(&self.path.join(name))(why));
            }
            Err(error) => return Err(at(&self.path.join(name))(error.into())),
        }
        if self.is_at(name, &file)? {
            unlinkat(&self.handle, name, AtFlags::empty())
                .map_err(io::Error::from)
                .map_err(at(&self.path.join(name)))?;
        }
        Ok(true)
    }
}

fn is_regular(found: &Stat) -> bool {
    FileType::from_raw_mode(found.st_mode) == FileType::RegularFile
}

/// Returns a name at which nobody else can have put something. Files are created exclusively all
/// the same.
pub(crate) fn unpredictable_name() -> OsString {
    format!(".{:016x}.new", RandomState::new().build_hasher().finish()).into()
}

/// Opens a regular file for reading and returns it with its length in bytes, or `None` if it does
/// not exist. Follows no link at the end of the path, and does not wait for the writer of a FIFO.
///
/// # Errors
/// Fails with [`ErrorKind::InvalidData`] if something else than a regular file is there, and with
/// errors of the file system.
pub(crate) fn open_regular(path: &Path) -> io::Result<Option<(File, u64)>> {
    match OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path) {
        Ok(file) => match file.metadata().map_err(at(path))? {
            found if found.is_file() => Ok(Some((file, found.len()))),
            _ => Err(damaged(path, "not a regular file")),
        },
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) if matches!(error.raw_os_error(), Some(libc::ELOOP | libc::ENXIO)) => {
            Err(damaged(path, "not a regular file"))
        }
        Err(error) => Err(at(path)(error)),
    }
}
