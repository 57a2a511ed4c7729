//! What the source asks of its destination and of its VMM, in which order, and what it reports.

use std::{
    io,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU32, Ordering},
        mpsc,
    },
    thread,
};

use migration_core::{
    GuestRam, MigrationError, PageRange, PageSet,
    channel::{Channel, Connector},
    engine::{Controller, NoSwitchOver, SnapshotOptions, SourceOptions, migrate, snapshot},
    protocol::SourcePhase,
    report::{Event, Observer, Outcome, Report},
    state::{MAX_SECTION, VmState},
    store::MemoryVersions,
    strategy::{Done, Linear, Place, PostCopy, PreCopy, PushOrder, Running, StopAndCopy, Strategy},
    text::describe,
    tracker::DirtyTracker,
    vm::{SectionEstimate, SourceVm, StateEstimate, VmDescription, VmError},
    wire::{
        Bulk, Control, FEATURE_HUGE_BLOCKS, FEATURE_PAYLOAD_CRC, FEATURE_POST_COPY, LaneKind, SessionToken, VERSION,
        Welcome,
    },
};

use crate::{
    HANG,
    destination::{Destination, said},
    guest::{Host, RecordedVm, checksums},
    live::Link,
    pager::Paging,
    post_copy::{guest, paged_description},
    rounds::Rounds,
    serving::{Ends, lane},
};

fn destination(paged: bool) -> Destination {
    let paging = paged.then(|| Paging { block_pages: 1, faults: Vec::new(), touched: Vec::new() });
    Destination::of(HANG, |to| Host { description: paged_description(), to, paging })
}

/// Moves the VM of a test, which arrives whole.
fn moved(strategy: &mut dyn Strategy, demand_lanes: u16, observer: Arc<dyn Observer>) -> Report {
    let (destination, mut vm) = (destination(demand_lanes > 0), guest());
    let options = SourceOptions { demand_lanes, observer, ..SourceOptions::default() };
    let report = migrate(&mut vm, &Link::new(&destination, None), strategy, &options, Controller::new().1);
    assert_eq!(report.outcome, Outcome::Completed, "{:?}", report.reason);
    let (arrived, told) = destination.finish();
    assert_eq!(arrived.pages(), checksums(&vm.ram), "{told}");
    report
}

/// Keeps phases and warnings.
#[derive(Default)]
struct Told {
    phases: Mutex<Vec<SourcePhase>>,
    warnings: Mutex<Vec<String>>,
}

impl Observer for Told {
    fn event(&self, event: &Event) {
        match event {
            Event::Source(phase) => self.phases.lock().unwrap().push(*phase),
            Event::Warning(why) => self.warnings.lock().unwrap().push(why.clone()),
            _ => {}
        }
    }
}

#[test]
fn an_observer_is_told_where_the_source_stands() {
    let told = Arc::new(Told::default());
    moved(&mut StopAndCopy, 0, told.clone());
    assert_eq!(*told.phases.lock().unwrap(), [SourcePhase::Copying, SourcePhase::Completed]);
}

#[test]
fn a_source_asks_for_what_its_options_allow() {
    let paged = FEATURE_POST_COPY | FEATURE_HUGE_BLOCKS;
    for (demand_lanes, payload_crc, features) in
        [(0, false, 0), (0, true, FEATURE_PAYLOAD_CRC), (1, false, paged), (1, true, paged | FEATURE_PAYLOAD_CRC)]
    {
        let (tx, lanes) = mpsc::channel();
        thread::spawn(move || {
            let link = Ends { to: Mutex::new(tx), refuses: Arc::default() };
            let options = SourceOptions { demand_lanes, payload_crc, ..SourceOptions::default() };
            migrate(&mut guest(), &link, &mut StopAndCopy, &options, Controller::new().1)
        });
        let control = lane(&lanes, LaneKind::Control);
        let Some(Control::Hello(hello)) = said(&control) else { panic!("no hello") };
        assert_eq!(hello.features, features, "{demand_lanes} {payload_crc}");
        control.outgoing.update(|state| state.ended = true);
    }
}

/// Does something when a lane of this kind is about to be opened, and counts the lanes.
struct AtLane<F> {
    link: Link,
    kind: LaneKind,
    act: F,
    opened: AtomicU32,
}

impl<F: Fn() + Send + Sync> Connector for AtLane<F> {
    fn connect(&self) -> io::Result<Box<dyn Channel>> {
        self.link.connect()
    }

