//! Unix socket connections.

use std::{
    fs::{self, File, Permissions},
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::{FileTypeExt, MetadataExt, PermissionsExt},
    },
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use migration_core::channel::{Channel, Connector, Listener};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use socket2::{Domain, SockAddr, SockRef, Socket, Type};

use crate::{Address, ConnectOptions, SocketOptions, StreamChannel, accept::accept_within};

/// Connections that may wait for [`Listener::accept`]; further ones block until their connect time-out.
const BACKLOG: i32 = 128;

/// Opens connections to a Unix socket.
#[derive(Clone, Debug)]
pub struct UnixConnector {
    path: PathBuf,
    options: ConnectOptions,
}

impl UnixConnector {
    /// A connector to the socket at `path`. Nothing is opened yet.
    pub fn new(path: impl Into<PathBuf>, options: ConnectOptions) -> Self {
        Self { path: path.into(), options }
    }

    fn open(&self) -> io::Result<StreamChannel> {
        let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
        self.options.socket.apply_unix(SockRef::from(&socket));
        let address = SockAddr::unix(&self.path)?;
        let deadline = Instant::now().checked_add(self.options.connect_timeout);
        loop {
            // Connecting blocks only while the listener's backlog is full, and then for the send time-out. A year is
            // as good as for ever, and fits.
            let left = deadline.map_or(Duration::MAX, |at| at.saturating_duration_since(Instant::now()));
            socket
                .set_write_timeout(Some(left.clamp(Duration::from_millis(1), Duration::from_secs(365 * 24 * 3600))))?;
            match socket.connect(&address) {
                Ok(()) => break,
                Err(e) if e.kind() == io::ErrorKind::Interrupted && !left.is_zero() => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    let why = format!("nobody accepted for {:?}", self.options.connect_timeout);
                    return Err(io::Error::new(io::ErrorKind::TimedOut, why));
                }
                Err(e) => return Err(e),
            }
        }
        channel(socket, self.address(), &self.options.socket)
    }
}

impl Connector for UnixConnector {
    /// # Errors
    /// What the operating system says, without the path: the caller has the [`address`](Connector::address).
    fn connect(&self) -> io::Result<Box<dyn Channel>> {
        match self.open() {
            Ok(channel) => Ok(Box::new(channel)),
            Err(e) => Err(io::Error::new(e.kind(), format!("cannot connect: {e}"))),
        }
    }

    fn carries_files(&self) -> bool {
        true
    }

    fn address(&self) -> String {
        Address::Unix(self.path.clone()).to_string()
    }
}

fn channel(socket: Socket, peer: String, options: &SocketOptions) -> io::Result<StreamChannel> {
    let mut channel = StreamChannel::new(socket, peer)?;
    channel.set_idle_timeout(options.idle_timeout)?;
    Ok(channel)
}

/// Accepts connections at a Unix socket.
///
/// The socket file is made for its owner alone (mode 0600, less the umask): whoever connects can replace a VM's
/// memory. It is removed when the listener is dropped, unless something else has taken its place by then.
#[derive(Debug)]
pub struct UnixListener {
    socket: Socket,
    path: PathBuf,
    /// Device and inode of the socket file.
    file: (u64, u64),
    options: SocketOptions,
}

impl UnixListener {
    /// Listens at `path`. A socket file that is left there from a process that has ended is replaced. `options` apply
    /// to each connection.
    ///
    /// # Errors
    /// `AddrInUse` when a living process listens there; `AlreadyExists` when something else than a socket is there;
    /// else what the operating system says.
    pub fn bind(path: impl Into<PathBuf>, options: SocketOptions) -> io::Result<Self> {
        let path = path.into();
        let named = |e: io::Error| io::Error::new(e.kind(), format!("cannot listen at unix:{}: {e}", path.display()));
        let (socket, file) = listen(&path).map_err(named)?;
        Ok(Self { socket, path, file, options })
    }
}

impl UnixListener {
    /// The next connection as a socket, within `timeout`.
    pub(crate) fn accept_socket(&mut self, timeout: Duration) -> io::Result<Option<Socket>> {
        Ok(accept_within(self.socket.as_fd(), timeout, || self.socket.accept())?.map(|(socket, _)| socket))
    }
}

fn listen(path: &Path) -> io::Result<(Socket, (u64, u64))> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    // on Linux a socket's file gets the mode that the socket has when it is bound
    File::from(OwnedFd::from(socket.try_clone()?)).set_permissions(Permissions::from_mode(0o600))?;
    let address = SockAddr::unix(path)?;

    // Two processes that find the same stale file must not both replace it, the second one unlinking the first one's
    // new socket. A lock on the directory, held from the look to the listening, leaves no file behind.
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let directory = File::open(parent)?;
    directory.lock()?;

    if let Err(e) = socket.bind(&address) {
        if e.kind() != io::ErrorKind::AddrInUse {
            return Err(e);
        }
        remove_stale(path, &address)?;
        socket.bind(&address)?;
    }
    socket.listen(BACKLOG)?;
    Ok((socket, identity(path)?))
}

/// Removes the socket file at `path` if nothing listens there.
fn remove_stale(path: &Path, address: &SockAddr) -> io::Result<()> {
    if !fs::symlink_metadata(path)?.file_type().is_socket() {
        return Err(io::Error::new(io::ErrorKind::AlreadyExists, "there is a file that is no socket"));
    }
    let probe = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    probe.set_nonblocking(true)?; // a listener whose backlog is full lives, too
    match probe.connect(address) {
        Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        // whatever else comes of it, even a refusal of access, someone may be there
        _ => Err(io::Error::new(io::ErrorKind::AddrInUse, "another process listens there")),
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let metadata = fs::symlink_metadata(path)?;
    Ok((metadata.dev(), metadata.ino()))
}

impl Listener for UnixListener {
    fn accept(&mut self, timeout: Duration) -> io::Result<Option<Box<dyn Channel>>> {
        let deadline = Instant::now().checked_add(timeout);
        let mut left = timeout;
        while let Some((socket, _)) = accept_within(self.socket.as_fd(), left, || self.socket.accept())? {
            self.options.apply_unix(SockRef::from(&socket));
            let pid = getsockopt(&socket, PeerCredentials).map_or(0, |credentials| credentials.pid());
            match channel(socket, format!("{} (process {pid})", self.address()), &self.options) {
                Ok(channel) => return Ok(Some(Box::new(channel))),
                // it has failed already: the next one
                Err(_) => {
                    left = deadline.map_or(timeout, |at| at.saturating_duration_since(Instant::now()));
                }
            }
        }
        Ok(None)
    }

    fn address(&self) -> String {
        Address::Unix(self.path.clone()).to_string()
    }
}

impl Drop for UnixListener {
    fn drop(&mut self) {
        if identity(&self.path).is_ok_and(|file| file == self.file) {
            let _ = fs::remove_file(&self.path);
        }
    }
}
