//! A source that keeps a destination busy and gets nowhere: what it can make the destination do,
//! and for how long it keeps others out, has bounds.

use std::{
    sync::{Arc, Mutex, mpsc},
    time::{Duration, Instant},
};

use bytes::Bytes;
use migration_core::{
    channel::{Channel, Listener, Room},
    engine::ReceiverOptions,
    spawner::{GuestImpact, Joiner, Role, Spawner, StdSpawner},
    vm::VmId,
    wire::{
        Bulk, Control, ErrorCode, FEATURE_POST_COPY, Hello, LaneKind, MAX_STREAMS, Preamble, SessionToken, Welcome,
    },
};

use crate::{
    HANG,
    channels::{Door, End, Pipe, pair},
    destination::{Destination, said},
    guest::{Host, description, layout},
    hostile::zeros,
};

pub(crate) fn hello_of(id: VmId, features: u32, streams: u16) -> Control {
    let vm = migration_core::vm::VmDescription { id, ..description() };
    Control::Hello(Box::new(Hello { features, streams, strategy: "by hand".into(), vm }))
}

pub(crate) fn greet(destination: &Destination, hello: &Control) -> End {
    let preamble = Preamble::new(LaneKind::Control, 0, SessionToken::default()).encode();
    destination.connect(&[&preamble[..], &hello.encode(0, 0, 1)].concat())
}

fn welcome(control: &End) -> Welcome {
    match said(control) {
        Some(Control::Welcome(welcome)) => welcome,
        other => panic!("{other:?} instead of welcome"),
    }
}

/// A session with one lane that stands ready for pages.
fn session(destination: &Destination) -> (End, End) {
    let control = greet(destination, &hello_of(description().id, FEATURE_POST_COPY, 1));
    let token = welcome(&control).session;
    let lane = destination.connect(&Preamble::new(LaneKind::Bulk, 0, token).encode());
    assert!(matches!(said(&control), Some(Control::Prepared { .. })));
    (control, lane)
}

/// What the session ends with.
pub(crate) fn end(control: &End) -> (ErrorCode, String) {
    loop {
        match said(control) {
            Some(Control::Error { code, text }) => return (code, text),
            Some(_) => {}
            None => panic!("the lane ends without a word"),
        }
    }
}

fn host(to: mpsc::Sender<crate::guest::Arrived>) -> Host {
    Host { description: description(), to, paging: None }
}

#[test]
fn a_round_that_never_ends_is_refused_when_it_has_more_pages_than_the_vm() {
    let destination = Destination::new();
    let (control, lane) = session(&destination);
    let pages = layout().pages();
    for sequence in 0..3 {
        // the lane is closed when it has had enough
        let _ = lane.outgoing.write(&zeros(0, pages / 2).encode(0, sequence, 1));
    }
    let (code, text) = end(&control);
    assert!(code == ErrorCode::Protocol && text.contains("pages of a round"), "{code:?}: {text}");
}

#[test]
fn each_page_once_in_a_round_is_not_too_much() {
    let destination = Destination::new();
    let (control, lane) = session(&destination);
    let pages = layout().pages();
    for round in 1..=3 {
        let first = (round - 1) * 2;
        lane.outgoing.write(&zeros(0, pages).encode(0, first, round)).unwrap();
        lane.outgoing.write(&Bulk::RoundEnd { pages }.encode(0, first + 1, round)).unwrap();
        assert_eq!(said(&control), Some(Control::RoundReceived { generation: round }));
    }
}

#[test]
fn pings_without_end_are_refused() {
    let destination = Destination::new();
    let (control, _lane) = session(&destination);
    // far more than a source sends in an hour
    let pings: Vec<u8> = (1..=100_000).flat_map(|sequence| Control::Ping.encode(0, sequence, 1)).collect();
    let _ = control.outgoing.write(&pings);
    let (code, text) = end(&control);
    assert!(code == ErrorCode::Protocol && text.contains("ping"), "{code:?}: {text}");
}

#[test]
fn a_list_of_missing_pages_without_end_is_refused() {
    let paged = || Destination::of(HANG, |to| Host { paging: Some(crate::post_copy::paging()), ..host(to) });
    let destination = paged();
    let (control, _lane) = session(&destination);
    let list = Control::Missing { first: 0, bitmap: Bytes::from_static(&[0; 8]) };
    let _ = control.outgoing.write(&[list.encode(0, 1, 1), list.encode(0, 2, 1)].concat());
    let (code, text) = end(&control);
    assert!(code == ErrorCode::Protocol && text.contains("parts of a list"), "{code:?}: {text}");
}

pub(crate) const OTHER: VmId = VmId(*b"another guest...");