    fn connect_as(&self, kind: LaneKind) -> io::Result<Box<dyn Channel>> {
        self.opened.fetch_add(1, Ordering::SeqCst);
        if kind == self.kind {
            (self.act)();
        }
        self.link.connect_as(kind)
    }

    fn address(&self) -> String {
        self.link.address()
    }
}

fn at_lane<F: Fn() + Send + Sync>(destination: &Destination, kind: LaneKind, act: F) -> AtLane<F> {
    AtLane { link: Link::new(destination, None), kind, act, opened: AtomicU32::new(0) }
}

#[test]
fn before_the_destination_answers_a_switch_over_is_refused_for_the_reason_that_holds() {
    let post_copy = || PostCopy { order: Box::new(Linear::default()) };
    let strategies: [(Box<dyn Strategy>, NoSwitchOver); 2] =
        [(Box::new(<PreCopy>::default()), NoSwitchOver::NotYet), (Box::new(post_copy()), NoSwitchOver::Strategy)];
    for (mut strategy, why) in strategies {
        let destination = destination(true);
        let (controller, commands) = Controller::new();
        let answers = Mutex::new(Vec::new());
        let ask = || answers.lock().unwrap().push(controller.switch_over());
        let link = at_lane(&destination, LaneKind::Control, ask);
        let options = SourceOptions { demand_lanes: 1, ..SourceOptions::default() };
        let report = migrate(&mut guest(), &link, &mut *strategy, &options, commands);
        assert_eq!(report.outcome, Outcome::Completed, "{:?}", report.reason);
        drop(destination.finish());
        assert_eq!(*answers.lock().unwrap(), [Err(why)]);
    }
}

#[test]
fn no_further_lane_is_opened_when_the_user_cancels_or_the_guest_ends() {
    for (kind, opened) in [(LaneKind::Bulk, 2), (LaneKind::Demand, 4)] {
        for ends in [false, true] {
            let destination = destination(true);
            let (controller, commands) = Controller::new();
            let act = || if ends { controller.vm_ended("it has powered off") } else { controller.cancel("enough") };
            let link = at_lane(&destination, kind, act);
            let options = SourceOptions { streams: 2, demand_lanes: 2, ..SourceOptions::default() };
            let report = migrate(&mut guest(), &link, &mut StopAndCopy, &options, commands);
            let outcome = if ends { Outcome::Failed } else { Outcome::Cancelled };
            assert_eq!((report.outcome, link.opened.load(Ordering::SeqCst)), (outcome, opened), "{kind:?}");
        }
    }
    let destination = destination(true);
    let (controller, commands) = Controller::new();
    controller.cancel("enough");
    let link = at_lane(&destination, LaneKind::Control, || {});
    let report = migrate(&mut guest(), &link, &mut StopAndCopy, &SourceOptions::default(), commands);
    assert_eq!((report.outcome, link.opened.load(Ordering::SeqCst)), (Outcome::Cancelled, 0));
}

/// Sends all of RAM once, and says when that is done.
struct Once(Arc<AtomicBool>);

impl Strategy for Once {
    fn name(&self) -> &'static str {
        "once"
    }

    fn migrate(&mut self, mut vm: Running<'_>) -> Result<Done, MigrationError> {
        let pages = vm.start_tracking()?;
        vm.send(&pages)?;
        self.0.store(true, Ordering::SeqCst);
        vm.cancel("that was all")
    }
}

/// What was sent may be lost with the link: until the destination says so, no page has arrived.
#[test]
fn a_round_ends_when_the_destination_has_received_it() {
    let (tx, lanes) = mpsc::channel();
    let sent = Arc::new(AtomicBool::new(false));
    let done = sent.clone();
    let source = thread::spawn(move || {
        let link = Ends { to: Mutex::new(tx), refuses: Arc::default() };
        let options = SourceOptions { streams: 1, demand_lanes: 0, ..SourceOptions::default() };
        migrate(&mut guest(), &link, &mut Once(done), &options, Controller::new().1)
    });
    let control = lane(&lanes, LaneKind::Control);
    let mut number = 0;
    let mut say = |frame: &Control| {
        control.outgoing.write(&frame.encode(0, number, 1)).unwrap();
        number += 1;
    };
    let hear = |name: &str| while said(&control).expect("the lane goes on").name() != name {};
    hear("hello");
    say(&Control::Welcome(Welcome { version: VERSION, features: 0, streams: 1, session: SessionToken([7; 16]) }));
    let bulk = lane(&lanes, LaneKind::Bulk);
    say(&Control::Prepared { load_us: None });
    hear("ping");
    say(&Control::Pong);
    // its last frame ends the round
    let end = Bulk::RoundEnd { pages: 6 }.encode(0, 0, 1).len();
    drop(bulk.incoming.wait("the round", |state| state.bytes.len() > 6 * 4096 + end));
    (0..1000).for_each(|_| thread::yield_now());
    assert!(!sent.load(Ordering::SeqCst), "the round has ended before it was received");
    say(&Control::RoundReceived { generation: 1 });
    hear("error");
    assert!(sent.load(Ordering::SeqCst));
    control.outgoing.update(|state| state.ended = true);
    assert_eq!(source.join().unwrap().outcome, Outcome::Failed);
}

