//! Byte streams between two hosts, as the engine needs them. migration-transport implements them.

use std::{
    io,
    os::fd::{BorrowedFd, OwnedFd},
    sync::Arc,
    time::{Duration, Instant},
};

use crate::{ram::RamSlice, wire::LaneKind};

/// A connected, reliable, ordered stream of bytes in both directions: a TCP or Unix connection, TLS over one, …
pub trait Channel: Send {
    /// Takes it apart into its directions, which two threads can use at once.
    fn split(self: Box<Self>) -> io::Result<Halves>;

    /// The other end's address, for messages.
    fn peer(&self) -> String;
}

/// The two directions of a [`Channel`], and a way to shut both from a third thread.
pub struct Halves {
    /// What the peer sends.
    pub reader: Box<dyn ReadHalf>,
    /// What the peer receives.
    pub writer: Box<dyn WriteHalf>,
    /// Ends both.
    pub closer: Box<dyn Closer>,
}

/// The receiving direction of a [`Channel`].
pub trait ReadHalf: Send {
    /// Fills all of `buf`.
    ///
    /// # Errors
    /// `UnexpectedEof` when the stream ends first, `TimedOut` when nothing arrived for the idle time-out; any error
    /// ends the lane.
    fn read_exact(&mut self, buf: &mut [u8]) -> io::Result<()>;

    /// Fills all of the guest memory that `slices` name, in order.
    fn read_ram(&mut self, slices: &[RamSlice<'_>]) -> io::Result<()>;

    /// How long a read may go without a byte; `None` for ever.
    fn set_idle_timeout(&mut self, timeout: Option<Duration>) -> io::Result<()>;

    /// Receives exactly `count` open files, as [`WriteHalf::send_files`] sends them.
    ///
    /// # Errors
    /// `InvalidData` when the peer sent another number of them; none stays open then. `Unsupported`, which is what the
    /// default says, when files cannot travel on this channel. Any error ends the lane.
    fn receive_files(&mut self, count: usize) -> io::Result<Vec<OwnedFd>> {
        let _ = count;
        Err(no_files())
    }
}

/// The sending direction of a [`Channel`].
pub trait WriteHalf: Send {
    /// Sends all of `head`, then all of the guest memory that `slices` name, straight from where it lies.
    ///
    /// # Errors
    /// Any error ends the lane; how much was sent is then not known.
    fn write_all(&mut self, head: &[u8], slices: &[RamSlice<'_>]) -> io::Result<()>;

    /// How long a write may go without a byte taken by the peer; `None` for ever.
    fn set_idle_timeout(&mut self, timeout: Option<Duration>) -> io::Result<()>;

    /// Sets the moment at which writes end, although the peer takes bytes: `None` for no such
    /// moment. The idle time-out alone does not end a write to a peer that takes a byte now and
    /// then. A write that is not complete at the deadline, and every later one, fails with
    /// `TimedOut`. A hint: the default does nothing. What wraps a channel passes it on.
    fn set_deadline(&mut self, deadline: Option<Instant>) {
        let _ = deadline;
    }

    /// Returns how long what was sent so far exceeds a limit on the bandwidth: nothing that can wait
    /// is to be written before. Writes that never wait for a limit are how it is exceeded. Zero by
    /// default. What wraps a channel passes it on.
    fn ahead_of_limit(&self) -> Duration {
        Duration::ZERO
    }

    /// From now on, keeps short what is queued on this host behind what is on its way: on another channel over the same
    /// link somebody waits for an answer. A hint; does nothing by default.
    fn keep_queue_short(&mut self) {}

    /// Sends open files to a peer on this machine, which gets descriptors of its own for them. On the wire they take a
    /// byte for every [`FILES_PER_BYTE`] of them, whose value is how many go with it.
    ///
    /// # Errors
    /// `Unsupported`, which is what the default says, when files cannot travel on this channel. Any error ends the lane.
    fn send_files(&mut self, files: &[BorrowedFd<'_>]) -> io::Result<()> {
        let _ = files;
        Err(no_files())
    }
}

/// As many open files travel with one byte: the kernel's limit for a message.
pub const FILES_PER_BYTE: usize = 253;

fn no_files() -> io::Error {
    io::Error::new(io::ErrorKind::Unsupported, "open files travel only over a Unix socket")
}

/// Ends a [`Channel`] from any thread: blocked reads and writes return at once with an error.
pub trait Closer: Send + Sync {
    /// Shuts both directions. May be called more than once.
    fn close(&self);
}

/// Opens channels to one destination: the first for control, further ones as lanes, and again after a link loss.
pub trait Connector: Send + Sync {
    /// Opens a channel, or gives up after the connect time-out.
    fn connect(&self) -> io::Result<Box<dyn Channel>>;

    /// Opens a channel that will carry a lane of this kind. What limits or orders traffic can tell by it which
    /// channels must not wait behind others.
    fn connect_as(&self, _kind: LaneKind) -> io::Result<Box<dyn Channel>> {
        self.connect()
    }

    /// As [`connect_as`](Self::connect_as), but gives up after `timeout` if that is shorter than the time-outs of the connector:
    /// a connection that was lost is looked for again and again, and no attempt may hold up the next one. The default has only the
    /// connector's own time-outs.
    fn connect_within(&self, kind: LaneKind, timeout: Duration) -> io::Result<Box<dyn Channel>> {
        let _ = timeout;
        self.connect_as(kind)
    }

    /// Whether open files can travel on its channels ([`WriteHalf::send_files`]): those of Unix sockets.
    fn carries_files(&self) -> bool {
        false
    }

    /// The destination's address, for messages.
    fn address(&self) -> String;
}

/// Accepts channels at a destination.
pub trait Listener: Send {
    /// Waits for the next channel; `None` when `timeout` passes first.
    ///
    /// # Errors
    /// Only when the listener itself is broken. A connection that fails while it is accepted is skipped.
    fn accept(&mut self, timeout: Duration) -> io::Result<Option<Box<dyn Channel>>>;

    /// Where it listens, in the form in which a source names it.
    fn address(&self) -> String;

    /// Returns the addresses that are bound, in numbers where there are any: a host name in
    /// [`address`](Self::address) may stand for several. Without those it is that one.
    fn bound(&self) -> Vec<String> {
        vec![self.address()]
    }

    /// Why connections that wait could not be accepted since this was last asked, such as a lack of descriptors; `None`, which
    /// is what the default says, when nothing was in the way.
    fn trouble(&mut self) -> Option<io::Error> {
        None
    }

    /// Accepts a connection that waits although [`accept`](Self::accept) has no descriptor for it, by one that is kept for this:
    /// so that its peer can be told why it is refused. It must be dropped before the next call. The default accepts none.
    fn accept_to_refuse(&mut self) -> Option<Box<dyn Channel>> {
        None
    }

    /// What tells other threads whether lanes that are due can be accepted; `None`, which is the default, where that is not
    /// known.
    fn room(&self) -> Option<Arc<dyn Room>> {
        None
    }
}

/// Tells for how many channels a listener has descriptors.
pub trait Room: Send + Sync {
    /// Returns how many of `wanted` further channels can be accepted, as things are: others may take descriptors at any time.
    fn channels(&self, wanted: usize) -> usize;
}
