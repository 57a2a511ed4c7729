//! Channels over connected stream sockets, TCP and Unix.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    sync::{Arc, Weak},
    time::{Duration, Instant},
};

use migration_core::{
    RamSlice,
    channel::{Channel, Closer, FILES_PER_BYTE, Halves, ReadHalf, WriteHalf},
};
use nix::sys::socket::{MsgFlags, recv};
use socket2::{Domain, SockRef, Type};

use crate::{fd_passing, gather::Gather, iovec};

#[cfg(test)]
mod file_tests;

/// The largest number of unsent bytes that a TCP connection queues if its queue should be short.
const SHORT_QUEUE_BYTES: u32 = 128 << 10;

/// A [`Channel`] over a connected stream socket.
///
/// The connectors and listeners of this crate make them. A VMM that gets a connected socket from
/// its management layer can make one with [`StreamChannel::new`].
///
/// The socket closes when both halves are dropped; the [`Closer`] does not keep it open.
#[derive(Debug)]
pub struct StreamChannel {
    socket: Arc<OwnedFd>,
    peer: String,
    idle: Option<Duration>,
}

impl StreamChannel {
    /// Makes a channel of a connected stream socket, for example a `TcpStream`, a `UnixStream` or
    /// one end of a socket pair. `peer` names the other end in messages. The socket's options stay
    /// as they are, except that it becomes blocking and has no idle time-outs.
    ///
    /// # Errors
    /// Fails with `InvalidInput` if it is no stream socket, and with errors of the operating
    /// system.
    pub fn new(socket: impl Into<OwnedFd>, peer: impl Into<String>) -> io::Result<Self> {
        let socket = socket.into();
        let reference = SockRef::from(&socket);
        if reference.r#type()? != Type::STREAM {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a stream socket"));
        }
        reference.set_nonblocking(false)?;
        let mut channel = Self { socket: Arc::new(socket), peer: peer.into(), idle: None };
        channel.set_idle_timeout(None)?;
        Ok(channel)
    }

    /// Sets the initial idle time-out of both halves. `None` is no time-out.
    ///
    /// # Errors
    /// Fails with the error of the operating system.
    pub fn set_idle_timeout(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        let socket = SockRef::from(&self.socket);
        self.idle = timeout.map(clamp);
        socket.set_read_timeout(self.idle)?;
        socket.set_write_timeout(self.idle)
    }
}

impl AsFd for StreamChannel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Channel for StreamChannel {
    fn split(self: Box<Self>) -> io::Result<Halves> {
        let closer = StreamCloser { socket: Arc::downgrade(&self.socket) };
        let reader = StreamReader { socket: Arc::clone(&self.socket), idle: self.idle };
        let writer = StreamWriter { socket: self.socket, idle: self.idle, deadline: None };
        Ok(Halves { reader: Box::new(reader), writer: Box::new(writer), closer: Box::new(closer) })
    }

    fn peer(&self) -> String {
        self.peer.clone()
    }
}

/// Limits a time-out to what the kernel accepts: zero would mean no time-out, and there are at most
/// 2^31 ticks.
fn clamp(timeout: Duration) -> Duration {
    timeout.clamp(Duration::from_millis(1), Duration::from_secs(365 * 24 * 3600))
}

/// Translates `EAGAIN`, which on a blocking socket means that its time-out passed.
fn translate_timeout(error: io::Error, idle: Option<Duration>, what: &str) -> io::Error {
    match (error.kind(), idle) {
        (io::ErrorKind::WouldBlock, Some(idle)) => {
            io::Error::new(io::ErrorKind::TimedOut, format!("the peer {what} for {idle:?}"))
        }
        _ => error,
    }
}

fn closed() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "the peer closed the connection")
}

/// Returns an error unless the socket is a Unix socket.
fn carries_files(socket: &OwnedFd) -> io::Result<()> {
    if SockRef::from(socket).domain()? == Domain::UNIX {
        return Ok(());
    }
    Err(io::Error::new(io::ErrorKind::Unsupported, "only channels over Unix sockets carry open files"))
}

struct StreamReader {
    socket: Arc<OwnedFd>,
    idle: Option<Duration>,
}

impl StreamReader {
    /// Translates the result of a receiving call into the number of received bytes. 0 means that
    /// the call was interrupted.
    fn received(&self, result: io::Result<usize>) -> io::Result<usize> {
        match result {
            Ok(0) => Err(closed()),
            Ok(bytes) => Ok(bytes),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => Ok(0),
            Err(e) => Err(translate_timeout(e, self.idle, "sent no data")),
        }
    }
}

impl ReadHalf for StreamReader {
    fn read_exact(&mut self, buf: &mut [u8]) -> io::Result<()> {
        let mut filled = 0;
        while filled < buf.len() {
            // MSG_WAITALL usually needs one call, but returns early after a signal, at the end and
            // after a time-out
            let result = recv(self.socket.as_raw_fd(), &mut buf[filled..], MsgFlags::MSG_WAITALL);
            filled += self.received(result.map_err(io::Error::from))?;
        }
        Ok(())
    }