/// Takes a VM that lacks pages for moved.
#[derive(Default)]
struct Finishes(Option<String>);

impl Strategy for Finishes {
    fn name(&self) -> &'static str {
        "finishes"
    }

    fn needs_post_copy(&self) -> bool {
        true
    }

    fn migrate(&mut self, mut vm: Running<'_>) -> Result<Done, MigrationError> {
        let all = vm.start_tracking()?;
        let done = vm.pause()?.hand_over(all)?.finish();
        self.0 = done.as_ref().err().map(ToString::to_string);
        Ok(done?)
    }
}

#[test]
fn a_strategy_cannot_forget_the_pages_that_it_has_left_behind() {
    let mut strategy = Finishes::default();
    let report = moved(&mut strategy, 1, Arc::new(Told::default()));
    let left = report.pages.pushed + report.pages.demanded;
    assert!(left > 0);
    assert_eq!(strategy.0, Some(format!("{left} pages are missing at the destination")));
}

/// Puts pages at the destination by a few, and starts to track twice.
#[derive(Default)]
struct ByFew(Vec<u64>);

impl Strategy for ByFew {
    fn name(&self) -> &'static str {
        "by few"
    }

    fn migrate(&mut self, mut vm: Running<'_>) -> Result<Done, MigrationError> {
        vm.start_tracking()?;
        let mut pages = vm.start_tracking()?;
        self.0.push(pages.len());
        while !pages.is_empty() {
            let put = vm.put(&mut pages, Place::Destination.at_most(4))?;
            assert!(put.failed.is_none() && put.round.sent <= 4);
            self.0.push(pages.len());
        }
        let rest = vm.harvest()?;
        let mut vm = vm.pause()?;
        vm.send_rest(rest)?;
        let nothing = vm.no_pages();
        Ok(vm.hand_over(nothing)?.finish()?)
    }
}

#[test]
fn pages_that_were_put_at_the_destination_are_not_put_again() {
    let mut strategy = ByFew::default();
    moved(&mut strategy, 1, Arc::new(Told::default()));
    assert_eq!(strategy.0, [6, 2, 0]);
}

/// A VM whose answers a test chooses.
struct Awkward {
    vm: RecordedVm,
    resumes: bool,
    /// How often it was asked what the guest has used.
    looks: u32,
    /// The size of its state, if it says so.
    estimate: Option<u64>,
    pauses: u32,
}

impl Awkward {
    fn new() -> Self {
        Self { vm: guest(), resumes: true, looks: 0, estimate: None, pauses: 0 }
    }
}

impl SourceVm for Awkward {
    fn describe(&mut self) -> Result<VmDescription, VmError> {
        self.vm.describe()
    }

    fn ram(&self) -> Arc<dyn GuestRam> {
        SourceVm::ram(&self.vm)
    }

    fn tracker(&mut self) -> &mut dyn DirtyTracker {
        self.vm.tracker()
    }

    fn referenced_pages(&mut self, _into: &mut PageSet) -> Result<(), VmError> {
        self.looks += 1;
        Ok(())
    }

    fn estimate_state(&mut self) -> Option<StateEstimate> {
        let gpu = |bytes| SectionEstimate { name: "gpu".into(), instance: 0, bytes };
        self.estimate.map(|bytes| StateEstimate { sections: vec![gpu(bytes)], save_time: None })
    }

    fn pause(&mut self) -> Result<(), VmError> {
        self.pauses += 1;
        self.vm.pause()
    }

    fn resume(&mut self) -> Result<(), VmError> {
        if self.resumes { Ok(()) } else { Err(VmError::new("no vCPU goes on")) }
    }

    fn throttle(&mut self, percent: u8) -> Result<(), VmError> {
        if percent == 0 { Err(VmError::new("it stays slow")) } else { Ok(()) }
    }

    fn save_state(&mut self) -> Result<VmState, VmError> {
        self.vm.save_state()
    }

    fn released(&mut self) {}
}

