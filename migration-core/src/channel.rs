//! The byte streams between two hosts that the engine needs. The crate migration-transport
//! implements them.

use std::{
    io,
    os::fd::{BorrowedFd, OwnedFd},
    sync::Arc,
    time::{Duration, Instant},
};

use crate::{ram::RamSlice, wire::LaneKind};

/// A connected, reliable, ordered stream of bytes in both directions, such as a TCP or Unix
/// connection.
pub trait Channel: Send {
    /// Splits the channel into its two directions, which two threads can use at the same time.
    ///
    /// # Errors
    /// Fails if the system runs out of a resource, such as descriptors.
    fn split(self: Box<Self>) -> io::Result<Halves>;

    /// Returns the address of the other end, for messages.
    fn peer(&self) -> String;
}

/// The two directions of a [`Channel`], and a handle that closes both from another thread.
pub struct Halves {
    /// The direction from the peer.
    pub reader: Box<dyn ReadHalf>,
    /// The direction to the peer.
    pub writer: Box<dyn WriteHalf>,
    /// The handle that closes both directions.
    pub closer: Box<dyn Closer>,
}

/// The receiving direction of a [`Channel`].
pub trait ReadHalf: Send {
    /// Fills all of `buf`.
    ///
    /// # Errors
    /// Fails with `UnexpectedEof` if the stream ends first, and with `TimedOut` if nothing arrives
    /// for the idle time-out. Any error ends the lane.
    fn read_exact(&mut self, buf: &mut [u8]) -> io::Result<()>;

