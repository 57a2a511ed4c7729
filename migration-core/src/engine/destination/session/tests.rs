//! Tests which lanes wait for which link, and what the loss of a link ends.

use std::{io, sync::mpsc, thread};

use super::*;
use crate::{
    HeapRam, PageRange, RamLayout, RamRegion, RamSlice,
    engine::destination::missing::tests::{arrive, missing},
    state::VmState,
    vm::{DestinationVm, VmError},
    wire::Header,
};

/// A time-out that is never reached in a test.
const NEVER: Duration = Duration::from_secs(3600);

struct NoVm(Arc<HeapRam>);

impl DestinationVm for NoVm {
    fn ram(&self) -> Arc<dyn GuestRam> {
        self.0.clone()
    }

    fn load_state(&mut self, _state: &VmState) -> Result<(), VmError> {
        unreachable!("nothing is offered")
    }

    fn start(&mut self, _running: bool) -> Result<(), VmError> {
        unreachable!("nothing is offered")
    }
}

impl AnyVm for NoVm {
    fn vm(&mut self) -> &mut dyn DestinationVm {
        self
    }

    fn arrived(self: Box<Self>, _id: VmId, _epoch: u32, _not_started: Option<VmError>) {}
}

/// The data that was sent on a control lane.
#[derive(Clone, Default)]
struct Sent(Arc<Mutex<Vec<u8>>>);

impl WriteHalf for Sent {
    fn write_all(&mut self, head: &[u8], _slices: &[RamSlice<'_>]) -> io::Result<()> {
        lock(&self.0).extend_from_slice(head);
        Ok(())
    }

    fn set_idle_timeout(&mut self, _timeout: Option<Duration>) -> io::Result<()> {
        Ok(())
    }
}

impl Sent {
    fn control(&self) -> ControlWriter {
        ControlWriter::new(Box::new(self.clone()), "the source".into(), Arc::default())
    }