/// Throttles and pauses the guest, and gives up.
struct GivesUp;

impl Strategy for GivesUp {
    fn name(&self) -> &'static str {
        "gives up"
    }

    fn migrate(&mut self, mut vm: Running<'_>) -> Result<Done, MigrationError> {
        vm.throttle(50)?;
        let pages = vm.start_tracking()?;
        let mut vm = vm.pause()?;
        vm.send_rest(pages)?;
        Err(MigrationError::GaveUp("enough".into()))
    }
}

#[test]
fn a_user_is_told_what_could_not_be_given_back() {
    let (destination, told) = (destination(false), Arc::new(Told::default()));
    let options = SourceOptions { observer: told.clone(), ..SourceOptions::default() };
    let mut vm = Awkward { resumes: false, ..Awkward::new() };
    let report = migrate(&mut vm, &Link::new(&destination, None), &mut GivesUp, &options, Controller::new().1);
    assert_eq!((report.outcome, report.reason.as_deref()), (Outcome::Failed, Some("gave up: enough")));
    let warnings = told.warnings.lock().unwrap().clone();
    assert_eq!(warnings, ["resuming the guest: no vCPU goes on", "lifting the throttle: it stays slow"]);
}

#[test]
fn a_vmm_is_asked_once_what_its_guest_has_used_and_only_for_pages_that_follow() {
    for (demand_lanes, looks) in [(1, 1), (0, 0)] {
        let (destination, mut vm) = (destination(true), Awkward::new());
        let options = SourceOptions { demand_lanes, ..SourceOptions::default() };
        let link = Link::new(&destination, None);
        let report = migrate(&mut vm, &link, &mut ByFew::default(), &options, Controller::new().1);
        assert_eq!((report.outcome, vm.looks), (Outcome::Completed, looks), "{:?}", report.reason);
        drop(destination.finish());
    }
}

#[test]
fn a_state_that_nobody_could_take_is_refused_before_the_pause() {
    let most = MAX_SECTION as u64;
    for (bytes, fits) in [(most, true), (most + 1, false)] {
        let (destination, mut vm) = (destination(false), Awkward { estimate: Some(bytes), ..Awkward::new() });
        let link = Link::new(&destination, None);
        let options = SourceOptions { demand_lanes: 0, ..SourceOptions::default() };
        let report = migrate(&mut vm, &link, &mut Rounds(1), &options, Controller::new().1);
        let outcome = if fits { Outcome::Completed } else { Outcome::Failed };
        assert_eq!((report.outcome, vm.pauses), (outcome, u32::from(fits)), "{:?}", report.reason);
        assert!(fits || report.reason.is_some_and(|why| why.contains("the state of gpu 0")));
        if fits {
            drop(destination.finish());
        }
        let mut vm = Awkward { estimate: Some(bytes), ..Awkward::new() };
        let mut store = MemoryVersions::default();
        let taken = snapshot(&mut vm, &mut store, &SnapshotOptions::default(), Controller::new().1);
        let refused = taken.err().map(|error| describe(&error));
        assert_eq!((refused.is_none(), vm.pauses), (fits, u32::from(fits)), "{refused:?}");
    }
}

/// Says in vain that its guest has ended: that runs elsewhere.
struct Mistaken(Linear, Controller);

impl PushOrder for Mistaken {
    fn name(&self) -> &'static str {
        "mistaken"
    }

    fn begin(&mut self, unsent: &PageSet, heat: &[u8]) {
        self.1.vm_ended("the vCPUs have stopped");
        self.1.cancel("too late");
        self.0.begin(unsent, heat);
    }

    fn fault(&mut self, page: u64) {
        self.0.fault(page);
    }

    fn next(&mut self, unsent: &PageSet, most: u64) -> Option<PageRange> {
        self.0.next(unsent, most)
    }
}

#[test]
fn after_the_hand_over_the_end_of_the_guest_here_and_a_cancel_change_nothing() {
    let (destination, mut vm) = (destination(true), guest());
    let (controller, commands) = Controller::new();
    let mut strategy = PostCopy { order: Box::new(Mistaken(Linear::default(), controller)) };
    let options = SourceOptions { demand_lanes: 1, ..SourceOptions::default() };
    let report = migrate(&mut vm, &Link::new(&destination, None), &mut strategy, &options, commands);
    assert_eq!((report.outcome, report.recoveries), (Outcome::Completed, 0), "{:?}", report.reason);
    let (arrived, told) = destination.finish();
    assert_eq!(arrived.pages(), checksums(&vm.ram), "{told}");
}