    /// Fills all of the guest memory in `slices`, in order.
    ///
    /// # Errors
    /// Fails like [`read_exact`](Self::read_exact).
    fn read_ram(&mut self, slices: &[RamSlice<'_>]) -> io::Result<()>;

    /// Sets the longest time for which a read may wait without receiving a byte. `None` is no
    /// limit.
    ///
    /// # Errors
    /// Fails if the underlying stream refuses the time-out.
    fn set_idle_timeout(&mut self, timeout: Option<Duration>) -> io::Result<()>;

    /// Receives exactly `count` open files that the peer sent with [`WriteHalf::send_files`].
    ///
    /// # Errors
    /// Fails with `InvalidData` if the peer sent another number of files; all of them are closed
    /// then. Fails with `Unsupported`, as the default does, if the channel cannot carry files. Any
    /// error ends the lane.
    fn receive_files(&mut self, count: usize) -> io::Result<Vec<OwnedFd>> {
        let _ = count;
        Err(no_files())
    }
}

/// The sending direction of a [`Channel`].
pub trait WriteHalf: Send {
    /// Sends all of `head`, then all of the guest memory in `slices`, without a copy in user space.
    ///
    /// # Errors
    /// Any error ends the lane. It is then unknown how much was sent.
    fn write_all(&mut self, head: &[u8], slices: &[RamSlice<'_>]) -> io::Result<()>;

    /// Sets the longest time for which a write may wait without the peer accepting a byte. `None`
    /// is no limit.
    ///
    /// # Errors
    /// Fails if the underlying stream refuses the time-out.
    fn set_idle_timeout(&mut self, timeout: Option<Duration>) -> io::Result<()>;

    /// Sets a deadline for writes, or removes it. A write that is not complete at the deadline
    /// fails with `TimedOut`, and so does every later write. The idle time-out alone does not end a
    /// write to a peer that accepts a byte now and then. This is a hint: the default does nothing.
    /// A channel that wraps another passes it on.
    fn set_deadline(&mut self, deadline: Option<Instant>) {
        let _ = deadline;
    }

    /// Returns for how long the caller should not write data that can wait, because more was sent
    /// than a bandwidth limit allows. Urgent writes do not wait for the limit and may exceed it.
    /// The default returns zero. A channel that wraps another passes the call on.
    fn ahead_of_limit(&self) -> Duration {
        Duration::ZERO
    }

    /// Limits the unsent data that the kernel queues for this channel, so that a reply on another
    /// channel of the same link is not delayed. This is a hint: the default does nothing.
    fn keep_queue_short(&mut self) {}

    /// Sends open files to a peer on this host, which receives its own descriptors for them. On the
    /// wire each group of up to [`FILES_PER_BYTE`] files takes one byte, whose value is the number
    /// of files.
    ///
    /// # Errors
    /// Fails with `Unsupported`, as the default does, if the channel cannot carry files. Any error
    /// ends the lane.
    fn send_files(&mut self, files: &[BorrowedFd<'_>]) -> io::Result<()> {
        let _ = files;
        Err(no_files())
    }
}

/// The largest number of open files that travel with one byte. It is the kernel's limit for a
/// message.
pub const FILES_PER_BYTE: usize = 253;

fn no_files() -> io::Error {
    io::Error::new(io::ErrorKind::Unsupported, "only channels over Unix sockets carry open files")
}

/// Closes a [`Channel`] from any thread. Blocked reads and writes return at once with an error.
pub trait Closer: Send + Sync {
    /// Closes both directions. May be called more than once.
    fn close(&self);
}

/// Opens channels to one destination: the control channel, further lanes, and new ones after a lost
/// link.
pub trait Connector: Send + Sync {
    /// Opens a channel.
    ///
    /// # Errors
    /// Fails if the destination cannot be reached within the connector's time-out.
    fn connect(&self) -> io::Result<Box<dyn Channel>>;

    /// Opens a channel for a lane of this kind. A connector that limits or orders traffic can
    /// decide by the kind which channels must not wait for others.
    ///
    /// # Errors
    /// Fails like [`connect`](Self::connect).
    fn connect_as(&self, _kind: LaneKind) -> io::Result<Box<dyn Channel>> {
        self.connect()
    }

    /// Opens a channel like [`connect_as`](Self::connect_as), within `timeout` if that is shorter
    /// than the connector's own time-outs. A source that has lost its link connects again and
    /// again, and no attempt may delay the next one. The default has only the connector's own
    /// time-outs.
    ///
    /// # Errors
    /// Fails like [`connect`](Self::connect).
    fn connect_within(&self, kind: LaneKind, timeout: Duration) -> io::Result<Box<dyn Channel>> {
        let _ = timeout;
        self.connect_as(kind)
    }

    /// Returns whether the channels can carry open files ([`WriteHalf::send_files`]). Those over
    /// Unix sockets can.
    fn carries_files(&self) -> bool {
        false
    }

    /// Returns the address of the destination, for messages.
    fn address(&self) -> String;
}

/// Accepts channels at a destination.
pub trait Listener: Send {
    /// Waits for the next channel. Returns `None` if `timeout` passes first.
    ///
    /// # Errors
    /// Fails only if the listener itself is broken. A connection that fails while it is accepted is
    /// skipped.
    fn accept(&mut self, timeout: Duration) -> io::Result<Option<Box<dyn Channel>>>;

    /// Returns the address of the listener, in the form that a source's URL has.
    fn address(&self) -> String;

    /// Returns the bound addresses, in numeric form if they have one. A host name in
    /// [`address`](Self::address) may stand for several. The default returns `address`.
    fn bound(&self) -> Vec<String> {
        vec![self.address()]
    }

    /// Returns the reason why waiting connections could not be accepted since the last call, such
    /// as a lack of descriptors. Returns `None`, as the default does, if all could be accepted.
    fn trouble(&mut self) -> Option<io::Error> {
        None
    }

    /// Accepts a waiting connection for which [`accept`](Self::accept) has no descriptor, so that
    /// the caller can send a refusal with the reason. Uses a descriptor that is reserved for this.
    /// The caller must drop the channel before the next call. The default accepts none.
    fn accept_to_refuse(&mut self) -> Option<Box<dyn Channel>> {
        None
    }

    /// Returns an object that tells other threads whether further lanes can be accepted. Returns
    /// `None`, as the default does, if the listener does not know that.
    fn room(&self) -> Option<Arc<dyn Room>> {
        None
    }
}

/// Reports for how many channels a listener has descriptors.
pub trait Room: Send + Sync {
    /// Returns how many of `wanted` further channels can be accepted now. Other parts of the
    /// process may take descriptors at any time.
    fn channels(&self, wanted: usize) -> usize;
}
