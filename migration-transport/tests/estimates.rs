//! Tests of a VM with a large state over real sockets: the prediction and the limits take the
//! estimates of both VMMs into account.

#[allow(dead_code, reason = "these VMs have a destination of their own")]
mod common;

use std::{
    net::ToSocketAddrs,
    sync::{Arc, Mutex, mpsc},
    thread::{self, JoinHandle},
    time::Duration,
};

use bytes::Bytes;
use common::{Arriving, Guest, TestHost, TestVm};
use migration_core::{
    GuestRam, PageSet,
    engine::{
        Controller, OnTimeout, PauseLimits, Receiver, ReceiverHandle, ReceiverOptions, SnapshotOptions, SourceOptions,
        migrate, snapshot,
    },
    protocol::SourcePhase,
    report::{Event, Observer, Outcome, Progress, Report},
    state::{MAX_SECTION, Section, VmState},
    strategy::{PreCopy, StopAndCopy, Strategy},
    text::describe,
    tracker::DirtyTracker,
    vm::{Arrived, DestinationHost, DestinationVm, SectionEstimate, SourceVm, StateEstimate, VmDescription, VmError},
};
use migration_transport::{Address, Bandwidth, ConnectOptions, Relay, bind, connector};

const LARGE: usize = 15_000_000;
const SAVE: Duration = Duration::from_millis(5);
const LOAD: Duration = Duration::from_millis(100);

/// A VM with a device whose state is large.
struct LargeVm {
    vm: TestVm,
    /// The size in bytes of the device's state in the pause.
    bytes: usize,
    /// The VMM's estimate of that size, if it gives one.
    believed: Option<u64>,
    /// The bytes of the device's state that can be sent in pieces while the guest runs.
    pending: u64,
    config: usize,
    pauses: u32,
}

impl LargeVm {
    fn new(bytes: usize) -> Self {
        Self { vm: TestVm::new(), bytes, believed: Some(bytes as u64), pending: 0, config: 0, pauses: 0 }
    }
}

impl SourceVm for LargeVm {
    fn describe(&mut self) -> Result<VmDescription, VmError> {
        Ok(VmDescription { config: vec![0; self.config].into(), ..self.vm.describe()? })
    }

    fn ram(&self) -> Arc<dyn GuestRam> {
        self.vm.ram()
    }

    fn tracker(&mut self) -> &mut dyn DirtyTracker {
        self.vm.tracker()
    }

    fn estimate_state(&mut self) -> Option<StateEstimate> {
        let section = SectionEstimate { name: "large".into(), instance: 7, bytes: self.believed? };
        Some(StateEstimate { sections: vec![section], save_time: Some(SAVE) })
    }

    fn iterate_state(&mut self, budget: usize) -> Result<(Vec<Section>, u64), VmError> {
        let bytes = self.pending.min(budget as u64);
        self.pending -= bytes;
        let data = Bytes::from(vec![1; bytes as usize]);
        let pieces = if bytes == 0 { Vec::new() } else { vec![large(data)] };
        Ok((pieces, self.pending))
    }

    fn pause(&mut self) -> Result<(), VmError> {
        self.pauses += 1;
        self.vm.pause()
    }

    fn resume(&mut self) -> Result<(), VmError> {
        self.vm.resume()
    }

    fn throttle(&mut self, percent: u8) -> Result<(), VmError> {
        self.vm.throttle(percent)
    }

    fn save_state(&mut self) -> Result<VmState, VmError> {
        let mut state = self.vm.save_state()?;
        state.sections.push(large(vec![2; self.bytes].into()));
        Ok(state)
    }

    fn owner_in_doubt(&mut self) {
        self.vm.owner_in_doubt();
    }

    fn released(&mut self) {
        self.vm.released();
    }
}

fn large(data: Bytes) -> Section {
    Section { name: "large".into(), instance: 7, version: 1, data }
}

