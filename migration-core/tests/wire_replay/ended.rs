//! The guest ends by itself, in each phase of its migration: both ends hear it at once, and why.

use std::{
    io,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
};

use migration_core::{
    GuestRam, MigrationError, PageRange, PageSet,
    channel::{Channel, Connector},
    engine::{Controller, SnapshotOptions, SourceOptions, migrate, snapshot},
    protocol::DestinationPhase,
    report::{Outcome, Report},
    state::{Section, VmState},
    store::{MemoryVersions, VersionStore},
    strategy::{Done, Linear, ModelConvergence, PostCopy, PreCopy, PushOrder, Running, Strategy},
    tracker::DirtyTracker,
    vm::{SourceVm, VmDescription, VmError},
    wire::LaneKind,
};

use crate::{
    HANG,
    channels::{End, pair},
    destination::Destination,
    guest::{Host, RecordedVm},
    live::Link,
    post_copy::{guest, paged_description, paging},
};

const WHY: &str = "triple fault on vCPU 0";

/// When the guest ends.
#[derive(Clone, Copy, Debug, PartialEq)]
enum When {
    /// Before the migration has begun.
    Before,
    /// While pages are sent.
    Copying,
    /// The VMM finds out when it pauses it.
    Pausing,
    /// While its state is saved.
    Saving,
    /// It never does.
    Never,
}

/// A guest that ends at a certain moment; its VMM says so.
struct Ending {
    vm: RecordedVm,
    when: When,
    controller: Controller,
    lifted: bool,
}

impl Ending {
    fn new(when: When, controller: &Controller) -> Self {
        if when == When::Before {
            controller.vm_ended(WHY);
        }
        Self { vm: guest(), when, controller: controller.clone(), lifted: true }
    }

    fn now(&self, when: When) {
        if self.when == when {
            self.controller.vm_ended(WHY);
        }
    }
}

impl SourceVm for Ending {
    fn describe(&mut self) -> Result<VmDescription, VmError> {
        self.vm.describe()
    }

    fn ram(&self) -> Arc<dyn GuestRam> {
        SourceVm::ram(&self.vm)
    }

    fn tracker(&mut self) -> &mut dyn DirtyTracker {
        self.vm.tracker()
    }

    fn iterate_state(&mut self, budget: usize) -> Result<(Vec<Section>, u64), VmError> {
        self.now(When::Copying);
        self.vm.iterate_state(budget)
    }

    fn pause(&mut self) -> Result<(), VmError> {
        if self.when == When::Pausing {
            return Err(VmError::ended(WHY));
        }
        self.vm.pause()
    }

    fn resume(&mut self) -> Result<(), VmError> {
        self.vm.resume()
    }

    fn throttle(&mut self, percent: u8) -> Result<(), VmError> {
        self.lifted = percent == 0;
        self.vm.throttle(percent)
    }

    fn save_state(&mut self) -> Result<VmState, VmError> {
        self.now(When::Saving);
        self.vm.save_state()
    }

    fn released(&mut self) {
        self.vm.released();
    }
}

/// Says that the guest has ended when all is ready for the hand-over.
struct Ready(Controller);

impl Strategy for Ready {
    fn name(&self) -> &'static str {
        "ready"
    }

    fn migrate(&mut self, mut vm: Running<'_>) -> Result<Done, MigrationError> {
        let pages = vm.start_tracking()?;
        let mut vm = vm.pause()?;
        vm.send_rest(pages)?;
        self.0.vm_ended(WHY);
        let nothing = vm.no_pages();
        Ok(vm.hand_over(nothing)?.finish()?)
    }
}

fn pre_copy() -> PreCopy {
    PreCopy { convergence: ModelConvergence::default(), order: Box::new(Linear::default()) }
}

fn paged() -> Destination {
    Destination::of(HANG, |to| Host { description: paged_description(), to, paging: Some(paging()) })
}

