//! Unix socket connections.

use std::{
    fs, io,
    os::fd::AsFd,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use migration_core::{
    channel::{Channel, Connector, Listener, Room},
    wire::LaneKind,
};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use socket2::{Domain, SockAddr, SockRef, Socket, Type};

use crate::{
    Address, ConnectOptions, SocketOptions, StreamChannel,
    accept::{Descriptors, Shortage, accept_within},
    private_socket::{self, identity},
};

/// Opens connections to a Unix socket.
#[derive(Clone, Debug)]
pub struct UnixConnector {
    path: PathBuf,
    options: ConnectOptions,
}

impl UnixConnector {
    /// Makes a connector to the socket at `path`. Nothing is opened yet.
    pub fn new(path: impl Into<PathBuf>, options: ConnectOptions) -> Self {
        Self { path: path.into(), options }
    }

    fn open(&self, timeout: Duration) -> io::Result<StreamChannel> {
        let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
        self.options.socket.apply_unix(SockRef::from(&socket));
        let address = SockAddr::unix(&self.path)?;
        let deadline = Instant::now().checked_add(timeout);
        loop {
            // Connecting blocks only while the listener's backlog is full, and then for the send
            // time-out. A year means no limit, because longer time-outs may overflow.
            let left = deadline.map_or(Duration::MAX, |at| at.saturating_duration_since(Instant::now()));
            socket
                .set_write_timeout(Some(left.clamp(Duration::from_millis(1), Duration::from_secs(365 * 24 * 3600))))?;
            match socket.connect(&address) {
                Ok(()) => break,
                Err(e) if e.kind() == io::ErrorKind::Interrupted && !left.is_zero() => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    let why = format!("the listener did not accept within {timeout:?}");
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
    /// Fails with the error of the operating system, without the path: the caller knows the
    /// [`address`](Connector::address).
    fn connect(&self) -> io::Result<Box<dyn Channel>> {
        self.connect_within(LaneKind::Control, self.options.connect_timeout)
    }

    fn connect_within(&self, _kind: LaneKind, timeout: Duration) -> io::Result<Box<dyn Channel>> {
        match self.open(timeout.min(self.options.connect_timeout)) {
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
/// Only the owner may use the socket file (mode 0600, whatever the umask is), because a peer can
/// replace a VM's memory. The file appears when the socket accepts connections. It is removed when
/// the listener is dropped, unless it has been replaced by then.
#[derive(Debug)]
pub struct UnixListener {
    socket: Socket,
    path: PathBuf,
    /// The device and inode of the socket file.
    file: (u64, u64),
    options: SocketOptions,
    shortage: Shortage,
}

impl UnixListener {
    /// Listens at `path`. A socket file that was left there by a process that has ended is
    /// replaced. `options` apply to each connection.
    ///
    /// # Errors
    /// Fails with `AddrInUse` if a living process listens there, with `AlreadyExists` if something
    /// else than a socket is there, and with errors of the operating system.
    pub fn bind(path: impl Into<PathBuf>, options: SocketOptions) -> io::Result<Self> {
        let path = path.into();
        let named = |e: io::Error| io::Error::new(e.kind(), format!("cannot listen at unix:{}: {e}", path.display()));
        let bound = private_socket::listen(&path).map_err(named)?;
        bound.socket.set_nonblocking(true).map_err(named)?;
        Ok(Self { socket: bound.socket, path, file: bound.file, options, shortage: Shortage::new() })
    }
}

impl UnixListener {
    /// Returns the next connection as a socket, or `None` after `timeout`.
    pub(crate) fn accept_socket(&mut self, timeout: Duration) -> io::Result<Option<Socket>> {
        Ok(accept_within(self.socket.as_fd(), timeout, || self.socket.accept())?.map(|(socket, _)| socket))
    }

    fn next(&mut self, timeout: Duration) -> io::Result<Option<(Socket, SockAddr)>> {
        let socket = &self.socket;
        self.shortage.accept_within(&[socket.as_fd()], timeout, |_| socket.accept())
    }

    fn channel(&self, socket: Socket) -> io::Result<StreamChannel> {
        self.options.apply_unix(SockRef::from(&socket));
        let pid = getsockopt(&socket, PeerCredentials).map_or(0, |credentials| credentials.pid());
        channel(socket, format!("{} (process {pid})", self.address()), &self.options)
    }
}

impl Listener for UnixListener {
    fn accept(&mut self, timeout: Duration) -> io::Result<Option<Box<dyn Channel>>> {
        let deadline = Instant::now().checked_add(timeout);
        let mut left = timeout;
        while let Some((socket, _)) = self.next(left)? {
            match self.channel(socket) {
                Ok(channel) => return Ok(Some(Box::new(channel))),
                // the connection has failed already, so wait for the next one
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

    fn trouble(&mut self) -> Option<io::Error> {
        self.shortage.take()
    }

    fn accept_to_refuse(&mut self) -> Option<Box<dyn Channel>> {
        let socket = &self.socket;
        let (socket, _) = self.shortage.accept_to_refuse(1, |_| socket.accept())?;
        Some(Box::new(self.channel(socket).ok()?))
    }

    fn room(&self) -> Option<Arc<dyn Room>> {
        Some(Arc::new(Descriptors))
    }
}

impl Drop for UnixListener {
    fn drop(&mut self) {
        if identity(&self.path).is_ok_and(|file| file == self.file) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shortage_is_told_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let mut listener = UnixListener::bind(&path, SocketOptions::default()).unwrap();
        let _near = std::os::unix::net::UnixStream::connect(&path).unwrap();
        let none = |_| Err::<(), _>(io::Error::from_raw_os_error(libc::EMFILE));
        let waiting = [listener.socket.as_fd()];
        assert!(listener.shortage.accept_within(&waiting, Duration::MAX, none).unwrap().is_none());
        assert_eq!(listener.trouble().unwrap().raw_os_error(), Some(libc::EMFILE));
        assert!(listener.trouble().is_none());
    }
}
