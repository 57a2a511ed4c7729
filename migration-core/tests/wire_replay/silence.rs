//! A network that is dead for longer than the source waits for an answer, while pages are missing
//! at the destination.

use std::{
    io,
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use migration_core::{
    RamSlice,
    channel::{Channel, Closer, Connector, Halves, ReadHalf},
    engine::SourceOptions,
    report::Outcome,
    strategy::{Linear, PostCopy},
    wire::{Control, Header, LaneKind},
};

use crate::{
    HANG,
    guest::checksums,
    live::{Link, run_by},
    post_copy::{destination, guest},
};

/// Attempts to reconnect that fail: the pauses between them become longer than the time between two
/// looks at what is due.
const REFUSED: u32 = 5;

/// The first control lane says nothing to the source after *running*; then nobody is to be reached
/// for a while.
struct Silent {
    link: Link,
    attempts: AtomicU32,
}

impl Connector for Silent {
    fn connect(&self) -> io::Result<Box<dyn Channel>> {
        self.link.connect()
    }

    fn connect_as(&self, kind: LaneKind) -> io::Result<Box<dyn Channel>> {
        match kind {
            LaneKind::Control => Ok(Box::new(Muted(self.link.connect_as(kind)?))),
            LaneKind::Reattach if self.attempts.fetch_add(1, Ordering::SeqCst) < REFUSED => {
                Err(io::ErrorKind::HostUnreachable.into())
            }
            _ => self.link.connect_as(kind),
        }
    }

    fn address(&self) -> String {
        self.link.address()
    }
}

struct Muted(Box<dyn Channel>);

/// Whether the lane was closed here.
type Closed = Arc<(Mutex<bool>, Condvar)>;

impl Channel for Muted {
    fn split(self: Box<Self>) -> io::Result<Halves> {
        let Halves { reader, writer, closer } = self.0.split()?;
        let closed = Closed::default();
        let reader = MutedReader { inner: reader, closed: closed.clone(), muted: false };
        Ok(Halves { reader: Box::new(reader), writer, closer: Box::new(TellingCloser { inner: closer, closed }) })
    }

    fn peer(&self) -> String {
        self.0.peer()
    }
}

struct MutedReader {
    inner: Box<dyn ReadHalf>,
    closed: Closed,
    muted: bool,
}

impl ReadHalf for MutedReader {
    fn read_exact(&mut self, buf: &mut [u8]) -> io::Result<()> {
        // the body of *running* is empty
        if self.muted && !buf.is_empty() {
            let (closed, changed) = &*self.closed;
            let (_guard, waited) = changed.wait_timeout_while(closed.lock().unwrap(), HANG, |closed| !*closed).unwrap();
            assert!(!waited.timed_out(), "hangs: a lane that says nothing is not given up");
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        self.inner.read_exact(buf)?;
        let header =
            buf.first_chunk().filter(|_| buf.len() == Header::LEN).and_then(|bytes| Header::decode(bytes).ok());
        let frame = header.and_then(|header| Control::decode(&header, &[]).ok());
        self.muted |= matches!(frame, Some(Control::Running));
        Ok(())
    }

    fn read_ram(&mut self, slices: &[RamSlice<'_>]) -> io::Result<()> {
        self.inner.read_ram(slices)
    }

    fn set_idle_timeout(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        self.inner.set_idle_timeout(timeout)
    }
}

struct TellingCloser {
    inner: Box<dyn Closer>,
    closed: Closed,
}

impl Closer for TellingCloser {
    fn close(&self) {
        self.inner.close();
        *self.closed.0.lock().unwrap() = true;
        self.closed.1.notify_all();
    }
}

/// What the lost link did not answer says nothing of the next one: the source recovers as soon as
/// the destination can be reached, however long that took.
#[test]
fn a_source_that_serves_recovers_after_a_silence_longer_than_it_waits() {
    let destination = destination();
    let link = Silent { link: Link::new(&destination, None), attempts: AtomicU32::new(0) };
    let options =
        SourceOptions { demand_lanes: 1, idle_timeout: Duration::from_millis(1500), ..SourceOptions::default() };
    let strategy = PostCopy { order: Box::new(Linear::default()) };
    let (report, vm, link) = run_by(strategy, &destination, link, guest(), options);
    assert_eq!(report.outcome, Outcome::Completed, "{:?}", report.reason);
    assert!(report.recoveries > 0 && link.attempts.load(Ordering::SeqCst) > REFUSED, "the link was never lost");
    let (arrived, said) = destination.finish();
    assert_eq!(arrived.pages(), checksums(&vm.ram), "{said}");
}