fn run(
    link: impl Connector + 'static,
    mut vm: Ending,
    mut strategy: impl Strategy + 'static,
    commands: migration_core::engine::Commands,
) -> (Report, Ending) {
    let (tx, rx) = mpsc::channel();
    thread::spawn(move || {
        let options = SourceOptions { demand_lanes: 1, ..SourceOptions::default() };
        let report = migrate(&mut vm, &link, &mut strategy, &options, commands);
        // a test that hangs has gone
        let _ = tx.send((report, vm));
    });
    rx.recv_timeout(HANG).expect("the source ends")
}

/// The migration has failed for that reason, everything was given back, and the destination has
/// heard why.
#[track_caller]
fn failed(destination: &Destination, (report, mut vm): (Report, Ending), what: &str) {
    assert_eq!(report.outcome, Outcome::Failed, "{what}: {:?}", report.reason);
    assert_eq!(report.reason.as_deref(), Some("the VM has ended: triple fault on vCPU 0"), "{what}");
    assert!(!vm.tracker().is_active() && vm.lifted, "{what}: the tracker or a throttle stays");
    let mut heard = Vec::new();
    while !heard.iter().any(|line: &String| line.contains("the VM has ended: triple fault on vCPU 0 (VmEnded)")) {
        heard.push(destination.log.recv_timeout(HANG).unwrap_or_else(|_| panic!("{what}: it heard only {heard:?}")));
    }
    assert_eq!(destination.handle.phase(), DestinationPhase::Empty, "{what}");
}

#[test]
fn a_guest_that_ends_before_run_ends_the_migration_at_both_ends() {
    for when in [When::Copying, When::Pausing, When::Saving] {
        let destination = paged();
        let (controller, commands) = Controller::new();
        let vm = Ending::new(when, &controller);
        let ended = run(Link::new(&destination, None), vm, pre_copy(), commands);
        failed(&destination, ended, &format!("{when:?}"));
    }
    let destination = paged();
    let (controller, commands) = Controller::new();
    let vm = Ending::new(When::Never, &controller);
    let ended = run(Link::new(&destination, None), vm, Ready(controller), commands);
    failed(&destination, ended, "ready");
}

/// A destination that says nothing.
struct Silent(Mutex<Vec<End>>);

impl Connector for Silent {
    fn connect(&self) -> io::Result<Box<dyn Channel>> {
        let (here, there) = pair();
        self.0.lock().unwrap().push(there);
        Ok(Box::new(here))
    }

    fn connect_as(&self, _kind: LaneKind) -> io::Result<Box<dyn Channel>> {
        self.connect()
    }

    fn address(&self) -> String {
        "memory".into()
    }
}

#[test]
fn a_guest_that_ends_while_the_destination_is_silent_is_not_waited_for() {
    let (controller, commands) = Controller::new();
    let vm = Ending::new(When::Before, &controller);
    let (report, _) = run(Silent(Mutex::default()), vm, pre_copy(), commands);
    assert_eq!(report.outcome, Outcome::Failed);
    assert_eq!(report.reason.as_deref(), Some("the VM has ended: triple fault on vCPU 0"));
}

#[test]
fn a_guest_that_ends_during_a_snapshot_ends_it() {
    for when in [When::Before, When::Copying, When::Pausing, When::Saving] {
        let (controller, commands) = Controller::new();
        let (mut vm, mut store) = (Ending::new(when, &controller), MemoryVersions::default());
        let error = snapshot(&mut vm, &mut store, &SnapshotOptions::default(), commands).unwrap_err();
        assert!(matches!(&error, MigrationError::VmEnded(why) if why == WHY), "{when:?}: {error}");
        assert!(store.latest().is_none() && !vm.tracker().is_active() && vm.lifted, "{when:?}");
    }
}

/// Pushes nothing before the guest has ended.
pub(crate) struct Held(pub(crate) Arc<AtomicBool>);

