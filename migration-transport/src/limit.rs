//! A bandwidth limit for all lanes of a migration.

mod bucket;

use std::{
    io,
    os::fd::BorrowedFd,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use migration_core::{
    RamSlice,
    channel::{Channel, Closer, Connector, Halves, WriteHalf},
    wire::LaneKind,
};

pub(crate) use bucket::Class;
use bucket::{Bucket, Turn};

use crate::{Bandwidth, gather::Gather};

/// The number of bytes that a lane may send without waiting before its first bulk data. They are
/// its preamble and, if the channel is encrypted, its handshake with certificates. The thread that
/// sends them sets up the migration and must react to a cancel.
const SETUP_ALLOWANCE: usize = 16 << 10;

/// A bandwidth limit that any number of writers share. It is a token bucket that holds tokens for
/// 10 ms, or for 64 KiB if that is more.
///
/// It counts the bytes that are written to channels, without headers of lower layers. Clones are
/// the same limit: keep one to [change](Limiter::set_bandwidth) the limit while channels are in
/// use.
#[derive(Clone, Debug)]
pub struct Limiter {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    bucket: Mutex<Bucket>,
    changed: Condvar,
}

impl Limiter {
    /// Makes a limit of `bandwidth`.
    pub fn new(bandwidth: Bandwidth) -> Self {
        let bucket = Mutex::new(Bucket::new(bandwidth, Instant::now()));
        Self { shared: Arc::new(Shared { bucket, changed: Condvar::new() }) }
    }

    /// Returns the current limit.
    pub fn bandwidth(&self) -> Bandwidth {
        self.lock().bandwidth
    }

    /// Changes the limit, also for writes that already wait.
    pub fn set_bandwidth(&self, bandwidth: Bandwidth) {
        self.lock().change(bandwidth, Instant::now());
        self.shared.changed.notify_all();
    }

    /// Applies this limit to the sending direction of `channel`. Use it for channels that a
    /// listener accepted, or to limit only some of a connector's channels.
    pub fn wrap(&self, channel: Box<dyn Channel>) -> Box<dyn Channel> {
        Box::new(LimitedChannel { inner: channel, limiter: self.clone(), class: Class::Bulk, allowance: 0 })
    }

    fn lock(&self) -> MutexGuard<'_, Bucket> {
        // no code that can panic runs under this lock
        self.shared.bucket.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the largest number of bytes to send in one piece.
    fn piece(&self) -> usize {
        self.lock().piece()
    }

    /// Waits until `bytes` of this class may be sent. Returns `false` if `closed` was set
    /// meanwhile.
    pub(crate) fn pass(&self, class: Class, bytes: u64, closed: &AtomicBool) -> bool {
        let mut bucket = self.lock();
        'ask: loop {
            let turn = bucket.reserve(Instant::now(), class, bytes);
            let generation = bucket.generation;
            loop {
                if closed.load(Ordering::Acquire) {
                    return false;
                }
                let left = match turn {
                    Turn::At(turn) => turn.saturating_duration_since(Instant::now()),
                    Turn::Never => Duration::MAX,
                };
                if left.is_zero() {
                    return true;
                }
                bucket = self.shared.changed.wait_timeout(bucket, left).unwrap_or_else(PoisonError::into_inner).0;
                if bucket.generation != generation {
                    continue 'ask;
                }
            }
        }
    }

    fn wake(&self) {
        // under the lock, so that a writer that has just read its flag does not miss the
        // notification
        drop(self.lock());
        self.shared.changed.notify_all();
    }
}

/// A [`Connector`] whose channels share a bandwidth limit for what they send.
///
/// ```
/// use migration_core::{channel::Connector, wire::LaneKind};
/// use migration_transport::{Bandwidth, Limited, memory};
///
/// let (connector, _listener) = memory::link(memory::DEFAULT_CAPACITY);
/// let limited = Limited::new(Box::new(connector), "1Gbit/s".parse()?);
/// let limiter = limited.limiter(); // to change the limit later
/// let lane = limited.connect_as(LaneKind::Bulk)?; // waits for the limit
/// let control = limited.connect_as(LaneKind::Control)?; // never waits, but counts
/// limiter.set_bandwidth(Bandwidth::UNLIMITED);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Limited<C: Connector + ?Sized = dyn Connector> {
    inner: Box<C>,
    limiter: Limiter,
}