    fn read_ram(&mut self, slices: &[RamSlice<'_>]) -> io::Result<()> {
        let mut gather = Gather::new(&[], slices);
        while gather.remaining() > 0 {
            gather.advance(self.received(iovec::receive(self.socket.as_fd(), &gather))?);
        }
        Ok(())
    }

    fn set_idle_timeout(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        self.idle = timeout.map(clamp);
        SockRef::from(&self.socket).set_read_timeout(self.idle)
    }

    fn receive_files(&mut self, count: usize) -> io::Result<Vec<OwnedFd>> {
        carries_files(&self.socket)?;
        let mut files = Vec::new();
        while files.len() < count {
            let expected = (count - files.len()).min(FILES_PER_BYTE);
            let mut announced = [0];
            let (bytes, mut received) = fd_passing::receive_files(self.socket.as_fd(), &mut announced, expected)
                .map_err(|e| translate_timeout(e, self.idle, "sent no data"))?;
            if bytes == 0 {
                return Err(closed());
            }
            let [announced] = announced;
            if usize::from(announced) != expected || received.len() != expected {
                let reason = format!(
                    "the peer announced {announced} open files and sent {}, but {expected} are expected",
                    received.len()
                );
                return Err(io::Error::new(io::ErrorKind::InvalidData, reason));
            }
            files.append(&mut received);
        }
        Ok(files)
    }
}

/// Returns the time that a write has until its deadline, if it has one.
///
/// # Errors
/// Fails with `TimedOut` if the deadline has passed.
pub(crate) fn time_left(deadline: Option<Instant>) -> io::Result<Option<Duration>> {
    let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
    if left == Some(Duration::ZERO) {
        return Err(io::Error::new(io::ErrorKind::TimedOut, "the time for the write is over"));
    }
    Ok(left)
}

struct StreamWriter {
    socket: Arc<OwnedFd>,
    idle: Option<Duration>,
    deadline: Option<Instant>,
}

impl StreamWriter {
    /// Limits the time of the next call to the idle time-out or to the time until the deadline.
    fn limit_call(&self) -> io::Result<()> {
        let Some(left) = time_left(self.deadline)? else { return Ok(()) };
        let timeout = clamp(self.idle.map_or(left, |idle| idle.min(left)));
        SockRef::from(&self.socket).set_write_timeout(Some(timeout))
    }

    /// Translates the error of a sending call. Returns `Ok` if the call should be repeated.
    fn failed(&self, error: io::Error) -> io::Result<()> {
        match error.kind() {
            io::ErrorKind::Interrupted => Ok(()),
            // the next turn of the loop reports the passed deadline
            io::ErrorKind::WouldBlock if self.deadline.is_some_and(|at| Instant::now() >= at) => Ok(()),
            _ => Err(translate_timeout(error, self.idle, "accepted no data")),
        }
    }
}

impl WriteHalf for StreamWriter {
    fn write_all(&mut self, head: &[u8], slices: &[RamSlice<'_>]) -> io::Result<()> {
        let mut gather = Gather::new(head, slices);
        while gather.remaining() > 0 {
            // The kernel's send time-out covers a whole call. If it passes after a part was sent,
            // the call returns that part, and the next call starts a new time-out. So the write
            // times out only if the peer accepts nothing at all.
            self.limit_call()?;
            match iovec::send(self.socket.as_fd(), &gather) {
                Ok(0) => return Err(io::Error::new(io::ErrorKind::WriteZero, "the connection accepts no more bytes")),
                Ok(bytes) => gather.advance(bytes),
                Err(e) => self.failed(e)?,
            }
        }
        Ok(())
    }

    fn set_deadline(&mut self, deadline: Option<Instant>) {
        if self.deadline.is_some() && deadline.is_none() {
            // undo the limit of earlier calls; an error is ignored, because the next write then
            // fails, too
            let _ = SockRef::from(&self.socket).set_write_timeout(self.idle);
        }
        self.deadline = deadline;
    }

    fn set_idle_timeout(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        self.idle = timeout.map(clamp);
        SockRef::from(&self.socket).set_write_timeout(self.idle)
    }

    fn send_files(&mut self, files: &[BorrowedFd<'_>]) -> io::Result<()> {
        carries_files(&self.socket)?;
        for files in files.chunks(FILES_PER_BYTE) {
            let count = u8::try_from(files.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
            fd_passing::send_files(self.socket.as_fd(), &[count], files)
                .map_err(|e| translate_timeout(e, self.idle, "accepted no data"))?;
        }
        Ok(())
    }

    fn keep_queue_short(&mut self) {
        // ignored: other sockets than TCP refuse it, and their buffers are small anyway
        let _ = SockRef::from(&self.socket).set_tcp_notsent_lowat(SHORT_QUEUE_BYTES);
    }
}

struct StreamCloser {
    socket: Weak<OwnedFd>,
}

impl Closer for StreamCloser {
    fn close(&self) {
        if let Some(socket) = self.socket.upgrade() {
            // ignored: fails only if the connection has ended already
            let _ = SockRef::from(&socket).shutdown(std::net::Shutdown::Both);
        }
    }
}