impl PushOrder for Held {
    fn name(&self) -> &'static str {
        "held"
    }

    fn begin(&mut self, _unsent: &PageSet, _heat: &[u8]) {}

    fn fault(&mut self, _page: u64) {}

    fn next(&mut self, unsent: &PageSet, most: u64) -> Option<PageRange> {
        while !self.0.load(Ordering::SeqCst) {
            thread::yield_now();
        }
        unsent.run_at(unsent.first_from(0)?, most)
    }
}

/// A link over which the source comes back only after the guest has ended.
struct Late {
    link: Link,
    ended: Arc<AtomicBool>,
}

impl Connector for Late {
    fn connect(&self) -> io::Result<Box<dyn Channel>> {
        self.link.connect()
    }

    fn connect_as(&self, kind: LaneKind) -> io::Result<Box<dyn Channel>> {
        let ended = kind != LaneKind::Reattach || self.ended.load(Ordering::SeqCst);
        if ended { self.link.connect_as(kind) } else { Err(io::ErrorKind::ConnectionRefused.into()) }
    }

    fn address(&self) -> String {
        self.link.address()
    }
}

/// A post-copy whose guest ends at the destination while pages are missing there. With a cut of
/// what the destination says on its first control lane: how often the source came back, or `None`
/// if it has kept the VM.
fn ends_while_served(cut: Option<usize>) -> Option<u64> {
    let destination = paged();
    let (controller, commands) = Controller::new();
    let vm = Ending::new(When::Never, &controller);
    let link = Link::new(&destination, cut.map(|after| ((LaneKind::Control, 0, true), after)));
    let (handle, kept) = (destination.handle.clone(), Arc::new(AtomicBool::new(false)));
    let (never_there, ended) = (kept.clone(), Arc::new(AtomicBool::new(false)));
    let (link, held) = (Late { link, ended: ended.clone() }, ended.clone());
    // as soon as the VM runs there its guest ends
    let ends = thread::spawn(move || {
        while handle.phase() != DestinationPhase::Running && !never_there.load(Ordering::SeqCst) {
            thread::yield_now();
        }
        handle.vm_ended(WHY);
        ended.store(true, Ordering::SeqCst);
    });
    let (report, vm) = run(link, vm, PostCopy { order: Box::new(Held(held)) }, commands);
    kept.store(true, Ordering::SeqCst);
    ends.join().unwrap();
    let reason = report.reason.unwrap_or_default();
    if cut.is_some() && report.outcome == Outcome::Failed {
        return None;
    }
    assert_eq!(report.outcome, Outcome::Ended, "{cut:?}: {reason}");
    assert!(reason.contains("at the destination: the VM has ended: triple fault on vCPU 0"), "{reason}");
    // it may be freed, and never ran here again
    assert_eq!(*vm.vm.calls.lock().unwrap(), ["released"], "{cut:?}");
    // which its source has said: the receiver ends
    drop(destination.finish());
    Some(report.recoveries)
}

#[test]
fn a_guest_that_ends_while_pages_are_missing_frees_its_source() {
    assert_eq!(ends_while_served(None), Some(0));
}

#[test]
fn a_source_whose_link_was_lost_hears_it_when_it_is_back() {
    let (mut kept, mut lost) = (0, 0);
    for cut in 0.. {
        match ends_while_served(Some(cut)) {
            None => kept += 1,
            Some(0) => break,
            Some(_) => lost += 1,
        }
    }
    // the word that the VM runs, and the one that it has ended
    assert!(kept > 100 && lost > 40, "{kept} {lost}");
}

#[test]
fn the_end_of_a_guest_that_has_all_its_pages_is_nobodys_concern() {
    let destination = paged();
    // nothing is received, or runs here, yet
    destination.handle.vm_ended(WHY);
    let (controller, commands) = Controller::new();
    let vm = Ending::new(When::Never, &controller);
    let (report, _) = run(Link::new(&destination, None), vm, pre_copy(), commands);
    assert_eq!(report.outcome, Outcome::Completed, "{:?}", report.reason);
    destination.handle.vm_ended(WHY);
    controller.vm_ended(WHY);
    drop(destination.finish());
}