impl<C: Connector + ?Sized> Limited<C> {
    /// Limits the data that all channels of `inner` send together to `bandwidth`.
    pub fn new(inner: Box<C>, bandwidth: Bandwidth) -> Self {
        Self::with_limiter(inner, Limiter::new(bandwidth))
    }

    /// Applies a limit that others share, for example several migrations over one network.
    pub fn with_limiter(inner: Box<C>, limiter: Limiter) -> Self {
        Self { inner, limiter }
    }

    /// Returns the limit, to read and to change it.
    pub fn limiter(&self) -> Limiter {
        self.limiter.clone()
    }

    /// Returns the connector without the limit. Data on its channels neither waits nor counts.
    pub fn inner(&self) -> &C {
        &self.inner
    }

    fn limited(&self, inner: Box<dyn Channel>, kind: LaneKind) -> Box<dyn Channel> {
        let class = match kind {
            LaneKind::Control | LaneKind::Reattach | LaneKind::Checkpoint => Class::Exempt,
            LaneKind::Demand => Class::Urgent,
            LaneKind::Bulk => Class::Bulk,
        };
        Box::new(LimitedChannel { inner, limiter: self.limiter.clone(), class, allowance: SETUP_ALLOWANCE })
    }
}

impl<C: Connector + ?Sized> Connector for Limited<C> {
    fn connect(&self) -> io::Result<Box<dyn Channel>> {
        Ok(self.limiter.wrap(self.inner.connect()?))
    }

    /// Opens a channel. Data on control lanes and acknowledgements of checkpoints never wait, but
    /// count, so that other data waits for them. Pages for which a guest waits are sent first, up
    /// to three quarters of the limit. The messages that set up a lane never wait either.
    fn connect_as(&self, kind: LaneKind) -> io::Result<Box<dyn Channel>> {
        Ok(self.limited(self.inner.connect_as(kind)?, kind))
    }

    fn connect_within(&self, kind: LaneKind, timeout: Duration) -> io::Result<Box<dyn Channel>> {
        Ok(self.limited(self.inner.connect_within(kind, timeout)?, kind))
    }

    fn carries_files(&self) -> bool {
        self.inner.carries_files()
    }

    fn address(&self) -> String {
        self.inner.address()
    }
}

struct LimitedChannel {
    inner: Box<dyn Channel>,
    limiter: Limiter,
    class: Class,
    allowance: usize,
}

impl Channel for LimitedChannel {
    fn split(self: Box<Self>) -> io::Result<Halves> {
        let Halves { reader, writer, closer } = self.inner.split()?;
        let closed = Arc::new(AtomicBool::new(false));
        let writer = LimitedWriter {
            inner: writer,
            limiter: self.limiter.clone(),
            closed: Arc::clone(&closed),
            class: self.class,
            allowance: self.allowance,
        };
        let closer = LimitedCloser { inner: closer, limiter: self.limiter, closed };
        Ok(Halves { reader, writer: Box::new(writer), closer: Box::new(closer) })
    }

    fn peer(&self) -> String {
        self.inner.peer()
    }
}

struct LimitedWriter {
    inner: Box<dyn WriteHalf>,
    limiter: Limiter,
    closed: Arc<AtomicBool>,
    class: Class,
    /// The number of bytes that the lane may still send without waiting. Its first bulk data sets
    /// it to 0.
    allowance: usize,
}

