//! Listening Unix sockets that only their owner can use.

#[cfg(test)]
mod tests;

use std::{
    ffi::{OsStr, OsString},
    fs::{self, File, OpenOptions, Permissions, TryLockError},
    hash::{BuildHasher as _, Hasher as _, RandomState},
    io::{self, ErrorKind},
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::{
            ffi::OsStrExt as _,
            fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _},
            net,
        },
    },
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use rustix::{
    fs::{CWD, RenameFlags, renameat_with},
    io::Errno,
    process::geteuid,
};
use socket2::{Domain, SockAddr, Socket, Type};

use crate::UNIX_PATH_MAX;

/// The number of connections that may wait to be accepted. Further ones block until their connect
/// time-out.
const BACKLOG: i32 = 128;
/// The mode of a socket file. Only the owner and root may connect.
const MODE: u32 = 0o600;
/// The longest time to wait for the lock. Another process of this user needs it only for a moment.
const LOCK_TIMEOUT: Duration = Duration::from_secs(10);
const RETRY: Duration = Duration::from_millis(2);
/// The number of attempts with a name that other processes take or release at the same time.
const ATTEMPTS: usize = 64;

/// A listening socket, and the device and inode of its file.
pub(crate) struct Bound {
    pub(crate) socket: Socket,
    pub(crate) file: (u64, u64),
}

/// Listens at the path of a Unix socket to which only the caller's user and root can connect.
///
/// The socket's file has mode 0600, whatever the umask is; the umask does not change. The file
/// appears under its name when the socket accepts connections. A socket file that was left there by
/// a process that has ended is replaced.
///
/// The socket is bound to an unpredictable name in the same folder and then renamed, so that files
/// of other users in the folder do not interfere. (Tools such as `ss` show the name to which it was
/// bound, `.NAME.` and some digits.) A lock is needed only while a socket file is replaced. It is a
/// file `.NAME.lock` with mode 0600, so that no other user can hold it.
///
/// # Errors
/// - [`ErrorKind::AddrInUse`] if a living process listens there,
/// - [`ErrorKind::AlreadyExists`] if something else than a socket is there,
/// - [`ErrorKind::TimedOut`] if another process of this user holds the lock for 10 s,
/// - errors of the operating system.
///
/// After an error no file is left.
pub fn listen_private(path: &Path) -> io::Result<net::UnixListener> {
    Ok(OwnedFd::from(listen(path)?.socket).into())
}

pub(crate) fn listen(path: &Path) -> io::Result<Bound> {
    // the path itself must be short enough for those who connect
    SockAddr::unix(path)?;
    let name = path.file_name().ok_or_else(|| io::Error::new(ErrorKind::InvalidInput, "not a file's path"))?;
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    // on Linux a socket's file gets the mode that the socket has when it is bound, less the umask
    File::from(OwnedFd::from(socket.try_clone()?)).set_permissions(Permissions::from_mode(MODE))?;
    let unnamed = Unnamed::bind(&socket, path, name)?;
    socket.listen(BACKLOG)?;
    let file = unnamed.file;
    unnamed.rename(path)?;
    Ok(Bound { socket, file })
}

/// Returns device and inode of the file at `path`, without following a link.
pub(crate) fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let metadata = fs::symlink_metadata(path)?;
    Ok((metadata.dev(), metadata.ino()))
}

/// The file of a socket that is not renamed to its final name yet. It is removed when dropped.
struct Unnamed {
    path: PathBuf,
    file: (u64, u64),
}

impl Unnamed {
    /// Binds the socket in the folder of `path`. Binding creates the file, and fails if the name
    /// exists, also as a link.
    fn bind(socket: &Socket, path: &Path, name: &OsStr) -> io::Result<Self> {
        for _ in 0..ATTEMPTS {
            let unnamed = path.with_file_name(unnamed(path, name));
            match bind(socket, &unnamed) {
                Ok(()) => {}
                Err(error) if error.kind() == ErrorKind::AddrInUse => continue,
                Err(error) => return Err(error),
            }
            let unnamed = Self { file: identity(&unnamed)?, path: unnamed };
            // the umask may have removed permissions of the owner
            if fs::symlink_metadata(&unnamed.path)?.mode() & 0o7777 != MODE {
                fs::set_permissions(&unnamed.path, Permissions::from_mode(MODE))?;
            }
            return Ok(unnamed);
        }
        Err(io::Error::new(ErrorKind::AddrInUse, format!("{ATTEMPTS} names in its folder are taken")))
    }

    fn rename(self, path: &Path) -> io::Result<()> {
        // Two processes that find the same stale file must not both replace it, because the second
        // one would remove the new socket of the first one. So a process takes the lock before it
        // removes a file. A process that finds the name free needs no lock.
        let mut lock = None;
        for _ in 0..ATTEMPTS {
            match rename_if_free(&self.path, path) {
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                    if lock.is_none() {
                        lock = Lock::take(path, LOCK_TIMEOUT)?;
                    }
                    remove_stale(path)?;
                }
                done => return done,
            }
        }
        Err(io::Error::new(ErrorKind::AddrInUse, "other processes try to listen there at the same time"))
    }
}

