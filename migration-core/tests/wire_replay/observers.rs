//! Observers that panic, and observers that ask the engine what it is at: no migration is the worse
//! for them.

use std::{
    sync::{Arc, Condvar, Mutex, OnceLock, mpsc},
    thread,
    time::Instant,
};

use migration_core::{
    GuestRam,
    engine::{ReceiverHandle, SourceOptions},
    pager::Pager,
    protocol::DestinationPhase,
    report::{Event, Observer, Outcome},
    state::{Section, VmState},
    strategy::{Linear, PostCopy, PreCopy},
    vm::{DestinationHost, DestinationVm, VmDescription, VmError},
    wire::{ErrorCode, LaneKind, Preamble, SessionToken},
};

use crate::{
    HANG,
    bounds::{OTHER, end, greet, hello_of},
    destination::{Destination, Log},
    guest::{Arrived, ArrivingVm, Host, RecordedVm, checksums},
    live::{Link, run_by},
    post_copy::{guest, paged_description, paging},
};

/// Passes each event on in words, and then panics.
struct Panics(Log);

impl Panics {
    fn new() -> (Arc<Self>, mpsc::Receiver<String>) {
        let (tx, log) = mpsc::channel();
        (Arc::new(Self(Log(Mutex::new(tx)))), log)
    }
}

impl Observer for Panics {
    fn event(&self, event: &Event) {
        self.0.event(event);
        // without a message on stderr for each event
        std::panic::resume_unwind(Box::new("an observer that panics"));
    }
}

/// Asks the receiver for its phase at each event, as a VMM does that shows it.
#[derive(Default)]
struct AsksBack {
    handle: OnceLock<ReceiverHandle>,
    seen: Mutex<Vec<(DestinationPhase, String)>>,
    more: Condvar,
}

impl AsksBack {
    /// Waits until an event with these words has come.
    fn await_event(&self, words: &str) {
        let lacks = |seen: &mut Vec<(_, String)>| !seen.iter().any(|(_, text)| text.contains(words));
        let waited = self.more.wait_timeout_while(self.seen.lock().unwrap(), HANG, lacks).unwrap();
        assert!(!waited.1.timed_out(), "no {words}: {:?}", waited.0);
    }
}

impl Observer for AsksBack {
    fn event(&self, event: &Event) {
        let Some(handle) = self.handle.get() else { return };
        let (phase, _epoch) = (handle.phase(), handle.epoch());
        self.seen.lock().unwrap().push((phase, format!("{event:?}")));
        self.more.notify_all();
    }
}

fn host(to: mpsc::Sender<Arrived>) -> Host {
    Host { description: paged_description(), to, paging: Some(paging()) }
}

fn panicking_destination() -> (Destination, mpsc::Receiver<Arrived>) {
    let (observer, log) = Panics::new();
    let (to, arrived) = mpsc::channel();
    let (_unused, nothing) = mpsc::channel();
    (Destination::observed(HANG, (host(to), nothing), observer, log), arrived)
}

fn options(observer: Arc<dyn Observer>) -> SourceOptions {
    SourceOptions { observer, demand_lanes: 1, ..SourceOptions::default() }
}

/// Waits for the receiver's own end, which a thread that panicked would prevent.
fn ends(mut destination: Destination) {
    let _ = destination.door.send(None);
    let thread = destination.thread.take().unwrap();
    let (tx, ended) = mpsc::channel();
    thread::spawn(move || tx.send(thread.join().unwrap()));
    ended.recv_timeout(HANG).expect("the receiver listens on").unwrap();
}

fn arrives_whole(arrived: &mpsc::Receiver<Arrived>, vm: &RecordedVm) {
    let arrived = arrived.recv_timeout(HANG).expect("a VM has arrived");
    assert_eq!(arrived.pages(), checksums(&vm.ram));
}

#[test]
fn observers_that_panic_at_every_event_leave_pre_copy_as_it_is() {
    let (destination, arrived) = panicking_destination();
    let (observer, told) = Panics::new();
    let link = Link::new(&destination, None);
    let (report, vm, _) = run_by(<PreCopy>::default(), &destination, link, guest(), options(observer));
    assert_eq!(report.outcome, Outcome::Completed, "{:?}", report.reason);
    ends(destination);
    arrives_whole(&arrived, &vm);
    drop(told);
}

#[test]
fn observers_that_panic_at_every_event_leave_post_copy_as_it_is() {
    let strategy = || PostCopy { order: Box::new(Linear::default()) };
    // undisturbed, and with the link lost when pages follow the VM, where the source tells that it
    // reconnects
    for cut in [None, Some(((LaneKind::Bulk, 0, false), 3000))] {
        let (destination, arrived) = panicking_destination();
        let (observer, _told) = Panics::new();
        let link = Link::new(&destination, cut);
        let (report, vm, _) = run_by(strategy(), &destination, link, guest(), options(observer));
        assert_eq!(report.outcome, Outcome::Completed, "{cut:?}: {:?}", report.reason);
        assert_eq!(report.recoveries > 0, cut.is_some(), "{cut:?}: {} recoveries", report.recoveries);
        ends(destination);
        arrives_whole(&arrived, &vm);
    }
}

