//! A receiver that takes one attempt and returns what came of it.

use std::{
    sync::{Arc, Mutex, OnceLock, mpsc},
    thread,
    time::{Duration, Instant},
};

use migration_core::{
    GuestRam,
    channel::Connector,
    engine::{AttemptError, Controller, OneAttempt, ReceiverHandle, ReceiverOptions, SourceOptions, migrate},
    pager::Pager,
    protocol::DestinationPhase,
    report::{Outcome, Report},
    state::{Section, VmState},
    strategy::{Linear, PostCopy, PreCopy, Strategy},
    vm::{DestinationHost, DestinationVm, VmDescription, VmError},
    wire::{Control, LaneKind, Preamble, SessionToken},
};

use crate::{
    HANG, VM,
    bounds::hello_of,
    channels::{Door, End, pair},
    destination::{Destination, said},
    guest::{ArrivingVm, Host, RecordedVm, checksums, description},
    live::Link,
    post_copy::{guest, paged_description, paging},
    streams::{feed, frames, stream},
};

fn options() -> ReceiverOptions {
    ReceiverOptions { idle_timeout: HANG, ..ReceiverOptions::default() }
}

fn host(description: VmDescription, paged: bool) -> (Host, mpsc::Receiver<crate::guest::Arrived>) {
    let (to, arrived) = mpsc::channel();
    (Host { description, to, paging: paged.then(paging) }, arrived)
}

/// Migrates `vm` on a thread of its own.
pub(crate) fn source(
    mut strategy: impl Strategy + 'static,
    link: impl Connector + 'static,
    mut vm: RecordedVm,
) -> mpsc::Receiver<(Report, RecordedVm)> {
    let (tx, ended) = mpsc::channel();
    thread::spawn(move || {
        let options = SourceOptions { demand_lanes: 1, ..SourceOptions::default() };
        let report = migrate(&mut vm, &link, &mut strategy, &options, Controller::new().1);
        // a test that has failed has gone
        let _ = tx.send((report, vm));
    });
    ended
}

#[test]
fn the_caller_gets_its_own_vm_back_and_then_serves_it_until_it_is_whole() {
    let ((door, ends), (host, started)) = (mpsc::channel(), host(paged_description(), true));
    let mut listener = Door(ends);
    let mut attempt = OneAttempt::new(host, options());
    let strategy = PostCopy { order: Box::new(Linear::default()) };
    let ended = source(strategy, Link::to(door, None), guest());
    let arrived = attempt.receive(&mut listener, Some(Instant::now() + HANG)).unwrap();
    assert!(arrived.id == VM && arrived.epoch == 1 && arrived.not_started.is_none());
    let _: ArrivingVm = arrived.vm;
    attempt.finish(&mut listener, Some(Instant::now() + HANG)).unwrap();
    let (report, vm) = ended.recv_timeout(HANG).unwrap();
    assert_eq!(report.outcome, Outcome::Completed, "{:?}", report.reason);
    assert_eq!(started.recv_timeout(HANG).unwrap().pages(), checksums(&vm.ram));
}

/// At once, although the peer says no more, and waits for an answer.
#[test]
fn a_peer_that_speaks_another_protocol_is_a_result_and_one_that_says_nothing_is_not() {
    let ((door, ends), (host, _started)) = (mpsc::channel::<Option<End>>(), host(description(), false));
    let mut listener = Door(ends);
    let mut attempt = OneAttempt::new(host, options());
    let connect = |bytes: &[u8]| {
        let (here, there) = pair();
        here.outgoing.write(bytes).unwrap();
        door.send(Some(there)).unwrap();
        here
    };
    // a look at the port
    connect(b"").outgoing.update(|state| state.ended = true);
    let _foreign = connect(b"QEVM");
    let failed = match attempt.receive(&mut listener, Some(Instant::now() + HANG)) {
        Err(AttemptError::Failed(failed)) => failed,
        other => panic!("{:?}", other.map(|arrived| arrived.id)),
    };
    assert!(failed.vm.is_none() && failed.why.contains("does not speak this protocol"), "{failed}");
    // the next attempt
    let ended = source(<PreCopy>::default(), Link::to(door, None), RecordedVm::new());
    let arrived = attempt.receive(&mut listener, Some(Instant::now() + HANG)).map(|arrived| arrived.id);
    assert_eq!(arrived.unwrap(), VM);
    attempt.finish(&mut listener, None).unwrap();
    assert_eq!(ended.recv_timeout(HANG).unwrap().0.outcome, Outcome::Completed);
}