impl Drop for Unnamed {
    fn drop(&mut self) {
        if identity(&self.path).is_ok_and(|file| file == self.file) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// A lock for the replacement of a socket file, which only processes of this user can hold.
struct Lock {
    path: PathBuf,
    file: File,
}

impl Lock {
    /// Waits for the lock, for `patience` at most. Returns `None` if another user has put something else at its path. Then
    /// two processes of this user that find a stale socket at the very same moment may replace each
    /// other's socket.
    fn take(socket: &Path, patience: Duration) -> io::Result<Option<Self>> {
        let mut name = OsString::from(".");
        name.push(socket.file_name().unwrap_or_default());
        name.push(".lock");
        let path = socket.with_file_name(name);
        let deadline = Instant::now() + patience;
        loop {
            let mut options = OpenOptions::new();
            options
                .create(true)
                .truncate(false)
                .write(true)
                .mode(MODE)
                .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
            let Ok(file) = options.open(&path) else { return Ok(None) };
            let found = file.metadata()?;
            let ours = found.is_file() && found.uid() == geteuid().as_raw() && found.nlink() <= 1;
            if !ours || found.mode() & 0o077 != 0 {
                return Ok(None);
            }
            match file.try_lock() {
                Ok(()) if identity(&path).is_ok_and(|there| there == (found.dev(), found.ino())) => {
                    return Ok(Some(Self { path, file }));
                }
                // the last owner of the lock has removed the file
                Ok(()) => {}
                Err(TryLockError::WouldBlock) if Instant::now() < deadline => thread::sleep(RETRY),
                Err(TryLockError::WouldBlock) => {
                    let why =
                        format!("another process has held the lock (flock) of {} for {patience:?}", path.display());
                    return Err(io::Error::new(ErrorKind::TimedOut, why));
                }
                Err(TryLockError::Error(error)) => return Err(error),
            }
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // still locked, so a process that waits for the lock finds out that the file has no name
        // any more
        let _ = fs::remove_file(&self.path);
        let _ = self.file.unlock();
    }
}

/// Returns an unpredictable name for a file in the folder of `path`. It contains `name`, so that
/// people can recognize it, unless that makes it too long.
fn unnamed(path: &Path, name: &OsStr) -> OsString {
    let digits = RandomState::new().build_hasher().finish() as u32;
    let mut long = OsString::from(".");
    long.push(name);
    long.push(format!(".{digits:08x}"));
    // such a path is also shorter than the longest name of a file, 255 bytes
    let fits = path.with_file_name(&long).as_os_str().len() <= UNIX_PATH_MAX;
    if fits { long } else { format!(".{digits:08x}").into() }
}

fn bind(socket: &Socket, path: &Path) -> io::Result<()> {
    if path.as_os_str().len() <= UNIX_PATH_MAX {
        return socket.bind(&SockAddr::unix(path)?);
    }
    // a short name in a folder whose path leaves no room for it: reach the folder through its
    // descriptor
    let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(ErrorKind::InvalidInput.into());
    };
    let folder = OpenOptions::new().read(true).custom_flags(libc::O_DIRECTORY | libc::O_PATH).open(folder)?;
    let short = Path::new("/proc/self/fd").join(folder.as_raw_fd().to_string());
    if !short.exists() {
        let why =
            format!("the path of its folder is too long without /proc ({} bytes)", path.as_os_str().as_bytes().len());
        return Err(io::Error::new(ErrorKind::InvalidInput, why));
    }
    socket.bind(&SockAddr::unix(short.join(name))?)
}

/// Renames a socket's file, unless the new name exists.
fn rename_if_free(from: &Path, to: &Path) -> io::Result<()> {
    match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        Ok(()) => Ok(()),
        // if the file system cannot do that, use a hard link
        Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) => {
            fs::hard_link(from, to)?;
            fs::remove_file(from)
        }
        Err(error) => Err(error.into()),
    }
}

/// Removes the socket file at `path` if no process listens there.
fn remove_stale(path: &Path) -> io::Result<()> {
    let found = match fs::symlink_metadata(path) {
        Ok(found) => found,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    if !found.file_type().is_socket() {
        return Err(io::Error::new(ErrorKind::AlreadyExists, "the file there is no socket"));
    }
    let in_use = || io::Error::new(ErrorKind::AddrInUse, "another process listens there");
    let probe = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    probe.set_nonblocking(true)?; // a listener whose backlog is full lives, too
    match probe.connect(&SockAddr::unix(path)?) {
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => {}
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        // after any other result, even a refused access, a process may be listening
        _ => return Err(in_use()),
    }
    // Without the lock, another process may have replaced the file by now, so check which file was
    // moved.
    let name = path.file_name().unwrap_or_default();
    let taken = path.with_file_name(unnamed(path, name));
    match rename_if_free(path, &taken) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        done => done?,
    }
    if identity(&taken)? == (found.dev(), found.ino()) {
        return fs::remove_file(&taken);
    }
    // the socket of a living process, which is moved back
    if rename_if_free(&taken, path).is_err() {
        // if that fails, a third process has taken the name
        let _ = fs::remove_file(&taken);
    }
    Err(in_use())
}
