//! Channels in memory, for tests, simulations, and a source and a destination in one process.
//!
//! They behave like sockets. Their buffers are bounded and block the writer, idle time-outs work,
//! and after the end of a stream the reader still gets the data in transit. A channel ends when
//! both of its halves are dropped.

pub(crate) mod cut;

use std::{
    collections::VecDeque,
    fmt, io,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak},
    time::{Duration, Instant},
};

use migration_core::{
    RamSlice,
    channel::{Channel, Closer, Connector, Halves, Listener, ReadHalf, WriteHalf},
};

use self::cut::Cut;
use crate::{gather::Gather, stream::time_left};

/// A buffer size for [`pair`] and [`link`] in bytes that suits most tests.
pub const DEFAULT_CAPACITY: usize = 256 * 1024;

/// Returns two connected channels, with a buffer of `capacity` bytes (at least 1) in each
/// direction.
pub fn pair(capacity: usize) -> (MemoryChannel, MemoryChannel) {
    connected(capacity, &Cut::default())
}

/// Returns a connector and the listener to which it connects. Each channel has a buffer of
/// `capacity` bytes (at least 1) in each direction.
///
/// Connecting never blocks: the channel can be written to before the other end is accepted.
pub fn link(capacity: usize) -> (MemoryConnector, MemoryListener) {
    let shared = Arc::new(Link::default());
    (MemoryConnector { link: Arc::clone(&shared), capacity, cut: Cut::default() }, MemoryListener { link: shared })
}

fn connected(capacity: usize, cut: &Cut) -> (MemoryChannel, MemoryChannel) {
    let [there, back] = [(); 2].map(|()| Arc::new(Pipe::new(capacity, cut.clone())));
    let near = End { incoming: Arc::clone(&back), outgoing: Arc::clone(&there) };
    let far = End { incoming: there, outgoing: back };
    (MemoryChannel { end: Arc::new(near) }, MemoryChannel { end: Arc::new(far) })
}

/// The way in which a direction ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// Closed in order: the reader gets the remaining data and then the end of the stream.
    Closed,
    /// Cut after the last byte that was sent: the reader gets the remaining data and then an error.
    Cut,
    /// Cut, and the data in transit is lost.
    Lost,
}

/// One direction of a channel.
#[derive(Debug)]
pub(crate) struct Pipe {
    state: Mutex<PipeState>,
    changed: Condvar,
    capacity: usize,
    cut: Cut,
}

#[derive(Debug, Default)]
struct PipeState {
    bytes: VecDeque<u8>,
    ending: Option<Ending>,
}

impl Pipe {
    fn new(capacity: usize, cut: Cut) -> Self {
        Self { state: Mutex::default(), changed: Condvar::new(), capacity: capacity.max(1), cut }
    }

    fn lock(&self) -> MutexGuard<'_, PipeState> {
        // no code that can panic runs under this lock
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the direction. The first ending is kept, except that a cut replaces a close in order.
    pub(crate) fn end(&self, ending: Ending) {
        let mut state = self.lock();
        if state.ending.is_none_or(|before| before == Ending::Closed) {
            state.ending = Some(ending);
        }
        if ending == Ending::Lost {
            state.bytes.clear();
        }
        drop(state);
        self.changed.notify_all();
    }

    /// Waits until `ready` returns true or the direction has ended.
    fn wait(
        &self,
        idle: Option<Duration>,
        what: &str,
        ready: impl Fn(&PipeState) -> bool,
    ) -> io::Result<MutexGuard<'_, PipeState>> {
        let deadline = idle.and_then(|idle| Instant::now().checked_add(idle));
        let mut state = self.lock();
        while !ready(&state) && state.ending.is_none() {
            state = match deadline {
                None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some(deadline) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        let why = format!("the peer {what} for {:?}", idle.unwrap_or_default());
                        return Err(io::Error::new(io::ErrorKind::TimedOut, why));
                    }
                    self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
        Ok(state)
    }

    fn write(&self, mut gather: Gather<'_>, idle: Option<Duration>, deadline: Option<Instant>) -> io::Result<()> {
        while gather.remaining() > 0 {
            let idle = idle.into_iter().chain(time_left(deadline)?).min();
            let mut state = self.wait(idle, "accepted no data", |state| state.bytes.len() < self.capacity)?;
            match state.ending {
                None => {}
                Some(Ending::Closed) => return Err(io::ErrorKind::BrokenPipe.into()),
                Some(Ending::Cut | Ending::Lost) => return Err(io::ErrorKind::ConnectionReset.into()),
            }
            let room = self.capacity.saturating_sub(state.bytes.len());
            let granted = self.cut.take_sent(room.min(gather.remaining()));
            gather.copy_out(granted, |piece| state.bytes.extend(piece));
            drop(state);
            self.changed.notify_all();
            self.cut.check();
        }
        Ok(())
    }

    fn read(&self, mut wanted: usize, idle: Option<Duration>, mut sink: impl FnMut(&[u8])) -> io::Result<()> {
        while wanted > 0 {
            let mut state = self.wait(idle, "sent no data", |state| !state.bytes.is_empty())?;
            if state.bytes.is_empty() {
                return Err(match state.ending {
                    Some(Ending::Cut | Ending::Lost) => io::ErrorKind::ConnectionReset.into(),
                    _ => io::Error::new(io::ErrorKind::UnexpectedEof, "the peer closed the connection"),
                });
            }
            let granted = self.cut.take_received(wanted.min(state.bytes.len()));
            let (front, back) = state.bytes.as_slices();
            let of_front = granted.min(front.len());
            sink(&front[..of_front]);
            sink(&back[..granted - of_front]);
            state.bytes.drain(..granted);
            wanted -= granted;
            drop(state);
            self.changed.notify_all();
            self.cut.check();
        }
        Ok(())
    }
}

