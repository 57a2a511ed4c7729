//! Tests that the pause at the source is limited, whatever the destination does. The link stops at
//! every step of the pause, and the guest continues to run at the source.

#[allow(dead_code, reason = "these tests need a part of it")]
mod common;

use std::{
    io,
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use common::{Destination, TestVm};
use migration_core::{
    RamSlice,
    channel::{Channel, Closer, Connector, Halves, ReadHalf, WriteHalf},
    engine::{Controller, PauseLimits, SourceOptions, migrate},
    protocol::{DestinationPhase, SourcePhase},
    report::{Event, Observer, Outcome, Report},
    strategy::{PreCopy, StopAndCopy, Strategy},
};
use migration_transport::memory::{self, MemoryConnector};

/// The behaviour of a link that has stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stop {
    /// It accepts every byte, as the buffers of the kernel do, and delivers none.
    Swallows,
    /// It accepts no byte.
    Blocks,
    /// It accepts the pieces of large frames slowly: each takes [`DRIP`].
    Drips,
}

/// Longer than a piece of a frame takes on any link that works.
const DRIP: Duration = Duration::from_millis(300);
/// A write with more bytes than this outside guest memory is a piece of a large frame.
const LARGE: usize = 32 << 10;

/// A link that stops at a step of the pause. The steps are the reads and writes of all channels.
struct Stopper {
    how: Stop,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// The number of steps until the link stops, counted from the beginning of the pause; `None`
    /// before it.
    left: Option<u64>,
    stopped: bool,
    /// The generation of the channels that are opened before the link stops. They never work again;
    /// channels opened later are of the next generation and work.
    generation: u64,
    /// The number of pieces of large frames that the link has accepted since it stopped.
    drops: u64,
}

impl Stopper {
    fn new(how: Stop) -> Arc<Self> {
        Arc::new(Self { how, state: Mutex::default() })
    }

    /// Starts counting the steps.
    fn arm(&self, steps: u64) {
        self.state.lock().unwrap().left = Some(steps);
    }

    /// Counts a step on a channel of this generation. Returns whether the channel has stopped.
    fn step(&self, generation: u64) -> bool {
        let mut state = self.state.lock().unwrap();
        if state.stopped {
            return state.generation == generation;
        }
        match &mut state.left {
            Some(0) => {
                state.stopped = true;
                true
            }
            Some(left) => {
                *left -= 1;
                false
            }
            None => false,
        }
    }

    fn has_stopped(&self) -> bool {
        self.state.lock().unwrap().stopped
    }
}

/// Waits until the time-out or until the channel is closed, like a socket whose peer is silent.
fn stand_still(closed: &Closed, idle: Option<Duration>) -> io::Error {
    let guard = closed.0.lock().unwrap();
    match idle {
        None => drop(closed.1.wait_while(guard, |closed| !*closed).unwrap()),
        Some(idle) => drop(closed.1.wait_timeout_while(guard, idle, |closed| !*closed).unwrap()),
    }
    match *closed.0.lock().unwrap() {
        true => io::ErrorKind::ConnectionReset.into(),
        false => io::ErrorKind::TimedOut.into(),
    }
}

#[derive(Default)]
struct Closed(Mutex<bool>, Condvar);

struct StoppingConnector {
    inner: MemoryConnector,
    stopper: Arc<Stopper>,
}

impl Connector for StoppingConnector {
    fn connect(&self) -> io::Result<Box<dyn Channel>> {
        let state = self.stopper.state.lock().unwrap();
        let generation = state.generation + u64::from(state.stopped);
        drop(state);
        let inner = self.inner.connect()?;
        Ok(Box::new(StoppingChannel { inner, stopper: self.stopper.clone(), generation }))
    }

    fn address(&self) -> String {
        "memory:stopping".into()
    }
}

struct StoppingChannel {
    inner: Box<dyn Channel>,
    stopper: Arc<Stopper>,
    generation: u64,
}