/// The engine's state is as it should be before anybody hears of a lost source: the next one is not
/// refused as busy.
#[test]
fn an_observer_that_panics_at_a_lost_source_does_not_keep_the_next_one_out() {
    let (destination, arrived) = panicking_destination();
    let (observer, _told) = Panics::new();
    // the control lane ends after the hello
    let link = Link::new(&destination, Some(((LaneKind::Control, 0, false), 330)));
    let (report, vm, _) = run_by(<PreCopy>::default(), &destination, link, guest(), options(observer.clone()));
    assert_eq!(report.outcome, Outcome::Failed, "the link was cut");
    // a preamble that is none: a bad peer, of whom the observer hears too
    drop(destination.connect(&[0xff; Preamble::LEN]));
    destination.log.recv_timeout(HANG).expect("the lost source is noticed");
    // another VM's source, which does not supersede anything: the host refuses its VM, and the
    // receiver is not busy
    let deadline = Instant::now() + HANG;
    loop {
        let (code, text) = end(&greet(&destination, &hello_of(OTHER, 0, 1)));
        if code != ErrorCode::Busy {
            assert_eq!(code, ErrorCode::Mismatch, "{text}");
            break;
        }
        assert!(Instant::now() < deadline, "it stays busy: {text}");
    }
    let again = SourceOptions { last_epoch: report.epoch, ..options(observer) };
    let link = Link::new(&destination, None);
    let (report, vm, _) = run_by(<PreCopy>::default(), &destination, link, vm, again);
    assert_eq!(report.outcome, Outcome::Completed, "{:?}", report.reason);
    ends(destination);
    arrives_whole(&arrived, &vm);
}

/// Builds VMs that do not start: the engine warns of that.
struct Stubborn(Host);

impl DestinationHost for Stubborn {
    type Vm = NoStart;

    fn build(&self, vm: &VmDescription) -> Result<NoStart, VmError> {
        Ok(NoStart(self.0.build(vm)?))
    }
}

struct NoStart(ArrivingVm);

impl DestinationVm for NoStart {
    fn ram(&self) -> Arc<dyn GuestRam> {
        self.0.ram()
    }

    fn pager(&mut self) -> Option<Arc<dyn Pager>> {
        self.0.pager()
    }

    fn vcpu_threads(&self) -> Vec<u32> {
        self.0.vcpu_threads()
    }

    fn load_piece(&mut self, piece: &Section) -> Result<(), VmError> {
        self.0.load_piece(piece)
    }

    fn load_state(&mut self, state: &VmState) -> Result<(), VmError> {
        self.0.load_state(state)
    }

    fn start(&mut self, running: bool) -> Result<(), VmError> {
        self.0.start(running)?;
        Err(VmError::new("this one does not start"))
    }
}

/// No event comes with a lock held that the handle takes, and each comes after what it tells of.
#[test]
fn an_observer_may_ask_the_receiver_for_its_phase() {
    let observer = Arc::new(AsksBack::default());
    let (to, arrived) = mpsc::channel();
    let ((_unused, nothing), (_no_log, log)) = (mpsc::channel(), mpsc::channel());
    let destination = Destination::observed(HANG, (Stubborn(host(to)), nothing), observer.clone(), log);
    assert!(observer.handle.set(destination.handle.clone()).is_ok());
    // a bad peer, and a source that is lost in its first round
    drop(destination.connect(&Preamble::new(LaneKind::Bulk, 0, SessionToken::default()).encode()));
    let quiet = options(Arc::new(migration_core::report::NoObserver));
    let link = Link::new(&destination, Some(((LaneKind::Bulk, 0, false), 100)));
    let (report, vm, _) = run_by(<PreCopy>::default(), &destination, link, guest(), quiet.clone());
    assert_eq!(report.outcome, Outcome::Failed, "the link was cut");
    // events come without a lock: the next attempt would change the phase before it is asked for
    observer.await_event("Discarded");
    let again = SourceOptions { last_epoch: report.epoch, ..quiet };
    let strategy = PostCopy { order: Box::new(Linear::default()) };
    let (report, vm, _) = run_by(strategy, &destination, Link::new(&destination, None), vm, again);
    assert_eq!(report.outcome, Outcome::Completed, "{:?}", report.reason);
    ends(destination);
    arrives_whole(&arrived, &vm);
    let seen = observer.seen.lock().unwrap();
    let phase_at = |words: &str| seen.iter().find(|(_, text)| text.contains(words)).map(|(phase, _)| *phase);
    assert_eq!(phase_at("could not be started"), Some(DestinationPhase::Running), "{seen:?}");
    assert_eq!(phase_at("Discarded"), Some(DestinationPhase::Empty), "{seen:?}");
    assert!(phase_at("BadPeer").is_some(), "{seen:?}");
}

/// Keeps the phases of which it is told.
#[derive(Default)]
struct Phases(Mutex<Vec<DestinationPhase>>);

impl Observer for Phases {
    fn event(&self, event: &Event) {
        if let Event::Destination(phase) = event {
            self.0.lock().unwrap().push(*phase);
        }
    }
}

#[test]
fn an_observer_is_told_where_the_protocol_stands() {
    let phases = Arc::new(Phases::default());
    let ((to, arrived), (_unused, log)) = (mpsc::channel(), mpsc::channel());
    let destination = Destination::observed(HANG, (host(to), arrived), phases.clone(), log);
    let link = Link::new(&destination, None);
    let options = SourceOptions { demand_lanes: 1, ..SourceOptions::default() };
    let (report, ..) = run_by(PostCopy { order: Box::new(Linear::default()) }, &destination, link, guest(), options);
    assert_eq!(report.outcome, Outcome::Completed, "{:?}", report.reason);
    drop(destination.finish());
    let mut phases = phases.0.lock().unwrap().clone();
    phases.dedup();
    use DestinationPhase::*;
    assert_eq!(phases, [Preparing, Receiving, Ready, Running]);
}