/// Makes VMs that load slowly.
struct SlowHost {
    host: TestHost,
    load: Option<Duration>,
    pieces: mpsc::Sender<usize>,
}

struct SlowVm {
    vm: Arriving,
    load: Option<Duration>,
    pieces: mpsc::Sender<usize>,
}

impl DestinationHost for SlowHost {
    type Vm = SlowVm;

    fn build(&self, vm: &VmDescription) -> Result<SlowVm, VmError> {
        let vm = self.host.build(vm)?;
        Ok(SlowVm { vm, load: self.load, pieces: self.pieces.clone() })
    }
}

impl DestinationVm for SlowVm {
    fn ram(&self) -> Arc<dyn GuestRam> {
        self.vm.ram()
    }

    fn load_piece(&mut self, piece: &Section) -> Result<(), VmError> {
        // a test that does not need the pieces has dropped the receiver
        let _ = self.pieces.send(piece.data.len());
        Ok(())
    }

    fn estimate_load(&mut self) -> Option<Duration> {
        self.load
    }

    fn load_state(&mut self, state: &VmState) -> Result<(), VmError> {
        // the time that loading takes, not a wait for something
        thread::sleep(self.load.unwrap_or_default());
        self.vm.load_state(state)
    }

    fn start(&mut self, running: bool) -> Result<(), VmError> {
        self.vm.start(running)
    }
}

struct Destination {
    address: Address,
    handle: ReceiverHandle,
    arrived: mpsc::Receiver<Arc<Guest>>,
    pieces: mpsc::Receiver<usize>,
    thread: Option<JoinHandle<()>>,
}

impl Destination {
    fn start(load: Option<Duration>) -> Self {
        let mut listener = bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
        let address = listener.address().parse().unwrap();
        let (host, arrived) = TestHost::new(0);
        let (tx, pieces) = mpsc::channel();
        let to = host.arrived.clone();
        let host = SlowHost { host, load, pieces: tx };
        let arrived_vm = move |arrived: Arrived<SlowVm>| drop(to.send(arrived.vm.vm.guest));
        let receiver = Receiver::new(host, arrived_vm, ReceiverOptions::default());
        let handle = receiver.handle();
        let thread = thread::spawn(move || {
            // the test that stops the receiver expects the error
            let _ = receiver.run(&mut *listener);
        });
        Self { address, handle, arrived, pieces, thread: Some(thread) }
    }

    fn take(&self, vm: &mut LargeVm, strategy: &mut dyn Strategy, options: &SourceOptions) -> Report {
        let link = connector(&self.address, ConnectOptions::default());
        migrate(vm, &*link, strategy, options, Controller::new().1)
    }
}

impl Drop for Destination {
    fn drop(&mut self) {
        self.handle.stop();
        self.thread.take().map(JoinHandle::join);
    }
}

fn limit(ms: u64) -> SourceOptions {
    SourceOptions { downtime_limit: Duration::from_millis(ms), ..SourceOptions::default() }
}

#[test]
fn what_both_vmms_say_of_a_large_state_is_predicted() {
    let (destination, mut vm) = (Destination::start(Some(LOAD)), LargeVm::new(LARGE));
    let report = destination.take(&mut vm, &mut <PreCopy>::default(), &limit(30_000));
    assert_eq!(report.outcome, Outcome::Completed, "{:?}", report.reason);
    let (predicted, downtime) = (report.predicted_downtime.unwrap(), report.downtime.unwrap());
    // on a busy machine the downtime may exceed the prediction, but it is never shorter than the
    // load
    assert!(predicted >= SAVE + LOAD, "{predicted:?}");
    assert!(downtime >= LOAD && report.state_bytes >= LARGE as u64, "{downtime:?}");
    assert_eq!(report.stalled, None);
    destination.arrived.recv().unwrap().set_running(false);
}