#[test]
fn a_vm_that_the_host_does_not_build_is_a_result() {
    let ((door, ends), (host, _started)) = (mpsc::channel(), host(paged_description(), false));
    let mut attempt = OneAttempt::new(host, options());
    let ended = source(<PreCopy>::default(), Link::to(door, None), RecordedVm::new());
    match attempt.receive(&mut Door(ends), Some(Instant::now() + HANG)) {
        Err(AttemptError::Failed(failed)) => {
            assert!(failed.vm == Some(VM) && failed.why.contains("another VM than the one recorded"), "{failed}");
        }
        other => panic!("{:?}", other.map(|arrived| arrived.id)),
    }
    drop(attempt);
    let (report, vm) = ended.recv_timeout(HANG).unwrap();
    assert_eq!((report.outcome, &**vm.calls.lock().unwrap()), (Outcome::Failed, &[][..]), "{:?}", report.reason);
}

#[test]
fn without_a_source_the_deadline_ends_the_wait() {
    let ((_door, ends), (host, _started)) = (mpsc::channel(), host(description(), false));
    let mut attempt = OneAttempt::new(host, options());
    let ended = attempt.receive(&mut Door(ends), Some(Instant::now()));
    assert!(matches!(ended, Err(AttemptError::TimedOut)));
}

/// Cancels when its lanes are there, as a person would in the middle of an attempt.
struct Cancels {
    host: Host,
    handle: Arc<OnceLock<ReceiverHandle>>,
}

struct CancelsVm {
    vm: ArrivingVm,
    handle: Arc<OnceLock<ReceiverHandle>>,
}

impl DestinationHost for Cancels {
    type Vm = CancelsVm;

    fn build(&self, vm: &VmDescription) -> Result<CancelsVm, VmError> {
        Ok(CancelsVm { vm: self.host.build(vm)?, handle: self.handle.clone() })
    }
}

impl DestinationVm for CancelsVm {
    fn ram(&self) -> Arc<dyn GuestRam> {
        self.vm.ram()
    }

    fn pager(&mut self) -> Option<Arc<dyn Pager>> {
        None
    }

    fn estimate_load(&mut self) -> Option<Duration> {
        let handle = self.handle.get().unwrap();
        handle.stop();
        while handle.phase() != DestinationPhase::Empty {
            thread::yield_now();
        }
        None
    }

    fn load_piece(&mut self, piece: &Section) -> Result<(), VmError> {
        self.vm.load_piece(piece)
    }

    fn load_state(&mut self, state: &VmState) -> Result<(), VmError> {
        self.vm.load_state(state)
    }

    fn start(&mut self, running: bool) -> Result<(), VmError> {
        self.vm.start(running)
    }
}

#[test]
fn a_cancel_ends_the_attempt_that_is_under_way_and_its_source_goes_on() {
    let ((door, ends), (host, started)) = (mpsc::channel(), host(description(), false));
    let handle = Arc::new(OnceLock::new());
    let mut attempt = OneAttempt::new(Cancels { host, handle: handle.clone() }, options());
    assert!(handle.set(attempt.handle()).is_ok());
    let ended = source(<PreCopy>::default(), Link::to(door, None), RecordedVm::new());
    match attempt.receive(&mut Door(ends), None) {
        Err(AttemptError::Stopped) => {}
        other => panic!("{:?}", other.map(|arrived| arrived.id)),
    }
    assert!(started.try_recv().is_err());
    let (report, _vm) = ended.recv_timeout(HANG).unwrap();
    let reason = report.reason.unwrap_or_default();
    assert_eq!(report.outcome, Outcome::Failed, "{reason}");
    assert!(reason.contains("the destination has given the attempt up: stopped"), "{reason}");
}