/// One end of a channel. It closes when its last half is dropped.
#[derive(Debug)]
struct End {
    incoming: Arc<Pipe>,
    outgoing: Arc<Pipe>,
}

impl End {
    fn close(&self) {
        self.incoming.end(Ending::Closed);
        self.outgoing.end(Ending::Closed);
    }
}

impl Drop for End {
    fn drop(&mut self) {
        self.close();
    }
}

/// One end of a channel in memory.
#[derive(Debug)]
pub struct MemoryChannel {
    end: Arc<End>,
}

impl Channel for MemoryChannel {
    fn split(self: Box<Self>) -> io::Result<Halves> {
        let closer = MemoryCloser { end: Arc::downgrade(&self.end) };
        let reader = MemoryReader { end: Arc::clone(&self.end), idle: None };
        let writer = MemoryWriter { end: self.end, idle: None, deadline: None };
        Ok(Halves { reader: Box::new(reader), writer: Box::new(writer), closer: Box::new(closer) })
    }

    fn peer(&self) -> String {
        ADDRESS.into()
    }
}

const ADDRESS: &str = "memory:";

struct MemoryReader {
    end: Arc<End>,
    idle: Option<Duration>,
}

impl ReadHalf for MemoryReader {
    fn read_exact(&mut self, buf: &mut [u8]) -> io::Result<()> {
        let mut filled = 0;
        self.end.incoming.read(buf.len(), self.idle, |piece| {
            buf[filled..filled + piece.len()].copy_from_slice(piece);
            filled += piece.len();
        })
    }

    fn read_ram(&mut self, slices: &[RamSlice<'_>]) -> io::Result<()> {
        let mut gather = Gather::new(&[], slices);
        self.end.incoming.read(gather.remaining(), self.idle, |piece| gather.copy_in(piece))
    }

    fn set_idle_timeout(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        self.idle = timeout;
        Ok(())
    }
}

struct MemoryWriter {
    end: Arc<End>,
    idle: Option<Duration>,
    deadline: Option<Instant>,
}

impl WriteHalf for MemoryWriter {
    fn write_all(&mut self, head: &[u8], slices: &[RamSlice<'_>]) -> io::Result<()> {
        self.end.outgoing.write(Gather::new(head, slices), self.idle, self.deadline)
    }

    fn set_deadline(&mut self, deadline: Option<Instant>) {
        self.deadline = deadline;
    }

    fn set_idle_timeout(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        self.idle = timeout;
        Ok(())
    }
}

struct MemoryCloser {
    end: Weak<End>,
}

impl Closer for MemoryCloser {
    fn close(&self) {
        if let Some(end) = self.end.upgrade() {
            end.close();
        }
    }
}

/// Connections that were opened and not yet accepted.
#[derive(Default)]
struct Link {
    waiting: Mutex<Waiting>,
    changed: Condvar,
}

#[derive(Default)]
struct Waiting {
    channels: VecDeque<MemoryChannel>,
    closed: bool,
}

impl Link {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Opens channels to a [`MemoryListener`]. Clones connect to the same listener.
#[derive(Clone)]
pub struct MemoryConnector {
    link: Arc<Link>,
    capacity: usize,
    cut: Cut,
}

impl MemoryConnector {
    /// Returns an object that cuts this link, for tests.
    #[cfg(any(test, feature = "test-utils"))]
    pub fn cut(&self) -> Cut {
        self.cut.clone()
    }
}

impl Connector for MemoryConnector {
    /// # Errors
    /// Fails with `ConnectionRefused` if the listener was dropped, and at once with `TimedOut` if
    /// the link is cut.
    fn connect(&self) -> io::Result<Box<dyn Channel>> {
        let (near, far) = connected(self.capacity, &self.cut);
        if !self.cut.add([&near.end.incoming, &near.end.outgoing]) {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "the link is cut"));
        }
        let mut waiting = self.link.lock();
        if waiting.closed {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        waiting.channels.push_back(far);
        drop(waiting);
        self.link.changed.notify_all();
        Ok(Box::new(near))
    }

    fn address(&self) -> String {
        ADDRESS.into()
    }
}

impl fmt::Debug for MemoryConnector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryConnector").field("capacity", &self.capacity).finish_non_exhaustive()
    }
}

/// Accepts channels of a [`MemoryConnector`].
pub struct MemoryListener {
    link: Arc<Link>,
}

impl Listener for MemoryListener {
    fn accept(&mut self, timeout: Duration) -> io::Result<Option<Box<dyn Channel>>> {
        let waiting = self.link.lock();
        let (mut waiting, _) = self
            .link
            .changed
            .wait_timeout_while(waiting, timeout, |waiting| waiting.channels.is_empty())
            .unwrap_or_else(PoisonError::into_inner);
        Ok(waiting.channels.pop_front().map(|channel| Box::new(channel) as Box<dyn Channel>))
    }

    fn address(&self) -> String {
        ADDRESS.into()
    }
}

impl Drop for MemoryListener {
    fn drop(&mut self) {
        let mut waiting = self.link.lock();
        waiting.closed = true;
        // channels that were not accepted end
        let channels = std::mem::take(&mut waiting.channels);
        drop(waiting);
        drop(channels);
    }
}

impl fmt::Debug for MemoryListener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryListener").finish_non_exhaustive()
    }
}