#[test]
fn a_limit_that_it_does_not_fit_into_fails_before_a_page_moves_or_does_what_the_user_chose() {
    let (destination, mut vm) = (Destination::start(Some(LOAD)), LargeVm::new(LARGE));
    let report = destination.take(&mut vm, &mut <PreCopy>::default(), &limit(4));
    assert_eq!((report.outcome, vm.pauses, report.rounds.len()), (Outcome::Failed, 0, 0), "{report:?}");
    let why = report.reason.unwrap();
    for word in ["a downtime of 4 ms cannot be kept", "15000000 bytes of state"] {
        assert!(why.contains(word), "{why}: {word}");
    }
    assert!(vm.vm.guest.is_running() && !vm.vm.tracks() && report.throttle_percent == 0);
    let stop = SourceOptions { on_timeout: OnTimeout::Stop, last_epoch: report.epoch, ..limit(4) };
    let report = destination.take(&mut vm, &mut <PreCopy>::default(), &stop);
    assert_eq!(report.outcome, Outcome::Completed, "{:?}", report.reason);
    assert!(report.predicted_downtime >= Some(SAVE + LOAD), "{report:?}");
    assert!(report.stalled.is_some_and(|why| why.contains("of 4 ms")));
    destination.arrived.recv().unwrap().set_running(false);
}

/// Neither VMM gives an estimate, so the time that they need follows from the pending bytes.
#[test]
fn pieces_that_are_pending_move_while_the_guest_runs() {
    let destination = Destination::start(None);
    let mut vm = LargeVm { believed: None, pending: 40_000_000, ..LargeVm::new(100) };
    let report = destination.take(&mut vm, &mut <PreCopy>::default(), &limit(30_000));
    assert_eq!(report.outcome, Outcome::Completed, "{:?}", report.reason);
    destination.arrived.recv().unwrap().set_running(false);
    // the first round sends all but the remainder, which is part of the state in the pause
    let moved = destination.pieces.try_iter().sum::<usize>() as u64;
    assert_eq!(moved + vm.pending, 40_000_000);
    assert!(vm.pending < 1 << 20 && report.state_bytes >= moved, "{report:?}");
}

#[test]
fn what_no_destination_takes_is_refused_before_the_pause() {
    let destination = Destination::start(None);
    let pre_copy: Box<dyn Strategy> = Box::new(<PreCopy>::default());
    let mut last_epoch = 0;
    for mut strategy in [pre_copy, Box::new(StopAndCopy)] {
        let mut vm = LargeVm::new(MAX_SECTION + 1);
        let options = SourceOptions { last_epoch, ..limit(30_000) };
        let report = destination.take(&mut vm, &mut *strategy, &options);
        assert_eq!((report.outcome, vm.pauses), (Outcome::Failed, 0), "{report:?}");
        let why = report.reason.unwrap();
        assert!(why.contains("large 7") && why.contains("16777217") && why.contains("pieces"), "{why}");
        // a wrong estimate is noticed in the pause, and the message names it
        vm.believed = None;
        let again = SourceOptions { last_epoch: report.epoch, ..limit(30_000) };
        let report = destination.take(&mut vm, &mut StopAndCopy, &again);
        assert_eq!((report.outcome, vm.pauses), (Outcome::Failed, 1), "{report:?}");
        last_epoch = report.epoch;
        let why = report.reason.unwrap();
        assert!(why.contains("section large 7") && why.contains("16777217"), "{why}");
        assert!(vm.vm.guest.is_running());
    }
    let mut vm = LargeVm { config: (256 << 10) + 1, ..LargeVm::new(100) };
    let report = destination.take(&mut vm, &mut StopAndCopy, &limit(300));
    let why = report.reason.unwrap();
    assert!(why.contains("configuration has 262145 bytes") && why.contains("262144"), "{why}");
    assert!(report.wire_bytes == 0 && vm.vm.guest.is_running(), "nobody was asked");
}