/// Its source may have given it away: it is neither started nor discarded, until somebody decides.
#[test]
fn a_complete_vm_outlives_the_callers_patience() {
    let ((door, ends), (host, arrived)) = (mpsc::channel(), host(description(), false));
    let mut attempt = OneAttempt::new(host, options());
    let handle = attempt.handle();
    let thread = thread::spawn(move || {
        let mut listener = Door(ends);
        match attempt.receive(&mut listener, None) {
            Err(AttemptError::Held { vm: VM, epoch: 1 }) => {}
            other => panic!("{:?}", other.map(|arrived| arrived.id)),
        }
        attempt.handle().force_take_over().unwrap();
        let arrived = attempt.receive(&mut listener, None).map(|arrived| arrived.epoch);
        assert_eq!(arrived.unwrap(), 2);
        Ok(())
    });
    let (_log, log) = mpsc::channel();
    let mut destination = Destination { door, handle, thread: None, arrived, log };
    let good = stream("pre-copy");
    let control = frames(&good.lanes[0]);
    let cut = control[control.len() - 3];
    feed(&destination, &good, &|lane, bytes| {
        if lane == 0 {
            bytes.truncate(cut);
        }
    });
    assert_eq!(destination.handle.phase(), DestinationPhase::Ready);
    destination.handle.stop();
    destination.thread = Some(thread);
    crate::streams::check("pre-copy", &destination.finish().0);
}

/// Builds a VM when the test lets it.
struct Waits {
    host: Host,
    go: Mutex<mpsc::Receiver<()>>,
}

impl DestinationHost for Waits {
    type Vm = ArrivingVm;

    fn build(&self, vm: &VmDescription) -> Result<ArrivingVm, VmError> {
        self.go.lock().unwrap().recv().unwrap();
        self.host.build(vm)
    }
}

/// Its source has given it up, and has begun anew. What comes of that is the result.
#[test]
fn an_attempt_that_a_newer_one_replaces_is_no_result() {
    let ((door, ends), (host, _started)) = (mpsc::channel(), host(description(), false));
    let (go, waits) = mpsc::channel();
    let mut attempt = OneAttempt::new(Waits { host, go: Mutex::new(waits) }, options());
    let handle = attempt.handle();
    let result = thread::spawn(move || attempt.receive(&mut Door(ends), None).map(|arrived| arrived.id));
    let greet = |epoch| {
        let (here, there) = pair();
        let preamble = Preamble::new(LaneKind::Control, 0, SessionToken::default()).encode();
        let hello = hello_of(VM, 0, 1).encode(0, 0, epoch);
        here.outgoing.write(&[&preamble[..], &hello].concat()).unwrap();
        door.send(Some(there)).unwrap();
        let deadline = Instant::now() + HANG;
        while handle.epoch() != epoch {
            assert!(Instant::now() < deadline, "the hello is not taken");
            thread::yield_now();
        }
        here
    };
    let (_first, second) = (greet(1), greet(2));
    go.send(()).unwrap();
    go.send(()).unwrap();
    let answer = said(&second);
    assert!(matches!(answer, Some(Control::Welcome(_))), "{answer:?}");
    second.outgoing.update(|state| state.ended = true);
    match result.join().unwrap() {
        Err(AttemptError::Failed(failed)) => {
            assert!(failed.vm == Some(VM) && !failed.why.contains("given up"), "{failed}");
        }
        other => panic!("{other:?}"),
    }
}