impl Channel for StoppingChannel {
    fn split(self: Box<Self>) -> io::Result<Halves> {
        let Halves { reader, writer, closer } = self.inner.split()?;
        let closed = Arc::new(Closed::default());
        let stopper = self.stopper;
        let generation = self.generation;
        let half = |stopper| Half { stopper, generation, closed: closed.clone(), idle: None };
        Ok(Halves {
            reader: Box::new(Reader { inner: reader, half: half(stopper.clone()) }),
            writer: Box::new(Writer { inner: writer, half: half(stopper) }),
            closer: Box::new(Ends { inner: closer, closed: closed.clone() }),
        })
    }

    fn peer(&self) -> String {
        "memory:stopping".into()
    }
}

struct Half {
    stopper: Arc<Stopper>,
    generation: u64,
    closed: Arc<Closed>,
    idle: Option<Duration>,
}

struct Reader {
    inner: Box<dyn ReadHalf>,
    half: Half,
}

impl ReadHalf for Reader {
    fn read_exact(&mut self, buf: &mut [u8]) -> io::Result<()> {
        // the step is the delivery of the bytes, so bytes that have arrived may be lost
        self.inner.read_exact(buf)?;
        if self.half.stopper.step(self.half.generation) {
            return Err(stand_still(&self.half.closed, self.half.idle));
        }
        Ok(())
    }