/// The same limits apply to a snapshot.
#[test]
fn a_snapshot_refuses_it_too() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("snapshot");
    let mut store = migration_transport::SnapshotFile::create(&path, 1024).unwrap();
    let mut vm = LargeVm::new(MAX_SECTION + 1);
    let taken = snapshot(&mut vm, &mut store, &SnapshotOptions::default(), Controller::new().1);
    let why = describe(taken.unwrap_err());
    assert!(why.contains("large 7") && vm.pauses == 0 && vm.vm.guest.is_running(), "{why}");
    let mut dirty = PageSet::empty(1024);
    assert!(vm.tracker().harvest(&mut dirty).is_err() || !vm.vm.tracks());
}

/// Records all reports of progress.
#[derive(Default)]
struct Seen(Mutex<Vec<Progress>>);

impl Observer for Seen {
    fn event(&self, event: &Event) {
        if let Event::Progress(progress) = event {
            self.0.lock().unwrap().push(progress.clone());
        }
    }
}

#[test]
fn progress_is_live_in_the_first_round_and_never_absurd() {
    let (destination, mut vm) = (Destination::start(None), LargeVm::new(100));
    let address = destination.address.to_string();
    let address = address.strip_prefix("tcp:").unwrap().to_socket_addrs().unwrap().next().unwrap();
    let relay = Relay::new(address).unwrap();
    // one second for all of RAM
    relay.set_bandwidth(Bandwidth::from_bytes_per_second(4 << 20));
    let seen = Arc::new(Seen::default());
    let options = SourceOptions { observer: seen.clone(), ..limit(5000) };
    let link = connector(&relay.address(), ConnectOptions::default());
    let report = migrate(&mut vm, &*link, &mut <PreCopy>::default(), &options, Controller::new().1);
    assert_eq!(report.outcome, Outcome::Completed, "{:?}", report.reason);
    destination.arrived.recv().unwrap().set_running(false);
    let seen = seen.0.lock().unwrap();
    let first: Vec<_> = seen.iter().filter(|p| p.round == 1 && p.phase == SourcePhase::Copying).collect();
    assert!(first.iter().any(|p| p.bytes_per_second > 0.0 && p.share_done > 0.0 && p.eta.is_some()), "{first:?}");
    assert!(first.iter().all(|p| p.expected_downtime.is_none() && p.least_downtime.is_some()), "{first:?}");
    for pair in seen.windows(2) {
        assert!(pair[0].share_done <= pair[1].share_done, "{pair:?}");
    }
    for p in seen.iter() {
        let most = p.least_downtime.unwrap_or_default().max(options.downtime_limit);
        assert!(p.expected_downtime.is_none_or(|expected| expected <= most), "{p:?}");
    }
}

/// Pings are sent every second, so here the second one is sent before the first is answered.
#[test]
fn a_round_trip_is_longer_than_the_time_between_two_pings() {
    let (destination, mut vm) = (Destination::start(None), LargeVm::new(100));
    let address = destination.address.to_string();
    let address = address.strip_prefix("tcp:").unwrap().to_socket_addrs().unwrap().next().unwrap();
    let relay = Relay::new(address).unwrap();
    relay.set_delay(Duration::from_millis(600));
    // for more than a second of the pause, the destination sends nothing
    let far = Some(Duration::from_secs(3600));
    let pause_limits = PauseLimits { silence: far, total: far };
    let options = SourceOptions { on_timeout: OnTimeout::Stop, pause_limits, ..limit(300) };
    let link = connector(&relay.address(), ConnectOptions::default());
    let report = migrate(&mut vm, &*link, &mut <PreCopy>::default(), &options, Controller::new().1);
    assert_eq!(report.outcome, Outcome::Completed, "{:?}", report.reason);
    destination.arrived.recv().unwrap().set_running(false);
    // two round trips, each with the delay in both directions
    assert!(report.predicted_downtime >= Some(Duration::from_millis(2400)), "{:?}", report.predicted_downtime);
    assert!(report.stalled.is_some_and(|why| why.contains("two round trips")) && report.throttle_percent == 0);
}
