//! Fail-safe post-copy whose source dies: when its destination takes its place, and when it must
//! not.

use std::{
    io,
    sync::{Arc, Mutex, atomic::Ordering, mpsc},
    thread,
    time::{Duration, Instant},
};

use bytes::Bytes;
use migration_core::{
    GuestRam, PAGE_SIZE, PageRange,
    checkpoint::ForwardStores,
    engine::ReceiverOptions,
    protocol::DestinationPhase,
    state::VmState,
    store::{MemoryVersions, VersionStore},
    vm::VmId,
    wire::{
        Bulk, Checkpoint, Control, FEATURE_CHECKPOINTS, FEATURE_PAYLOAD_CRC, FEATURE_POST_COPY, Hello, LaneKind,
        Preamble, SessionToken,
    },
};

use crate::{
    HANG, VM,
    channels::End,
    destination::{Destination, said},
    guest::{Host, state},
    pager::Paging,
    post_copy::{DURING, GENERATION, check_by_hand, come_back, guest, paged_description, pages},
    protected::{Arbiter, DESTINATION, NEVER, ProtectedHost, SOURCE, Seen, later_state},
    refusals::missing,
    serving::take,
};

/// The epoch under which the VM is handed over, and that of one which is taken over before.
const HANDED_OVER: u32 = 1;
const TAKEN_OVER: u32 = 2;