/// The answer to another VM's source, while a session without progress is under way.
fn answer_to_another(grace: Duration) -> (End, ErrorCode) {
    let options = ReceiverOptions { progress_grace: grace, idle_timeout: HANG, ..ReceiverOptions::default() };
    let destination = Destination::with(options, host);
    let (control, _lane) = session(&destination);
    let deadline = Instant::now() + HANG;
    loop {
        let (code, text) = end(&greet(&destination, &hello_of(OTHER, 0, 1)));
        if code != ErrorCode::Busy || grace > HANG {
            return (control, code);
        }
        assert!(Instant::now() < deadline, "{text}");
    }
}

#[test]
fn a_session_without_progress_keeps_nobody_out() {
    let (held, code) = answer_to_another(Duration::from_millis(200));
    // this host builds one VM only: what matters is that it was asked to
    assert_eq!(code, ErrorCode::Mismatch);
    let (code, text) = end(&held);
    assert!(code == ErrorCode::Busy && text.contains("too little progress"), "{code:?}: {text}");
    // and one that has time left does
    let (_held, code) = answer_to_another(10 * HANG);
    assert_eq!(code, ErrorCode::Busy);
}

#[test]
fn a_session_without_progress_ends_also_when_nobody_else_asks() {
    let options = ReceiverOptions { progress_grace: Duration::ZERO, idle_timeout: HANG, ..ReceiverOptions::default() };
    let destination = Destination::with(options, host);
    let control = greet(&destination, &hello_of(description().id, 0, 1));
    let (code, text) = end(&control);
    assert!(code == ErrorCode::Busy && text.contains("too little progress"), "{code:?}: {text}");
}

/// Starts only so many threads at a time.
struct Few(Arc<Mutex<usize>>);

struct Returned(Box<dyn Joiner>);

impl Joiner for Returned {
    fn join(self: Box<Self>) {
        self.0.join();
    }
}

impl Spawner for Few {
    fn spawn(
        &self,
        role: Role,
        impact: GuestImpact,
        name: &str,
        body: Box<dyn FnOnce() + Send>,
    ) -> std::io::Result<Box<dyn Joiner>> {
        let left = self.0.clone();
        let mut count = left.lock().unwrap();
        *count = count.checked_sub(1).ok_or_else(|| std::io::Error::other("there are too many threads"))?;
        drop(count);
        let body = Box::new(move || {
            body();
            *left.lock().unwrap() += 1;
        });
        Ok(Box::new(Returned(StdSpawner.spawn(role, impact, name, body)?)))
    }
}

fn with_threads(count: usize) -> Destination {
    let spawner = Arc::new(Few(Arc::new(Mutex::new(count))));
    Destination::with(ReceiverOptions { spawner, idle_timeout: HANG, ..ReceiverOptions::default() }, host)
}

#[test]
fn where_threads_are_few_fewer_lanes_are_offered_and_they_can_be_had() {
    // one for the control lane, one that says that the destination lives
    let destination = with_threads(2 + 3);
    let control = greet(&destination, &hello_of(description().id, 0, MAX_STREAMS));
    let welcome = welcome(&control);
    assert_eq!(welcome.streams, 3);
    let _lanes: Vec<_> = (0..welcome.streams)
        .map(|index| destination.connect(&Preamble::new(LaneKind::Bulk, index, welcome.session).encode()))
        .collect();
    assert!(matches!(said(&control), Some(Control::Prepared { .. })));
}

#[test]
fn a_source_for_which_there_is_no_thread_is_told_so() {
    for threads in [0, 1, 2] {
        let destination = with_threads(threads);
        let control = greet(&destination, &hello_of(description().id, 0, 4));
        let (code, text) = end(&control);
        assert!(code == ErrorCode::Resources && text.contains("thread"), "{threads}: {code:?}: {text}");
    }
}

/// Opens bulk lanes, as many as were offered, and waits until all of them are there.
fn open_lanes(destination: &Destination, control: &End, welcome: &Welcome) -> Vec<End> {
    let lanes = (0..welcome.streams)
        .map(|index| destination.connect(&Preamble::new(LaneKind::Bulk, index, welcome.session).encode()))
        .collect();
    match said(control) {
        Some(Control::Prepared { .. }) => lanes,
        other => panic!("{other:?} instead of prepared"),
    }
}

/// Connections that say nothing.
fn strangers(destination: &Destination, count: usize) -> Vec<End> {
    (0..count).map(|_| destination.connect(&[])).collect()
}