impl LimitedWriter {
    /// Returns the class of a write. Small writes without guest memory before any bulk data set up
    /// the lane.
    fn class_of(&mut self, head: &[u8], slices: &[RamSlice<'_>]) -> Class {
        match self.allowance.checked_sub(head.len()) {
            Some(left) if slices.is_empty() && left > 0 => {
                self.allowance = left;
                Class::Exempt
            }
            _ => {
                self.allowance = 0;
                self.class
            }
        }
    }

    fn pass(&self, class: Class, bytes: usize) -> io::Result<()> {
        let passed = self.limiter.pass(class, bytes as u64, &self.closed);
        passed.then_some(()).ok_or_else(|| io::Error::new(io::ErrorKind::BrokenPipe, "the channel was closed"))
    }
}

impl WriteHalf for LimitedWriter {
    fn write_all(&mut self, head: &[u8], slices: &[RamSlice<'_>]) -> io::Result<()> {
        let class = self.class_of(head, slices);
        let mut gather = Gather::new(head, slices);
        if class == Class::Exempt || gather.remaining() <= self.limiter.piece() {
            self.pass(class, gather.remaining())?;
            return self.inner.write_all(head, slices);
        }
        while gather.remaining() > 0 {
            let piece = self.limiter.piece().min(gather.remaining()); // again for each piece, because the limit may change
            self.pass(class, piece)?;
            let (head, slices) = gather.take(piece);
            self.inner.write_all(head, &slices)?;
        }
        Ok(())
    }

    fn set_idle_timeout(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        self.inner.set_idle_timeout(timeout)
    }

    fn set_deadline(&mut self, deadline: Option<Instant>) {
        self.inner.set_deadline(deadline);
    }

    fn ahead_of_limit(&self) -> Duration {
        self.limiter.lock().ahead(Instant::now()).max(self.inner.ahead_of_limit())
    }

    fn keep_queue_short(&mut self) {
        self.inner.keep_queue_short();
    }

    /// Sends files, which do not count for the limit.
    fn send_files(&mut self, files: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.inner.send_files(files)
    }
}

struct LimitedCloser {
    inner: Box<dyn Closer>,
    limiter: Limiter,
    closed: Arc<AtomicBool>,
}

impl Closer for LimitedCloser {
    fn close(&self) {
        self.closed.store(true, Ordering::Release);
        self.inner.close();
        self.limiter.wake();
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use migration_core::{GuestRam, channel::Listener};

    use super::*;
    use crate::{
        memory,
        testing::{pattern, ram},
    };

    #[test]
    fn the_rate_holds_over_several_lanes() {
        let limiter = Limiter::new("400Mbit".parse().unwrap());
        let start = Instant::now();
        let sent: u64 = thread::scope(|scope| {
            let lanes: Vec<_> = (0..2)
                .map(|_| {
                    let limiter = &limiter;
                    scope.spawn(move || {
                        let mut sent = 0;
                        for _ in 0..100 {
                            assert!(limiter.pass(Class::Bulk, 60_000, &AtomicBool::new(false)));
                            sent += 60_000;
                        }
                        sent
                    })
                })
                .collect();
            lanes.into_iter().map(|lane| lane.join().unwrap()).sum()
        });
        // Data is never sent faster than the limit, except for the burst (10 ms = 500,000 bytes)
        // and the last piece. How much slower it is depends on the host, so that is not checked.
        let least = limiter.bandwidth().time_for(sent - 60_000 - bucket::MIN_BURST.max(500_000));
        assert!(start.elapsed() >= least, "{:?} < {least:?}", start.elapsed());
    }

    #[test]
    fn split_writes_arrive_whole() {
        let memory = ram(64);
        let bytes = pattern(64 * 4096);
        memory.write(0, &bytes).unwrap();
        let (near, far) = memory::pair(10_000);
        let limiter = Limiter::new("100Mbit".parse().unwrap());
        assert!(limiter.piece() < 100_000);
        let mut writer = limiter.wrap(Box::new(near)).split().unwrap().writer;
        let mut reader = Box::new(far).split().unwrap().reader;
        let head = pattern(100_001);
        let mut got = vec![0; head.len() + bytes.len()];
        thread::scope(|scope| {
            scope.spawn(|| {
                let slices = [memory.slice_at(0, 1).unwrap(), memory.slice_at(1, 64 * 4096 - 1).unwrap()];
                writer.write_all(&head, &slices).unwrap();
            });
            reader.read_exact(&mut got).unwrap();
        });
        assert!(got == [head, bytes].concat());
    }

    #[test]
    fn a_lane_is_set_up_until_its_first_guest_memory_or_its_allowance_is_used_up() {
        let memory = ram(1);
        let (near, _far) = memory::pair(1000);
        let mut writer = LimitedWriter {
            inner: Box::new(near).split().unwrap().writer,
            limiter: Limiter::new(Bandwidth::UNLIMITED),
            closed: Arc::default(),
            class: Class::Bulk,
            allowance: 100,
        };
        let (set_up, bulk) = (Class::Exempt, Class::Bulk);
        assert_eq!([60, 39].map(|len| writer.class_of(&vec![0; len], &[])), [set_up; 2]);
        assert_eq!([1, 0].map(|len| writer.class_of(&vec![0; len], &[])), [bulk; 2]);
        writer.allowance = 100;
        assert_eq!(writer.class_of(&[0; 101], &[]), bulk);
        assert_eq!(writer.class_of(&[0; 1], &[]), bulk, "the set-up is over");
        writer.allowance = 100;
        assert_eq!(writer.class_of(&[0; 10], &[memory.slice_at(0, 8).unwrap()]), bulk);
        assert_eq!(writer.class_of(&[0; 10], &[]), bulk, "the set-up is over");
    }

    #[test]
    fn urgent_data_does_not_wait_for_all_earlier_urgent_data() {
        let (connector, mut listener) = memory::link(8 << 20);
        let limited = Limited::new(Box::new(connector), "1Mbit".parse().unwrap());
        let open = |kind| limited.connect_as(kind).unwrap().split().unwrap();
        let (mut block, mut word) = (open(LaneKind::Demand), open(LaneKind::Demand));
        let mut peer = listener.accept(Duration::MAX).unwrap().unwrap().split().unwrap();
        let sent = AtomicBool::new(false);
        // after the data that sets up the lane, which never waits
        word.writer.write_all(&[0; SETUP_ALLOWANCE], &[]).unwrap();
        thread::scope(|scope| {
            scope.spawn(|| {
                block.writer.write_all(&pattern(2 << 20), &[]).unwrap();
                sent.store(true, Ordering::Release);
            });
            peer.reader.read_exact(&mut [0; 1]).unwrap();
            word.writer.write_all(&[0; 32], &[]).unwrap();
            let all = sent.load(Ordering::Acquire);
            limited.limiter().set_bandwidth(Bandwidth::UNLIMITED);
            assert!(!all);
        });
    }

    /// Opens every kind of lane at 1 bit/s, while a bulk lane waits for the limit. The messages
    /// that set up a lane pass, and all data on control lanes. If they waited, this test would not
    /// end.
    #[test]
    fn control_frames_and_the_setup_of_every_lane_never_wait() {
        let (connector, mut listener) = memory::link(8 << 20);
        let limited = Limited::new(Box::new(connector), Bandwidth::from_bits_per_second(1));
        let mut peers = Vec::new();
        let mut open = |kind| {
            let near = limited.connect_as(kind).unwrap().split().unwrap();
            peers.push(listener.accept(Duration::MAX).unwrap().unwrap().split().unwrap());
            near
        };
        let Halves { mut writer, closer, .. } = open(LaneKind::Bulk);
        thread::scope(|scope| {
            scope.spawn(move || assert!(writer.write_all(&pattern(2 << 20), &[]).is_err()));
            for kind in [LaneKind::Bulk, LaneKind::Demand, LaneKind::Checkpoint, LaneKind::Control, LaneKind::Reattach]
            {
                // a handshake and a preamble
                let mut lane = open(kind);
                for _ in 0..10 {
                    lane.writer.write_all(&[0; 1500], &[]).unwrap();
                }
                if !matches!(kind, LaneKind::Bulk | LaneKind::Demand) {
                    // the state that is sent in the pause, and many frames after it
                    lane.writer.write_all(&pattern(1 << 20), &[]).unwrap();
                    (0..1000).for_each(|_| lane.writer.write_all(&[0; 32], &[]).unwrap());
                }
            }
            closer.close();
        });
    }

    #[test]
    fn closing_ends_a_wait() {
        let (near, _far) = memory::pair(1 << 20);
        let limiter = Limiter::new(Bandwidth::from_bits_per_second(1));
        let Halves { mut writer, closer, .. } = limiter.wrap(Box::new(near)).split().unwrap();
        thread::scope(|scope| {
            scope.spawn(move || assert!(writer.write_all(&[0; 200_000], &[]).is_err()));
            closer.close();
        });
    }

    #[test]
    fn closing_ends_a_wait_that_no_clock_can_measure() {
        let limiter = Limiter::new(Bandwidth::from_bits_per_second(1));
        let closed = AtomicBool::new(false);
        thread::scope(|scope| {
            let waiter = scope.spawn(|| limiter.pass(Class::Bulk, u64::MAX, &closed));
            closed.store(true, Ordering::Release);
            limiter.wake();
            assert!(!waiter.join().unwrap());
        });
    }

    #[test]
    fn a_new_limit_ends_a_wait() {
        let (near, _far) = memory::pair(1 << 20);
        let limiter = Limiter::new(Bandwidth::from_bits_per_second(1));
        let mut writer = limiter.wrap(Box::new(near)).split().unwrap().writer;
        thread::scope(|scope| {
            scope.spawn(move || writer.write_all(&[0; 200_000], &[]).unwrap());
            limiter.set_bandwidth(Bandwidth::UNLIMITED);
        });
    }
}