    fn frames(&self) -> Vec<Control> {
        let (bytes, mut at, mut frames) = (lock(&self.0).clone(), 0, Vec::new());
        while let Some(header) = bytes[at..].first_chunk() {
            let header = Header::decode(header).unwrap();
            let end = at + Header::LEN + header.body as usize;
            frames.push(Control::decode(&header, &bytes[at + Header::LEN..end]).unwrap());
            at = end;
        }
        frames
    }
}

/// Records whether a lane was closed.
#[derive(Default)]
struct End(AtomicBool);

impl Closer for End {
    fn close(&self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl End {
    fn is_closed(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// Returns a session with one lane, the frames that it sends, and the closer of its control lane.
fn session() -> (Arc<Session>, Sent, Arc<End>) {
    let layout = RamLayout::new(vec![RamRegion { gpa: 0, len: 16 << 12 }]).unwrap();
    let map = Arc::new(SharedPageMap::new(PageMap::new(layout.pages())));
    let agreed = Agreed {
        token: SessionToken([7; 16]),
        id: VmId([1; 16]),
        peer: "the source".into(),
        epoch: 1,
        lanes: 1,
        payload_crc: false,
        shared: false,
        grace: NEVER,
    };
    let vm = Box::new(NoVm(Arc::new(HeapRam::new(layout).unwrap())));
    let built = Built { vm, pager: None, protection: None, map, gatherer: None };
    let (sent, end) = (Sent::default(), Arc::new(End::default()));
    (Arc::new(Session::new(agreed, built, sent.control(), end.clone())), sent, end)
}

/// Makes pages 0 to 15 of the session missing.
fn lacks(session: &Session) -> Arc<Missing> {
    let missing = Arc::new(missing(1, &[(0, 16)]).0);
    session.set_missing(&missing).unwrap();
    missing
}

fn lost(session: &Session, link: u32) -> bool {
    session.lane_lost(link, ErrorCode::Other, "a lane has ended")
}

fn replaced(session: &Session) -> Sent {
    let sent = Sent::default();
    session.replace_control(sent.control(), Arc::new(End::default()));
    sent
}

#[test]
fn whoever_waits_for_the_vm_to_run_waits_for_its_own_link() {
    let (session, ..) = session();
    let missing = lacks(&session);
    let is_it = |found: Option<Arc<Missing>>| found.is_some_and(|found| Arc::ptr_eq(&found, &missing));
    thread::scope(|scope| {
        let waiting = scope.spawn(|| session.wait_running(0));
        // most likely the other thread has begun to wait after this
        (0..1000).for_each(|_| thread::yield_now());
        session.set_running();
        assert!(is_it(waiting.join().unwrap()));
    });
    assert!(is_it(session.wait_running(0)));
    replaced(&session);
    assert!(session.wait_running(0).is_none() && is_it(session.wait_running(1)));
}

#[test]
fn nobody_waits_for_a_link_that_is_lost_or_replaced_or_for_a_session_that_is_over() {
    let lacking = || {
        let session = session().0;
        lacks(&session);
        session
    };
    let (lost_link, replaced_link, over) = (lacking(), lacking(), lacking());
    lost(&lost_link, 0);
    assert!(lost_link.wait_running(0).is_none());
    replaced(&replaced_link);
    assert!(replaced_link.wait_running(0).is_none());
    over.close("the test");
    assert!(over.wait_running(0).is_none());
    // a lane of the previous link is irrelevant for the present link
    lost(&replaced_link, 0);
    replaced_link.set_running();
    assert!(replaced_link.wait_running(1).is_some());
}

#[test]
fn a_link_stays_lost_until_another_one_comes_or_the_session_is_over() {
    let (session, ..) = session();
    assert!(session.stays_lost(0, Duration::ZERO));
    let other = replaced(&session);
    assert!(other.frames().is_empty());
    assert!(!session.stays_lost(0, NEVER) && session.stays_lost(1, Duration::ZERO));
    session.close("the test");
    assert!(!session.stays_lost(1, NEVER));
}

#[test]
fn a_link_ends_with_its_first_lost_lane_once_pages_may_be_under_way() {
    for (sealed, lacking, complete, guest_ended, cuts) in [
        (true, true, false, false, true),
        (false, true, false, false, false),
        (true, false, false, false, false),
        (true, true, true, false, false),
        (true, true, false, true, false),
    ] {
        let what = format!("{sealed} {lacking} {complete} {guest_ended}");
        let (session, sent, control) = session();
        let lane = Arc::new(End::default());
        session.attach(0, lane.clone()).unwrap();
        if sealed {
            session.seal(0).unwrap();
        }
        if lacking {
            let missing = lacks(&session);
            if complete {
                arrive(&missing, PageRange::new(0, 16), Default::default());
            }
        }
        if guest_ended {
            session.report_ended(Control::error(ErrorCode::VmEnded, "it has powered off")).unwrap();
        }
        assert!(!lost(&session, 1), "{what}: it is of no link");
        assert_eq!(lost(&session, 0), cuts, "{what}");
        assert_eq!((lane.is_closed(), control.is_closed()), (cuts, cuts), "{what}");
        assert!(!lost(&session, 0), "{what}: the second one follows from the first");
        let expected = cuts.then(|| Control::error(ErrorCode::Other, "a lane has ended"));
        assert_eq!(sent.frames(), expected.into_iter().collect::<Vec<_>>(), "{what}");
    }
    let (session, ..) = session();
    lacks(&session);
    session.seal(0).unwrap();
    session.close("the test");
    assert!(!lost(&session, 0), "it is over");
}

#[test]
fn lanes_belong_to_the_link_on_which_they_came() {
    let (session, ..) = session();
    let (first, second) = (Arc::new(End::default()), Arc::new(End::default()));
    assert_eq!(session.attach(0, first.clone()).unwrap(), 0);
    assert!(session.attach(0, second.clone()).is_err() && session.attach(1, second.clone()).is_err());
    replaced(&session);
    assert!(first.is_closed());
    assert_eq!(session.attach(0, second.clone()).unwrap(), 1);
    session.close("the test");
    assert!(second.is_closed() && session.attach(0, first).is_err());
    assert_eq!(session.over().as_deref(), Some("the test"));
}

#[test]
fn a_source_hears_that_the_destination_lives_while_its_vm_is_loaded() {
    let (session, sent, _) = session();
    let (tx, heard) = mpsc::channel();
    let loading = session.loads();
    let watched = (session.clone(), sent.clone());
    let waits = thread::spawn(move || {
        let (_session, sent) = watched;
        while sent.frames().is_empty() {
            thread::yield_now();
        }
        tx.send(sent.frames()).unwrap();
    });
    let alive = session.clone();
    let thread = thread::spawn(move || alive.keep_alive());
    let frames = heard.recv_timeout(Duration::from_secs(20)).expect("it says nothing");
    assert!(frames.iter().all(|frame| *frame == Control::Pong), "{frames:?}");
    drop(loading);
    session.set_running();
    waits.join().unwrap();
    thread.join().unwrap();
}

#[test]
fn a_session_that_has_ended_gives_its_first_reason() {
    let (session, sent, _) = session();
    session.fail(ErrorCode::State, "the first reason");
    session.fail(ErrorCode::State, "the second reason");
    assert_eq!(sent.frames(), [Control::error(ErrorCode::State, "the first reason")]);
    let refused = session.wait_prepared(NEVER).unwrap_err();
    assert!(crate::text::describe(&refused).contains("the first reason"), "{refused:?}");
    assert!(session.discard("the third reason") && !session.discard("the third reason"));
}

#[test]
fn whoever_waits_in_vain_hears_for_what() {
    let (session, ..) = session();
    let in_vain = |waited: Result<(), MigrationError>| match waited {
        Err(MigrationError::Link { cause, .. }) => cause.kind() == io::ErrorKind::TimedOut,
        _ => false,
    };
    assert!(session.wait_demand(0, Duration::ZERO).is_ok());
    assert!(in_vain(session.wait_demand(1, Duration::ZERO)));
    assert!(in_vain(session.wait_attached(Duration::ZERO)) && in_vain(session.wait_prepared(Duration::ZERO)));
    // no byte has arrived meanwhile
    assert!(in_vain(session.wait_round(1, Duration::ZERO, &AtomicU64::new(5))));
    session.lane_ended(0, 1).unwrap();
    assert!(session.wait_round(1, Duration::ZERO, &AtomicU64::new(5)).is_ok());
    session.attach(0, Arc::new(End::default())).unwrap();
    assert!(session.wait_attached(Duration::ZERO).is_ok());
}

#[test]
fn a_source_that_comes_back_waits_until_the_vm_was_started() {
    let (session, ..) = session();
    let started = AtomicBool::new(false);
    thread::scope(|scope| {
        let waiting = scope.spawn(|| {
            session.wait_started();
            started.load(Ordering::Relaxed)
        });
        // most likely the other thread has begun to wait after this
        (0..1000).for_each(|_| thread::yield_now());
        started.store(true, Ordering::Relaxed);
        session.set_running();
        assert!(waiting.join().unwrap(), "the VM was not started yet");
    });
}

#[test]
fn links_are_counted() {
    let (session, ..) = session();
    assert_eq!(session.link(), 0);
    replaced(&session);
    replaced(&session);
    assert_eq!(session.link(), 2);
}

#[test]
fn a_source_hears_once_on_each_link_what_became_of_its_vm_and_in_order() {
    let ended = || Control::error(ErrorCode::VmEnded, "it has powered off");
    // the guest ends while its missing pages are being sent
    let (first, sent, _) = session();
    let missing = lacks(&first);
    let complete = || Control::Complete(missing.summary());
    first.report_running().unwrap();
    assert!(!first.has_guest_ended());
    first.report_ended(ended()).unwrap();
    first.report_complete(&missing).unwrap();
    assert!(first.has_guest_ended());
    assert_eq!(sent.frames(), [Control::Running, ended()]);
    // the same report is sent on the next link
    let sent = replaced(&first);
    first.report_complete(&missing).unwrap();
    first.report_running().unwrap();
    first.report_complete(&missing).unwrap();
    assert_eq!(sent.frames(), [Control::Running, ended()]);
    // nothing is sent before *running*, and nothing after *complete*
    let (second, sent, _) = session();
    lacks(&second);
    second.report_complete(&missing).unwrap();
    second.report_running().unwrap();
    second.report_complete(&missing).unwrap();
    second.report_complete(&missing).unwrap();
    second.report_ended(ended()).unwrap();
    assert_eq!(sent.frames(), [Control::Running, complete()]);
    let (third, sent, _) = session();
    lacks(&third);
    third.report_ended(ended()).unwrap();
    assert_eq!(sent.frames(), []);
    third.report_running().unwrap();
    assert_eq!(sent.frames(), [Control::Running, ended()]);
}
