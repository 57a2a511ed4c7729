//! Channels over connected stream sockets, TCP and Unix alike.

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

/// Bytes that a TCP connection queues beyond what is on its way, when its queue is to be short.
const SHORT_QUEUE: u32 = 128 << 10;

/// A [`Channel`] over a connected stream socket.
///
/// Connectors and listeners of this crate make them; a VMM that was handed a connected socket by its management layer
/// makes one with [`StreamChannel::new`].
///
/// The socket closes when both halves are dropped; the [`Closer`] does not keep it open.
#[derive(Debug)]
pub struct StreamChannel {
    socket: Arc<OwnedFd>,
    peer: String,
    idle: Option<Duration>,
}

impl StreamChannel {
    /// Takes over a connected stream socket, for example a `TcpStream`, a `UnixStream` or one end of a socket pair.
    /// `peer` names the other end in messages. The socket's options stay as they are, but it is made blocking, without
    /// idle time-outs.
    ///
    /// # Errors
    /// `InvalidInput` when it is no stream socket; else what the operating system says.
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

    /// Sets the idle time-out that both halves start with; `None` for ever.
    ///
    /// # Errors
    /// What the operating system says.
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

/// The kernel takes zero for "no time-out", and at most 2^31 ticks make sense.
fn clamp(timeout: Duration) -> Duration {
    timeout.clamp(Duration::from_millis(1), Duration::from_secs(365 * 24 * 3600))
}

/// Gives `EAGAIN`, which on a blocking socket means that its time-out passed, a meaning.
fn explain(error: io::Error, idle: Option<Duration>, what: &str) -> io::Error {
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

/// An error unless it is a Unix socket.
fn carries_files(socket: &OwnedFd) -> io::Result<()> {
    if SockRef::from(socket).domain()? == Domain::UNIX {
        return Ok(());
    }
    Err(io::Error::new(io::ErrorKind::Unsupported, "open files travel only over a Unix socket"))
}

struct StreamReader {
    socket: Arc<OwnedFd>,
    idle: Option<Duration>,
}

impl StreamReader {
    /// Turns what one receiving call gave into the number of bytes to move on by: 0 only after an interruption.
    fn received(&self, result: io::Result<usize>) -> io::Result<usize> {
        match result {
            Ok(0) => Err(closed()),
            Ok(bytes) => Ok(bytes),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => Ok(0),
            Err(e) => Err(explain(e, self.idle, "sent nothing")),
        }
    }
}

impl ReadHalf for StreamReader {
    fn read_exact(&mut self, buf: &mut [u8]) -> io::Result<()> {
        let mut filled = 0;
        while filled < buf.len() {
            // with MSG_WAITALL one call mostly does it; it still returns early at a signal, the end or a time-out
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
            let due = (count - files.len()).min(FILES_PER_BYTE);
            let mut said = [0];
            let (bytes, mut came) = fd_passing::receive_files(self.socket.as_fd(), &mut said, due)
                .map_err(|e| explain(e, self.idle, "sent nothing"))?;
            if bytes == 0 {
                return Err(closed());
            }
            let [said] = said;
            if usize::from(said) != due || came.len() != due {
                let why = format!("{} open files came with a byte of {said} where {due} are due", came.len());
                return Err(io::Error::new(io::ErrorKind::InvalidData, why));
            }
            files.append(&mut came);
        }
        Ok(files)
    }
}

/// Returns the time that a write has until its deadline, if it has one.
///
/// # Errors
/// Of kind `TimedOut`, when the deadline has passed.
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
    /// Sets how long the next call may take: the idle time-out, or what is left until the deadline.
    fn limit_call(&self) -> io::Result<()> {
        let Some(left) = time_left(self.deadline)? else { return Ok(()) };
        let timeout = clamp(self.idle.map_or(left, |idle| idle.min(left)));
        SockRef::from(&self.socket).set_write_timeout(Some(timeout))
    }

    /// Returns what the failure of a call means; `Ok` if the call is to be repeated.
    fn failed(&self, error: io::Error) -> io::Result<()> {
        match error.kind() {
            io::ErrorKind::Interrupted => Ok(()),
            // the idle time-out counts from the last byte taken, and the call may have been cut short
            io::ErrorKind::WouldBlock if self.deadline.is_some_and(|at| Instant::now() >= at) => Ok(()),
            _ => Err(explain(error, self.idle, "took nothing")),
        }
    }
}

impl WriteHalf for StreamWriter {
    fn write_all(&mut self, head: &[u8], slices: &[RamSlice<'_>]) -> io::Result<()> {
        let mut gather = Gather::new(head, slices);
        while gather.remaining() > 0 {
            // The kernel's send time-out covers a whole call. When it passes after part was taken, the call returns
            // that part, and the next call starts a new time-out: only a peer that takes nothing at all times out.
            self.limit_call()?;
            match iovec::send(self.socket.as_fd(), &gather) {
                Ok(0) => return Err(io::Error::new(io::ErrorKind::WriteZero, "the connection takes no more bytes")),
                Ok(bytes) => gather.advance(bytes),
                Err(e) => self.failed(e)?,
            }
        }
        Ok(())
    }

    fn set_deadline(&mut self, deadline: Option<Instant>) {
        if self.deadline.is_some() && deadline.is_none() {
            // calls were limited by what was left of it; fails only where the next write fails too
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
                .map_err(|e| explain(e, self.idle, "took nothing"))?;
        }
        Ok(())
    }

    fn keep_queue_short(&mut self) {
        // refused by sockets other than TCP's, whose buffers are small anyway
        let _ = SockRef::from(&self.socket).set_tcp_notsent_lowat(SHORT_QUEUE);
    }
}

struct StreamCloser {
    socket: Weak<OwnedFd>,
}

impl Closer for StreamCloser {
    fn close(&self) {
        if let Some(socket) = self.socket.upgrade() {
            // fails only when the connection has ended already
            let _ = SockRef::from(&socket).shutdown(std::net::Shutdown::Both);
        }
    }
}