#[test]
fn strangers_give_way_to_a_source_where_threads_are_few() {
    // as many as there are threads, and as many as wait for one
    for count in [5, 12] {
        let destination = with_threads(2 + 3);
        let held = strangers(&destination, count);
        let control = greet(&destination, &hello_of(description().id, 0, 3));
        let welcome = welcome(&control);
        assert_eq!(welcome.streams, 3, "{count} strangers");
        open_lanes(&destination, &control, &welcome);
        drop(held);
    }
}

#[test]
fn strangers_do_not_keep_the_threads_that_are_reserved_for_lanes() {
    for count in [3, 12] {
        let destination = with_threads(2 + 3);
        let control = greet(&destination, &hello_of(description().id, 0, 3));
        let welcome = welcome(&control);
        assert_eq!(welcome.streams, 3);
        let held = strangers(&destination, count);
        open_lanes(&destination, &control, &welcome);
        drop(held);
    }
}

/// Has descriptors for so many connections, and for one more for each of these that was closed.
struct Cramped(usize, Vec<Arc<Pipe>>);

impl Room for Cramped {
    fn channels(&self, wanted: usize) -> usize {
        let given_up = self.1.iter().filter(|pipe| pipe.lock().ended).count();
        wanted.min(self.0 + given_up)
    }
}

#[test]
fn strangers_give_way_to_a_source_where_descriptors_are_few() {
    let (door, ends) = mpsc::channel();
    let pairs: Vec<_> = (0..3).map(|_| pair()).collect();
    let (held, far): (Vec<_>, Vec<_>) = pairs.into_iter().unzip();
    far.into_iter().for_each(|end| door.send(Some(end)).unwrap());
    let room = Cramped(1, held.iter().map(|end| end.incoming.clone()).collect());
    let destination = Destination::behind(CrampedDoor(Door(ends), Arc::new(room)), door, host);
    let control = greet(&destination, &hello_of(description().id, 0, 4));
    assert_eq!(welcome(&control).streams, 4);
}

#[test]
fn where_there_is_room_no_stranger_gives_way() {
    let (door, ends) = mpsc::channel();
    let (held, far) = pair();
    door.send(Some(far)).unwrap();
    let room = Cramped(4, vec![held.incoming.clone()]);
    let destination = Destination::behind(CrampedDoor(Door(ends), Arc::new(room)), door, host);
    let control = greet(&destination, &hello_of(description().id, 0, 4));
    assert_eq!(welcome(&control).streams, 4);
    assert!(!held.incoming.lock().ended);
}

struct CrampedDoor(Door, Arc<Cramped>);

impl Listener for CrampedDoor {
    fn accept(&mut self, timeout: Duration) -> std::io::Result<Option<Box<dyn Channel>>> {
        self.0.accept(timeout)
    }

    fn address(&self) -> String {
        self.0.address()
    }

    fn room(&self) -> Option<Arc<dyn Room>> {
        Some(self.1.clone())
    }
}

/// A source that gives up while its lanes are awaited, by this word or by the end of its link.
fn gives_up(word: Option<Control>) {
    // nothing is waited for as long as that
    let options = ReceiverOptions { idle_timeout: 10 * HANG, ..ReceiverOptions::default() };
    let destination = Destination::with(options, host);
    let control = greet(&destination, &hello_of(description().id, 0, 2));
    let token = welcome(&control).session;
    let lane = destination.connect(&Preamble::new(LaneKind::Bulk, 0, token).encode());
    match &word {
        Some(word) => control.outgoing.write(&word.encode(0, 1, 1)).unwrap(),
        None => control.outgoing.update(|state| state.ended = true),
    }
    drop(lane.incoming.wait("the lanes are closed", |state| state.closed || state.ended));
    // and the next one is welcome
    let next = Preamble::new(LaneKind::Control, 0, SessionToken::default()).encode();
    let next = destination.connect(&[&next[..], &hello_of(description().id, 0, 2).encode(0, 0, 2)].concat());
    welcome(&next);
}

#[test]
fn a_source_that_gives_up_while_its_lanes_are_awaited_is_heard_at_once() {
    gives_up(Some(Control::Abandon));
    gives_up(Some(Control::error(ErrorCode::VmEnded, "the VM has ended")));
    gives_up(None);
}

#[test]
fn a_vm_may_have_as_much_ram_as_the_destination_takes() {
    let with = |max_ram_bytes| {
        let options = ReceiverOptions { max_ram_bytes, idle_timeout: HANG, ..ReceiverOptions::default() };
        Destination::with(options, host)
    };
    drop(session(&with(layout().bytes())));
    for less in [1, 4096] {
        let destination = with(layout().bytes() - less);
        let (code, text) = end(&greet(&destination, &hello_of(description().id, 0, 1)));
        assert!(code == ErrorCode::Mismatch && text.contains("bytes of RAM"), "{code:?}: {text}");
    }
}
