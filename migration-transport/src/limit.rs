//! A bandwidth limit over all lanes of a migration.

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

use crate::{Bandwidth, gather::Gather};

/// The largest and the smallest piece that a write is split into, in bytes; in between it is what the limit lets pass
/// in [`PIECE_TIME`].
const PIECES: std::ops::RangeInclusive<u64> = 4 << 10..=1 << 20;
/// How much time a piece takes on the wire, about: short enough for a smooth rate and to hear a closer, long enough for
/// the timer's inexactness not to matter.
const PIECE_TIME: Duration = Duration::from_millis(4);
/// What may be sent at once after a pause: so much time's worth, but at least [`MIN_BURST`].
const BURST_TIME: Duration = Duration::from_millis(10);
/// Bytes.
const MIN_BURST: u64 = 64 << 10;

/// How much of the limit goes to what is urgent, if there is so much of it: enough that it hardly waits, and not all, as
/// one may wait for the rest too (a fault, for a page that is being pushed).
const URGENT_SHARE: f64 = 0.75;

/// A bandwidth limit that any number of writers share: a token bucket of 10 ms worth, or 64 KiB if that is more.
///
/// It counts what is handed to channels, without the headers of lower layers. Clones are the same limit.
#[derive(Clone, Debug)]
pub struct Limiter {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    bucket: Mutex<Bucket>,
    changed: Condvar,
}

#[derive(Debug)]
struct Bucket {
    bandwidth: Bandwidth,
    /// When everything that was let pass will have been sent at exactly the limit. The bucket is full when that is a
    /// burst's time ago.
    next: Instant,
    /// Likewise for what is urgent, at its share of the limit.
    urgent: Instant,
    /// Counts changes of the limit. Who waits under an older one asks again.
    generation: u64,
}

impl Limiter {
    /// A limit of `bandwidth`.
    pub fn new(bandwidth: Bandwidth) -> Self {
        let bucket = Bucket { bandwidth, next: Instant::now(), urgent: Instant::now(), generation: 0 };
        Self { shared: Arc::new(Shared { bucket: Mutex::new(bucket), changed: Condvar::new() }) }
    }

    /// The limit at the moment.
    pub fn bandwidth(&self) -> Bandwidth {
        self.lock().bandwidth
    }

    /// Changes the limit, for writes that wait already as well.
    pub fn set_bandwidth(&self, bandwidth: Bandwidth) {
        let mut bucket = self.lock();
        let now = Instant::now();
        *bucket = Bucket { bandwidth, next: now, urgent: now, generation: bucket.generation + 1 };
        drop(bucket);
        self.shared.changed.notify_all();
    }

    /// Puts the sending direction of `channel` under this limit: for channels that a listener accepted, or where only
    /// some of a connector's channels are to be limited.
    pub fn wrap(&self, channel: Box<dyn Channel>) -> Box<dyn Channel> {
        Box::new(LimitedChannel { inner: channel, limiter: self.clone(), urgent: false })
    }

    fn lock(&self) -> MutexGuard<'_, Bucket> {
        // no code that can panic runs under this lock
        self.shared.bucket.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many bytes to send in one piece.
    fn piece(&self) -> usize {
        match self.bandwidth().bytes_per_second() {
            None => usize::MAX,
            Some(rate) => {
                let bytes = (rate * PIECE_TIME.as_secs_f64()) as u64;
                bytes.clamp(*PIECES.start(), *PIECES.end()) as usize
            }
        }
    }

    /// Waits until `bytes` may pass. `false` when `closed` was set meanwhile. Bytes that are urgent may use [`URGENT_SHARE`]
    /// of the limit, at the expense of the others, to whom the rest is left.
    pub(crate) fn pass(&self, urgent: bool, bytes: u64, closed: &AtomicBool) -> bool {
        let mut bucket = self.lock();
        'ask: loop {
            if bucket.bandwidth == Bandwidth::UNLIMITED {
                return !closed.load(Ordering::Acquire);
            }
            let burst = BURST_TIME.max(bucket.bandwidth.time_for(MIN_BURST));
            let now = Instant::now();
            let time = bucket.bandwidth.time_for(bytes);
            let full = |next: Instant| now.checked_sub(burst).map_or(next, |full| next.max(full));
            // Writers queue up by reserving their time; a rate so low that the time overflows waits for a new limit.
            let all = full(bucket.next).checked_add(time);
            let start = if urgent {
                let start = full(bucket.urgent);
                let Some(next) = start.checked_add(time.div_f64(URGENT_SHARE)) else { return false };
                bucket.urgent = next;
                start
            } else {
                full(bucket.next)
            };
            let Some(all) = all else { return false };
            bucket.next = all;
            let generation = bucket.generation;
            loop {
                if closed.load(Ordering::Acquire) {
                    return false;
                }
                let left = start.saturating_duration_since(Instant::now());
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
        // Under the lock, lest a writer that has just looked at its flag misses it.
        drop(self.lock());
        self.shared.changed.notify_all();
    }
}

/// A [`Connector`] whose channels share a bandwidth limit for what they send.
///
/// ```
/// use migration_core::channel::Connector;
/// use migration_transport::{Bandwidth, Limited, memory};
///
/// let (connector, _listener) = memory::link(memory::DEFAULT_CAPACITY);
/// let limited = Limited::new(Box::new(connector), "1Gbit/s".parse()?);
/// let limiter = limited.limiter(); // to change it while it runs
/// let lane = limited.connect()?; // under the limit
/// let control = limited.inner().connect()?; // exempt
/// limiter.set_bandwidth(Bandwidth::UNLIMITED);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Limited<C: Connector + ?Sized = dyn Connector> {
    inner: Box<C>,
    limiter: Limiter,
}