    fn read_ram(&mut self, slices: &[RamSlice<'_>]) -> io::Result<()> {
        self.inner.read_ram(slices)
    }

    fn set_idle_timeout(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        self.half.idle = timeout;
        self.inner.set_idle_timeout(timeout)
    }
}

struct Writer {
    inner: Box<dyn WriteHalf>,
    half: Half,
}

impl WriteHalf for Writer {
    fn write_all(&mut self, head: &[u8], slices: &[RamSlice<'_>]) -> io::Result<()> {
        if !self.half.stopper.step(self.half.generation) {
            return self.inner.write_all(head, slices);
        }
        match self.half.stopper.how {
            Stop::Swallows => Ok(()),
            Stop::Blocks => Err(stand_still(&self.half.closed, self.half.idle)),
            Stop::Drips => {
                if head.len() > LARGE {
                    stand_still(&self.half.closed, Some(DRIP));
                    self.half.stopper.state.lock().unwrap().drops += 1;
                }
                self.inner.write_all(head, slices)
            }
        }
    }

    fn set_idle_timeout(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        self.half.idle = timeout;
        self.inner.set_idle_timeout(timeout)
    }
}

struct Ends {
    inner: Box<dyn Closer>,
    closed: Arc<Closed>,
}

impl Closer for Ends {
    fn close(&self) {
        self.inner.close();
        *self.closed.0.lock().unwrap() = true;
        self.closed.1.notify_all();
    }
}

/// Longer than any test takes, so that no wait ends because of it.
const FAR: Duration = Duration::from_secs(3600);

/// Returns options with a downtime limit that also a busy host meets.
fn patient() -> SourceOptions {
    SourceOptions { downtime_limit: Duration::from_secs(60), ..SourceOptions::default() }
}

fn options() -> SourceOptions {
    let pause_limits = PauseLimits { silence: Some(Duration::from_secs(3)), total: None };
    // this is only the longest time to wait for the answer to *run*
    let idle_timeout = Duration::from_secs(5);
    SourceOptions { pause_limits, idle_timeout, setup_timeout: FAR, streams: 1, ..patient() }
}

fn strategy(which: u64) -> Box<dyn Strategy> {
    if which == 0 { Box::new(<PreCopy>::default()) } else { Box::new(StopAndCopy) }
}

/// Migrates over a link that stops at this step of the pause, and then over one that works. Returns
/// the report of the first attempt, and whether the link stopped in it.
fn attempt(how: Stop, which: u64, steps: u64) -> (Report, bool) {
    let (connector, listener) = memory::link(memory::DEFAULT_CAPACITY);
    let destination = Destination::start(Box::new(listener), 0);
    let stopper = Stopper::new(how);
    let link = StoppingConnector { inner: connector.clone(), stopper: stopper.clone() };
    let mut vm = TestVm::new();
    let armed = stopper.clone();
    vm.on_pause = Some(Box::new(move || armed.arm(steps)));
    let (_controller, commands) = Controller::new();
    let report = migrate(&mut vm, &link, &mut *strategy(which), &options(), commands);
    vm.on_pause = None;
    let stopped = stopper.has_stopped();
    let name = format!("{how:?}, strategy {which}, step {steps}");
    if report.outcome == Outcome::Completed {
        let guest = destination.arrived.recv().unwrap();
        assert!(guest.is_running() && !vm.guest.is_running(), "{name}");
        guest.set_running(false);
        guest.check();
        return (report, stopped);
    }
    let reason = report.reason.clone().unwrap_or_default();
    assert!(report.outcome == Outcome::Failed && stopped, "{name}: {reason}");
    assert!(reason.contains("the guest was paused for") && reason.contains("runs on here"), "{name}: {reason}");
    // the guest is in its previous state
    assert!(vm.guest.is_running() && !vm.tracks() && !vm.doubt && !vm.released, "{name}");
    assert_eq!(vm.guest.throttle.load(Ordering::SeqCst), 0, "{name}");
    assert!(destination.arrived.try_recv().is_err(), "{name}: two owners");
    assert_ne!(destination.handle.phase(), DestinationPhase::Running, "{name}");
    // the next attempt migrates the guest
    let options = SourceOptions { last_epoch: report.epoch, ..patient() };
    let (_controller, commands) = Controller::new();
    let retry = migrate(&mut vm, &connector, &mut *strategy(which), &options, commands);
    assert_eq!(retry.outcome, Outcome::Completed, "{name}: {:?}", retry.reason);
    let guest = destination.arrived.recv().unwrap();
    guest.set_running(false);
    guest.check();
    (report, stopped)
}

#[test]
fn wherever_the_link_stops_in_the_pause_the_guest_runs_on() {
    for how in [Stop::Swallows, Stop::Blocks] {
        for which in [0, 1] {
            let failed = AtomicU64::new(0);
            let next = AtomicU64::new(0);
            let done = Mutex::new(false);
            // every stop takes a time-out, so run many attempts at once
            thread::scope(|scope| {
                for _ in 0..12 {
                    scope.spawn(|| {
                        while !*done.lock().unwrap() {
                            let (report, stopped) = attempt(how, which, next.fetch_add(1, Ordering::SeqCst));
                            failed.fetch_add(u64::from(report.outcome == Outcome::Failed), Ordering::SeqCst);
                            // the step is after the last one of the pause
                            *done.lock().unwrap() |= !stopped;
                        }
                    });
                }
            });
            // at least the last pages, the state, the end of the round, the offer and the answers
            assert!(failed.load(Ordering::SeqCst) >= 5, "{how:?}, strategy {which}");
        }
    }
}

/// The destination takes longer to load than the source waits without a message. It sends messages
/// that it is alive.
#[test]
fn a_destination_that_loads_for_long_is_not_silent() {
    let (connector, listener) = memory::link(memory::DEFAULT_CAPACITY);
    let destination = Destination::loading_for(Box::new(listener), Duration::from_secs(4));
    let mut vm = TestVm::new();
    let (_controller, commands) = Controller::new();
    let pause_limits = PauseLimits { silence: Some(Duration::from_secs(2)), total: Some(FAR) };
    let options = SourceOptions { pause_limits, ..options() };
    let report = migrate(&mut vm, &connector, &mut <PreCopy>::default(), &options, commands);
    assert_eq!(report.outcome, Outcome::Completed, "{:?}", report.reason);
    let guest = destination.arrived.recv().unwrap();
    guest.set_running(false);
    guest.check();
}

/// A destination that sends such messages without end is given up at the limit of the whole pause.
#[test]
fn a_destination_that_never_gets_ready_is_given_up_although_it_lives() {
    let (connector, listener) = memory::link(memory::DEFAULT_CAPACITY);
    let destination = Destination::loading_for(Box::new(listener), Duration::from_secs(8));
    let mut vm = TestVm::new();
    let (_controller, commands) = Controller::new();
    let pause_limits = PauseLimits { silence: Some(FAR), total: Some(Duration::from_secs(1)) };
    let options = SourceOptions { pause_limits, ..options() };
    let report = migrate(&mut vm, &connector, &mut <PreCopy>::default(), &options, commands);
    let reason = report.reason.unwrap_or_default();
    assert!(report.outcome == Outcome::Failed && reason.contains("although it made progress"), "{reason}");
    assert!(vm.guest.is_running() && !vm.tracks() && !vm.doubt);
    assert!(destination.arrived.try_recv().is_err());
}

/// Accepting the state in small pieces does not extend the pause, because the limit is also checked
/// within a frame.
#[test]
fn a_destination_that_takes_a_frame_drop_by_drop_does_not_prolong_the_pause() {
    let (connector, listener) = memory::link(memory::DEFAULT_CAPACITY);
    let destination = Destination::start(Box::new(listener), 0);
    let stopper = Stopper::new(Stop::Drips);
    let link = StoppingConnector { inner: connector, stopper: stopper.clone() };
    let mut vm = TestVm::new();
    vm.large_state = 3 << 20;
    let armed = stopper.clone();
    vm.on_pause = Some(Box::new(move || armed.arm(0)));
    let (_controller, commands) = Controller::new();
    let total = 3 * DRIP;
    let pause_limits = PauseLimits { silence: Some(FAR), total: Some(total) };
    let options = SourceOptions { pause_limits, ..options() };
    let report = migrate(&mut vm, &link, &mut <PreCopy>::default(), &options, commands);
    let reason = report.reason.unwrap_or_default();
    assert!(report.outcome == Outcome::Failed && reason.contains("although it made progress"), "{reason}");
    assert!(vm.guest.is_running() && !vm.tracks() && !vm.doubt);
    // the piece that was being sent at the limit was the last one
    let drops = stopper.state.lock().unwrap().drops;
    assert!((1..=3).contains(&drops), "{drops} pieces were sent, each after {DRIP:?}, in a pause of {total:?}");
    assert!(destination.arrived.try_recv().is_err());
}

/// Records the phases of the source.
#[derive(Default)]
struct Phases(Mutex<Vec<SourcePhase>>);

impl Observer for Phases {
    fn event(&self, event: &Event) {
        if let Event::Source(phase) = event {
            self.0.lock().unwrap().push(*phase);
        }
    }
}

/// A guest that its user has paused has no downtime while the destination is silent, so the limits
/// of the pause do not apply, only the time-outs of the link.
#[test]
fn a_guest_that_does_not_run_is_not_hurried() {
    let (connector, listener) = memory::link(memory::DEFAULT_CAPACITY);
    let destination = Destination::loading_for(Box::new(listener), Duration::from_secs(2));
    let mut vm = TestVm::new();
    vm.paused_by_user = true;
    let (_controller, commands) = Controller::new();
    let limit = Some(Duration::from_millis(100));
    let phases = Arc::new(Phases::default());
    let pause_limits = PauseLimits { silence: limit, total: limit };
    let options = SourceOptions { pause_limits, observer: phases.clone(), ..options() };
    let began = Instant::now();
    let report = migrate(&mut vm, &connector, &mut <PreCopy>::default(), &options, commands);
    assert_eq!(report.outcome, Outcome::Completed, "{:?} after {:?}", report.reason, began.elapsed());
    assert!(phases.0.lock().unwrap().contains(&SourcePhase::Completed));
    let guest = destination.arrived.recv().unwrap();
    assert!(!guest.is_running());
}