/// What was called, for which VM, and for which epoch.
type Calls = Vec<(&'static str, VmId, u32)>;

/// What a store has of the VM that a source by hand hands over.
#[derive(Clone)]
struct Forward {
    /// The state of the checkpoint, if it was committed.
    state: Option<VmState>,
    readable: bool,
    calls: Arc<Mutex<Calls>>,
}

impl Forward {
    fn new(state: Option<VmState>) -> Self {
        Self { state, readable: true, calls: Arc::default() }
    }
}

impl ForwardStores for Forward {
    fn open(&self, vm: VmId, epoch: u32, pages: u64) -> io::Result<Box<dyn VersionStore>> {
        assert_eq!(pages, paged_description().layout.pages());
        self.calls.lock().unwrap().push(("open", vm, epoch));
        if !self.readable {
            return Err(io::Error::other("the disk is gone"));
        }
        let (mut store, mut vm) = (MemoryVersions::default(), guest());
        vm.write_more();
        let mut content = [0; PAGE_SIZE];
        for (page, byte) in DURING {
            vm.ram.slice(PageRange::new(page, 1)).unwrap().copy_to(&mut content);
            // pages of zeros are in the store as such, or not at all
            match (byte, page) {
                (0, 1) => {}
                (0, _) => store.put(page, None)?,
                _ => store.put(page, Some(&content))?,
            }
        }
        if let Some(state) = &self.state {
            store.commit(1, Bytes::from(state.encode()))?;
        }
        Ok(Box::new(store))
    }

    fn done(&self, vm: VmId, epoch: u32) {
        self.calls.lock().unwrap().push(("done", vm, epoch));
    }
}

/// A source by hand that has offered a VM in fail-safe post-copy, with all of its pages left behind.
struct Source {
    destination: Destination,
    seen: Arc<Seen>,
    fence: Arc<Arbiter>,
    token: SessionToken,
    control: End,
    bulk: End,
    demand: End,
    checkpoints: End,
    sent: u32,
}

impl Source {
    fn offered(detect: Duration, fence: Arc<Arbiter>, forward: Option<Forward>) -> Self {
        Self::with_interval(detect, fence, forward, 0)
    }

    fn with_interval(detect: Duration, fence: Arc<Arbiter>, forward: Option<Forward>, interval_us: u64) -> Self {
        let (seen, description) = (Arc::<Seen>::default(), paged_description());
        let options = ReceiverOptions {
            fence: fence.clone(),
            forward: forward.map(|forward| Arc::new(forward) as Arc<dyn ForwardStores>),
            idle_timeout: HANG,
            ..ReceiverOptions::default()
        };
        let destination = Destination::with(options, |to| {
            let paging = Some(Paging { block_pages: 1, faults: Vec::new(), touched: Vec::new() });
            let host = Host { description: description.clone(), to, paging };
            ProtectedHost { host, seen: seen.clone(), stops: false }
        });
        let features = FEATURE_POST_COPY | FEATURE_PAYLOAD_CRC | FEATURE_CHECKPOINTS;
        let hello =
            Control::Hello(Box::new(Hello { features, streams: 1, strategy: "by hand".into(), vm: description }));
        let preamble = Preamble::new(LaneKind::Control, 0, SessionToken::default()).encode();
        let control = destination.connect(&[&preamble[..], &hello.encode(0, 0, 1)].concat());
        let Some(Control::Welcome(welcome)) = said(&control) else { panic!("not welcome") };
        assert_eq!(welcome.features, features);
        let lane = |kind| destination.connect(&Preamble::new(kind, 0, welcome.session).encode());
        let (bulk, demand, checkpoints) = (lane(LaneKind::Bulk), lane(LaneKind::Demand), lane(LaneKind::Checkpoint));
        let every = Checkpoint::Every { interval_us, detect_us: detect.as_micros() as u64, identity: SOURCE };
        checkpoints.outgoing.write(&every.encode(0, 0)).unwrap();
        let identity = Checkpoint::Identity(DESTINATION).encode(0, 0);
        assert_eq!(take(&checkpoints, identity.len()), identity);
        let token = welcome.session;
        let mut source = Self { destination, seen, fence, token, control, bulk, demand, checkpoints, sent: 1 };
        source.hear("prepared");
        source.bulk.outgoing.write(&Bulk::RoundEnd { pages: 0 }.encode(0, 0, 1)).unwrap();
        source.hear("round received");
        source.send(&missing(DURING.map(|(page, _)| page)));
        source.send(&Control::PostCopy { missing: DURING.len() as u64, demand_lanes: 1 });
        let state = state().encode();
        let offer = Control::Offer { generation: 1, state_bytes: state.len() as u64, running: true };
        source.send(&Control::State(state.into()));
        source.send(&offer);
        source.hear("ready");
        source
    }

    fn handed_over(detect: Duration, fence: Arc<Arbiter>, forward: Option<Forward>) -> Self {
        let mut source = Self::offered(detect, fence, forward);
        source.send(&Control::Run);
        source.hear("running");
        source
    }

    fn send(&mut self, frame: &Control) {
        self.control.outgoing.write(&frame.encode(0, self.sent, 1)).unwrap();
        self.sent += 1;
    }

    /// Reads up to this frame.
    fn hear(&self, name: &str) {
        while said(&self.control).unwrap_or_else(|| panic!("the lane ends before {name}")).name() != name {}
    }

    /// Sends all pages that were left behind.
    fn send_pages(&self) {
        let all = DURING.map(|(page, _)| page);
        self.bulk.outgoing.write(&pages(&all, 1, GENERATION)).unwrap();
        self.hear("complete");
    }

    /// Its host loses its power.
    fn dies(&self) {
        self.control.outgoing.update(|state| state.ended = true);
    }

    /// Waits for a warning with these words.
    fn await_warning(&self, words: &str) {
        let mut heard = Vec::new();
        while !heard.iter().any(|line: &String| line.contains(words)) {
            let next = self.destination.log.recv_timeout(HANG);
            heard.push(next.unwrap_or_else(|_| panic!("not {words:?}, but {heard:?}")));
        }
    }

    /// The VM runs at its destination, whole, and nobody holds anything for its source any more.
    fn taken_over(self, epoch: u32) -> String {
        let handle = self.destination.handle.clone();
        let (arrived, told) = self.destination.finish();
        check_by_hand(&arrived);
        assert!(arrived.running, "{told}");
        assert_eq!((handle.phase(), handle.epoch()), (DestinationPhase::Running, epoch), "{told}");
        assert_eq!(*self.seen.released.lock().unwrap(), [None], "{told}");
        assert!(self.seen.found.load(Ordering::SeqCst) > 0, "{told}");
        assert_eq!(self.fence.fenced(), [SOURCE], "{told}");
        told
    }

    /// All that the receiver has told its observer, once it was stopped.
    fn told(self) -> Vec<String> {
        let Self { mut destination, .. } = self;
        let thread = destination.thread.take().unwrap();
        destination.handle.stop();
        let _ = destination.door.send(None);
        thread.join().unwrap().expect_err("stopped");
        destination.log.try_iter().collect()
    }
}

#[test]
fn a_vm_lives_on_as_soon_as_its_source_is_known_to_be_dead() {
    for runs in [false, true] {
        let (fence, forward) = (Arbiter::new(true, &[]), Forward::new(Some(state())));
        let calls = forward.calls.clone();
        let start = if runs { Source::handed_over } else { Source::offered };
        let source = start(NEVER, fence, Some(forward));
        source.dies();
        source.taken_over(if runs { HANDED_OVER } else { TAKEN_OVER });
        assert_eq!(*calls.lock().unwrap(), [("open", VM, 1), ("done", VM, 1)], "runs: {runs}");
    }
}

#[test]
fn a_source_whose_link_was_lost_a_moment_ago_is_not_ended() {
    let source = Source::offered(NEVER, Arbiter::new(false, &[]), Some(Forward::new(Some(state()))));
    source.dies();
    let deadline = Instant::now() + HANG;
    while source.fence.looks.load(Ordering::SeqCst) < 5 {
        assert!(Instant::now() < deadline, "nobody asks whether the source is dead");
        thread::yield_now();
    }
    assert_eq!(source.fence.fenced(), [] as [Bytes; 0]);
    assert!(source.destination.arrived.try_recv().is_err(), "it runs at both ends");
    // until somebody knows
    source.fence.dead.store(true, Ordering::SeqCst);
    source.taken_over(TAKEN_OVER);
}

#[test]
fn a_source_that_stays_away_is_ended_although_nobody_knows_of_its_death() {
    let source = Source::handed_over(Duration::ZERO, Arbiter::new(false, &[]), Some(Forward::new(Some(state()))));
    source.dies();
    source.taken_over(HANDED_OVER);
}

#[test]
fn a_fence_that_fails_is_asked_again_and_each_reason_is_told_once() {
    let fence = Arbiter::new(true, &["no answer", "no answer", "no", "no"]);
    let source = Source::handed_over(NEVER, fence, Some(Forward::new(Some(state()))));
    source.dies();
    let told = source.taken_over(HANDED_OVER);
    let warned = |why: &str| told.lines().filter(|line| line.ends_with(&format!("is not fenced: {why}"))).count();
    assert_eq!((warned("no answer"), warned("no")), (1, 1), "{told}");
}

#[test]
fn without_its_forward_checkpoint_a_vm_depends_on_its_source() {
    let unreadable = Forward { readable: false, ..Forward::new(Some(state())) };
    for (why, forward) in [
        ("it has pages that are nowhere else", None),
        ("its forward checkpoint: the disk is gone", Some(unreadable)),
        ("its forward checkpoint is not complete", Some(Forward::new(None))),
        ("its forward checkpoint is of another moment", Some(Forward::new(Some(later_state())))),
    ] {
        let source = Source::handed_over(NEVER, Arbiter::new(true, &[]), forward);
        source.dies();
        source.await_warning(why);
        assert_eq!(source.fence.fenced(), [] as [Bytes; 0], "{why}");
        // it was only the link
        come_back(&source.destination, source.token, 1);
        let handle = source.destination.handle.clone();
        check_by_hand(&source.destination.finish().0);
        assert_eq!(handle.epoch(), HANDED_OVER, "{why}");
    }
}

#[test]
fn a_vm_that_has_all_its_pages_needs_no_checkpoint() {
    let source = Source::handed_over(Duration::ZERO, Arbiter::new(false, &[]), None);
    source.send_pages();
    // before it has said *done*
    source.dies();
    source.taken_over(HANDED_OVER);
}

#[test]
fn a_receiver_that_was_stopped_ends_no_source() {
    let source = Source::offered(NEVER, Arbiter::new(false, &[]), Some(Forward::new(Some(state()))));
    let (handle, fence) = (source.destination.handle.clone(), source.fence.clone());
    let (tx, looked) = mpsc::channel();
    *fence.at_look.lock().unwrap() = Some(Box::new(move || {
        handle.stop();
        let _ = tx.send(());
    }));
    source.dies();
    looked.recv_timeout(HANG).expect("nobody asks whether the source is dead");
    // it ends when it next looks for connections: until then others could ask again
    let Source { mut destination, .. } = source;
    destination.thread.take().unwrap().join().unwrap().expect_err("stopped");
    assert_eq!((fence.looks.load(Ordering::SeqCst), fence.fenced()), (1, Vec::new()));
}

/// What was told of the end of a link, when all is over.
fn told_of_the_end(source: Source) -> Vec<String> {
    drop(source.control.incoming.wait("the end of the control lane", |state| state.ended));
    source.told()
}

#[test]
fn of_the_lanes_of_a_link_the_first_one_that_ends_is_told_and_the_control_lane() {
    let handed_over = || Source::handed_over(NEVER, Arbiter::new(false, &[]), None);
    let source = handed_over();
    source.checkpoints.outgoing.update(|state| state.ended = true);
    let told = told_of_the_end(source);
    assert_eq!(told.len(), 2, "{told:?}");
    let source = handed_over();
    source.bulk.outgoing.update(|state| state.ended = true);
    let told = told_of_the_end(source);
    assert_eq!(told.len(), 2, "{told:?}");
    // a guest that does not stop for its checkpoint
    let mut source = Source::with_interval(NEVER, Arbiter::new(false, &[]), None, 1);
    source.send(&Control::Run);
    let told = told_of_the_end(source);
    assert!(told.len() == 2 && told.iter().any(|line| line.contains("a vCPU does not stop")), "{told:?}");
}

#[test]
fn once_all_pages_are_there_a_lane_ends_for_itself() {
    let source = Source::handed_over(NEVER, Arbiter::new(false, &[]), None);
    source.send_pages();
    source.checkpoints.outgoing.write(&Checkpoint::Committed.encode(1, 0)).unwrap();
    source.await_warning("on an idle checkpoint lane");
    assert!(!source.control.incoming.lock().ended && !source.demand.incoming.lock().ended);
}