impl<C: Connector + ?Sized> Limited<C> {
    /// Limits what the channels of `inner` send together to `bandwidth`.
    pub fn new(inner: Box<C>, bandwidth: Bandwidth) -> Self {
        Self::with_limiter(inner, Limiter::new(bandwidth))
    }

    /// The same with a limit that others share, for example several migrations over one network.
    pub fn with_limiter(inner: Box<C>, limiter: Limiter) -> Self {
        Self { inner, limiter }
    }

    /// The limit, to read and to change.
    pub fn limiter(&self) -> Limiter {
        self.limiter.clone()
    }

    /// The connector without the limit: a control channel opened by it never waits behind bulk data's allowance.
    pub fn inner(&self) -> &C {
        &self.inner
    }
}

impl<C: Connector + ?Sized> Connector for Limited<C> {
    fn connect(&self) -> io::Result<Box<dyn Channel>> {
        Ok(self.limiter.wrap(self.inner.connect()?))
    }

    /// What other lanes than bulk ones send goes first, up to three quarters of the limit.
    fn connect_as(&self, kind: LaneKind) -> io::Result<Box<dyn Channel>> {
        let (inner, limiter) = (self.inner.connect_as(kind)?, self.limiter.clone());
        Ok(Box::new(LimitedChannel { inner, limiter, urgent: kind != LaneKind::Bulk }))
    }

    fn connect_within(&self, kind: LaneKind, timeout: Duration) -> io::Result<Box<dyn Channel>> {
        let (inner, limiter) = (self.inner.connect_within(kind, timeout)?, self.limiter.clone());
        Ok(Box::new(LimitedChannel { inner, limiter, urgent: kind != LaneKind::Bulk }))
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
    urgent: bool,
}

impl Channel for LimitedChannel {
    fn split(self: Box<Self>) -> io::Result<Halves> {
        let Halves { reader, writer, closer } = self.inner.split()?;
        let closed = Arc::new(AtomicBool::new(false));
        let writer = LimitedWriter {
            inner: writer,
            limiter: self.limiter.clone(),
            closed: Arc::clone(&closed),
            urgent: self.urgent,
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
    urgent: bool,
}

impl LimitedWriter {
    fn pass(&self, bytes: usize) -> io::Result<()> {
        let passed = self.limiter.pass(self.urgent, bytes as u64, &self.closed);
        passed.then_some(()).ok_or_else(|| io::Error::new(io::ErrorKind::BrokenPipe, "the channel was closed"))
    }
}

impl WriteHalf for LimitedWriter {
    fn write_all(&mut self, head: &[u8], slices: &[RamSlice<'_>]) -> io::Result<()> {
        let mut gather = Gather::new(head, slices);
        if gather.remaining() <= self.limiter.piece() {
            self.pass(gather.remaining())?;
            return self.inner.write_all(head, slices);
        }
        while gather.remaining() > 0 {
            let piece = self.limiter.piece().min(gather.remaining()); // anew each time: the limit may change
            self.pass(piece)?;
            let (head, slices) = gather.take(piece);
            self.inner.write_all(head, &slices)?;
        }
        Ok(())
    }

    fn set_idle_timeout(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        self.inner.set_idle_timeout(timeout)
    }

    fn keep_queue_short(&mut self) {
        self.inner.keep_queue_short();
    }

    /// The files weigh nothing.
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
                            assert!(limiter.pass(false, 60_000, &AtomicBool::new(false)));
                            sent += 60_000;
                        }
                        sent
                    })
                })
                .collect();
            lanes.into_iter().map(|lane| lane.join().unwrap()).sum()
        });
        // Never faster than the limit, but for the burst (10 ms = 500,000 bytes) and the last piece. How much slower is
        // up to the machine: the reservations themselves add up to exactly the limit.
        let least = limiter.bandwidth().time_for(sent - 60_000 - MIN_BURST.max(500_000));
        assert!(start.elapsed() >= least, "{:?} < {least:?}", start.elapsed());
    }

    #[test]
    fn split_writes_arrive_whole() {
        let memory = ram(64);
        let memory: &dyn GuestRam = &memory;
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
    fn what_is_urgent_does_not_wait_for_all_of_what_is_urgent_too() {
        let (connector, mut listener) = memory::link(8 << 20);
        let limited = Limited::new(Box::new(connector), "1Mbit".parse().unwrap());
        let open = |kind| limited.connect_as(kind).unwrap().split().unwrap();
        let (mut block, mut word) = (open(LaneKind::Demand), open(LaneKind::Control));
        let mut peer = listener.accept(Duration::MAX).unwrap().unwrap().split().unwrap();
        let sent = AtomicBool::new(false);
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
